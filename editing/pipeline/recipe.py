"""A recipe: the TOML file of a job."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editing.methods.keyed import MEANS, STRENGTHS, VALUES
from neurons.errors import UsageError
from neurons.scorers.registry import METHODS, method_of
from neurons.setting import COUNT, DTYPES, declared, setting
from neurons.text.corpus_files import language_label


@dataclass(frozen=True)
class Recipe:
    """The job of ``broca run``.

    Attributes:
        model: hub id or directory; relative to the recipe's directory.
        corpus: directory of ``<language>.txt``, ``.jsonl`` or ``.parquet``; relative to the recipe's directory.
        source: language of the prompts.
        targets: languages to steer to; each gets a checkpoint.
        out: directory of the results; relative to the working directory.
        languages: of the corpus; None takes all.
        method: that identifies neurons (``broca identify --method``).
        top_rate: fraction of neurons kept.
        key_neurons: "all": a key uses every neuron of a layer; "identified": only the source's.
        layers: edited layers ("1-3"); None is the method's default.
        values: of the keyed edit: "means" (the direction, with keys over neurons) or "learned" (by gradient, with
            keys over heads and neurons).
        strengths: of the keyed edit; the best on the choosing part is used.  None: the default for the values.
        prompts: maximum number of lines of a part used as prompts.
        samples: continuations a prompt.
        seed: of the sampling.
        tokens: maximum tokens of a language, evenly from the whole text; None: what each stage needs.
        classifier: what labels the continuations (``load_classifier``), relative to the recipe's directory; None:
            language identification.
        device, dtype: as for ``broca identify``.
    """

    model: str
    corpus: Path
    source: str
    targets: tuple[str, ...]
    out: Path = Path("broca-out")
    languages: tuple[str, ...] | None = None
    method: str = "gradient-contrast"
    top_rate: float = 0.01
    key_neurons: str = setting("all", words=("all", "identified"))
    layers: str | None = None
    values: str = setting(MEANS, words=VALUES)
    strengths: tuple[float, ...] | None = None
    prompts: int = setting(100, kind=COUNT)
    samples: int = setting(2, kind=COUNT)
    seed: int = 0
    tokens: int | None = setting(None, kind=COUNT)
    classifier: str | None = None
    device: str = "auto"
    dtype: str = setting(DTYPES[0], words=DTYPES)

    @property
    def keyed_strengths(self) -> tuple[float, ...]:
        """``strengths``, or the default for ``values``."""
        return STRENGTHS[self.values] if self.strengths is None else self.strengths

    def with_options(self, **options: Any) -> Recipe:
        """The recipe with the options that are not None."""
        return replace(self, **{key: value for key, value in options.items() if value is not None})


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UsageError: no such file, not TOML, an unknown or missing field, or a value of the wrong kind.
    """
    content = checked_fields(path, read_toml(path), Recipe, ("model", "corpus", "source", "targets"))
    content["corpus"] = path.resolve().parent / Path(content["corpus"]).expanduser()
    for name in ("model", "classifier"):
        if name in content:
            content[name] = model_beside(path, content[name])
    if "out" in content:
        content["out"] = Path(content["out"]).expanduser()
    for name in ("targets", "languages", "strengths"):
        if name in content:
            content[name] = tuple(content[name])
    content["source"] = language_label(content["source"])
    content["targets"] = tuple(map(language_label, content["targets"]))
    recipe = Recipe(**content)
    check_recipe(recipe)
    return recipe


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        UsageError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such recipe") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML ({error})") from error


def checked_fields(
    path: Path, content: Mapping[str, Any], owner: type, required: Sequence[str]
) -> dict[str, Any]:
    """The values of a recipe's fields.

    Args:
        path: of the recipe, for errors.
        content: name -> value.
        owner: a dataclass that declares the fields (``neurons.setting.declared``).
        required: names that must be present.

    Raises:
        UsageError: an unknown or missing field, or a value of the wrong kind.
    """
    settings = declared(owner)
    if unknown := sorted(set(content) - set(settings)):
        raise UsageError(f"{path}: unknown {', '.join(unknown)} (known: {', '.join(sorted(settings))})")
    if missing := [name for name in required if name not in content]:
        raise UsageError(f"{path}: {', '.join(missing)} is missing")
    return {name: settings[name].require(f"{path}: {name}", value) for name, value in content.items()}


def model_beside(path: Path, model: str) -> str:
    """A recipe's model or classifier: a directory or file relative to the recipe's, if there is one, else a hub id."""
    local = path.resolve().parent / Path(model).expanduser()
    return str(local) if local.exists() else model


def check_recipe(recipe: Recipe) -> None:
    """Check method, targets and strengths.

    Raises:
        UsageError: a method that reads no text, no target, the source among the targets, or a target or strength that
            is named twice.
    """
    method = method_of(recipe.method)
    if not method.records() or method.control:
        able = ", ".join(name for name, one in METHODS.items() if one.records() and not one.control)
        raise UsageError(
            f"method {recipe.method!r} does not find neurons from text alone: choose from {able}"
        )
    strengths = recipe.keyed_strengths
    if len(set(strengths)) != len(strengths):
        raise UsageError("strengths: name each once")
    if not recipe.targets or len(set(recipe.targets)) != len(recipe.targets):
        raise UsageError("targets: name at least one language, each once")
    if recipe.source in recipe.targets:
        raise UsageError(f"the source {recipe.source!r} is also a target")
