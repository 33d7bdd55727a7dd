"""Stages of a job: each writes files, and is skipped if its inputs and its files are unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from neurons.errors import BrocaError
from neurons.files.artifact import json_bytes, package_versions, write_atomically
from neurons.files.digest import digest, digest_of

RECORD = "run.json"
RUNS, UNCHANGED, KEPT = "...", "unchanged", "kept as changed by hand: {}"


class Stages:
    """Records in ``<out>/run.json`` the inputs and outputs of each stage.

    Args:
        out: directory of the results; created if missing.
        report: called before a stage runs with its name and RUNS, UNCHANGED or the formatted KEPT.

    Raises:
        BrocaError: ``out`` is a file, or a directory with files and no run.json.
    """

    def __init__(self, out: Path, report: Callable[[str, str], None]) -> None:
        self.out = out
        self._report = report
        if not (out / RECORD).is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise BrocaError(
                f"{out}: exists and is not the directory of an earlier run: choose another --out"
            )

    @cached_property
    def _record(self) -> dict[str, dict[str, Any]]:
        """Read when the first stage runs, as another run may have ended until then."""
        try:
            record: dict[str, dict[str, Any]] = json.loads((self.out / RECORD).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}  # all stages run
        return record

    def run(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        action: Callable[[], None],
    ) -> None:
        """Run ``action`` unless the last run had the same inputs and its outputs exist.

        An output that was changed by hand is kept, and later stages use it.

        Args:
            name: of the stage.
            inputs: JSON values that decide the outputs; digests for files.
            outputs: files or directories that the action writes, relative to ``out``.
            action: writes the outputs.

        Raises:
            BrocaError: the stage must run again and would overwrite a file that was changed by hand.
        """
        inputs_digest = digest_of({"inputs": inputs, "packages": package_versions()})
        last = self._record.get(name, {"inputs": None, "outputs": {}})
        digests = {output: digest(self.out / output) for output in outputs}
        changed = [
            output
            for output, sha256 in digests.items()
            if sha256 is not None and last["outputs"].get(output, sha256) != sha256
        ]
        if last["inputs"] == inputs_digest and None not in digests.values():
            self._report(name, KEPT.format(", ".join(changed)) if changed else UNCHANGED)
            return
        if changed:
            raise BrocaError(
                f"{self.out}: {', '.join(changed)} was changed by hand since {name!r} wrote it, and would be "
                "overwritten: move it away, or choose another --out"
            )
        self._report(name, RUNS)
        if self._record.pop(name, None) is not None or not (self.out / RECORD).is_file():
            # If it is killed after it wrote an output, that would differ from the record as if changed by hand, and
            # without a record the directory would be taken for the user's.
            write_atomically(self.out / RECORD, json_bytes(self._record))
        action()
        self._record[name] = {
            "inputs": inputs_digest,
            "outputs": {output: digest(self.out / output) for output in outputs},
        }
        write_atomically(self.out / RECORD, json_bytes(self._record))
