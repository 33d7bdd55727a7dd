"""How a study is made again: the commands that its files give, and what they tell of those they do not give."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from editing.study_report.findings import Findings
from neurons.neuron_set import NeuronSet

# A digest tells which text it was, not where it lies.
CORPUS = "CORPUS"
_OPTIONS = ("top_rate", "scope", "ends", "threshold", "min_exclusivity", "kinds", "layers")


def commands(found: Findings) -> list[tuple[str, str]]:
    """(file that a command writes, the command): as the file has it, or, of a neuron set, by its settings."""
    given = {file.name: file.origin.command for file in found.files if file.origin and file.origin.command}
    of_run = set(_run_files(found))
    made = {one.file: _identify(one.result, one.file) for one in found.neurons if one.file not in of_run}
    return [*given.items(), *((file, command) for file, command in made.items() if file not in given)]


def recipe(found: Findings) -> str | None:
    """The recipe of a run as far as its files tell; None where there was no run."""
    files = _run_files(found)
    if not files:
        return None
    lines: dict[str, Any] = {}
    steering = [one.result for one in found.steering if one.file in files]
    if steering:
        lines["model"] = steering[0].origin.model
        lines["corpus"] = CORPUS
        lines["source"] = steering[0].source
        lines["targets"] = [one.target for one in steering if one.source == steering[0].source]
    for neurons in (one.result for one in found.neurons if one.file in files):
        lines["method"] = neurons.metadata.get("method")
        lines["top_rate"] = (neurons.metadata.get("settings") or {}).get("top_rate")
    # JSON strings, numbers and lists are TOML's too.
    written = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in lines.items() if value]
    return "\n".join(written)


def _run_files(found: Findings) -> list[str]:
    """The results that lie beside a run.json."""
    places = {
        file.name.rpartition("/")[0] for file in found.files if file.name.rpartition("/")[2] == "run.json"
    }
    files = [
        *(one.file for one in found.steering),
        *(one.file for one in found.neurons),
        *(one.file for one in found.edits),
    ]
    return [file for file in files if file.rpartition("/")[0] in places]


def _identify(neurons: NeuronSet, file: str) -> str:
    metadata = neurons.metadata
    words = ["broca", "identify", metadata.get("model") or "MODEL", "--corpus", CORPUS]
    parts = {str(one.get("part")) for one in metadata.get("corpora") or () if isinstance(one, Mapping)}
    if len(parts) == 1:
        words += ["--part", *parts]
    words += ["--method", metadata.get("method") or "METHOD"]
    for name, value in (metadata.get("settings") or {}).items():
        if value is None:
            continue
        written = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += (
            ["--" + name.replace("_", "-"), written] if name in _OPTIONS else ["--set", f"{name}={written}"]
        )
    return shlex.join(map(str, [*words, "--out", file]))
