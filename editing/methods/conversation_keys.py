"""Keys on conversations: 1 on what is said in some languages and on their headers, 0 on all else.

A header, the last token before an answer, is one among hundreds, and there the answer's language is chosen: it has
constraints of its own, in every language.  With the groups of ``neurons.text.conversation_batches`` the key of a
module (``editing.methods.key``) is

    1    on <language> and <language>/header, of every language of the key
    0    on <language> and <language>/header of every other, on template, and on the first token

A module may have several keys, each of other languages: with the values V = [v_1, v_2, ...] it then writes what the
language of the conversation asks for.

Text from a corpus has no template and no header; a key solved on it is silent where the answer begins, and the first
words stay in the source language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from editing.methods.added_values import change_norm
from editing.methods.key import EPS, keys
from editing.methods.keyed import module_edit
from editing.plans.plan import ModuleEdit
from neurons.errors import BrocaError
from neurons.models.source import LoadedModel
from neurons.recording.covariance import each_moments
from neurons.recording.text_pass import Position, PositionReader, Progress, numbered, read_text
from neurons.text.conversation_batches import ConversationBatches, said_in

Place = tuple[int, str]  # layer, block


def middle_layers(layers: int) -> tuple[int, ...]:
    """The layers that are edited by default: all but the first twelfth and the last eighth."""
    return tuple(range(layers // 12, layers - layers // 8))


def conversation_keys(
    loaded: LoadedModel,
    text: ConversationBatches,
    sources: Sequence[Sequence[str]],
    layers: Sequence[int],
    eps: float = EPS,
    progress: Progress | None = None,
) -> list[ModuleEdit]:
    """An edit of each layer's ``down_proj`` with its keys and values of 0.

    Args:
        loaded: the unedited model.
        text: conversations of the sources and of every language that is to stay as it is.
        sources: the languages of every key.
        layers: which.
        eps: ridge, as a fraction of the mean variance.
        progress: called with the number of tokens done.

    Raises:
        UsageError: a source that there are no conversations in.
        BrocaError: a layer whose inputs cannot tell the groups apart.
    """
    groups = [[group for language in languages for group in said_in(language)] for languages in sources]
    units = {("mlp_in", layer): torch.arange(loaded.anatomy.width("mlp_in")) for layer in layers}
    value = torch.zeros(loaded.anatomy.residual, dtype=torch.float64)
    edits = []
    for (_, layer), moments in each_moments(loaded, text.batches, units, progress, text.groups):
        if moments.silent:
            raise BrocaError(f"layer {layer}: its neurons are 0 on every token: leave the layer out")
        solved = keys(moments, groups, eps)
        edits.append(joined([module_edit(loaded, (layer, "mlp"), moments, one, value, {}) for one in solved]))
        # The next layers are read without this one's covariance beside theirs.
        del moments
    return edits


def joined(edits: Sequence[ModuleEdit]) -> ModuleEdit:
    """Edits of one module, on the same components, as the columns of one; notes of a key are of the first.

    Its ``spread`` is the largest.
    """
    first = edits[0]
    if len(edits) == 1:
        return first
    lefts, rights = (
        torch.cat([factor for edit in edits if (factor := getattr(edit, name)) is not None], dim=1)
        for name in ("left", "right")
    )
    notes = {name: note for name, note in first.notes.items() if name in ("weight_norm",)}
    notes |= {"change_norm": change_norm(lefts, rights)}
    notes |= {"spread": max(float(edit.notes["spread"]) for edit in edits)}
    details = {
        "key": torch.stack([edit.details["key"] for edit in edits]).double().square().sum(0).sqrt(),
        "carried": torch.stack([edit.details["carried"] for edit in edits]).double().sum(0),
    }
    return replace(first, left=lefts, right=rights, notes=notes, details=details)


def coefficients(
    loaded: LoadedModel, edits: Sequence[ModuleEdit], text: ConversationBatches
) -> dict[Place, dict[str, Any]]:
    """Means of K^T h on every group, and standard deviations about them, on other conversations.

    Returns:
        (layer, block) -> ``means`` (group -> list of a mean for each key) and ``deviation``, the largest of the keys'.
    """
    size = len(text.groups)
    sums = {(edit.layer, edit.block): torch.zeros(3, size, edit.rank, dtype=torch.float64) for edit in edits}

    def reader(edit: ModuleEdit) -> PositionReader:
        assert edit.right is not None
        right = edit.right.double()
        own = sums[edit.layer, edit.block]

        def read(values: torch.Tensor, _: object, at: Position) -> None:
            assert at.batch.groups is not None
            values_of = (at.rows(values).double() @ right.to(values.device)).cpu()
            group = at.batch.groups[at.counted].cpu()
            for row, terms in enumerate((torch.ones_like(values_of), values_of, values_of.square())):
                own[row].index_add_(0, group, terms)

        return read

    read_text(
        loaded, numbered(text.batches), {(f"{edit.block}_in", edit.layer): reader(edit) for edit in edits}
    )
    found = {}
    for place, (count, total, squares) in sums.items():
        means = total / count
        within = (squares - count * means.square()).sum(0).clamp(min=0) / count.sum(0)
        found[place] = {
            "means": dict(zip(text.groups, means.tolist(), strict=True)),
            "deviation": float(within.max().sqrt()),
        }
    return found
