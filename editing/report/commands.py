"""How a study is made again: the commands that its files give, and what they tell of those they do not give."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from editing.report.findings import Findings, place_of
from editing.report.provenance import Provenance
from neurons.neuron_sets.neuron_set import NeuronSet

# A digest tells which text or set it was, not where it lies.
CORPUS, NEURONS = "CORPUS", "NEURONS"
_OPTIONS = ("top_rate", "scope", "ends", "threshold", "min_exclusivity", "kinds", "layers", "seed")


@dataclass(frozen=True)
class Again:
    """How some files are made again.

    Attributes:
        files: that it writes.
        command: None where nothing tells it.
        told: whether a file gives the command; else it is put together from settings.
        recipe: text of the recipe that the command reads.
        processor: what computed the figures, in words; empty where no file says.
    """

    files: tuple[str, ...]
    command: str | None = None
    told: bool = True
    recipe: str | None = None
    processor: str = ""


def ways_again(found: Findings) -> list[Again]:
    """A command for every result, those of the same command together; last those without any.

    What a run leaves beside its figures is of the figures' command.
    """
    origins = {file.name: file.origin for file in found.files if file.origin is not None}
    of_run = _run_files(found)
    runs: dict[str, Provenance] = {}
    for name in of_run:
        origin = origins.get(name)
        if origin is not None and origin.command:
            runs.setdefault(place_of(name), origin)
    sets = {one.file: one.result for one in found.neurons}
    given: dict[tuple[str, str | None, str], list[str]] = {}
    made, without = [], []
    for name in _results(found):
        origin = origins.get(name)
        if (origin is None or not origin.command) and name in of_run:
            origin = runs.get(place_of(name))
        if origin is not None and origin.command:
            given.setdefault((origin.command, origin.recipe, origin.processor), []).append(name)
        elif name in of_run:
            continue  # the recipe's reconstruction stands for them
        elif name in sets:
            made.append(Again((name,), _identify(sets[name], name), told=False))
        else:
            without.append(name)
    ways = [
        Again(tuple(files), command, recipe=recipe, processor=processor)
        for (command, recipe, processor), files in given.items()
    ]
    return [*ways, *made, *([Again(tuple(without), told=False)] if without else [])]


def recipe(found: Findings) -> str | None:
    """The recipe of a run whose files give no command, as far as they tell; None where there is no such run."""
    told = {name for way in ways_again(found) for name in way.files}
    files = [name for name in _run_files(found) if name not in told]
    if not files:
        return None
    lines: dict[str, Any] = {}
    steering = [one.result for one in found.steering if one.file in files]
    if steering:
        lines["model"] = steering[0].model
        lines["corpus"] = CORPUS
        lines["source"] = steering[0].source
        lines["targets"] = [one.target for one in steering if one.source == steering[0].source]
    for neurons in (one.result for one in found.neurons if one.file in files):
        lines["method"] = neurons.metadata.get("method")
        lines["top_rate"] = (neurons.metadata.get("settings") or {}).get("top_rate")
    # JSON strings, numbers and lists are TOML's too.
    written = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in lines.items() if value]
    return "\n".join(written)


def _results(found: Findings) -> list[str]:
    """Names of the files that hold results, each once, in the order of the directory."""
    kinds = (found.steering, found.searches, found.ablations, found.neurons, found.edits, found.choices)
    names = {one.file for results in kinds for one in results}
    return [
        file.name
        for file in found.files
        if file.name in names or (file.origin is not None and file.origin.command)
    ]


def _run_files(found: Findings) -> list[str]:
    """The results that lie beside a run.json."""
    places = {place_of(file.name) for file in found.files if file.name.rpartition("/")[2] == "run.json"}
    kinds = (found.steering, found.neurons, found.edits, found.choices)
    return [one.file for results in kinds for one in results if one.place in places]


def _identify(neurons: NeuronSet, file: str) -> str:
    metadata = neurons.metadata
    words = ["broca", "identify", metadata.get("model") or "MODEL", "--corpus", CORPUS]
    parts = {str(one.get("part")) for one in metadata.get("corpora") or () if isinstance(one, Mapping)}
    if len(parts) == 1:
        words += ["--part", *parts]
    words += ["--method", metadata.get("method") or "METHOD"]
    for name, value in (metadata.get("settings") or {}).items():
        if value is None or name == "like_settings":
            continue
        written = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if name == "like":
            words += ["--like", NEURONS]
        elif name in _OPTIONS:
            words += ["--" + name.replace("_", "-"), written]
        else:
            words += ["--set", f"{name}={written}"]
    return shlex.join(map(str, [*words, "--out", file]))
