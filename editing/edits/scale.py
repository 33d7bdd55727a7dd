"""Neuron scaling: a neuron's column of down_proj times a factor; 0 ablates it.

Exact: scaling a neuron's activation and scaling its value are the same, so the checkpoint computes what
a hook on the neuron would.  Needs no forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from editing.plan import ModuleEdit, Plan, make_plan
from editing.weights import Weights
from neurons.errors import BrocaError, UsageError
from neurons.neuron_set import NeuronSet
from neurons.source import ModelSource


def scale_plan(source: ModelSource, neurons: NeuronSet, languages: Sequence[str], factor: float) -> Plan:
    """Scale the neurons of some languages.

    Args:
        source: the model.
        neurons: a neuron set of this model.
        languages: whose neurons; a neuron of several is scaled once.
        factor: 0 ablates, 1 would change nothing.

    Raises:
        UsageError: a factor of 1 or not finite, or a language that the set does not know.
        BrocaError: the set has no neuron for one of these languages.
    """
    if factor == 1 or factor != factor or abs(factor) == float("inf"):
        raise UsageError(f"factor {factor}: give a finite factor other than 1 (0 ablates)")
    neurons.require_model(source)
    if not languages:
        raise UsageError("name at least one language whose neurons are to be scaled")
    empty = [language for language in languages if len(neurons.of(language)) == 0]
    if empty:
        raise BrocaError(
            f"the neuron set has no neuron for {', '.join(empty)}: choose another method or rate"
        )
    rows = torch.cat([neurons.of(language) for language in languages])
    weights = Weights(source)
    edits = []
    for layer in sorted(set(rows[:, 0].tolist())):
        chosen = rows[rows[:, 0] == layer, 1].unique()
        scale = torch.ones(source.anatomy.neurons)
        scale[chosen] = factor
        weight = weights.read(layer, "mlp")
        edits.append(
            ModuleEdit(
                layer=layer,
                block="mlp",
                components=tuple(chosen.tolist()),
                column_scale=scale,
                details={"factor": torch.full((len(chosen),), factor, dtype=torch.float64)},
                notes={
                    "change_norm": float((weight[:, chosen] * (factor - 1)).norm()),
                    "weight_norm": float(weight.norm()),
                },
            )
        )
    metadata = {
        "model": source.label,
        "fingerprint": source.fingerprint,
        "method": "scale",
        "languages": list(languages),
        "settings": {"factor": factor, "neurons": neurons.metadata.get("method")},
    }
    return make_plan(edits, metadata)
