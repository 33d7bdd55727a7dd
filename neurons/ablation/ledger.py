"""Losses of an unfinished ablation study on disk: one line of JSON for each condition and batch."""

from __future__ import annotations

import json
import os
from io import BufferedWriter
from pathlib import Path
from types import TracebackType

import torch

from neurons.ablation.conditions import InMemory


class LedgerFile(InMemory):
    """``.NAME.unfinished`` beside a study's output: its finished losses, from which a stopped study resumes.

    The first line holds the key; a file with another key is overwritten.  A truncated line is dropped.
    Numbers are written with all their digits, so that reading them gives the same bits.

    Args:
        out: the study's output.
        key: identifies model, text and batches.
    """

    def __init__(self, out: Path, key: str) -> None:
        super().__init__()
        self.path = out.with_name(f".{out.name}.unfinished")
        self.key = key
        self._stream: BufferedWriter | None = None

    def __enter__(self) -> LedgerFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._read()
        if whole:
            os.truncate(self.path, whole)
            self._stream = self.path.open("ab")
        else:
            self._stream = self.path.open("wb")
            self._write({"key": self.key})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def put(self, language: str, turn: int, digest: str, losses: torch.Tensor) -> None:
        super().put(language, turn, digest, losses)
        self._write({"at": [language, turn, digest], "losses": losses.tolist()})

    def remove(self) -> None:
        """Delete the file, once the study is written."""
        self.path.unlink(missing_ok=True)

    def _write(self, line: object) -> None:
        assert self._stream is not None
        self._stream.write(json.dumps(line).encode() + b"\n")
        self._stream.flush()

    def _read(self) -> int:
        """Read the lines if the key matches; the number of valid bytes of the file."""
        if not self.path.is_file():
            return 0
        good = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True)):
            try:
                entry = json.loads(line)
                if not line.endswith(b"\n"):
                    break
                if number == 0:
                    if entry["key"] != self.key:
                        return 0
                else:
                    language, turn, digest = entry["at"]
                    losses = torch.tensor(entry["losses"], dtype=torch.float64)
                    self._held[language, turn, digest] = losses
            except (ValueError, KeyError, TypeError):
                break
            good += len(line)
        return good
