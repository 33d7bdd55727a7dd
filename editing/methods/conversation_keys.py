"""Keys on conversations: 1 on what is said in the source languages and on their headers, 0 on all else.

A header, the last token before an answer, is one among hundreds, and there the answer's language is chosen: it has
constraints of its own, in every language.  With the groups of ``neurons.text.conversation_batches`` the key of a
module (``editing.methods.key``) is

    1    on <source> and <source>/header, of every source
    0    on <language> and <language>/header of every other, on template, and on the first token

Text from a corpus has no template and no header; a key solved on it is silent where the answer begins, and the first
words stay in the source language.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from editing.methods.key import EPS, key
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
    sources: Sequence[str],
    layers: Sequence[int],
    eps: float = EPS,
    progress: Progress | None = None,
) -> list[ModuleEdit]:
    """An edit of each layer's ``down_proj`` with its key and a value of 0.

    Args:
        loaded: the unedited model.
        text: conversations of the sources and of every language that is to stay as it is.
        sources: languages where the edit speaks.
        layers: which.
        eps: ridge, as a share of the mean variance.
        progress: called with the number of tokens done.

    Raises:
        UsageError: a source that there are no conversations in.
        BrocaError: a layer whose inputs cannot tell the groups apart.
    """
    speaking = [name for source in sources for name in said_in(source)]
    units = {("mlp_in", layer): torch.arange(loaded.anatomy.width("mlp_in")) for layer in layers}
    nothing = torch.zeros(loaded.anatomy.residual, dtype=torch.float64)
    edits = []
    for (_, layer), moments in each_moments(loaded, text.batches, units, progress, text.groups):
        if moments.silent:
            raise BrocaError(f"layer {layer}: its neurons are 0 on every token: leave the layer out")
        own = key(moments, speaking, eps)
        edits.append(module_edit(loaded, (layer, "mlp"), moments, own, nothing, {}))
        # The next layers are read without this one's covariance beside theirs.
        del moments
    return edits


def coefficients(
    loaded: LoadedModel, edits: Sequence[ModuleEdit], text: ConversationBatches
) -> dict[Place, dict[str, Any]]:
    """Mean of k^T h on every group, and its standard deviation about them, on other conversations.

    Returns:
        (layer, block) -> ``means`` (group -> mean) and ``deviation``.
    """
    size = len(text.groups)
    sums = {(edit.layer, edit.block): torch.zeros(3, size, dtype=torch.float64) for edit in edits}

    def reader(edit: ModuleEdit) -> PositionReader:
        assert edit.right is not None
        right = edit.right[:, 0].double()
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
        within = (squares - count * means.square()).sum().clamp(min=0) / count.sum()
        found[place] = {
            "means": dict(zip(text.groups, means.tolist(), strict=True)),
            "deviation": float(within.sqrt()),
        }
    return found
