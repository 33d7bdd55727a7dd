"""What an edit may reach: the layers and blocks that were asked for, and all that their modules add."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from editing.directions.direction import Direction
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS
from neurons.errors import BrocaError, UsageError
from neurons.files.tensor_files import read_tensor
from neurons.models.source import ModelSource
from neurons.neuron_sets.neuron_set import NeuronSet

# The site that stands for attn_out in attention and for mlp_out in the MLP.
OWN = "own"
SITE_LINE = "whose direction: block_out, or own (of the block that is edited)"
FROM_LINE = "the layer whose direction is used in all layers; each layer's own where not given"


def require_strength(strength: float) -> None:
    """Refuse a strength that changes nothing, or everything.

    Raises:
        UsageError: 0, or not finite.
    """
    if strength == 0 or not abs(strength) < float("inf"):
        raise UsageError(f"strength {strength}: give a finite one other than 0")


def chosen_layers(source: ModelSource, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers asked for, ascending, each once; None asks for all.

    Raises:
        UsageError: none, or one that the model does not have.
    """
    count = source.anatomy.layers
    chosen = tuple(range(count)) if layers is None else tuple(sorted(set(layers)))
    if not chosen:
        raise UsageError("name at least one layer")
    missing = [layer for layer in chosen if not 0 <= layer < count]
    if missing:
        raise UsageError(f"layer {missing[0]} is not there: the model has layers 0-{count - 1}")
    return chosen


def chosen_blocks(blocks: Sequence[str]) -> tuple[str, ...]:
    """The blocks asked for, attention first, each once.

    Raises:
        UsageError: none, or one that there is not.
    """
    unknown = [block for block in blocks if block not in BLOCKS]
    if unknown or not blocks:
        what = f"block {unknown[0]!r} is unknown" if unknown else "no block is named"
        raise UsageError(f"{what}: choose from {', '.join(BLOCKS)}")
    return tuple(block for block in BLOCKS if block in blocks)


def chosen_site(source: ModelSource, site: str) -> None:
    """Refuse a site at which the directions of a module's output cannot be read.

    Raises:
        UsageError: neither "block_out" nor "own".
        BrocaError: "block_out" where a norm stands between the modules and the residual.
    """
    if site not in ("block_out", OWN):
        raise UsageError(f"site {site!r} is unknown: choose from block_out, {OWN}")
    if site == "block_out" and not source.anatomy.residual_output:
        raise BrocaError(
            f"{source.anatomy.model_type}: a norm stands between the output modules and the residual, so a "
            f"direction of the residual is not one of their outputs: use the site {OWN!r}"
        )


def require_neurons(source: ModelSource, neurons: NeuronSet) -> None:
    """Refuse a neuron set of another model.

    Raises:
        BrocaError: another fingerprint, or other numbers of layers or neurons.
    """
    neurons.require_model(source)
    expected = (source.anatomy.layers, source.anatomy.neurons)
    if (neurons.layers, neurons.neurons) != expected:
        raise BrocaError(
            f"the neuron set is of {neurons.layers} x {neurons.neurons} neurons where the model has "
            f"{expected[0]} x {expected[1]}: identify them in this model"
        )


def site_of(site: str, block: str) -> str:
    """The site's name in a direction, for a block."""
    return f"{block}_out" if site == OWN else site


def vector_at(direction: Direction, site: str, layer: int) -> torch.Tensor:
    """The direction's vector, float64 [d].

    Raises:
        UsageError: the direction has none at this site.
    """
    if site not in direction.vectors:
        held = ", ".join(direction.vectors) or "none"
        raise UsageError(f"the direction has no vectors at {site}: it has {held}")
    return direction.vectors[site][layer].double()


def output_bias(source: ModelSource, weights: Weights, layer: int, block: str) -> torch.Tensor | None:
    """The output module's bias, float64 [d]; None where it has none.

    Raises:
        BrocaError: the experts of a mixture have biases of their own, which no plan can change.
    """
    anatomy = source.anatomy
    if block == "mlp" and anatomy.mixed:
        if getattr(anatomy.outputs["mlp"][layer], "has_bias", False):
            raise BrocaError(
                f"{anatomy.model_type}: each expert of a mixture has a bias of its own, which would go on "
                "writing what the weights no longer do: choose --blocks attn"
            )
        return None
    entry = weights.bias(layer, block)
    return None if entry is None else read_tensor(entry).double()
