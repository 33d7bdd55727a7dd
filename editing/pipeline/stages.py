"""Stages of a job: each leaves files and is skipped while its inputs and its files are unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neurons.errors import BrocaError
from neurons.files.artifact import json_bytes, package_versions, write_atomically
from neurons.files.digest import digest, digest_of

RECORD = "run.json"
RUNS, UNCHANGED, KEPT = "...", "unchanged", "kept as changed by hand: {}"


class Stages:
    """Remembers in ``<out>/run.json`` what each stage was made from and what it left.

    Args:
        out: directory of the results; made where it is missing.
        report: called with a stage's name and RUNS, UNCHANGED or what is KEPT, before it runs.

    Raises:
        BrocaError: ``out`` is a file, or a directory with something in it that no run has left.
    """

    def __init__(self, out: Path, report: Callable[[str, str], None]) -> None:
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
        """Run ``action`` unless the last run had the same inputs and its outputs are there.

        An output that was changed by hand since is kept and used by the later stages.

        Args:
            name: of the stage.
            inputs: JSON values that decide the outcome; file digests for files.
            outputs: files or directories that the action writes, relative to ``out``.
            action: writes them.

        Raises:
            BrocaError: the stage must run again and would overwrite a file that was changed by hand.
        """
        wanted = digest_of({"inputs": inputs, "packages": package_versions()})
        last = self._record.get(name, {"inputs": None, "outputs": {}})
        now = {output: digest(self.out / output) for output in outputs}
        theirs = [
            output
            for output, found in now.items()
            if found is not None and last["outputs"].get(output, found) != found
        ]
        if last["inputs"] == wanted and None not in now.values():
            self._report(name, KEPT.format(", ".join(theirs)) if theirs else UNCHANGED)
            return
        if theirs:
            raise BrocaError(
                f"{self.out}: {', '.join(theirs)} was changed by hand since {name!r} wrote it, and would now "
                "be written again: move it away, or choose another --out"
            )
        self._report(name, RUNS)
        action()
        self._record[name] = {
            "inputs": wanted,
            "outputs": {output: digest(self.out / output) for output in outputs},
        }
        write_atomically(self.out / RECORD, json_bytes(self._record))
