"""Stages of a job: each leaves files and is skipped while its inputs and its files are unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neurons.artifact import package_versions, write_atomically
from neurons.errors import BrocaError

RECORD = "run.json"


class Stages:
    """Remembers in ``<out>/run.json`` what each stage was made from and what it left.

    Args:
        out: directory of the results; made where it is missing.
        report: called with a stage's name and whether it is skipped, before it runs.

    Raises:
        BrocaError: ``out`` is a file, or a directory with something in it that no run has left.
    """

    def __init__(self, out: Path, report: Callable[[str, bool], None]) -> None:
        self.out = out
        self._report = report
        self._record: dict[str, dict[str, Any]] = {}
        record = out / RECORD
        if record.is_file():
            try:
                self._record = json.loads(record.read_text(encoding="utf-8"))
            except json.JSONDecodeError:
                self._record = {}  # all stages run again, which loses time and nothing else
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise BrocaError(
                f"{out}: exists and is not the directory of an earlier run: choose another --out"
            )

    def run(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        action: Callable[[], None],
    ) -> None:
        """Run ``action`` unless the last run had the same inputs and its outputs are as it left them.

        Args:
            name: of the stage.
            inputs: JSON values that decide the outcome; file digests for files.
            outputs: files or directories that the action writes, relative to ``out``.
            action: writes them.
        """
        wanted = _digest_of({"inputs": inputs, "packages": package_versions()})
        last = self._record.get(name)
        unchanged = (
            last is not None
            and last["inputs"] == wanted
            and all(last["outputs"].get(output) == digest(self.out / output) for output in outputs)
        )
        self._report(name, unchanged)
        if unchanged:
            return
        action()
        self._record[name] = {
            "inputs": wanted,
            "outputs": {output: digest(self.out / output) for output in outputs},
        }
        text = json.dumps(self._record, indent=2, sort_keys=True) + "\n"
        write_atomically(self.out / RECORD, text.encode())


def digest(path: Path) -> str | None:
    """sha256 of a file, or of a directory's file names and contents; None where there is nothing."""
    if path.is_dir():
        inside = {
            item.relative_to(path).as_posix(): digest(item)
            for item in sorted(path.rglob("*"))
            if item.is_file()
        }
        return _digest_of(inside)
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
