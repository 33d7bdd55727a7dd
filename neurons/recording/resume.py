"""An unfinished recording on disk: the sums so far and how far they go."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from neurons.errors import BrocaError
from neurons.files.artifact import load_artifact, save_artifact
from neurons.models.processes import world

EVERY = 30.0  # seconds
# Share of the time: what a recording keeps of every text takes long to write.
MOST_FOR_WRITING = 0.02


@dataclass
class Unfinished:
    """Keeps a recording's state beside its output, so that a stopped run goes on where it was.

    Attributes:
        path: of the output; the state is ``.NAME.unfinished`` beside it, one for each process.
        key: names the recording: model, text, moments, batches.  A state of another is not used.
        every: seconds between two writes, more where writing takes more than ``MOST_FOR_WRITING`` of the time.
    """

    path: Path
    key: str
    every: float = EVERY
    _written: float = field(default_factory=time.monotonic)
    _took: float = 0.0

    @property
    def file(self) -> Path:
        number, count = world()
        ending = "" if count == 1 else f".{number}-of-{count}"
        return self.path.with_name(f".{self.path.name}.unfinished{ending}")

    def load(self) -> tuple[int, dict[str, torch.Tensor]]:
        """Batches done and the state after them; (0, {}) where there is none of this recording."""
        try:
            artifact = load_artifact(self.file, "unfinished")
        except BrocaError:
            return 0, {}
        if artifact.metadata.get("key") != self.key:
            return 0, {}
        return int(artifact.metadata["batches"]), artifact.tensors

    def is_due(self) -> bool:
        longer = max(1.0, self._took / (MOST_FOR_WRITING * EVERY))
        return time.monotonic() - self._written >= longer * self.every

    def save(self, batches: int, tensors: Mapping[str, torch.Tensor]) -> None:
        begun = time.monotonic()
        save_artifact(self.file, "unfinished", tensors, {"key": self.key, "batches": batches})
        self._written = time.monotonic()
        self._took = self._written - begun

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
