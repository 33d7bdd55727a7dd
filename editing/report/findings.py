"""What lies in a study's directory: each file is read as what it is, or named as what is not understood."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError, safe_open

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

GENERATOR = "broca report"  # what made a page, as its beginning says
_BEGINNING = 1000  # bytes
# Files that say again, or for other eyes, what the files beside them say, and those of no result.
_NOT_READ = {
    ".md": "text",
    **dict.fromkeys((".html", ".htm"), "page"),
    **dict.fromkeys((".png", ".svg", ".pdf"), "picture"),
    ".jsonl": "lines of a program's own memory",
    ".log": "log",
    ".txt": "text",
    ".toml": "recipe",
}
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
    """A result and the file it was read from, by its path inside the directory."""

    file: str
    result: Result

    @property
    def place(self) -> str:
        """The file's directory inside the directory."""
        return place_of(self.file)


def place_of(file: str) -> str:
    return file.rpartition("/")[0]


@dataclass(frozen=True)
class File:
    """A file that was found.

    Attributes:
        name: its path inside the directory.
        what: it is.
        digest: sha256 of a file that was read; empty of others.
        origin: what it says of its making; None where nothing.
        understood: whether this page knows what to do with it.
    """

    name: str
    what: str
    digest: str = ""
    origin: Provenance | None = None
    understood: bool = True


@dataclass
class Findings:
    """Everything in a directory, each kind in the order of the files' names.

    Attributes:
        name: of the directory.
        steering, ablations, searches, choices, neurons, edits: results, with their files.
        files: all that was found.
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
        """Whether there is nothing to show."""
        results = (self.steering, self.ablations, self.searches, self.choices, self.neurons, self.edits)
        return not any(results)


def read_findings(directory: Path) -> Findings:
    """Read a study's directory and those in it; a checkpoint is named and not entered.

    Raises:
        UsageError: no such directory, or one without any result.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: there is no such directory: name the one that holds the results")
    found = Findings(directory.resolve().name or "study")
    _enter(directory, directory, found)
    if found.empty:
        raise UsageError(
            f"{directory}: holds no result of broca run, evaluate, ablate, tune, identify or edit: name the "
            "directory that they were written to"
        )
    return found


def _enter(top: Path, directory: Path, found: Findings) -> None:
    # Files of a directory come before those of the directories in it.
    for path in sorted(directory.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        name = path.relative_to(top).as_posix()
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if (path / "config.json").is_file():
                steered = (path / PLAN_IN_CHECKPOINT).is_file()
                found.files.append(File(f"{name}/", "checkpoint" + " steered by Broca" * steered))
            elif not path.is_symlink():  # a link may lead back
                _enter(top, path, found)
        elif path.suffix == ".json":
            found.files.append(_json(path, name, found))
        elif path.suffix == ".safetensors":
            found.files.append(_artifact(path, name, found))
        elif path.suffix in (".html", ".htm") and _is_ours(path):
            continue  # an earlier page of this study is no part of it
        elif path.suffix in _NOT_READ:
            found.files.append(File(name, f"{_NOT_READ[path.suffix]}, not read"))
        else:
            found.files.append(_strange(name, "no file of Broca's"))


def _strange(name: str, why: str) -> File:
    return File(name, f"not understood: {why}", understood=False)


def _is_ours(page: Path) -> bool:
    with page.open("rb") as stream:
        return GENERATOR.encode() in stream.read(_BEGINNING)


def _json(path: Path, name: str, found: Findings) -> File:
    try:
        value = read_json(path)
        what = _document(value, path, name, found)
    except UsageError as error:
        return _strange(name, str(error).removeprefix(f"{path}: "))
    if what is None:
        return _strange(name, "JSON of another kind")
    # A run's report.json is a list whose entries are of one making.
    one = value[0] if isinstance(value, list) else value
    origin = provenance(one) if isinstance(one, Mapping) else None
    return File(name, what, digest(path) or "", origin)


def _document(value: Any, path: Path, name: str, found: Findings) -> str | None:
    """What a JSON document is, once its result is among the findings; None of an unknown one."""
    if isinstance(value, list) and value and all(_has(one, "outcomes", "target") for one in value):
        for one in value:
            _add_steering(found, name, report_of(one, path))
        return "steering, all targets of a run"
    if _has(value, "trials", "front"):
        found.searches.append(Named(name, checked(SearchResult, value, path)))
        return "search"
    if _has(value, "sets", "baseline", "languages"):
        found.ablations.append(Named(name, study_of(value, path)))
        return "ablation study"
    if _has(value, "outcomes", "target"):
        report = report_of(value, path)
        _add_steering(found, name, report)
        if report.choice is not None:
            found.choices.append(Named(name, report.choice))
        return "steering, measured"
    if _has(value, "tried", "chosen"):
        found.choices.append(Named(name, checked(Choice, value, path)))
        return "settings that were tried"
    if isinstance(value, dict) and value and all(_has(one, "inputs", "outputs") for one in value.values()):
        return f"stages of a run: {', '.join(sorted(value))}"
    return None


def _add_steering(found: Findings, name: str, result: Report) -> None:
    """A run's report.json holds its measured-*.json again: what is there already is not shown twice."""
    if all(_figures(result) != _figures(known.result) for known in found.steering):
        found.steering.append(Named(name, result))


def _figures(one: Report) -> tuple[Any, ...]:
    """What two files that hold the same measurement have in common; NaN is written, for it equals nothing."""
    ways = [repr((way.name, way.target_share, way.fluency_gap, way.nll_rise)) for way in one.outcomes]
    doses = [(name, *(dose.details["dose"] for dose in doses)) for name, doses in (one.curves or {}).items()]
    return one.source, one.target, one.continuations, ways, doses


def _has(value: Any, *keys: str) -> bool:
    return isinstance(value, Mapping) and all(key in value for key in keys)


def _artifact(path: Path, name: str, found: Findings) -> File:
    try:
        metadata = _header(path)
        kind = str(metadata["kind"])
        if kind == "neurons":
            found.neurons.append(Named(name, load_neuron_set(path)))
        elif kind == "edit":
            found.edits.append(Named(name, load_plan(path)))
    except (SafetensorError, OSError) as error:
        return _strange(name, f"not a readable safetensors file ({error})")
    except BrocaError as error:
        return _strange(name, str(error).removeprefix(f"{path}: "))
    except (KeyError, TypeError, ValueError) as error:
        return _strange(name, f"damaged ({error})")
    read = kind in ("neurons", "edit", "direction")
    what = _ARTIFACTS.get(kind, f"{kind}, not shown")
    return File(name, what, digest(path) or "" if read else "", provenance(metadata))


def _header(path: Path) -> dict[str, Any]:
    """A Broca file's metadata alone: statistics are larger than a page needs to know."""
    with safe_open(str(path), framework="pt") as stream:
        text = (stream.metadata() or {}).get("broca")
    if text is None:
        raise BrocaError("a safetensors file, but not one that Broca wrote")
    metadata = json.loads(text)
    if not isinstance(metadata, dict):
        raise BrocaError("its metadata is damaged")
    return metadata
