"""A recipe: one TOML file that names a whole job."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from editing.methods.keyed import LEARNED, MEANS, STRENGTHS, VALUES
from neurons.errors import UsageError
from neurons.text.corpus_files import language_label


@dataclass(frozen=True)
class Recipe:
    """What ``broca run`` does.

    Attributes:
        model: hub id or directory; a relative path counts from the recipe's directory.
        corpus: directory of ``<language>.txt``, ``.jsonl`` or ``.parquet``; likewise.
        source: language of the prompts.
        targets: languages to steer to, a checkpoint each.
        out: directory of the results; counts from where the command runs.
        languages: which of the corpus; None takes all.
        method: that finds neurons (``broca identify --method``).
        top_rate: share of neurons kept.
        key_neurons: "all" lets a key use every neuron of a layer, "identified" only the source's.
        layers: layers that are edited ("1-3"); None is the method's default.
        values: what the keyed edit writes: "means" (the direction, by keys over neurons) or "learned"
            (by gradient, by keys over heads and neurons).
        strengths: of the keyed edit; the best on the choosing part is taken.  None: the one that suits
            the values.
        prompts: at most so many lines of a part are prompted with.
        samples: continuations a prompt.
        seed: of the sampling.
        tokens: most tokens of a language that are read, evenly from the whole text; None: what each stage needs.
        device, dtype: as ``broca identify`` takes them.
    """

    model: str
    corpus: Path
    source: str
    targets: tuple[str, ...]
    out: Path = Path("broca-out")
    languages: tuple[str, ...] | None = None
    method: str = "gradient-contrast"
    top_rate: float = 0.01
    key_neurons: str = "all"
    layers: str | None = None
    values: str = MEANS
    strengths: tuple[float, ...] | None = None
    prompts: int = 100
    samples: int = 2
    seed: int = 0
    tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"

    @property
    def keyed_strengths(self) -> tuple[float, ...]:
        """``strengths``, or those of the values."""
        return STRENGTHS[self.values] if self.strengths is None else self.strengths

    def with_options(self, **options: Any) -> Recipe:
        """The recipe with the options that are not None in place of its own."""
        return replace(self, **{key: value for key, value in options.items() if value is not None})


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UsageError: no such file, not TOML, an unknown or a missing field, or a value of the wrong kind.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: there is no such recipe") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML ({error})") from error
    known = {field.name for field in fields(Recipe)}
    unknown = sorted(set(content) - known)
    if unknown:
        raise UsageError(f"{path}: unknown {', '.join(unknown)} (known: {', '.join(sorted(known))})")
    missing = [name for name in ("model", "corpus", "source", "targets") if name not in content]
    if missing:
        raise UsageError(f"{path}: {', '.join(missing)} is missing")
    for name, kind in _KINDS.items():
        if name in content and not _is(content[name], kind):
            raise UsageError(f"{path}: {name} must be {kind}, not {content[name]!r}")
    beside = path.resolve().parent
    content["corpus"] = beside / Path(content["corpus"]).expanduser()
    local = beside / Path(content["model"]).expanduser()
    if local.is_dir():
        content["model"] = str(local)
    if "out" in content:
        content["out"] = Path(content["out"]).expanduser()
    for name in ("targets", "languages", "strengths"):
        if name in content:
            content[name] = tuple(content[name])
    content["source"] = language_label(content["source"])
    content["targets"] = tuple(map(language_label, content["targets"]))
    recipe = Recipe(**content)
    if recipe.values not in VALUES:
        raise UsageError(f"{path}: values is {MEANS!r} or {LEARNED!r}, not {recipe.values!r}")
    if recipe.key_neurons not in ("all", "identified"):
        raise UsageError(f"{path}: key_neurons is 'all' or 'identified', not {recipe.key_neurons!r}")
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: Recipe) -> None:
    """Refuse a job without targets, with the source among them or with a strength twice.

    Raises:
        UsageError: as said.
    """
    strengths = recipe.keyed_strengths
    if len(set(strengths)) != len(strengths):
        raise UsageError("strengths: name each once")
    if not recipe.targets or len(set(recipe.targets)) != len(recipe.targets):
        raise UsageError("targets: name at least one language, each once")
    if recipe.source in recipe.targets:
        raise UsageError(f"the source {recipe.source!r} is also a target")


_KINDS = {
    **dict.fromkeys(
        ("model", "corpus", "source", "out", "method", "key_neurons", "layers", "values", "device", "dtype"),
        "a string",
    ),
    **dict.fromkeys(("targets", "languages"), "a list of strings"),
    "strengths": "a list of finite numbers other than 0",
    "top_rate": "a finite number",
    **dict.fromkeys(("prompts", "samples", "tokens"), "a whole number above 0"),
    "seed": "a whole number",
}


def _is(value: Any, kind: str) -> bool:
    if kind == "a string":
        return isinstance(value, str)
    if kind == "a list of strings":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == "a list of finite numbers other than 0":
        numbers = isinstance(value, list) and all(_is(item, "a finite number") for item in value)
        return numbers and bool(value) and 0 not in value
    if kind == "a finite number":
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and (kind == "a whole number" or value > 0)
