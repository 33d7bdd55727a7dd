"""Steer2Edit (arXiv 2602.09870): a direction becomes a rank-1 edit of each component that it concerns.

A component i of a block is a head's slice W_i [d, D] of o_proj or a neuron's column [d, 1] of down_proj.
With v the direction at the block's output, v^ = v / ||v||, and mu_i the component's mean input:

    g_i      = cos(v, W_i mu_i)                                      (0 where W_i mu_i = 0)
    lambda_i = sign(g_i) max(|g_i| - rho*alpha, 0) / (rho*(1 - alpha))
    k_i      = W_i^T v^ / ||W_i^T v^||
    W_i'     = W_i + lambda_i v^ k_i^T  =  (I + c_i v^ v^^T) W_i,    c_i = lambda_i / ||W_i^T v^||

All components of a block share v^, so the block's whole edit is rank 1.

For a neuron g_j is sign(mu_j) cos(v, w_j): how much it is active does not count.  Broca can let it count
(``weigh="activity"``): g_j is multiplied with min(1, |mu_j| / rms), rms the root mean square of mu over the
layer's neurons, before it enters the same elastic net.  Not by the layer's largest |mu_j|: language models
have single neurons a hundred times as active as the rest, which would leave no other a g above the
threshold.  And not above 1, so that a g stays within the range of the cosine that rho and alpha are made for:
a neuron of ordinary activity is edited as published, a quiet one less or not at all.
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
from editing.methods.reach import chosen_layers, require_neurons, require_strength, vector_at
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.errors import BrocaError, NothingToChangeError, UsageError
from neurons.models.source import ModelSource
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.scorers.setting import Range, setting

# One of the published settings (rho of heads, rho of neurons, alpha); lambda is absolute, so no
# setting carries from model to model.
HEADS_RHO, NEURONS_RHO, ALPHA = 0.3, 0.9, 0.2
WEIGHTINGS = ("sign", "activity")
# (rho of heads, rho of neurons, alpha), the best settings that the paper reports for its models; None is off.
PUBLISHED = (
    (0.18, 0.55, 0.8),
    (0.42, 0.55, 0.75),
    (0.3, None, 0.9),
    (0.1, 0.3, 0.4),
    (None, 0.8, 0.05),
    (0.3, 0.9, 0.2),
)
MOST_THRESHOLD = 0.2
EDITS = ("heads and neurons", "heads", "neurons")


@dataclass(frozen=True)
class Components:
    """What one block's components are to the direction, whatever rho and alpha.

    Attributes:
        importance: float64 [C], g, weighed.
        key_norms: float64 [C], ||W_i^T v^||.
        unit_keys: float64 [C, D], k_i; 0 where v^ does not reach the component.
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
    """Steer2Edit of one block.

    Attributes:
        importance: float64 [C], g, weighed.
        magnitude: float64 [C], lambda.
        amplification: float64 [C], c (0 where lambda is 0); below -1 the direction is reversed.
        left: float64 [d], v^.
        right: float64 [n], the components' lambda_i k_i one after the other.
    """

    importance: torch.Tensor
    magnitude: torch.Tensor
    amplification: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor


def steer2edit(
    weight: torch.Tensor,
    direction: torch.Tensor,
    input_mean: torch.Tensor,
    component_width: int,
    rho: float,
    alpha: float,
    weigh: str = "sign",
) -> ComponentEdits:
    """Steer2Edit of one output weight.

    Args:
        weight: [d, n], as ``components_of`` takes it, and so what follows.
        direction: [d].
        input_mean: [n].
        component_width: D for heads, 1 for neurons.
        weigh: "sign" or "activity".
        rho: > 0, strength of the penalty: larger edits less.
        alpha: in [0, 1), the penalty's share of sparsity.

    Raises:
        UsageError, BrocaError: as ``components_of`` and ``elastic_net``.
    """
    return elastic_net(components_of(weight, direction, input_mean, component_width, weigh), rho, alpha)


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
        direction: [d], v at the block's output, of any length but 0.
        input_mean: [n], mu.
        component_width: D for heads, 1 for neurons.
        weigh: "sign" as published, or "activity" (of neurons only).

    Raises:
        UsageError: an unknown weighting, or heads weighed by activity.
        BrocaError: a direction of length 0.
    """
    _require_weighting(weigh)
    if weigh == "activity" and component_width != 1:
        raise UsageError("only neurons can be weighed by their activity: a head's g has its mean input in it")
    d, n = weight.shape
    parts = weight.double().view(d, n // component_width, component_width)
    length = direction.double().norm()
    if not length > 0:
        raise BrocaError("the direction has length 0")
    unit = direction.double() / length
    outputs = torch.einsum("dcw,cw->cd", parts, input_mean.double().view(-1, component_width))
    norms = outputs.norm(dim=1)
    importance = torch.where(norms > 0, (outputs @ unit) / norms, 0.0)
    if weigh == "activity":
        importance = importance * relative_activity(input_mean)
    keys = torch.einsum("dcw,d->cw", parts, unit)
    key_norms = keys.norm(dim=1)
    unit_keys = torch.where((key_norms > 0)[:, None], keys / key_norms[:, None], 0.0)
    return Components(importance, key_norms, unit_keys, unit, float(weight.norm()))


def elastic_net(components: Components, rho: float, alpha: float) -> ComponentEdits:
    """The edit of a block's components.

    Raises:
        UsageError: rho or alpha out of range.
    """
    if not rho > 0:
        raise UsageError(f"rho is {rho}: it must be above 0")
    if not 0 <= alpha < 1:
        raise UsageError(f"alpha is {alpha}: it lies in [0, 1)")
    importance = components.importance
    shrunk = (importance.abs() - rho * alpha).clamp(min=0)
    magnitude = importance.sign() * shrunk / (rho * (1 - alpha))
    # A component orthogonal to v has g = 0 or a slice that v does not reach: it stays as it is.
    reached = components.key_norms > 0
    magnitude = torch.where(reached, magnitude, 0.0)
    return ComponentEdits(
        importance=importance,
        magnitude=magnitude,
        amplification=torch.where(reached, magnitude / components.key_norms, 0.0),
        left=components.left,
        right=(magnitude[:, None] * components.unit_keys).flatten(),
    )


def relative_activity(input_mean: torch.Tensor) -> torch.Tensor:
    """min(1, |mu_j| / rms of mu), float64 [I]; 0 where no neuron of the layer is active.

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
        direction: with vectors at ``attn_out`` and ``mlp_out`` and means at ``attn_in`` and ``mlp_in``.
        layers: which layers.
        heads_rho: None leaves heads alone.
        neurons_rho: None leaves neurons alone.
        alpha: in [0, 1).
        strength: multiplies every lambda.
        neurons: only these neurons may change; heads are free.
        languages: of ``neurons``, only those of these languages; None takes those of any.
        weigh: what a neuron's importance is weighed by, "sign" as published or "activity".
        components: (layer, block) -> what ``read_components`` returns for the same direction and weighting, where
            it is kept; None reads the weights.

    Raises:
        UsageError: rho or alpha out of range, a strength of 0, a layer that is not there, both classes off, languages without a neuron set or that it
            does not know, an unknown weighting, or a direction that lacks what is needed.
        BrocaError: the neuron set has no neuron of one of ``languages`` in these layers.
        NothingToChangeError: no component passes the threshold.
    """
    _require_weighting(weigh)
    require_strength(strength)
    if heads_rho is None and neurons_rho is None:
        raise UsageError("heads and neurons are both off: give --heads-rho or --neurons-rho")
    if languages is not None and (neurons is None or neurons_rho is None):
        raise UsageError("languages choose among a set's neurons: give --neurons, and a --neurons-rho")
    if weigh != "sign" and neurons_rho is None:
        raise UsageError(f"neurons are off, so none can be weighed by {weigh}: give --neurons-rho")
    direction.require_model(source)
    chosen_layers(source, layers)
    allowed = None if neurons is None else _allowed(source, neurons, languages, layers)
    if components is None:
        components = partial(read_components, source, direction, weigh)
    edits = []
    for layer in layers:
        for block, rho in (("attn", heads_rho), ("mlp", neurons_rho)):
            if rho is None:
                continue
            own = components(layer, block)
            found = elastic_net(own, rho, alpha)
            magnitude, right = found.magnitude * strength, found.right * strength
            if block == "mlp" and allowed is not None:
                magnitude, right = magnitude * allowed[layer], right * allowed[layer]
            chosen = magnitude.nonzero()[:, 0]
            if len(chosen):
                edits.append(
                    ModuleEdit(
                        layer=layer,
                        block=block,
                        components=tuple(chosen.tolist()),
                        left=found.left[:, None].float(),
                        right=right[:, None].float(),
                        details={
                            "g": found.importance[chosen],
                            "lambda": magnitude[chosen],
                            "c": found.amplification[chosen] * strength,
                        },
                        notes={
                            "change_norm": float(right.norm()),
                            "weight_norm": own.weight_norm,
                        },
                    )
                )
    if not edits:
        raise NothingToChangeError(
            "Steer2Edit: no component's importance passes rho * alpha: lower rho or alpha, or allow more "
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
    # As they were before there was a choice, so that the published edit is the same file.
    if languages is not None:
        settings["languages"] = list(languages)
    if weigh != "sign":
        settings["weigh"] = weigh
    return make_plan(edits, plan_metadata(source, "steer2edit", direction, settings))


def read_components(
    source: ModelSource, direction: Direction, weigh: str, layer: int, block: str
) -> Components:
    """The components of a block of a layer.

    Raises:
        UsageError: a direction that lacks what is needed.
        BrocaError: a direction of length 0 there.
    """
    if f"{block}_in" not in direction.input_means:
        raise UsageError(f"the direction has no mean at {block}_in, which Steer2Edit needs")
    vector = vector_at(direction, f"{block}_out", layer)
    if not bool(vector.any()):
        raise BrocaError(
            f"layer {layer}, {block}: the direction has length 0, as the module writes the same in both "
            f"languages: leave layer {layer} out with --layers"
        )
    return components_of(
        Weights(source).read(layer, block),
        vector,
        direction.input_means[f"{block}_in"][layer],
        source.anatomy.component_width(block),
        weigh if block == "mlp" else "sign",
    )


def _allowed(
    source: ModelSource, neurons: NeuronSet, languages: Sequence[str] | None, layers: Sequence[int]
) -> torch.Tensor:
    """Which neurons may change, bool [L, I]."""
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
    """The method, on all layers or some."""

    name = "steer2edit"
    title = "Steer2Edit"
    line = "a rank-1 edit of every head and neuron that the direction concerns"
    source = "arXiv 2602.09870"
    needs = ("direction",)
    takes = ("neurons", "languages", "layers", "strength")

    heads_rho: float | None = setting(None, "penalty on heads; off if only the neurons' is given")
    neurons_rho: float | None = setting(None, "penalty on neurons; off if only the heads' is given")
    alpha: float = setting(ALPHA, "sparsity in [0, 1)", search=Range(0.0, 0.9))
    weigh: str = setting("sign", "a neuron by its mean's sign, or by its activity", words=WEIGHTINGS)
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
        """rho is absolute, so its range is that of importances, which are cosines."""
        heads, neurons = (Knob(0.02, 2.0, log=True, given=("edits", (EDITS[0], own))) for own in EDITS[1:])
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
        """What takes the thresholds; importances are computed once."""
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
    """Of the neurons that a method finds alone, as a comparison tries it."""

    edited = False

    @classmethod
    def grid(cls, material: Material) -> Sequence[dict[str, Any]]:
        # Only the settings with the lowest thresholds leave much to edit.
        return [
            one
            for one in super().grid(material)
            if one["neurons_rho"] is not None and one["neurons_rho"] * one["alpha"] < MOST_THRESHOLD
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
