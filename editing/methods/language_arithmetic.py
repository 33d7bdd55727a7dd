"""Language arithmetic in the weights (arXiv 2507.22608): deactivates languages' neurons, adds to another's their mean.

On s = act(gate) of chosen neurons, with m_j the mean of s_j on the target's text and o_j on another language's:

    deactivate     s_j <- fill           (0 or below)        neurons of deactivated languages
    additive       s_j <- s_j + strength m_j                 neurons of the target
    replacement    s_j <- strength m_j
    difference     s_j <- s_j + strength (m_j - o_j)

in this order, so the total is s_j <- c_j s_j + a_j with c_j in {0, 1}.  The input of down_proj is h_j = s_j in an MLP
without gates and h_j = s_j u_j in a gated one, with u the linear branch, so its output W h changes by

    W diag(c - 1) h + sum_j a_j u_j w_j          w_j column j of W; u_j = 1 without gates

The first term is an exact scale of columns.  Without gates the second is a constant, W a: exact as a bias, and in the
weights as accurate as the constant key.  In a gated MLP it varies between tokens with u, and the edit adds its mean
over the corpus,

    v = sum_j a_j mean(u_j) w_j              constant fraction = ||v||^2 / (||v||^2 + E ||sum_j a_j (u_j - mean) w_j||^2)

The constant fraction (note "constant_share") is the part of the published intervention that the edit can represent;
it is 1 without gates.  The edit also adds v on the start token, where a hook would use its u.  Scale and constant
form one plan, W' = W diag(c) + v k^T with k of ``editing.methods.bake``, or W' = W diag(c) and b' = b + v.  The edit
changes the output of down_proj before a norm, so models with a norm after it are supported.  In a mixture each expert
has a constant and a key of its own (``editing.methods.expert_arithmetic``), and means are over the tokens that reach it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from editing.methods.affine_neurons import Arithmetic, mean_shift
from editing.methods.bake import EPS, baked_edit, constant_keys, total_moments
from editing.methods.expert_arithmetic import expert_edits
from editing.methods.material import Material
from editing.methods.method import NEURON_METHODS, Method, Settings
from editing.methods.scope import require_neurons
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.architectures.anatomy import Anatomy
from neurons.architectures.sites import Routed, expert_units
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.recording.covariance import language_moments
from neurons.recording.text_pass import Position, numbered, read_text
from neurons.setting import Range, setting
from neurons.text.batches import TokenBatch, counted_tokens, language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import KEYS, MEANS

MODES = ("additive", "replacement", "difference")


def arithmetic(
    target_mean: torch.Tensor,
    other_mean: torch.Tensor,
    activated: torch.Tensor,
    deactivated: torch.Tensor,
    mode: str,
    strength: float,
    fill: float,
) -> Arithmetic:
    """The affine map of the module's docstring.

    Args:
        target_mean: [I], m.
        other_mean: [I], o; used by "difference".
        activated: bool [I].
        deactivated: bool [I]; a neuron in both is deactivated first.
        mode: one of ``MODES``.
        strength: multiplies the added mean.
        fill: value of deactivated neurons.

    Raises:
        UsageError: an unknown mode.
    """
    if mode not in MODES:
        raise UsageError(f"mode {mode!r} is unknown: choose from {', '.join(MODES)}")
    scale = torch.where(deactivated, 0.0, torch.ones_like(target_mean, dtype=torch.float64))
    offset = torch.where(deactivated, fill, torch.zeros_like(scale))
    added = strength * (target_mean - other_mean if mode == "difference" else target_mean).double()
    if mode == "replacement":
        return Arithmetic(torch.where(activated, 0.0, scale), torch.where(activated, added, offset))
    return Arithmetic(scale, torch.where(activated, offset + added, offset))


def _gate_activation(anatomy: Anatomy) -> str | None:
    """The config's attribute that names the gate's activation; None without gates.

    Raises:
        BrocaError: a gated MLP without one: the input of down_proj may be another function of gate and branch than s u.
    """
    if anatomy.gated and anatomy.layout.activation is None:
        raise BrocaError(
            f"{anatomy.model_type}: its config does not name the gate's activation, so s cannot be computed: use --method "
            "scale"
        )
    return anatomy.layout.activation if anatomy.gated else None


def activation_means(
    loaded: LoadedModel, batches: Mapping[str, Sequence[TokenBatch]], layers: Sequence[int]
) -> dict[int, dict[str, torch.Tensor]]:
    """Mean of s over the tokens of each language that reach the neuron: layer -> language -> float64 [I].

    Raises:
        BrocaError: a gated MLP without a known activation.
    """
    site, activation = "mlp_in", _identity
    if (name := _gate_activation(loaded.anatomy)) is not None:
        from transformers.activations import ACT2FN

        config = loaded.model.config.get_text_config()
        site, activation = "mlp_act", ACT2FN[getattr(config, name)]
    sums = {
        layer: {k: torch.zeros(loaded.anatomy.neurons, dtype=torch.float64) for k in batches}
        for layer in layers
    }
    tokens = {layer: {k: torch.zeros_like(total) for k, total in of.items()} for layer, of in sums.items()}
    languages = tuple(batches)

    def read(layer: int, values: torch.Tensor, routed: Routed | None, at: Position) -> None:
        units = slice(None) if routed is None else expert_units(loaded.anatomy, routed)
        rows = values.detach().flatten(0, -2)[at.positions(routed, values.device)]
        language = languages[at.language]
        sums[layer][language][units] += activation(rows).double().sum(0).cpu()
        tokens[layer][language][units] += len(rows)

    read_text(loaded, numbered(batches), {(site, layer): partial(read, layer) for layer in layers})
    return {
        layer: {k: total / tokens[layer][k].clamp(min=1) for k, total in of.items()}
        for layer, of in sums.items()
    }


def _identity(values: torch.Tensor) -> torch.Tensor:
    return values


def _shifts(
    material: Material, maps: Mapping[int, Arithmetic]
) -> tuple[dict[int, torch.Tensor], dict[int, float]]:
    """The constant of each layer with an offset, and its constant fraction."""
    units = {
        layer: affine.offset.nonzero()[:, 0] for layer, affine in maps.items() if bool(affine.offset.any())
    }
    if not units:
        return {}, {}
    loaded = material.loaded
    weights, shifts, fractions = Weights(loaded), {}, {}
    batches = language_batches(loaded, material.text, default=MEANS.tokens)
    tokens = torch.tensor([counted_tokens(of_language) for of_language in batches.values()])
    named = ("moments", *((layer, *index.tolist()) for layer, index in units.items()))
    moments = {}
    if loaded.anatomy.gated:
        moments = material.once(
            named, lambda: language_moments(loaded, batches, "mlp_up", units, material.progress)
        )
    for layer, index in units.items():
        if loaded.anatomy.gated:
            mean, covariance = total_moments(moments[layer], tokens)
        else:
            mean = torch.ones(len(index), dtype=torch.float64)
            covariance = torch.zeros(len(index), len(index), dtype=torch.float64)
        values = weights.read(layer, "mlp")[:, index]
        shift, fractions[layer] = mean_shift(values, maps[layer].offset[index], mean, covariance)
        if bool(shift.any()):
            shifts[layer] = shift
    return shifts, fractions


def _mask(neurons: NeuronSet, languages: Sequence[str]) -> torch.Tensor:
    """bool [L, I]: neurons of any of the languages.

    Raises:
        BrocaError: a language without neurons.
    """
    mask = torch.zeros(neurons.layers, neurons.neurons, dtype=torch.bool)
    for language in languages:
        rows = neurons.of(language)
        if not len(rows):
            raise BrocaError(f"the neuron set has no neuron for {language}: choose another method or rate")
        mask[rows[:, 0], rows[:, 1]] = True
    return mask


@dataclass(frozen=True, kw_only=True)
class ArithmeticEdit(Method):
    """The registered method."""

    name = "language-arithmetic"
    line = "deactivates one language's neurons and raises another's by its mean"
    source = "arXiv 2507.22608"
    needs = ("neurons", "corpus")
    solves_keys = True
    takes = ("part", "strength", "device", "dtype")

    strength: float = setting(1.0, search=Range(0.25, 8.0, log=True))
    target: str | None = setting(None, "language whose neurons are raised")
    deactivate: tuple[str, ...] = setting((), "languages whose neurons are deactivated")
    mode: str = setting("additive", "operation on the target's neurons", words=MODES, search_words=True)
    other: str | None = setting(
        None, "mode difference: language whose mean is subtracted; the deactivated one"
    )
    fill: float = setting(0.0, "value of deactivated neurons, 0 or below")
    as_bias: bool = setting(False, "add the constant as a bias, if the architecture supports one")
    eps: float = setting(EPS, "ridge, as a fraction of the mean variance")

    @classmethod
    def of(cls, material: Material, settings: Settings) -> ArithmeticEdit:
        source, target = material.pair
        return cls(target=target, deactivate=(source,), **settings)

    def key_widths(self, anatomy: Anatomy, modules: Sequence[str]) -> list[int]:
        groups = [anatomy.expert_width] * anatomy.experts
        return groups if anatomy.mixed else super().key_widths(anatomy, modules)

    def prepare(self, material: Material) -> Plan:
        """The plan at this strength, which does not scale to others because deactivation does not.

        Returns:
            A plan with an edit for each layer with such neurons; notes "constant_share" and, for a constant in the
            weights, those of ``bake_plan``; details "scale" and "offset" of the neurons.

        Raises:
            UsageError: neither target nor languages to deactivate, an unknown mode or language, "difference" without
                another language, a strength of 0, or a fill above 0.
            BrocaError: a language without neurons, ``as_bias`` without support for a bias, or a constant (of a target
                or a fill below 0) in gated MLPs without a known activation.
        """
        neurons = material.identified(NEURON_METHODS[1]) if material.studied else material.neuron_set
        loaded, corpus, target, other = material.loaded, material.text, self.target, self.other
        self._check(loaded, corpus, neurons)
        if self.mode == "difference":
            other = other or (self.deactivate[0] if len(self.deactivate) == 1 else None)
            if other not in corpus.languages or other == target:
                raise UsageError(
                    "mode difference needs another language of the corpus, whose mean is subtracted: give --set other=..."
                )
        targets = [] if target is None else [target]
        on, off = _mask(neurons, targets), _mask(neurons, self.deactivate)
        layers = (on | off).any(1).nonzero()[:, 0].tolist()

        def activations() -> dict[int, dict[str, torch.Tensor]]:
            return activation_means(loaded, language_batches(loaded, corpus, default=MEANS.tokens), layers)

        means = {} if target is None else material.once(("activation means", *layers), activations)
        zeros = torch.zeros(loaded.anatomy.neurons, dtype=torch.float64)
        maps = {
            layer: arithmetic(
                means[layer][target] if target is not None else zeros,
                means[layer][other] if self.mode == "difference" and other is not None else zeros,
                on[layer],
                off[layer],
                self.mode,
                self.strength,
                self.fill,
            )
            for layer in layers
        }
        if loaded.anatomy.mixed:
            edits = expert_edits(
                loaded,
                maps,
                language_batches(loaded, corpus, default=MEANS.tokens),
                language_batches(loaded, corpus, default=KEYS.tokens),
                self.eps,
                material.progress,
            )
        else:
            edits = self._edits(material, maps, on | off)
        settings = {
            "target": target,
            "deactivate": list(self.deactivate),
            "mode": self.mode,
            "other": other,
            "strength": self.strength,
            "fill": self.fill,
            "as_bias": self.as_bias,
            "eps": self.eps,
            "neurons": neurons.metadata.get("method"),
            "corpus": corpus.provenance,
        }
        languages = list(dict.fromkeys([*self.deactivate, *targets]))
        return make_plan(edits, plan_metadata(loaded, self.name, settings, {"languages": languages}))

    def _check(self, loaded: LoadedModel, corpus: Corpus, neurons: NeuronSet) -> None:
        anatomy = loaded.anatomy
        require_neurons(loaded, neurons)
        if self.target is None and not self.deactivate:
            raise UsageError("name a target language, or languages to deactivate")
        if self.target is not None:
            corpus.require(self.target)
        if self.mode not in MODES:
            raise UsageError(f"mode {self.mode!r} is unknown: choose from {', '.join(MODES)}")
        if not math.isfinite(self.strength) or (self.strength == 0 and self.target is not None):
            raise UsageError(f"strength {self.strength}: give a finite number other than 0")
        if not -math.inf < self.fill <= 0:
            raise UsageError(f"fill is {self.fill}: it must be finite and not above 0")
        if self.target is not None or self.fill:
            _gate_activation(anatomy)
        if self.as_bias and not anatomy.supports_bias("mlp"):
            raise BrocaError(
                f"{anatomy.model_type}: its MLP has no bias, and its config has no setting for a bias that serving "
                "engines support: leave --set as_bias=yes out"
            )

    def _edits(
        self, material: Material, maps: Mapping[int, Arithmetic], chosen: torch.Tensor
    ) -> list[ModuleEdit]:
        """The edits of a dense model; ``chosen`` are the neurons of the maps, bool [L, I]."""
        loaded, corpus = material.loaded, material.text
        shifts, fractions = _shifts(material, maps)
        shifted = sorted(shifts)
        keys = {}
        if shifts and not self.as_bias:
            keys = material.once(
                ("constant keys", self.eps, *shifted),
                lambda: constant_keys(loaded, corpus, shifted, self.eps),
            )
        weights = Weights(loaded)
        edits = []
        for layer, affine in maps.items():
            scaled = None if bool((affine.scale == 1).all()) else affine.scale
            neurons = chosen[layer].nonzero()[:, 0]
            if layer in keys:
                edit = baked_edit(loaded, layer, "mlp", shifts[layer], keys[layer], corpus.languages, scaled)
            elif scaled is None and layer not in shifts:
                continue
            else:
                weight = weights.read(layer, "mlp")
                edit = ModuleEdit(
                    layer=layer,
                    block="mlp",
                    components=(),
                    column_scale=None if scaled is None else scaled.float(),
                    bias=shifts[layer].float() if layer in shifts else None,
                    notes={
                        "change_norm": float((weight * (affine.scale - 1)).norm()),
                        "weight_norm": float(weight.norm()),
                    },
                )
            notes = {**edit.notes, **({"constant_share": fractions[layer]} if layer in fractions else {})}
            # A key uses all neurons; without one only the chosen ones change.
            components = edit.components if layer in keys else tuple(neurons.tolist())
            index = torch.tensor(components)
            details = {"scale": affine.scale[index], "offset": affine.offset[index]}
            edits.append(replace(edit, components=components, notes=notes, details=details))
        return edits
