"""Reproduction of a study: the commands that its files record, and commands reconstructed from settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from editing.report.findings import STEER_RECIPE, Findings, place_of
from editing.report.provenance import Provenance
from neurons.neuron_sets.neuron_set import NeuronSet

# Placeholders: a digest does not say where the text or the set is stored.
CORPUS, NEURONS = "CORPUS", "NEURONS"
_OPTIONS = ("top_rate", "scope", "ends", "threshold", "min_exclusivity", "kinds", "layers", "seed")


@dataclass(frozen=True)
class Reproduction:
    """How some files are reproduced.

    Attributes:
        files: that the command writes.
        command: None if unknown.
        recorded: whether a file records the command; otherwise it is reconstructed from settings.
        recipe: text of the recipe that the command reads.
        processor: of the original run, in words; empty if unknown.
    """

    files: tuple[str, ...]
    command: str | None = None
    recorded: bool = True
    recipe: str | None = None
    processor: str = ""


def reproductions(findings: Findings) -> list[Reproduction]:
    """The command of every result; results of the same command are grouped, those without a command come last.

    Files of a run that record no command have the command of the run's other files.
    """
    recorded = {file.name: file.provenance for file in findings.files if file.provenance is not None}
    run_files = _run_files(findings)
    steer_recipes = [file.name for file in findings.files if file.kind == STEER_RECIPE]
    by_run: dict[str, Provenance] = {}
    for name in [*run_files, *steer_recipes]:
        provenance = recorded.get(name)
        if provenance is not None and provenance.command:
            by_run.setdefault(place_of(name), provenance)
    neuron_sets = {named.file: named.result for named in findings.neurons}
    grouped: dict[tuple[str, str | None, str], list[str]] = {}
    reconstructed, unknown = [], []
    for name in _results(findings):
        provenance = recorded.get(name)
        if (provenance is None or not provenance.command) and name in run_files:
            provenance = by_run.get(place_of(name))
        if provenance is not None and provenance.command:
            key = (provenance.command, provenance.recipe, provenance.processor)
            grouped.setdefault(key, []).append(name)
        elif name in run_files:
            continue  # ``recipe`` reconstructs the run
        elif name in neuron_sets:
            command = _identify_command(neuron_sets[name], name)
            reconstructed.append(Reproduction((name,), command, recorded=False))
        else:
            unknown.append(name)
    return [
        *(
            Reproduction(tuple(files), command, recipe=recipe, processor=processor)
            for (command, recipe, processor), files in grouped.items()
        ),
        *reconstructed,
        *([Reproduction(tuple(unknown), recorded=False)] if unknown else []),
    ]


def recipe(findings: Findings) -> str | None:
    """The reconstructed recipe of a run whose files record no command; None without such a run."""
    reproduced = {name for reproduction in reproductions(findings) for name in reproduction.files}
    files = [name for name in _run_files(findings) if name not in reproduced]
    if not files:
        return None
    fields: dict[str, Any] = {}
    steering = [named.result for named in findings.steering if named.file in files]
    if steering:
        fields["model"] = steering[0].model
        fields["corpus"] = CORPUS
        fields["source"] = steering[0].source
        fields["targets"] = [report.target for report in steering if report.source == steering[0].source]
    for neurons in (named.result for named in findings.neurons if named.file in files):
        fields["method"] = neurons.metadata.get("method")
        fields["top_rate"] = (neurons.metadata.get("settings") or {}).get("top_rate")
    # JSON strings, numbers and lists are valid TOML.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items() if value]
    return "\n".join(lines)


def _results(findings: Findings) -> list[str]:
    """Names of the files with results, each once, in the order of the directory."""
    kinds = (
        findings.steering,
        findings.searches,
        findings.ablations,
        findings.neurons,
        findings.edits,
        findings.choices,
    )
    names = {named.file for results in kinds for named in results}
    return [
        file.name
        for file in findings.files
        if file.name in names or (file.provenance is not None and file.provenance.command)
    ]


def _run_files(findings: Findings) -> list[str]:
    """Names of the results in directories with a run.json or a recipe of ``broca steer``."""
    places = {
        place_of(file.name)
        for file in findings.files
        if file.name.rpartition("/")[2] == "run.json" or file.kind == STEER_RECIPE
    }
    kinds = (findings.steering, findings.neurons, findings.edits, findings.choices)
    return [named.file for results in kinds for named in results if named.place in places]


def _identify_command(neurons: NeuronSet, file: str) -> str:
    metadata = neurons.metadata
    words = ["broca", "identify", metadata.get("model") or "MODEL", "--corpus", CORPUS]
    parts = {
        str(corpus.get("part")) for corpus in metadata.get("corpora") or () if isinstance(corpus, Mapping)
    }
    if len(parts) == 1:
        words += ["--part", *parts]
    words += ["--method", metadata.get("method") or "METHOD"]
    for name, value in (metadata.get("settings") or {}).items():
        if value is None or name == "like_settings":
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if name == "like":
            words += ["--like", NEURONS]
        elif name in _OPTIONS:
            words += ["--" + name.replace("_", "-"), text]
        else:
            words += ["--set", f"{name}={text}"]
    return shlex.join(map(str, [*words, "--out", file]))
