"""Steer2Edit (arXiv 2602.09870): turns a direction into rank-1 edits of the heads and neurons that write it.

A component i of a module is a head's slice W_i [d, D] of o_proj or a neuron's column [d, 1] of down_proj.
With v the direction at the module's output, v^ = v / ||v||, and mu_i the component's mean input:

    g_i      = cos(v, W_i mu_i)                                      (0 where W_i mu_i = 0)
    lambda_i = sign(g_i) max(|g_i| - rho*alpha, 0) / (rho*(1 - alpha))
    k_i      = W_i^T v^ / ||W_i^T v^||
    W_i'     = W_i + lambda_i v^ k_i^T  =  (I + c_i v^ v^^T) W_i,    c_i = lambda_i / ||W_i^T v^||

All components of a module share v^, so the module's whole edit has rank 1.

For a neuron g_j = sign(mu_j) cos(v, w_j), which ignores the size of its activity.  With ``weigh="activity"`` Broca
multiplies g_j by min(1, |mu_j| / rms), with rms the root mean square of mu over the layer's neurons, before the
elastic net.  The factor is not relative to the largest |mu_j|: in language models single neurons are a hundred times
as active as the rest, and no other g would exceed the threshold.  It is at most 1, so that g stays in the range of
the cosine for which rho and alpha are chosen: neurons of ordinary activity are edited as published, inactive ones
less or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from editing.directions.direction import Direction
from editing.methods.material import Material
from editing.methods.method import NEURON_METHODS, Knob, Method, Settings
from editing.methods.scope import chosen_layers, require_neurons, require_strength, vector_at
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.errors import BrocaError, NothingToChangeError, UsageError
from neurons.models.source import ModelSource
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.setting import Range, setting

# One of the published settings (rho of heads, rho of neurons, alpha).  The thresholds are absolute, so settings do
# not transfer between models.
HEADS_RHO, NEURONS_RHO, ALPHA = 0.3, 0.9, 0.2
WEIGHTINGS = ("sign", "activity")
# (rho of heads, rho of neurons, alpha): the best published settings for several models; None is off.
PUBLISHED = (
    (0.18, 0.55, 0.8),
    (0.42, 0.55, 0.75),
    (0.3, None, 0.9),
    (0.1, 0.3, 0.4),
    (None, 0.8, 0.05),
    (0.3, 0.9, 0.2),
)
MAX_THRESHOLD = 0.2
EDITS = ("heads and neurons", "heads", "neurons")


@dataclass(frozen=True)
class Components:
    """The components of one module relative to the direction, independent of rho and alpha.

    Attributes:
        importance: float64 [C], g, weighted.
        key_norms: float64 [C], ||W_i^T v^||.
        unit_keys: float64 [C, D], k_i; 0 if W_i^T v^ = 0.
        left: float64 [d], v^.
        weight_norm: ||W||.
    """

    importance: torch.Tensor
    key_norms: torch.Tensor
    unit_keys: torch.Tensor
    left: torch.Tensor
    weight_norm: float


@dataclass(frozen=True)
class ComponentEdits:
    """Steer2Edit of one module.

    Attributes:
        importance: float64 [C], g, weighted.
        magnitude: float64 [C], lambda.
        amplification: float64 [C], c (0 if lambda is 0); below -1 the direction is reversed.
        left: float64 [d], v^.
        right: float64 [n], the components' lambda_i k_i, concatenated.
    """

    importance: torch.Tensor
    magnitude: torch.Tensor
    amplification: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor


def components_of(
    weight: torch.Tensor,
    direction: torch.Tensor,
    input_mean: torch.Tensor,
    component_width: int,
    weigh: str = "sign",
) -> Components:
    """The components of one output weight.

    Args:
        weight: [d, n], n = C * component_width.
        direction: [d], v at the module's output, of any length but 0.
        input_mean: [n], mu.
        component_width: D for heads, 1 for neurons.
        weigh: "sign" as published, or "activity" (only for neurons).

    Raises:
        UsageError: an unknown weighting, or heads weighted by activity.
        BrocaError: a direction of length 0.
    """
    _require_weighting(weigh)
    if weigh == "activity" and component_width != 1:
        raise UsageError("only neurons can be weighted by activity: the g of heads already includes it")
    d, n = weight.shape
    slices = weight.double().view(d, n // component_width, component_width)
    length = direction.double().norm()
    if not length > 0:
        raise BrocaError("the direction has length 0")
    unit = direction.double() / length
    outputs = torch.einsum("dcw,cw->cd", slices, input_mean.double().view(-1, component_width))
    norms = outputs.norm(dim=1)
    importance = torch.where(norms > 0, (outputs @ unit) / norms, 0.0)
    if weigh == "activity":
        importance = importance * relative_activity(input_mean)
    keys = torch.einsum("dcw,d->cw", slices, unit)
    key_norms = keys.norm(dim=1)
    unit_keys = torch.where((key_norms > 0)[:, None], keys / key_norms[:, None], 0.0)
    return Components(importance, key_norms, unit_keys, unit, float(weight.norm()))


def elastic_net(components: Components, rho: float, alpha: float) -> ComponentEdits:
    """The edit of a module's components.

    Raises:
        UsageError: rho or alpha out of range.
    """
    if not rho > 0:
        raise UsageError(f"rho is {rho}: it must be above 0")
    if not 0 <= alpha < 1:
        raise UsageError(f"alpha is {alpha}: it must be in [0, 1)")
    importance = components.importance
    shrunk = (importance.abs() - rho * alpha).clamp(min=0)
    magnitude = importance.sign() * shrunk / (rho * (1 - alpha))
    # A component with W_i^T v^ = 0 has no key and is not edited.
    has_key = components.key_norms > 0
    magnitude = torch.where(has_key, magnitude, 0.0)
    return ComponentEdits(
        importance=importance,
        magnitude=magnitude,
        amplification=torch.where(has_key, magnitude / components.key_norms, 0.0),
        left=components.left,
        right=(magnitude[:, None] * components.unit_keys).flatten(),
    )


def relative_activity(input_mean: torch.Tensor) -> torch.Tensor:
    """min(1, |mu_j| / rms of mu), float64 [I]; 0 if no neuron of the layer is active.

    Args:
        input_mean: [I], mu.
    """
    size = input_mean.double().abs()
    rms = size.square().mean().sqrt()
    return (size / rms).clamp(max=1) if rms > 0 else torch.zeros_like(size)


def _require_weighting(weigh: str) -> None:
    if weigh not in WEIGHTINGS:
        raise UsageError(f"weighting {weigh!r} is unknown: choose from {', '.join(WEIGHTINGS)}")


def steer2edit_plan(
    source: ModelSource,
    direction: Direction,
    layers: Sequence[int],
    heads_rho: float | None = HEADS_RHO,
    neurons_rho: float | None = NEURONS_RHO,
    alpha: float = ALPHA,
    strength: float = 1.0,
    neurons: NeuronSet | None = None,
    languages: Sequence[str] | None = None,
    weigh: str = "sign",
    components: Callable[[int, str], Components] | None = None,
) -> Plan:
    """A plan from a direction; no forward pass.

    Args:
        source: the model.
        direction: a direction with vectors at ``attn_out`` and ``mlp_out`` and means at ``attn_in`` and ``mlp_in``.
        layers: layers to edit.
        heads_rho: rho of heads; None does not edit heads.
        neurons_rho: rho of neurons; None does not edit neurons.
        alpha: in [0, 1).
        strength: multiplies every lambda.
        neurons: only these neurons may change; heads are not restricted.
        languages: languages of ``neurons`` to use; None takes all.
        weigh: weighting of neurons, "sign" as published or "activity".
        components: (layer, module) -> cached result of ``read_components`` for the same direction and weighting; None
            reads the weights.

    Raises:
        UsageError: rho or alpha out of range, a strength of 0, an unknown layer, heads and neurons both off,
            languages without a neuron set or that it does not have, an unknown weighting, or a direction without
            the needed vectors and means.
        BrocaError: the neuron set has no neuron of one of ``languages`` in these layers.
        NothingToChangeError: no component exceeds the threshold.
    """
    _require_weighting(weigh)
    require_strength(strength)
    if heads_rho is None and neurons_rho is None:
        raise UsageError("heads and neurons are both off: give --heads-rho or --neurons-rho")
    if languages is not None and neurons is None:
        raise UsageError("languages select neurons of a set: give --neurons")
    if neurons is not None and neurons_rho is None:
        raise UsageError("neurons are off, so --neurons has no effect: leave it out, or give --neurons-rho")
    if weigh != "sign" and neurons_rho is None:
        raise UsageError(f"neurons are off, so they cannot be weighted by {weigh}: give --neurons-rho")
    direction.require_model(source)
    chosen_layers(source, layers)
    allowed = None if neurons is None else _allowed(source, neurons, languages, layers)
    if components is None:
        components = partial(read_components, source, direction, weigh)
    edits = []
    for layer in layers:
        for module, rho in (("attn", heads_rho), ("mlp", neurons_rho)):
            if rho is None or not source.anatomy.has(layer, module):
                continue
            of_module = components(layer, module)
            solved = elastic_net(of_module, rho, alpha)
            magnitude, right = solved.magnitude * strength, solved.right * strength
            if module == "mlp" and allowed is not None:
                own = allowed[layer, : len(right)]
                magnitude, right = magnitude * own, right * own
            chosen = magnitude.nonzero()[:, 0]
            if len(chosen):
                edits.append(
                    ModuleEdit(
                        layer=layer,
                        block=module,
                        components=tuple(chosen.tolist()),
                        left=solved.left[:, None].float(),
                        right=right[:, None].float(),
                        details={
                            "g": solved.importance[chosen],
                            "lambda": magnitude[chosen],
                            "c": solved.amplification[chosen] * strength,
                        },
                        notes={
                            "change_norm": float(right.norm()),
                            "weight_norm": of_module.weight_norm,
                        },
                    )
                )
    if not edits:
        raise NothingToChangeError(
            "Steer2Edit: no component's importance exceeds rho * alpha: lower rho or alpha, or allow more "
            "layers or neurons"
        )
    settings: dict[str, Any] = {
        "layers": list(layers),
        "heads_rho": heads_rho,
        "neurons_rho": neurons_rho,
        "alpha": alpha,
        "strength": strength,
        "neurons": None if neurons is None else neurons.metadata.get("method"),
    }
    # Written only if they differ from the published edit, so that its file does not depend on them.
    if languages is not None:
        settings["languages"] = list(languages)
    if weigh != "sign":
        settings["weigh"] = weigh
    return make_plan(edits, plan_metadata(source, "steer2edit", settings, direction.provenance))


def read_components(
    source: ModelSource, direction: Direction, weigh: str, layer: int, module: str
) -> Components:
    """The components of a module of a layer.

    Raises:
        UsageError: a direction without the needed vectors or means.
        BrocaError: a direction of length 0 there.
    """
    if f"{module}_in" not in direction.input_means:
        raise UsageError(f"the direction has no mean at {module}_in, which Steer2Edit needs")
    vector = vector_at(direction, f"{module}_out", layer)
    if not bool(vector.any()):
        raise BrocaError(
            f"layer {layer}, {module}: the direction has length 0, because the module's output is the same in both "
            f"languages: leave layer {layer} out with --layers"
        )
    weight = Weights(source).read(layer, module)
    return components_of(
        weight,
        vector,
        direction.input_means[f"{module}_in"][layer, : weight.shape[1]],
        source.anatomy.component_width(module, layer),
        weigh if module == "mlp" else "sign",
    )


def _allowed(
    source: ModelSource, neurons: NeuronSet, languages: Sequence[str] | None, layers: Sequence[int]
) -> torch.Tensor:
    """bool [L, I], the neurons that may change."""
    require_neurons(source, neurons)
    if languages is not None and not languages:
        raise UsageError("name at least one language whose neurons may change")
    allowed = torch.zeros(neurons.layers, neurons.neurons, dtype=torch.bool)
    for language in neurons.languages if languages is None else languages:
        rows = neurons.of(language)
        allowed[rows[:, 0], rows[:, 1]] = True
        if languages is not None and not bool(torch.isin(rows[:, 0], torch.tensor(list(layers))).any()):
            raise BrocaError(
                f"the neuron set has no neuron for {language} in these layers: choose other layers, another "
                "method or rate"
            )
    return allowed


@dataclass(frozen=True, kw_only=True)
class Steer2Edit(Method):
    """The registered method."""

    name = "steer2edit"
    title = "Steer2Edit"
    line = "rank-1 edits of the heads and neurons that write the direction"
    source = "arXiv 2602.09870"
    needs = ("direction",)
    takes = ("neurons", "languages", "layers", "strength")

    heads_rho: float | None = setting(None, "penalty of heads: 0.3, or off if only neurons_rho is given")
    neurons_rho: float | None = setting(None, "penalty of neurons: 0.9, or off if only heads_rho is given")
    alpha: float = setting(ALPHA, "sparsity in [0, 1)", search=Range(0.0, 0.9))
    weigh: str = setting(
        "sign", "weight of a neuron: the sign of its mean, or its activity", words=WEIGHTINGS
    )
    within: ClassVar[str | None] = None

    @classmethod
    def grid(cls, material: Material) -> Sequence[dict[str, Any]]:
        return [
            {"heads_rho": heads, "neurons_rho": neurons, "alpha": alpha}
            for heads, neurons, alpha in PUBLISHED
        ]

    @classmethod
    def of(cls, material: Material, settings: Settings) -> Steer2Edit:
        return cls(**{name: value for name, value in settings.items() if name != "edits"})

    @classmethod
    def knobs(cls, material: Material) -> dict[str, Knob]:
        """The range of rho is that of importances, which are cosines."""
        heads, neurons = (Knob(0.02, 2.0, log=True, given=("edits", (EDITS[0], only))) for only in EDITS[1:])
        return {
            "edits": Knob(words=EDITS), "heads_rho": heads, "neurons_rho": neurons, **super().knobs(material)
        }  # fmt: skip

    @classmethod
    def known(cls, material: Material) -> Sequence[Settings]:
        return (
            {"edits": EDITS[0], "heads_rho": HEADS_RHO, "neurons_rho": NEURONS_RHO, "alpha": ALPHA},
            {"edits": EDITS[0], "heads_rho": 0.1, "neurons_rho": 0.3, "alpha": 0.4},
            {"edits": EDITS[2], "neurons_rho": 0.8, "alpha": 0.05},
        )

    def prepare(self, material: Material) -> Callable[..., Plan]:
        """A function of the thresholds; importances are computed once."""
        neurons, languages = material.neurons, material.languages
        if self.within is not None:
            languages = material.pair
            for language in languages:
                material.mask(self.within, language)
            neurons = material.identified(self.within)
        read = partial(read_components, material.opened, material.direction, self.weigh)
        return partial(
            steer2edit_plan,
            material.opened,
            material.direction,
            range(material.opened.anatomy.layers) if material.layers is None else material.layers,
            neurons=neurons,
            languages=languages,
            weigh=self.weigh,
            components=lambda *place: material.once(
                ("components", self.weigh, *place), partial(read, *place)
            ),
        )

    def plan(self, prepared: Callable[..., Plan]) -> Plan:
        heads, neurons = self.heads_rho, self.neurons_rho
        if heads is None and neurons is None:
            heads, neurons = HEADS_RHO, NEURONS_RHO
        return prepared(heads_rho=heads, neurons_rho=neurons, alpha=self.alpha, strength=self.strength)


@dataclass(frozen=True, kw_only=True)
class _Within(Steer2Edit):
    """Only the neurons of a scorer, for comparisons."""

    edited = False

    @classmethod
    def grid(cls, material: Material) -> Sequence[dict[str, Any]]:
        # With higher thresholds few of the neurons are edited.
        return [
            settings
            for settings in super().grid(material)
            if settings["neurons_rho"] is not None
            and settings["neurons_rho"] * settings["alpha"] < MAX_THRESHOLD
        ]

    @classmethod
    def searched(cls) -> bool:
        return False


class Steer2EditLape(_Within):
    name = "steer2edit-lape"
    title = "Steer2Edit in LAPE neurons"
    within = NEURON_METHODS[0]


class Steer2EditGradient(_Within):
    name = "steer2edit-gradient"
    title = "Steer2Edit in gradient neurons"
    within = NEURON_METHODS[1]
