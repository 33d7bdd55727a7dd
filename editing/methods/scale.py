"""Neuron scaling: a neuron's column of down_proj times a factor; 0 ablates it, more than 1 amplifies it.

Of a head it is the columns of o_proj.  Scaling columns equals scaling the activations by a hook.  No forward pass is
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from editing.methods.material import Material
from editing.methods.method import NEURON_METHODS, Method
from editing.methods.scope import chosen_layers
from editing.plans.algebra import compose
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.architectures.anatomy import UNITS
from neurons.errors import BrocaError, UsageError
from neurons.models.source import ModelSource
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.setting import Range, setting


def scale_plan(
    source: ModelSource,
    neurons: NeuronSet,
    languages: Sequence[str],
    factor: float,
    layers: Sequence[int] | None = None,
) -> Plan:
    """Scale the neurons or heads of languages.

    Args:
        source: the model.
        neurons: a neuron set of this model, of neurons or of heads.
        languages: languages of the neurons; a neuron of several is scaled once.
        factor: 0 ablates, more than 1 amplifies, a negative factor reverses the sign.
        layers: layers of the neurons; None takes all.

    Raises:
        UsageError: a factor of 1 or not finite, a language that the set does not have, or a layer that the
            model does not have.
        BrocaError: the set has no neuron for one of the languages (in these layers).
    """
    if factor == 1 or factor != factor or abs(factor) == float("inf"):
        raise UsageError(f"factor {factor}: give a finite factor other than 1 (0 ablates)")
    neurons.require_places(source)
    if not languages:
        raise UsageError("name at least one language whose neurons should be scaled")
    in_layers = torch.zeros(source.anatomy.layers, dtype=torch.bool)
    in_layers[list(chosen_layers(source, layers))] = True
    members = {language: neurons.of(language) for language in languages}
    members = {language: rows[in_layers[rows[:, 0]]] for language, rows in members.items()}
    empty = [language for language, rows in members.items() if len(rows) == 0]
    if empty:
        where, fix = (
            ("", "choose another method or rate")
            if layers is None
            else (" in these layers", "choose other layers, another method or rate")
        )
        raise BrocaError(f"the neuron set has no {neurons.unit} for {', '.join(empty)}{where}: {fix}")
    rows = source.anatomy.unit_columns(neurons.unit, torch.cat(list(members.values())))
    scale = torch.ones(source.anatomy.layers, source.anatomy.width(neurons.site), dtype=torch.float64)
    scale[rows[:, 0], rows[:, 1]] = factor
    settings: dict[str, Any] = {"factor": factor, "neurons": neurons.metadata.get("method")}
    if layers is not None:
        settings["layers"] = list(chosen_layers(source, layers))
    metadata = plan_metadata(source, "scale", settings, {"languages": list(languages)})
    return make_plan(column_scaling(source, UNITS[neurons.unit], scale), metadata)


def column_scaling(source: ModelSource, module: str, scale: torch.Tensor) -> list[ModuleEdit]:
    """An edit for each layer with a scaled channel of the module's input.

    Args:
        source: the model.
        module: "attn" (channels of o_proj's input) or "mlp" (neurons).
        scale: float64 [L, n], 1 for unchanged channels.

    Returns:
        Edits with ``factor`` of each component: of a neuron, or the mean over a head's channels.

    Raises:
        UsageError: a factor that is rounded to 1 in float32.
    """
    vanished = ((scale != 1) & (scale.float() == 1)).nonzero()
    if len(vanished):
        layer, channel = vanished[0].tolist()
        raise UsageError(
            f"layer {layer}, {module}: the factor of channel {channel} is too close to 1 to change anything: give "
            "more strength"
        )
    weights = Weights(source)
    edits = []
    for layer in (scale != 1).any(1).nonzero()[:, 0].tolist():
        weight = weights.read(layer, module)
        width = source.anatomy.component_width(module, layer)
        of_layer = scale[layer, : weight.shape[1]]
        components = of_layer.view(-1, width)
        chosen = (components != 1).any(1).nonzero()[:, 0]
        changed = (of_layer != 1).nonzero()[:, 0]
        edits.append(
            ModuleEdit(
                layer=layer,
                block=module,
                components=tuple(chosen.tolist()),
                column_scale=of_layer.float(),
                details={"factor": components[chosen].mean(1)},
                notes={
                    "change_norm": float((weight[:, changed] * (of_layer[changed] - 1)).norm()),
                    "weight_norm": float(weight.norm()),
                },
            )
        )
    return edits


@dataclass(frozen=True, kw_only=True)
class Scale(Method):
    """The registered method."""

    name = "scale"
    line = "multiplies neurons or heads by a factor: 0 ablates, 2 doubles; no forward pass"
    source = "exact fold"
    needs = ("neurons", "languages")
    takes = ("layers", "strength")

    factor: float | None = setting(None, "0 ablates, 2 doubles")

    def prepare(self, material: Material) -> Plan:
        if self.factor is None:
            raise UsageError("--method scale needs --factor (0 ablates, 2 doubles)")
        if material.languages is None:
            raise UsageError("--method scale needs --languages: the languages whose neurons are scaled")
        return scale_plan(
            material.opened, material.neuron_set, material.languages, self.factor, material.layers
        )


@dataclass(frozen=True, kw_only=True)
class ScalePair(Method):
    """The source's neurons times one factor and the target's times another, for studies."""

    name = "scale"
    title = "neuron scaling"
    line = Scale.line
    source = Scale.source
    edited = False

    neurons: str = NEURON_METHODS[1]
    source_factor: float = setting(0.0, search=Range(-1.0, 0.95))
    target_factor: float = setting(3.0, search=Range(1.05, 8.0))

    @classmethod
    def grid(cls, material: Material) -> Sequence[dict[str, Any]]:
        # A factor of 1 does not change them.
        factors = ((0.0, 1.0), (1.0, 3.0), (0.0, 3.0), (0.0, 6.0))
        return [
            {"neurons": NEURON_METHODS[1], "source_factor": source, "target_factor": target}
            for source, target in factors
        ]

    def prepare(self, material: Material) -> Plan:
        neurons = material.identified(self.neurons)
        plans = [
            scale_plan(material.loaded, neurons, (language,), factor, material.layers)
            for language, factor in zip(material.pair, (self.source_factor, self.target_factor), strict=True)
            if factor != 1
        ]
        return plans[0] if len(plans) == 1 else compose(plans, material.loaded)
