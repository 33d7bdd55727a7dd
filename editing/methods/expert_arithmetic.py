"""Language arithmetic in a mixture of experts: each expert adds a constant to the tokens that are routed to it.

The map s_j <- c_j s_j + a_j of ``editing.methods.language_arithmetic`` changes the output of expert e, before the
router's weight, by

    W_e diag(c - 1) h_e + sum_j a_j u_j w_j          over the neurons j of e, with u of the tokens that reach it

The first term is exact.  The edit adds the mean of the second over these tokens, v_e, with a constant key of e alone
(``editing.methods.bake``): W'_e = W_e diag(c) + v_e k_e^T.  The neurons of shared experts and of dense layers are edited in
groups of as many, which every token reaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from editing.methods.affine_neurons import Arithmetic, mean_shift
from editing.methods.bake import ConstantKey, constant_key, in_layer, total_moments
from editing.plans.plan import ModuleEdit
from editing.plans.weights import Weights
from neurons.models.source import LoadedModel
from neurons.recording.covariance import Expert, expert_moments
from neurons.recording.text_pass import Progress
from neurons.text.batches import TokenBatch

Batches = Mapping[str, Sequence[TokenBatch]]


@dataclass(frozen=True)
class Shift:
    """What an expert adds.

    Attributes:
        vector: float64 [d], v.
        constant: ||v||^2.
        variance: mean over the tokens of the squared norm of what the constant leaves out.
        tokens: number of tokens that reach the expert.
    """

    vector: torch.Tensor
    constant: float
    variance: float
    tokens: float


def expert_edits(
    loaded: LoadedModel,
    maps: Mapping[int, Arithmetic],
    means: Batches,
    keys: Batches,
    eps: float,
    progress: Progress | None = None,
) -> list[ModuleEdit]:
    """The edits of the layers of a model of mixtures.

    Args:
        loaded: the model.
        maps: layer -> the map of its neurons.
        means: text for the means of u, by language.
        keys: text for the keys.
        eps: ridge of the keys, as a fraction of the mean variance.
        progress: called with the number of tokens done in the first pass.

    Returns:
        Edits with the notes "constant_share", "spread" and "edited_experts" in layers with a constant, and the details
        "scale" and "offset".

    Raises:
        BrocaError: as ``constant_key``; names layer and expert.
    """
    anatomy, weights = loaded.anatomy, Weights(loaded)
    width = anatomy.expert_width
    units: dict[Expert, torch.Tensor] = {}
    for layer, affine in maps.items():
        index = affine.offset.nonzero()[:, 0]
        for expert in (index // width).unique().tolist():
            units[layer, expert] = index[index // width == expert] - expert * width
    shifts = _shifts(loaded, weights, maps, means, units, progress)
    solved: dict[Expert, ConstantKey] = {}
    inputs = {
        (layer, expert): torch.arange(min(width, anatomy.width("mlp_in", layer) - expert * width))
        for layer, expert in shifts
    }
    for (layer, expert), moments in expert_moments(loaded, keys, "mlp_in", inputs) if inputs else ():
        assert moments.tokens is not None
        with in_layer(layer, f"expert {expert}"):
            solved[layer, expert] = constant_key(moments, moments.tokens, eps)
        del moments
    edits = []
    for layer, affine in maps.items():
        of_layer = {expert: shift for (at, expert), shift in shifts.items() if at == layer}
        if not of_layer and bool((affine.scale == 1).all()):
            continue
        edits.append(_edit(weights, layer, width, affine, of_layer, solved, eps))
    return edits


def _shifts(
    loaded: LoadedModel,
    weights: Weights,
    maps: Mapping[int, Arithmetic],
    batches: Batches,
    units: Mapping[Expert, torch.Tensor],
    progress: Progress | None,
) -> dict[Expert, Shift]:
    """What each expert with an offset adds to its tokens; without those that no token reaches."""
    shifts: dict[Expert, Shift] = {}
    read: dict[int, torch.Tensor] = {}  # the weight of one layer
    # Without gates u is 1, but the number of tokens is needed.
    for (layer, expert), moments in (
        expert_moments(loaded, batches, "mlp_up", units, progress) if units else ()
    ):
        assert moments.tokens is not None
        reached = float(moments.tokens.sum())
        if not reached:
            continue
        mean, covariance = total_moments(moments, moments.tokens)
        if not loaded.anatomy.gated:
            mean, covariance = torch.ones_like(mean), torch.zeros_like(covariance)
        index = moments.units + expert * loaded.anatomy.expert_width
        if layer not in read:
            read.clear()
            read[layer] = weights.read(layer, "mlp")
        values, offset = read[layer][:, index], maps[layer].offset[index]
        vector, share = mean_shift(values, offset, mean, covariance)
        if bool(vector.any()):
            constant = float(vector.square().sum())
            shifts[layer, expert] = Shift(vector, constant, constant / share - constant, reached)
    return shifts


def _edit(
    weights: Weights,
    layer: int,
    width: int,
    affine: Arithmetic,
    shifts: Mapping[int, Shift],
    keys: Mapping[Expert, ConstantKey],
    eps: float,
) -> ModuleEdit:
    """The edit of a layer: a scale of columns, and a rank for each expert that adds a constant."""
    weight = weights.read(layer, "mlp")
    scale = affine.scale[: weight.shape[1]]
    changed = (scale != 1) | (affine.offset[: weight.shape[1]] != 0)
    change = weight * (scale - 1)
    notes: dict[str, object] = {"weight_norm": float(weight.norm())}
    left = torch.zeros(len(weight), len(shifts), dtype=torch.float64)
    right = torch.zeros(weight.shape[1], len(shifts), dtype=torch.float64)
    for rank, (expert, shift) in enumerate(shifts.items()):
        vector = keys[layer, expert].vector
        own = slice(expert * width, expert * width + len(vector))
        left[:, rank], right[own, rank], changed[own] = shift.vector, vector, True
    if shifts:
        change = change + left @ right.T
        tokens = sum(shift.tokens for shift in shifts.values())
        constant = sum(shift.tokens * shift.constant for shift in shifts.values())
        variance = sum(shift.tokens * shift.variance for shift in shifts.values())
        spread = sum(shift.tokens * keys[layer, expert].deviation ** 2 for expert, shift in shifts.items())
        notes |= {
            "constant_share": constant / (constant + variance),
            "spread": (spread / tokens) ** 0.5,
            "edited_experts": len(shifts),
            "eps": eps,
        }
    components = changed.nonzero()[:, 0]
    return ModuleEdit(
        layer=layer,
        block="mlp",
        components=tuple(components.tolist()),
        column_scale=None if bool((scale == 1).all()) else scale.float(),
        left=left.float() if shifts else None,
        right=right.float() if shifts else None,
        details={"scale": affine.scale[components], "offset": affine.offset[components]},
        notes={**notes, "change_norm": float(change.norm())},
    )
