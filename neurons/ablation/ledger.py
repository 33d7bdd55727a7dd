"""Losses of an unfinished ablation study on disk: a line of JSON for each condition on each batch."""

from __future__ import annotations

import json
import os
from io import BufferedWriter
from pathlib import Path
from types import TracebackType

import torch


class LedgerFile:
    """``.NAME.unfinished`` beside a study's output: what is done, so that a stopped study goes on there.

    The first line names what was measured on what text; a file of something else is begun anew.  A line
    that was cut off is dropped.  Numbers are written with all their digits, so what is read back has the
    same bits.

    Args:
        out: the study's output.
        key: names model, text and batches.
    """

    def __init__(self, out: Path, key: str) -> None:
        self.path = out.with_name(f".{out.name}.unfinished")
        self.key = key
        self._held: dict[tuple[str, int, str], torch.Tensor] = {}
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

    @property
    def done(self) -> int:
        """Conditions times batches that are done."""
        return len(self._held)

    def get(self, language: str, turn: int, digest: str) -> torch.Tensor | None:
        return self._held.get((language, turn, digest))

    def put(self, language: str, turn: int, digest: str, losses: torch.Tensor) -> None:
        self._held[language, turn, digest] = losses
        self._write({"at": [language, turn, digest], "losses": losses.tolist()})

    def remove(self) -> None:
        """The study is written: nothing is unfinished."""
        self.path.unlink(missing_ok=True)

    def _write(self, line: object) -> None:
        assert self._stream is not None
        self._stream.write(json.dumps(line).encode() + b"\n")
        self._stream.flush()

    def _read(self) -> int:
        """Take in the lines of this key; bytes of the file that are good."""
        if not self.path.is_file():
            return 0
        good = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True)):
            try:
                found = json.loads(line)
                if not line.endswith(b"\n"):
                    break
                if number == 0:
                    if found["key"] != self.key:
                        return 0
                else:
                    language, turn, digest = found["at"]
                    losses = torch.tensor(found["losses"], dtype=torch.float64)
                    self._held[language, turn, digest] = losses
            except (ValueError, KeyError, TypeError):
                break
            good += len(line)
        return good
