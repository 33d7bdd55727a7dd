"""Baking a steering vector as a bias: b' = b + strength * v, exactly what a hook would add, on every token.

Possible where the output module of the block (``down_proj`` or ``o_proj``) has a bias in the checkpoint, or the
architecture's config can ask for one that transformers and serving engines both read (Llama's ``mlp_bias`` and
``attention_bias``).  Elsewhere: ``editing.methods.bake``.  No text and no forward pass are needed, and no weight
changes; a constant cannot travel in a LoRA adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from editing.methods.bake import baked_metadata, require_vectors
from editing.plans.plan import ModuleEdit, Plan, make_plan
from editing.plans.weights import Weights
from neurons.errors import BrocaError
from neurons.models.source import ModelSource


def bake_bias_plan(
    source: ModelSource,
    vectors: Mapping[int, torch.Tensor],
    strength: float = 1.0,
    block: str = "mlp",
    origin: Mapping[str, Any] | None = None,
) -> Plan:
    """A plan that adds vectors at the outputs of layers by biases alone.

    Args:
        source: the model.
        vectors: layer -> [d], added after that layer ("mlp"), or after its attention ("attn").
        strength: multiplies every vector.
        block: "mlp" or "attn".
        origin: fields for the plan's metadata: source, target, languages, direction.

    Returns:
        A plan of edits of rank 0 and without components: ||dW|| is 0; notes "bias_norm" is ||strength v||.

    Raises:
        UsageError: as ``require_vectors``.
        BrocaError: a norm stands between the block's output and the residual, or the checkpoint can hold no
            bias there.
    """
    require_vectors(source, vectors, strength, block)
    if not source.anatomy.supports_bias(block):
        raise BrocaError(
            f"{source.anatomy.model_type}: {source.anatomy.layout.outputs[block]} has no bias, and no setting of "
            "its config gives it one that serving engines read: use --method bake, which writes the vector into "
            "the weights"
        )
    weights = Weights(source)
    edits = []
    for layer in sorted(vectors):
        bias = vectors[layer].double().cpu() * strength
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
    return make_plan(edits, baked_metadata(source, "bake-bias", settings, origin))
