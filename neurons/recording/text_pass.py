"""One pass over text: the only loop in which the model reads batches while hooks read its sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from neurons.architectures.sites import Routed, SiteHook, site_hooks
from neurons.models.not_finite import explained
from neurons.models.processes import world
from neurons.models.source import LoadedModel
from neurons.text.batches import TokenBatch

Progress = Callable[[int], None]
Numbered = list[tuple[int, TokenBatch]]  # (language number, batch)


@dataclass(frozen=True)
class Position:
    """Where a pass over text is: the batch that the model reads.

    Attributes:
        index: the batch's place among those that are read.
        language: its number k.
        batch: on the model's device.
        places: int64 [rows], each text's place among the texts of its language; None where they are not told.
    """

    index: int
    language: int
    batch: TokenBatch
    places: torch.Tensor | None = None

    @property
    def counted(self) -> torch.Tensor:
        """bool [rows, length]."""
        return self.batch.counted

    @cached_property
    def _positions(self) -> torch.Tensor:
        return self.counted.flatten().nonzero().flatten()

    def positions(self, routed: Routed | None, device: torch.device) -> torch.Tensor:
        """int64 [n], the counted tokens among the batch's, or among those that reached an expert."""
        if routed is None:
            return self._positions.to(device)
        return self.counted.flatten().to(device)[routed.tokens].nonzero().flatten()

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """[n, width]: the counted tokens' rows of values [rows, length, width], without their gradient."""
        return values.detach()[self.counted.to(values.device)]


# As ``neurons.architectures.sites.SiteHook``, with the position of the pass; it replaces nothing.
PositionReader = Callable[[torch.Tensor, Routed | None, Position], None]


def forward(model: Any, batch: TokenBatch) -> torch.Tensor:
    """Hidden states [rows, length, d] of a batch, on its device; no logits are made."""
    mask = batch.attention.long() if batch.padded else None
    hidden: torch.Tensor = model.base_model(
        input_ids=batch.ids, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return hidden.to(batch.ids.device)


def numbered(batches: Mapping[str, Sequence[TokenBatch]]) -> Numbered:
    """Every language's batches, with the language's number."""
    return [(k, batch) for k, some in enumerate(batches.values()) for batch in some]


def own_share(batches: Numbered) -> Numbered:
    """Those of this process, in the order that a single process would take them."""
    number, processes = world()
    return batches[number::processes]


def line_numbers(batches: Mapping[str, Sequence[TokenBatch]]) -> dict[str, torch.Tensor]:
    """Language -> int64 [T], the lines of its texts, ascending."""
    return {
        language: torch.cat([batch.line_numbers for batch in some]).unique()
        for language, some in batches.items()
    }


def read_text(
    loaded: LoadedModel,
    batches: Numbered,
    readers: Mapping[tuple[str, int], PositionReader],
    progress: Progress | None = None,
    *,
    lines: Sequence[torch.Tensor] | None = None,
    run: Callable[[int, TokenBatch], object] | None = None,
    gradients: bool = False,
    after: Callable[[int], None] | None = None,
) -> None:
    """Run the model on every batch, one after the other, with hooks at some sites.

    Args:
        loaded: the model.
        batches: what is read, in this order.
        readers: (site, layer) -> what is called with the site's values.
        progress: called with the number of counted tokens of each batch that is done.
        lines: ``line_numbers`` of each language, for ``Position.places``.
        run: called with a batch's index and the batch on the device; None: the forward pass without logits.
        gradients: whether the passes are recorded for a backward pass.
        after: called with the index of each batch that is done.

    Raises:
        BrocaError: an activation that is not finite.
    """
    current: list[Position] = []

    def bound(read: PositionReader) -> SiteHook:
        return lambda values, routed: read(values, routed, current[0])

    own = {place: bound(read) for place, read in readers.items()}
    with explained(loaded), site_hooks(loaded.anatomy, own), torch.set_grad_enabled(gradients):
        for at, (k, batch) in enumerate(batches):
            on_device = batch.to(loaded.device)
            places = None if lines is None else torch.searchsorted(lines[k], batch.line_numbers)
            current[:] = [Position(at, k, on_device, places)]
            if run is None:
                forward(loaded.model, on_device)
            else:
                run(at, on_device)
            if progress is not None:
                progress(int(batch.counted.sum()))
            if after is not None:
                after(at)
