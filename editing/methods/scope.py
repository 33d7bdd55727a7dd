"""The scope of an edit: checks and choices of layers, modules, sites, neurons and strengths."""

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

# The site attn_out for attention and mlp_out for the MLP.
OWN = "own"
SITE_LINE = "site of the direction: block_out, or own (the output of the edited module)"
FROM_LINE = "layer whose direction is used in all layers; by default each layer's own"


def require_strength(strength: float) -> None:
    """Check a strength.

    Raises:
        UsageError: it is 0 or not finite.
    """
    if strength == 0 or not abs(strength) < float("inf"):
        raise UsageError(f"strength {strength}: give a finite number other than 0")


def chosen_layers(source: ModelSource, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The given layers, ascending and without duplicates; None chooses all.

    Raises:
        UsageError: no layer, or a layer that the model does not have.
    """
    count = source.anatomy.layers
    chosen = tuple(range(count)) if layers is None else tuple(sorted(set(layers)))
    if not chosen:
        raise UsageError("name at least one layer")
    missing = [layer for layer in chosen if not 0 <= layer < count]
    if missing:
        raise UsageError(f"the model has no layer {missing[0]}: its layers are 0-{count - 1}")
    return chosen


def chosen_places(
    source: ModelSource, layers: Sequence[int] | None, modules: Sequence[str]
) -> tuple[tuple[int, str], ...]:
    """(layer, module) of the chosen layers and modules, in their order.

    Of each layer it has the modules that the layer has; a layer that is named must have one.

    Raises:
        UsageError: as ``chosen_layers`` and ``chosen_modules``, or a named layer without them.
    """
    chosen, blocks = chosen_layers(source, layers), chosen_modules(modules)
    without = [layer for layer in chosen if not any(source.anatomy.has(layer, module) for module in blocks)]
    if layers is not None and without:
        source.anatomy.require(blocks[0], without)
    return tuple(
        (layer, module) for layer in chosen for module in blocks if source.anatomy.has(layer, module)
    )


def chosen_modules(modules: Sequence[str]) -> tuple[str, ...]:
    """The given modules of "attn" and "mlp", in this order and without duplicates.

    Raises:
        UsageError: no module, or an unknown one.
    """
    unknown = [module for module in modules if module not in BLOCKS]
    if unknown or not modules:
        raise UsageError(f"blocks {', '.join(unknown) or '(none)'}: choose from {', '.join(BLOCKS)}")
    return tuple(module for module in BLOCKS if module in modules)


def require_site(source: ModelSource, site: str) -> None:
    """Check the site of a direction that modules' outputs are compared with.

    Raises:
        UsageError: neither "block_out" nor "own".
        BrocaError: "block_out" in a model with a norm or a factor of the weights between modules and residual stream.
    """
    if site not in ("block_out", OWN):
        raise UsageError(f"site {site!r} is unknown: choose from block_out, {OWN}")
    if site == "block_out" and not source.anatomy.residual_output:
        raise BrocaError(
            f"{source.anatomy.model_type}: a norm or a factor between output modules and residual stream changes "
            f"directions, so the outputs do not share the direction at block_out: use the site {OWN!r}"
        )


def require_neurons(source: ModelSource, neurons: NeuronSet) -> None:
    """Check that a set of neurons belongs to the model.

    Raises:
        UsageError: it is a set of heads.
        BrocaError: another fingerprint, or other numbers of layers or neurons.
    """
    if neurons.unit != "neuron":
        raise UsageError(
            f"the neuron set is of {neurons.unit}s, which only `broca edit --method scale` edits: identify neurons with another method"
        )
    neurons.require_places(source)


def site_of(site: str, module: str) -> str:
    """The name of the site in a direction, for a module."""
    return f"{module}_out" if site == OWN else site


def vector_at(direction: Direction, site: str, layer: int) -> torch.Tensor:
    """The direction's vector, float64 [d].

    Raises:
        UsageError: the direction has no vectors at this site.
    """
    if site not in direction.vectors:
        sites = ", ".join(direction.vectors) or "none"
        raise UsageError(f"the direction has no vectors at {site}: it has {sites}")
    return direction.vectors[site][layer].double()


def output_bias(source: ModelSource, weights: Weights, layer: int, module: str) -> torch.Tensor | None:
    """The bias of the output module, float64 [d]; None if it has none.

    Raises:
        BrocaError: the experts of a mixture have biases, which plans cannot change.
    """
    anatomy = source.anatomy
    if module == "mlp" and anatomy.mixed_in(layer):
        if getattr(anatomy.outputs["mlp"][layer], "has_bias", False):
            raise BrocaError(
                f"{anatomy.model_type}: the experts have biases, which would still write the direction and which a "
                "plan cannot change: choose --blocks attn"
            )
        return None
    entry = weights.bias(layer, module)
    return None if entry is None else read_tensor(entry).double()
