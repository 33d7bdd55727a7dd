"""What the search can tell each edit method, and the plan that it gets for it.

What is expensive is done once for all trials: the keys of the keyed edit in every module and its learned
values (``Keys``), Steer2Edit's importances (``Importances``), the constant keys of bake (``ConstantKeys``).  A trial's plan is then
made of these by multiplying what modules write, without a forward pass and without reading weights; only a norm
after the output (Gemma 2 and 3, OLMo 2) has its value solved anew at each strength, on tokens that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from editing.directions.direction import Direction
from editing.methods.bake import bake_plan
from editing.methods.keyed import LEARNED, MEANS, VALUES, keyed_plan
from editing.methods.learned_values import LEARNED_AT, enough_text, learned_values
from editing.methods.norm_value import value_through_norm
from editing.methods.output_norm import OutputNorm, output_norm, source_tokens
from editing.methods.steer2edit import ALPHA, steer2edit_plan
from editing.plans.plan import ModuleEdit, Plan, make_plan
from neurons.architectures.anatomy import BLOCKS
from neurons.errors import NothingToChangeError, UsageError
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus

Value = float | int | str
Settings = Mapping[str, Value]

# Layers that write, as shares of the depth.
LAYERS = {"all": (0.0, 1.0), "lower half": (0.0, 0.5), "lower 3/4": (0.0, 0.75), "upper 3/4": (0.25, 1.0)}
COMPONENTS = ("heads and neurons", "heads", "neurons")


@dataclass(frozen=True)
class Knob:
    """One thing that a method can be told.

    Attributes:
        low, high: of a number's range.
        whole: whether the number is whole.
        log: whether the range is searched by ratios.
        words: in place of a range, what to choose from.
        given: (another knob, words of it): searched only then; None: always.
    """

    low: float = 0.0
    high: float = 1.0
    whole: bool = False
    log: bool = False
    words: tuple[str, ...] = ()
    given: tuple[str, tuple[str, ...]] | None = None

    def applies(self, chosen: Settings) -> bool:
        return self.given is None or chosen[self.given[0]] in self.given[1]


@dataclass(frozen=True)
class Space:
    """What one method can be told.

    Attributes:
        knobs: name -> knob; a knob comes after the one that it is given by.
        known: settings that are tried first.
        make: the plan of some settings.

    ``make`` raises NothingToChangeError where the settings change nothing.
    """

    knobs: Mapping[str, Knob]
    known: tuple[Settings, ...]
    make: Callable[[Settings], Plan]

    def as_json(self) -> dict[str, Any]:
        """What decides the trials: two searches may be joined only if they agree in it."""
        return {
            name: {"words": list(knob.words)} if knob.words else {"low": knob.low, "high": knob.high}
            for name, knob in self.knobs.items()
        }


class Keys:
    """The keyed edit of one direction with any layers, blocks and strength, from keys solved once.

    Args:
        loaded: the model.
        corpus: text of all the languages that matter; what keys are solved on.
        direction: from this model.
        layers: that may write; None allows all.
        progress: called with the number of tokens done.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        corpus: Corpus,
        direction: Direction,
        layers: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._loaded, self._corpus, self._direction = loaded, corpus, direction
        self.layers = tuple(range(loaded.anatomy.layers) if layers is None else sorted(layers))
        self._progress = progress
        self._through: dict[tuple[int, str], _Through] = {}

    @property
    def can_learn(self) -> bool:
        """Whether values learned once hold for all strengths, and there is text enough to learn from."""
        texts, direction = self._corpus.texts, self._direction
        return self._loaded.anatomy.residual_output and enough_text(
            texts[direction.source], texts[direction.target]
        )

    @cached_property
    def _whole(self) -> Plan:
        """Every module at the same share of strength 1."""
        return keyed_plan(
            self._loaded,
            self._corpus,
            self._direction,
            self.layers,
            1.0,
            progress=self._progress,
            blocks=BLOCKS,
        )

    @cached_property
    def _learned(self) -> Plan:
        """``_whole`` with values learned where all its modules write, at ``LEARNED_AT``."""
        texts, direction = self._corpus.texts, self._direction
        plan = self._whole.scaled(LEARNED_AT)
        found = learned_values(
            self._loaded, plan, texts[direction.source], texts[direction.target], progress=self._progress
        )
        return found.plan.scaled(1 / LEARNED_AT)

    def plan(self, layers: Sequence[int], heads: float, strength: float, learned: bool = False) -> Plan:
        """What ``keyed_plan`` makes of the same layers, up to the last bits of float32.

        Args:
            layers: that write, evenly.
            heads: share of the strength that ``o_proj`` writes, in [0, 1]; ``down_proj`` writes the rest.
                ``keyed_plan`` knows 0, 1/2 and 1.
            strength: of all together.
            learned: values learned once for all settings (``editing.methods.learned_values``), in place of
                the direction's.

        Raises:
            UsageError: values learned for a model with a norm behind its modules, which do not scale.
        """
        if learned and not self._loaded.anatomy.residual_output:
            raise UsageError(
                "values behind a norm are learned at one strength: --method keyed --set learn=yes"
            )
        whole = self._learned if learned else self._whole
        of_block = {"attn": heads, "mlp": 1 - heads}
        edits = []
        for edit in whole.edits:
            share = of_block[edit.block] / len(layers)
            if edit.layer not in layers or not share:
                continue
            if self._loaded.anatomy.residual_output:
                made = edit.scaled(share * strength * len(whole.edits))
            else:
                made = self._written_through(edit, share * strength)
            edits.append(replace(made, notes={**made.notes, "value_share": share}))
        settings = {
            **whole.metadata["settings"],
            "layers": list(layers),
            "blocks": [block for block in BLOCKS if of_block[block]],
            "heads": heads,
            "strength": strength,
        }
        return make_plan(edits, {**whole.metadata, "settings": settings})

    def _written_through(self, edit: ModuleEdit, strength: float) -> ModuleEdit:
        """The module's edit at a strength of its own, solved through the norm after it."""
        place = edit.layer, edit.block
        assert edit.right is not None
        key = edit.right[:, 0].double()
        if place not in self._through:
            batches = language_batches(self._loaded, self._corpus)[self._direction.source]
            tokens = source_tokens(self._loaded, *place, batches)
            norm = output_norm(self._loaded, *place, batches[0])
            self._through[place] = _Through(norm, tokens.outputs, tokens.inputs @ key)
        at = self._through[place]
        value = self._direction.vectors["block_out"][edit.layer] * strength
        found = value_through_norm(at.outputs, at.norm.gain, at.norm.eps, value, at.coefficients)
        notes = {
            **edit.notes,
            "change_norm": float(found.vector.norm() * key.norm()),
            "value_through_norm": found.through,
            "value_error": found.error,
        }
        return replace(edit, left=found.vector[:, None].float(), notes=notes)


@dataclass(frozen=True)
class _Through:
    """A module before a norm, on tokens of the source: outputs [T, d] and the key's coefficients [T]."""

    norm: OutputNorm
    outputs: torch.Tensor
    coefficients: torch.Tensor


class Importances:
    """Steer2Edit of one direction with any rho and alpha, from importances computed once.

    At rho 1 and alpha 0 a component's lambda is its importance g, so the plan made there holds, as
    right = g k, all that the elastic net needs.

    Args:
        loaded: the model.
        direction: from this model.
        layers: that may change; None allows all.
    """

    def __init__(
        self, loaded: LoadedModel, direction: Direction, layers: Sequence[int] | None = None
    ) -> None:
        self._loaded, self._direction = loaded, direction
        self._layers = tuple(range(loaded.anatomy.layers) if layers is None else sorted(layers))

    @cached_property
    def _whole(self) -> Plan:
        return steer2edit_plan(self._loaded, self._direction, self._layers, 1.0, 1.0, 0.0)

    def plan(self, heads_rho: float | None, neurons_rho: float | None, alpha: float) -> Plan:
        """What ``steer2edit_plan`` makes of the same, up to the last bits of float32.

        Raises:
            NothingToChangeError: no component passes the threshold.
        """
        edits = []
        for edit in self._whole.edits:
            rho = heads_rho if edit.block == "attn" else neurons_rho
            if rho is not None:
                edits += self._shrunk(edit, rho, alpha)
        if not edits:
            raise NothingToChangeError("Steer2Edit: no component's importance passes rho * alpha")
        settings = {
            **self._whole.metadata["settings"],
            "heads_rho": heads_rho,
            "neurons_rho": neurons_rho,
            "alpha": alpha,
        }
        return make_plan(edits, {**self._whole.metadata, "settings": settings})

    def _shrunk(self, edit: ModuleEdit, rho: float, alpha: float) -> list[ModuleEdit]:
        assert edit.right is not None
        importance = edit.details["g"]
        size = (importance.abs() - rho * alpha).clamp(min=0) / (rho * (1 - alpha))
        ratio = size / importance.abs()
        kept = ratio.nonzero()[:, 0]
        if not len(kept):
            return []
        components = torch.tensor(edit.components)
        width = self._loaded.anatomy.component_width(edit.block)
        of_all = torch.zeros(len(edit.right) // width, dtype=torch.float64)
        of_all[components] = ratio
        right = edit.right.double() * of_all.repeat_interleave(width)[:, None]
        details = {
            "g": importance[kept],
            "lambda": (importance * ratio)[kept],
            "c": (edit.details["c"] * ratio)[kept],
        }
        return [
            replace(
                edit,
                components=tuple(components[kept].tolist()),
                right=right.float(),
                details=details,
                notes={**edit.notes, "change_norm": float(right.norm())},
            )
        ]


class ConstantKeys:
    """A direction baked in after any layer at any strength, all layers' keys solved once.

    Args:
        loaded: the model.
        corpus: what keys are solved on.
        direction: from this model.
        layers: after which it may be baked; None allows all.
        progress: called with the number of tokens done.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        corpus: Corpus,
        direction: Direction,
        layers: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._loaded, self._corpus, self._direction = loaded, corpus, direction
        self.layers = tuple(range(loaded.anatomy.layers) if layers is None else sorted(layers))
        self._progress = progress

    @cached_property
    def _whole(self) -> Plan:
        """After every layer, which no trial does."""
        direction = self._direction
        return bake_plan(
            self._loaded,
            self._corpus,
            {layer: direction.vectors["block_out"][layer] for layer in self.layers},
            progress=self._progress,
            origin={
                "source": direction.source,
                "target": direction.target,
                "method": direction.metadata.get("method"),
            },
        )

    def plan(self, layer: int, strength: float) -> Plan:
        """What ``bake_plan`` makes of the same, up to the last bits of float32."""
        edits = [edit.scaled(strength) for edit in self._whole.edits if edit.layer == layer]
        settings = {**self._whole.metadata["settings"], "layers": [layer], "strength": strength}
        return make_plan(edits, {**self._whole.metadata, "settings": settings})


def keyed_space(keys: Keys) -> Space:
    """The keyed edit: what it writes, where and how much.

    Its other options made no difference or were worse (docs/keyed.md).
    """
    windows = {name: _window(keys.layers, *ends) for name, ends in LAYERS.items()}
    # Of a model of few layers several windows are the same.
    named = {name: own for name, own in windows.items() if own and own not in _before(windows, name)}

    def make(settings: Settings) -> Plan:
        return keys.plan(
            named[str(settings["layers"])],
            float(settings["heads"]),
            float(settings["strength"]),
            settings["values"] == LEARNED,
        )

    knobs = {
        "values": Knob(words=VALUES if keys.can_learn else VALUES[:1]),
        "heads": Knob(0.0, 1.0),
        "layers": Knob(words=tuple(named)),
        "strength": Knob(1.0, 4.5),
    }
    tried = (
        (LEARNED, 0.5, "all", 2.0),
        (LEARNED, 0.5, "all", 1.5),
        (MEANS, 0.5, "all", 2.0),
        (MEANS, 0.25, "upper 3/4", 2.25),
        (LEARNED, 0.5, "all", 2.5),
        (MEANS, 0.5, "all", 2.5),
        (MEANS, 0.25, "all", 1.75),
        (MEANS, 0.0, "all", 3.0),
    )
    known: tuple[Settings, ...] = tuple(
        {"values": values, "heads": heads, "layers": layers, "strength": strength}
        for values, heads, layers, strength in tried
        if layers in named and values in knobs["values"].words
    )
    return Space(knobs, known, make)


def steer2edit_space(importances: Importances) -> Space:
    """Steer2Edit; rho is absolute, so the range is that of importances, which are cosines."""
    heads, neurons = (("edits", (COMPONENTS[0], own)) for own in COMPONENTS[1:])

    def make(settings: Settings) -> Plan:
        rhos = [settings.get("heads_rho"), settings.get("neurons_rho")]
        heads_rho, neurons_rho = (None if rho is None else float(rho) for rho in rhos)
        return importances.plan(heads_rho, neurons_rho, float(settings["alpha"]))

    knobs = {
        "edits": Knob(words=COMPONENTS),
        "heads_rho": Knob(0.02, 2.0, log=True, given=heads),
        "neurons_rho": Knob(0.02, 2.0, log=True, given=neurons),
        "alpha": Knob(0.0, 0.9),
    }
    known: tuple[Settings, ...] = (
        {"edits": COMPONENTS[0], "heads_rho": 0.3, "neurons_rho": 0.9, "alpha": ALPHA},
        {"edits": COMPONENTS[0], "heads_rho": 0.1, "neurons_rho": 0.3, "alpha": 0.4},
        {"edits": COMPONENTS[2], "neurons_rho": 0.8, "alpha": 0.05},
    )
    return Space(knobs, known, make)


def bake_space(keys: ConstantKeys) -> Space:
    """DiffMean baked in after one layer."""

    def make(settings: Settings) -> Plan:
        return keys.plan(int(str(settings["layer"])), float(settings["strength"]))

    middle = keys.layers[len(keys.layers) // 3]
    knobs = {"layer": Knob(words=tuple(map(str, keys.layers))), "strength": Knob(0.25, 4.0, log=True)}
    known: tuple[Settings, ...] = tuple({"layer": str(middle), "strength": own} for own in (1.0, 2.0))
    return Space(knobs, known, make)


def _keyed(loaded: LoadedModel, corpus: Corpus, direction: Direction, layers: Any, progress: Any) -> Space:
    return keyed_space(Keys(loaded, corpus, direction, layers, progress))


def _steer2edit(
    loaded: LoadedModel, corpus: Corpus, direction: Direction, layers: Any, progress: Any
) -> Space:
    return steer2edit_space(Importances(loaded, direction, layers))


def _bake(loaded: LoadedModel, corpus: Corpus, direction: Direction, layers: Any, progress: Any) -> Space:
    return bake_space(ConstantKeys(loaded, corpus, direction, layers, progress))


METHODS: dict[str, Callable[[LoadedModel, Corpus, Direction, Any, Any], Space]] = {
    "keyed": _keyed,
    "steer2edit": _steer2edit,
    "bake": _bake,
}


def spaces(
    loaded: LoadedModel,
    corpus: Corpus,
    direction: Direction,
    methods: Sequence[str],
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> dict[str, Space]:
    """Each method's space; nothing is computed before a plan is asked for.

    Args:
        loaded: the model.
        corpus: the text that the direction is from, of all languages.
        direction: from source to target.
        methods: keys of ``METHODS``.
        layers: that may change; None allows all.
        progress: called with the number of tokens done.

    Raises:
        UsageError: no method, one that cannot be searched or that is named twice.
    """
    check_methods(methods)
    return {name: METHODS[name](loaded, corpus, direction, layers, progress) for name in methods}


def check_methods(methods: Sequence[str]) -> None:
    """
    Raises:
        UsageError: no method, one that cannot be searched or that is named twice.
    """
    if not methods or len(set(methods)) < len(methods):
        raise UsageError("methods: name at least one, each once")
    for name in methods:
        if name not in METHODS:
            raise UsageError(f"method {name!r} cannot be searched: choose from {', '.join(METHODS)}")


def _window(layers: Sequence[int], first: float, last: float) -> tuple[int, ...]:
    return tuple(layers[round(first * len(layers)) : round(last * len(layers))])


def _before(windows: Mapping[str, tuple[int, ...]], name: str) -> list[tuple[int, ...]]:
    names = list(windows)
    return [windows[other] for other in names[: names.index(name)]]
