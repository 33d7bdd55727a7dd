"""A recipe: one TOML file that names a whole job."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editing.methods.keyed import MEANS, STRENGTHS, VALUES
from neurons.errors import UsageError
from neurons.scorers.setting import COUNT, declared, setting
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
    key_neurons: str = setting("all", words=("all", "identified"))
    layers: str | None = None
    values: str = setting(MEANS, words=VALUES)
    strengths: tuple[float, ...] | None = None
    prompts: int = setting(100, kind=COUNT)
    samples: int = setting(2, kind=COUNT)
    seed: int = 0
    tokens: int | None = setting(None, kind=COUNT)
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
    settings = declared(Recipe)
    unknown = sorted(set(content) - set(settings))
    if unknown:
        raise UsageError(f"{path}: unknown {', '.join(unknown)} (known: {', '.join(sorted(settings))})")
    missing = [name for name in ("model", "corpus", "source", "targets") if name not in content]
    if missing:
        raise UsageError(f"{path}: {', '.join(missing)} is missing")
    for name in content:
        content[name] = settings[name].require(f"{path}: {name}", content[name])
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
