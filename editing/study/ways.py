"""All ways of steering by name: what each may be told, and the candidate that it makes of one model's text.

Everything is estimated on one part of the corpus (``Material``), once, whichever ways ask for it.  Grids
are small and stand here: settings as published where there are any, scaled to multiples of what was
measured where those of the paper are for another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from editing.directions.diffmean import diffmean_direction
from editing.directions.direction import Direction
from editing.directions.take import direction_of
from editing.evaluation.instructions import instructions
from editing.hooks.austeer import Austeer
from editing.hooks.clas import Clas
from editing.hooks.language_arithmetic import LanguageArithmetic
from editing.hooks.residual import ResidualDiffMean
from editing.hooks.subspace_removal import SubspaceRemoval, middle_layers, top_layers
from editing.methods.austeer import CHANNELS, corpus_rates
from editing.methods.bake import bake_plan
from editing.methods.directional_ablation import directional_ablation_plan
from editing.methods.keyed import keyed_plan
from editing.methods.language_arithmetic import MODES, activation_means
from editing.methods.learned_values import LEARNED_AT, learned_values
from editing.methods.scale import scale_plan
from editing.methods.steer2edit import steer2edit_plan
from editing.plans.algebra import compose
from editing.plans.live import applied
from editing.plans.plan import Plan
from editing.study.comparison import (
    HOOK,
    HOOK_STRENGTHS,
    KEYED,
    STEER2EDIT,
    STEER2EDIT_SETTINGS,
    Candidate,
    hook_layers,
)
from neurons.architectures.anatomy import BLOCKS
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel
from neurons.neuron_sets.identify import identify
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.recording.corpus_recording import record_corpus
from neurons.scorers.clas import clas_classes
from neurons.scorers.momentum import MomentumRates
from neurons.scorers.registry import TEXTS
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import MEANS

Settings = dict[str, Any]
# The published method of finding neurons, and Broca's.
NEURON_METHODS = ("lape", "gradient-contrast")
# (strength, blocks): where keys over heads and neurons together reach as far as neurons alone do at more.
LEARNED_STRENGTHS = (1.5, 2.0, 2.5)
KEYED_SETTINGS = ((3.5, ("mlp",)), (2.0, ("attn", "mlp")), (2.5, ("attn", "mlp")))
ARITHMETIC_STRENGTHS = (1.0, 3.0)
CLAS_STRENGTHS = (-5.0, -2.0, 2.0, 5.0)
AUSTEER_ALPHAS = (1.0, 2.0, 4.0)
REMOVAL_STRENGTHS = (0.2, 0.5, 1.0)
ABLATION_STRENGTHS = (1.0, 2.0, -1.0)
# Within a few neurons only the published settings with the lowest thresholds rho * alpha leave much to edit.
MOST_THRESHOLD = 0.2
# Factors of the source's and of the target's neurons; 1 leaves them alone.
SCALE_FACTORS = ((0.0, 1.0), (1.0, 3.0), (0.0, 3.0), (0.0, 6.0))


@dataclass(frozen=True)
class Material:
    """What the ways are made of, each part taken when it is first asked for.

    Attributes:
        loaded: the unedited model.
        corpus: the text to estimate from.
        source, target: languages.
    """

    loaded: LoadedModel
    corpus: Corpus
    source: str
    target: str
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def direction(self) -> Direction:
        return diffmean_direction(self.loaded, self.corpus, self.source, self.target)

    @cached_property
    def subspace(self) -> Direction:
        return direction_of(self.loaded, self.corpus, self.source, self.target, "language-subspace")

    @cached_property
    def classes(self) -> torch.Tensor:
        """int64 [L, I], CLAS's classes."""
        recorded = record_corpus(self.loaded, self.corpus, ["mlp_in:text_mean"], TEXTS)
        return clas_classes(recorded.text_mean("mlp_in"))

    @cached_property
    def rates(self) -> dict[str, MomentumRates]:
        return corpus_rates(self.loaded, self.corpus, self.source, self.target)

    @cached_property
    def means(self) -> dict[str, torch.Tensor]:
        """Language -> float64 [L, I], mean of s = act(gate) on source and target."""
        batches = language_batches(self.loaded, self.corpus, default=MEANS.tokens)
        wanted = {language: batches[language] for language in (self.source, self.target)}
        found = activation_means(self.loaded, wanted, range(self.loaded.anatomy.layers))
        return {
            language: torch.stack([found[layer][language] for layer in sorted(found)]) for language in wanted
        }

    def neurons(self, method: str) -> NeuronSet:
        found: NeuronSet = self._once(("neurons", method), lambda: identify(self.loaded, self.corpus, method))
        return found

    def mask(self, method: str, language: str) -> torch.Tensor:
        """bool [L, I], the language's neurons.

        Raises:
            BrocaError: it has none.
        """
        found = self.neurons(method)
        rows = found.of(language)
        if not len(rows):
            raise BrocaError(f"{method} finds no neuron for {language} in this model")
        mask = torch.zeros(found.layers, found.neurons, dtype=torch.bool)
        mask[rows[:, 0], rows[:, 1]] = True
        return mask

    def keyed(self, strength: float, blocks: Sequence[str]) -> Plan:
        """The keyed edit; its keys are solved once where the strength only scales it."""
        make = partial(keyed_plan, self.loaded, self.corpus, self.direction, blocks=tuple(blocks))
        if not self.loaded.anatomy.residual_output:
            return make(strength=strength)
        whole: Plan = self._once(("keyed", tuple(blocks)), lambda: make(strength=1.0))
        return whole.scaled(strength)

    def learned(self, strength: float) -> Plan:
        """The keyed edit over heads and neurons with learned values, learned once where they scale."""
        at = LEARNED_AT if self.loaded.anatomy.residual_output else strength
        texts = self.corpus.texts
        found: Plan = self._once(
            ("learned", at),
            lambda: (
                learned_values(
                    self.loaded, self.keyed(at, BLOCKS), texts[self.source], texts[self.target]
                ).plan
            ),
        )
        return found.scaled(strength / at)

    def baked(self, layer: int, strength: float) -> Plan:
        """DiffMean baked into a layer; the key is solved once."""
        vector = {layer: self.direction.vectors["block_out"][layer]}
        origin = {"source": self.source, "target": self.target, "method": "diffmean"}
        whole: Plan = self._once(
            ("baked", layer), lambda: bake_plan(self.loaded, self.corpus, vector, origin=origin)
        )
        return whole.scaled(strength)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


@dataclass(frozen=True)
class Way:
    """One way of steering.

    Attributes:
        title: its row in a table.
        line: what it does, in a line.
        source: where it was published.
        permanent: whether it is in the weights.
        grid: the settings that are tried.
        make: the candidate of one of them.
        strength: the setting that says how strongly a hook steers; None: there is none, or the whole plan is scaled.
    """

    title: str
    line: str
    source: str
    permanent: bool
    grid: Callable[[Material], Sequence[Settings]]
    make: Callable[[Material, Settings], Candidate]
    strength: str | None = None


def ways_named(names: Sequence[str]) -> dict[str, Way]:
    """Ways by name, in the order of ``WAYS``; "all" is all of them.

    Raises:
        UsageError: an unknown name.
    """
    unknown = [name for name in names if name not in WAYS and name != "all"]
    if unknown:
        raise UsageError(f"method {unknown[0]!r} is unknown: choose from all, {', '.join(WAYS)}")
    return {name: way for name, way in WAYS.items() if name in names or "all" in names}


def candidates_of(way: Way, material: Material) -> tuple[list[Candidate], list[Settings]]:
    """A way's candidates, and the settings that it refuses here with the reason."""
    found, refused = [], []
    for settings in way.grid(material):
        try:
            found.append(way.make(material, settings))
        except BrocaError as error:
            refused.append({"name": way.title, "settings": settings, "refused": str(error)})
    return found, refused


def _edit(title: str, material: Material, settings: Settings, plan: Plan) -> Candidate:
    return Candidate(title, settings, plan, partial(applied, material.loaded, plan))


def _prompting(title: str, in_target: bool) -> Way:
    def grid(material: Material) -> list[Settings]:
        found = instructions(material.source, material.target)
        chosen = [k for k in found if (k == material.target) == in_target]
        return [{"language": k, "instruction": found[k]} for k in chosen]

    def make(_: Material, settings: Settings) -> Candidate:
        return Candidate(title, settings, None, nullcontext, settings["instruction"])

    where = "target" if in_target else "source"
    return Way(title, f"asked to, in the {where} language", "arXiv 2601.08331", False, grid, make)


def _diffmean_grid(material: Material) -> list[Settings]:
    return [
        {"layer": layer, "strength": strength}
        for layer in hook_layers(material.loaded.anatomy.layers)
        for strength in HOOK_STRENGTHS
    ]


def _diffmean(material: Material, settings: Settings) -> Candidate:
    vector = material.direction.vectors["block_out"][settings["layer"]]
    return Candidate(HOOK, settings, None, ResidualDiffMean(material.loaded, vector, **settings))


def _arithmetic(mode: str) -> Way:
    title = f"language arithmetic, {mode}"

    def grid(_: Material) -> list[Settings]:
        return [
            {"neurons": method, "strength": strength}
            for method in NEURON_METHODS
            for strength in ARITHMETIC_STRENGTHS
        ]

    def make(material: Material, settings: Settings) -> Candidate:
        if material.loaded.anatomy.mixed:
            raise BrocaError("the neurons of experts are not raised by their means")
        off, on = (
            material.mask(settings["neurons"], language) for language in (material.source, material.target)
        )
        steering = LanguageArithmetic(
            material.loaded,
            material.means[material.target],
            material.means[material.source],
            on,
            off,
            mode,
            settings["strength"],
        )
        return Candidate(title, settings, None, steering)

    line = "the source's neurons off, the target's raised"
    return Way(title, line, "arXiv 2507.22608", False, grid, make, "strength")


def _clas(material: Material, settings: Settings) -> Candidate:
    return Candidate(
        WAYS["clas"].title, settings, None, Clas(material.loaded, material.classes, settings["strength"])
    )


def _austeer(material: Material, settings: Settings) -> Candidate:
    steering = Austeer(material.loaded, material.rates, settings["channels"], settings["alpha"])
    with steering():  # refuses here what it would refuse while it is measured
        pass
    return Candidate(WAYS["austeer"].title, settings, None, steering)


def _removal(material: Material, settings: Settings) -> Candidate:
    depth, strength = material.loaded.anatomy.layers, float(settings["strength"])
    middle, top = middle_layers(depth), top_layers(depth)
    strengths = {layer: strength if layer in middle else -strength for layer in (*middle, *top)}
    steering = SubspaceRemoval(material.loaded, material.subspace, strengths)
    return Candidate(WAYS["subspace-removal"].title, settings, None, steering)


def _keyed(material: Material, settings: Settings) -> Candidate:
    return _edit(KEYED, material, settings, material.keyed(settings["strength"], settings["blocks"]))


def _learned(material: Material, settings: Settings) -> Candidate:
    return _edit(WAYS["keyed-learned"].title, material, settings, material.learned(settings["strength"]))


def _steer2edit(title: str, neurons: str | None) -> Way:
    def grid(_: Material) -> list[Settings]:
        return [
            {"heads_rho": heads, "neurons_rho": of_neurons, "alpha": alpha}
            for heads, of_neurons, alpha in STEER2EDIT_SETTINGS
            if neurons is None or (of_neurons is not None and of_neurons * alpha < MOST_THRESHOLD)
        ]

    def make(material: Material, settings: Settings) -> Candidate:
        chosen = None
        if neurons is not None:
            for language in (material.source, material.target):
                material.mask(neurons, language)
            chosen = material.neurons(neurons)
        plan = steer2edit_plan(
            material.loaded,
            material.direction,
            range(material.loaded.anatomy.layers),
            **settings,
            neurons=chosen,
            languages=None if chosen is None else (material.source, material.target),
        )
        return _edit(title, material, settings, plan)

    line = "the direction in every head and neuron that it concerns"
    within = "" if neurons is None else f", neurons of {neurons} only"
    return Way(title, line + within, "arXiv 2602.09870", True, grid, make)


def _ablate(material: Material, settings: Settings) -> Candidate:
    site = "block_out" if material.loaded.anatomy.residual_output else "own"
    plan = directional_ablation_plan(
        material.loaded, material.direction, site=site, strength=settings["strength"]
    )
    return _edit(WAYS["ablate"].title, material, settings, plan)


def _bake(material: Material, settings: Settings) -> Candidate:
    return _edit(
        WAYS["bake"].title, material, settings, material.baked(settings["layer"], settings["strength"])
    )


def _scale(material: Material, settings: Settings) -> Candidate:
    found = material.neurons(settings["neurons"])
    plans = [
        scale_plan(material.loaded, found, (language,), settings[whose])
        for language, whose in ((material.source, "source_factor"), (material.target, "target_factor"))
        if settings[whose] != 1
    ]
    plan = plans[0] if len(plans) == 1 else compose(plans, material.loaded)
    return _edit(WAYS["scale"].title, material, settings, plan)


def _one(name: str, values: Sequence[float], **fixed: Any) -> Callable[[Material], list[Settings]]:
    return lambda _: [{name: value, **fixed} for value in values]


WAYS: Mapping[str, Way] = {
    "prompt-source": _prompting("prompt, source language", in_target=False),
    "prompt-target": _prompting("prompt, target language", in_target=True),
    "diffmean": Way(
        HOOK,
        "h += strength v after a layer",
        "arXiv 2601.08331",
        False,
        _diffmean_grid,
        _diffmean,
        "strength",
    ),
    **{f"arithmetic-{mode}": _arithmetic(mode) for mode in MODES},
    "clas": Way(
        "CLAS hook",
        "shared neurons up, specific ones down, in the last layers",
        "arXiv 2601.16390",
        False,
        _one("strength", CLAS_STRENGTHS),
        _clas,
        "strength",
    ),
    "austeer": Way(
        "AUSteer hook",
        "the channels that tell translations apart, scaled",
        "arXiv 2602.04428",
        False,
        _one("alpha", AUSTEER_ALPHAS, channels=CHANNELS),
        _austeer,
        "alpha",
    ),
    "subspace-removal": Way(
        "subspace removal hook",
        "the languages' subspace out in middle layers, back in the top ones",
        "arXiv 2505.15257",
        False,
        _one("strength", REMOVAL_STRENGTHS),
        _removal,
        "strength",
    ),
    "keyed": Way(
        KEYED,
        "speaks only where the source language is read",
        "Broca",
        True,
        lambda _: [{"strength": strength, "blocks": list(blocks)} for strength, blocks in KEYED_SETTINGS],
        _keyed,
    ),
    "keyed-learned": Way(
        "keyed edit, learned values",
        "what it writes makes the target's text follow the source's",
        "Broca",
        True,
        _one("strength", LEARNED_STRENGTHS),
        _learned,
    ),
    "steer2edit": _steer2edit(STEER2EDIT, None),
    "steer2edit-lape": _steer2edit("Steer2Edit in LAPE neurons", "lape"),
    "steer2edit-gradient": _steer2edit("Steer2Edit in gradient neurons", "gradient-contrast"),
    "ablate": Way(
        "directional ablation",
        "the direction out of what blocks write; below 0 amplifies",
        "arXiv 2406.11717",
        True,
        _one("strength", ABLATION_STRENGTHS),
        _ablate,
    ),
    "bake": Way("baked DiffMean", "the hook's vector at every token", "Broca", True, _diffmean_grid, _bake),
    "scale": Way(
        "neuron scaling",
        "the source's neurons times a factor, the target's times another",
        "exact fold",
        True,
        lambda _: [
            {"neurons": NEURON_METHODS[1], "source_factor": source, "target_factor": target}
            for source, target in SCALE_FACTORS
        ],
        _scale,
    ),
}
