"""Findings: the results in a study's directory, and a list of its files with their kinds."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError, safe_open

from editing.evaluation.ability import Ability
from editing.plans.plan import Plan, load_plan
from editing.report.provenance import Provenance, provenance
from editing.study.results import Choice, Report, report_of
from editing.study.search_result import SearchResult
from neurons.ablation.study import Study
from neurons.ablation.study_file import study_of
from neurons.errors import BrocaError, UsageError
from neurons.files.digest import digest
from neurons.files.json_file import checked, read_json
from neurons.models.fingerprint import PLAN_IN_CHECKPOINT
from neurons.neuron_sets.neuron_set import NeuronSet, load_neuron_set

GENERATOR = "broca report"  # of a page, named near its beginning
_BEGINNING = 1000  # bytes
# Files that repeat results in another form, and files without results.
_NOT_READ = {
    ".md": "text",
    **dict.fromkeys((".html", ".htm"), "page"),
    **dict.fromkeys((".png", ".svg", ".pdf"), "picture"),
    ".jsonl": "lines of a program's own memory",
    ".log": "log",
    ".txt": "text",
}
STEER_RECIPE, STEER_TABLE = "recipe of broca steer", "steer"
_ARTIFACTS = {
    "neurons": "neuron set",
    "edit": "plan of weight edits",
    "direction": "direction",
    "statistics": "statistics, not shown",
    "unfinished": "unfinished work, not shown",
}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Named(Generic[Result]):
    """A result, and the path of its file inside the study's directory."""

    file: str
    result: Result

    @property
    def place(self) -> str:
        """The file's directory."""
        return place_of(self.file)


def place_of(file: str) -> str:
    """The directory part of a path inside the study's directory."""
    return file.rpartition("/")[0]


@dataclass(frozen=True)
class File:
    """A file in the directory.

    Attributes:
        name: its path inside the directory.
        kind: in words.
        digest: sha256; empty if the file was not read.
        provenance: None if the file records none.
        understood: whether its kind is known and it could be read.
    """

    name: str
    kind: str
    digest: str = ""
    provenance: Provenance | None = None
    understood: bool = True


@dataclass
class Findings:
    """The results and files in a directory, each kind in the order of the files' names.

    Attributes:
        name: of the directory; of the directory in a checkpoint: the model's name.
        steering, ablations, searches, choices, neurons, edits: results, with their files.
        files: all files.
    """

    name: str
    steering: list[Named[Report]] = field(default_factory=list)
    ablations: list[Named[Study]] = field(default_factory=list)
    searches: list[Named[SearchResult]] = field(default_factory=list)
    choices: list[Named[Choice]] = field(default_factory=list)
    neurons: list[Named[NeuronSet]] = field(default_factory=list)
    edits: list[Named[Plan]] = field(default_factory=list)
    files: list[File] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there are no results."""
        results = (self.steering, self.ablations, self.searches, self.choices, self.neurons, self.edits)
        return not any(results)


def read_findings(directory: Path) -> Findings:
    """Read a study's directory and its subdirectories; checkpoints are listed and not read.

    Raises:
        UsageError: no such directory, or no result in it.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory: give the directory of the results")
    findings = Findings(directory.resolve().name or "study")
    _enter(directory, directory, findings)
    if findings.name == PLAN_IN_CHECKPOINT.parent.name and findings.edits:
        # In a checkpoint this directory always has the same name.
        findings.name = f"{Path(findings.edits[0].result.metadata.get('model', 'model')).name}, edited"
    if findings.empty:
        raise UsageError(
            f"{directory}: no result of broca run, evaluate, ablate, tune, identify or edit: give the directory "
            "that they were written to"
        )
    return findings


def _enter(top: Path, directory: Path, findings: Findings) -> None:
    # A directory's files come before its subdirectories.
    for path in sorted(directory.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        name = path.relative_to(top).as_posix()
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if (path / "config.json").is_file():
                steered = (path / PLAN_IN_CHECKPOINT).is_file()
                findings.files.append(File(f"{name}/", "checkpoint" + " steered by Broca" * steered))
            elif not path.is_symlink():  # a link may lead back
                _enter(top, path, findings)
        elif path.suffix == ".json":
            findings.files.append(_json(path, name, findings))
        elif path.suffix == ".safetensors":
            findings.files.append(_artifact(path, name, findings))
        elif path.suffix in (".html", ".htm") and _is_report(path):
            continue  # an earlier page of this study
        elif path.suffix == ".toml":
            findings.files.append(_recipe(path, name))
        elif path.suffix in _NOT_READ:
            findings.files.append(File(name, f"{_NOT_READ[path.suffix]}, not read"))
        else:
            findings.files.append(_not_understood(name, "no file of Broca's"))


def _recipe(path: Path, name: str) -> File:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        steers = STEER_TABLE in tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        steers = False
    if not steers:
        return File(name, "recipe, not read")
    return File(
        name,
        STEER_RECIPE,
        digest(path) or "",
        Provenance(command=f"broca run {path.name} --out DIR", recipe=text),
    )


def _not_understood(name: str, reason: str) -> File:
    return File(name, f"not understood: {reason}", understood=False)


def _is_report(page: Path) -> bool:
    with page.open("rb") as stream:
        return GENERATOR.encode() in stream.read(_BEGINNING)


def _json(path: Path, name: str, findings: Findings) -> File:
    try:
        value = read_json(path)
        kind = _document(value, path, name, findings)
    except UsageError as error:
        return _not_understood(name, str(error).removeprefix(f"{path}: "))
    if kind is None:
        return _not_understood(name, "JSON of another kind")
    # The entries of a run's report.json have the same provenance.
    entry = value[0] if isinstance(value, list) else value
    recorded = provenance(entry) if isinstance(entry, Mapping) else None
    return File(name, kind, digest(path) or "", recorded)


def _document(value: Any, path: Path, name: str, findings: Findings) -> str | None:
    """Add the result of a JSON document to the findings and return its kind; None if the kind is unknown."""
    if isinstance(value, list) and value and all(_has(entry, "outcomes", "target") for entry in value):
        for entry in value:
            _add_steering(findings, name, report_of(entry, path))
        return "steering, all targets of a run"
    if _has(value, "trials", "front"):
        findings.searches.append(Named(name, checked(SearchResult, value, path)))
        return "search"
    if _has(value, "sets", "baseline", "languages"):
        findings.ablations.append(Named(name, study_of(value, path)))
        return "ablation study"
    if _has(value, "accuracy", "own_answers"):
        checked(Ability, value, path)
        return "ability, not shown"
    if _has(value, "outcomes", "target"):
        report = report_of(value, path)
        _add_steering(findings, name, report)
        if report.choice is not None:
            findings.choices.append(Named(name, report.choice))
        return "steering, measured"
    if _has(value, "tried", "chosen"):
        findings.choices.append(Named(name, checked(Choice, value, path)))
        return "settings that were tried"
    if (
        isinstance(value, dict)
        and value
        and all(_has(stage, "inputs", "outputs") for stage in value.values())
    ):
        return f"stages of a run: {', '.join(sorted(value))}"
    return None


def _add_steering(findings: Findings, name: str, report: Report) -> None:
    """Add a report unless it is there: a run's report.json repeats its measured-*.json."""
    if all(_measurement(report) != _measurement(known.result) for known in findings.steering):
        findings.steering.append(Named(name, report))


def _measurement(report: Report) -> str:
    """All that was measured; as text, since NaN does not equal itself."""
    return repr(replace(report, notes=None, about={}))


def _has(value: Any, *keys: str) -> bool:
    return isinstance(value, Mapping) and all(key in value for key in keys)


def _artifact(path: Path, name: str, findings: Findings) -> File:
    try:
        metadata = _header(path)
        kind = str(metadata["kind"])
        if kind == "neurons":
            findings.neurons.append(Named(name, load_neuron_set(path)))
        elif kind == "edit":
            findings.edits.append(Named(name, load_plan(path)))
    except (SafetensorError, OSError) as error:
        return _not_understood(name, f"not a readable safetensors file ({error})")
    except BrocaError as error:
        return _not_understood(name, str(error).removeprefix(f"{path}: "))
    except (KeyError, TypeError, ValueError) as error:
        return _not_understood(name, f"damaged ({error})")
    sha256 = digest(path) if kind in ("neurons", "edit", "direction") else None
    return File(name, _ARTIFACTS.get(kind, f"{kind}, not shown"), sha256 or "", provenance(metadata))


def _header(path: Path) -> dict[str, Any]:
    """The metadata of a Broca file, without its tensors, which may be large."""
    with safe_open(str(path), framework="pt") as stream:
        text = (stream.metadata() or {}).get("broca")
    if text is None:
        raise BrocaError("a safetensors file, but not one that Broca wrote")
    metadata = json.loads(text)
    if not isinstance(metadata, dict):
        raise BrocaError("its metadata is damaged")
    return metadata
