"""The state of an unfinished recording on disk: the sums so far and the number of batches done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from neurons.errors import BrocaError
from neurons.files.artifact import load_artifact, load_metadata, save_artifact
from neurons.models.processes import world

EVERY = 30.0  # seconds
# Maximum fraction of the time for writing: responses to single texts take long to write.
MAX_WRITING = 0.02


@dataclass
class Unfinished:
    """Keeps a recording's state beside its output, from which a stopped run resumes.

    Attributes:
        path: the output; the state is ``.NAME.unfinished`` beside it, one for each process.
        key: identity of the recording: model, text, moments, batches.  Only a state with the same key is used.
        size: tokens in a batch, if a recording may choose them; kept with the state (``kept``).
        every: seconds between two writes, increased to keep writing below ``MAX_WRITING`` of the time.
    """

    path: Path
    key: str
    size: int | None = None
    every: float = EVERY
    _written: float = field(default_factory=time.monotonic)
    _took: float = 0.0

    @property
    def file(self) -> Path:
        number, count = world()
        ending = "" if count == 1 else f".{number}-of-{count}"
        return self.path.with_name(f".{self.path.name}.unfinished{ending}")

    def kept(self) -> dict[str, Any]:
        """The metadata of the state that is kept, of any recording: key, batches and size; {} without one."""
        try:
            return load_metadata(self.file, "unfinished")
        except BrocaError:
            return {}

    def load(self) -> tuple[int, dict[str, torch.Tensor]]:
        """Batches done and the state after them; (0, {}) if there is none of this recording."""
        if self.kept().get("key") != self.key:
            return 0, {}
        try:
            artifact = load_artifact(self.file, "unfinished")
        except BrocaError:
            return 0, {}
        return int(artifact.metadata["batches"]), artifact.tensors

    def is_due(self) -> bool:
        factor = max(1.0, self._took / (MAX_WRITING * EVERY))
        return time.monotonic() - self._written >= factor * self.every

    def save(self, batches: int, tensors: Mapping[str, torch.Tensor]) -> None:
        begun = time.monotonic()
        save_artifact(
            self.file, "unfinished", tensors, {"key": self.key, "batches": batches, "size": self.size}
        )
        self._written = time.monotonic()
        self._took = self._written - begun

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
