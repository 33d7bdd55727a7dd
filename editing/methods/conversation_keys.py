"""Keys on conversations: mean 1 on the key's groups of tokens, mean 0 on all other tokens.

The language of an answer is decided at the header, the last token before the answer.  It is one token among hundreds,
so headers are groups of their own.  With the groups of ``neurons.text.conversation_batches``, the coefficient of a key
(``editing.methods.key``) has the mean

    1    on the groups of the key
    0    on all other groups, and on the first token

A module may have several keys, each for different groups; its values V = [v_1, v_2, ...] are then written each on the
groups of one key.

Text from a corpus has no template and no header.  A key solved on it is near 0 where the answer begins, so the first
words stay in the source language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from editing.methods.added_values import change_norm
from editing.methods.key import EPS, keys
from editing.methods.keyed import common_columns, module_edit
from editing.plans.plan import ModuleEdit
from neurons.architectures.anatomy import COMMON, COMMON_SITES
from neurons.errors import BrocaError
from neurons.models.source import LoadedModel
from neurons.recording.covariance import each_moments
from neurons.recording.text_pass import Position, PositionReader, Progress, numbered, read_text
from neurons.text.conversation_batches import ConversationBatches

Place = tuple[int, str]  # layer, module


def middle_layers(layers: int) -> tuple[int, ...]:
    """The layers edited by default: all except the first twelfth and the last eighth."""
    return tuple(range(layers // 12, layers - layers // 8))


def conversation_keys(
    loaded: LoadedModel,
    text: ConversationBatches,
    groups: Sequence[Sequence[str]],
    layers: Sequence[int],
    eps: float = EPS,
    progress: Progress | None = None,
) -> list[ModuleEdit]:
    """Edits of each layer's ``down_proj`` with solved keys and values of 0.

    Args:
        loaded: the unedited model.
        text: conversations in the sources and in every language to keep.
        groups: the groups of each key.
        layers: layers to edit.
        eps: ridge, as a fraction of the mean variance.
        progress: called with the number of tokens done.

    Raises:
        UsageError: a group that the text does not have.
        BrocaError: a layer whose inputs cannot separate the groups.
    """
    units = {(COMMON, layer): torch.arange(loaded.anatomy.width(COMMON, layer)) for layer in layers}
    value = torch.zeros(loaded.anatomy.residual, dtype=torch.float64)
    edits = []
    for (_, layer), moments in each_moments(loaded, text.batches, units, progress, text.groups):
        if moments.all_zero:
            raise BrocaError(f"layer {layer}: its neurons are 0 on every token: leave the layer out")
        of_keys = [
            module_edit(loaded, (layer, "mlp"), moments, key, value, {}) for key in keys(moments, groups, eps)
        ]
        edits.append(joined(of_keys))
        # Frees this covariance before the next layers are read.
        del moments
    return edits


def joined(edits: Sequence[ModuleEdit]) -> ModuleEdit:
    """Rank-1 edits of the same components of a module, as one edit with their columns.

    Of several edits, only the notes ``weight_norm``, ``change_norm`` and ``spread`` (the largest) are kept.
    """
    first = edits[0]
    if len(edits) == 1:
        return first
    lefts, rights = (
        torch.cat([factor for edit in edits if (factor := getattr(edit, name)) is not None], dim=1)
        for name in ("left", "right")
    )
    notes = {
        "weight_norm": first.notes["weight_norm"],
        "change_norm": change_norm(lefts, rights),
        "spread": max(float(edit.notes["spread"]) for edit in edits),
    }
    details = {
        "key": torch.stack([edit.details["key"] for edit in edits]).double().square().sum(0).sqrt(),
        "carried": torch.stack([edit.details["carried"] for edit in edits]).double().sum(0),
    }
    return replace(first, left=lefts, right=rights, notes=notes, details=details)


def coefficients(
    loaded: LoadedModel, edits: Sequence[ModuleEdit], text: ConversationBatches
) -> dict[Place, dict[str, Any]]:
    """Means of K^T h on each group of tokens, and its standard deviation about them, on other conversations.

    Returns:
        (layer, module) -> ``means`` (group -> the mean for each key) and ``deviation`` (the largest over the keys).
    """
    size = len(text.groups)
    sums = {(edit.layer, edit.block): torch.zeros(3, size, edit.rank, dtype=torch.float64) for edit in edits}

    def reader(edit: ModuleEdit) -> PositionReader:
        assert edit.right is not None
        right = edit.right.double()[common_columns(loaded.anatomy, edit.layer, edit.block)]
        of_module = sums[edit.layer, edit.block]

        def read(values: torch.Tensor, _: object, at: Position) -> None:
            assert at.batch.groups is not None
            products = (at.rows(values).double() @ right.to(values.device)).cpu()
            group = at.batch.groups[at.counted].cpu()
            for power, terms in enumerate((torch.ones_like(products), products, products.square())):
                of_module[power].index_add_(0, group, terms)

        return read

    readers = {(COMMON_SITES[edit.block], edit.layer): reader(edit) for edit in edits}
    read_text(loaded, numbered(text.batches), readers)
    result = {}
    for place, (count, total, squares) in sums.items():
        means = total / count
        within = (squares - count * means.square()).sum(0).clamp(min=0) / count.sum(0)
        result[place] = {
            "means": dict(zip(text.groups, means.tolist(), strict=True)),
            "deviation": float(within.max().sqrt()),
        }
    return result
