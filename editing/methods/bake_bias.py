"""Baking a steering vector as a bias: b' = b + strength * v, equal to a hook that adds it on every token.

The output module (``down_proj`` or ``o_proj``) must have a bias in the checkpoint, or the architecture's config must
offer one that both transformers and serving engines support (Llama's ``mlp_bias`` and ``attention_bias``).
Otherwise see ``editing.methods.bake``.  No text and no forward pass are needed, and no weight matrix changes.  A LoRA
adapter cannot hold the bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from editing.methods.bake import require_vectors
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.errors import BrocaError
from neurons.models.source import ModelSource


def bake_bias_plan(
    source: ModelSource,
    vectors: Mapping[int, torch.Tensor],
    strength: float = 1.0,
    block: str = "mlp",
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """A plan that adds vectors at the outputs of layers by biases.

    Args:
        source: the model.
        vectors: layer -> [d], added after that layer ("mlp"), or after its attention ("attn").
        strength: multiplies every vector.
        block: "mlp" or "attn".
        provenance: fields for the plan's metadata: source, target, languages, direction.

    Returns:
        A plan of edits of rank 0 without components: ||dW|| is 0; the note "bias_norm" is the length of what is added to
        the bias, strength v.

    Raises:
        UsageError: as ``require_vectors``.
        BrocaError: as ``require_vectors``, or the architecture does not support a bias there.
    """
    require_vectors(source, vectors, strength, block)
    if not source.anatomy.supports_bias(block):
        raise BrocaError(
            f"{source.anatomy.model_type}: {source.anatomy.layout.outputs[block]} has no bias, and its config has no "
            "setting for a bias that serving engines support: use --method bake, which needs no bias"
        )
    weights, factor = Weights(source), strength / source.anatomy.multiplier(block)
    edits = []
    for layer in sorted(vectors):
        bias = vectors[layer].double().cpu() * factor
        edits.append(
            ModuleEdit(
                layer=layer,
                block=block,
                components=(),
                bias=bias.float(),
                notes={
                    "change_norm": 0.0,
                    "weight_norm": float(weights.read(layer, block).norm()),
                    "bias_norm": float(bias.norm()),
                },
            )
        )
    settings = {"layers": sorted(vectors), "strength": strength, "block": block}
    return make_plan(edits, plan_metadata(source, "bake-bias", settings, provenance))
