"""The pass over text: the only loop that runs the model on batches while hooks read its sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from neurons.architectures.sites import Routed, SiteHook, body, site_hooks
from neurons.models.not_finite import explained
from neurons.models.processes import world
from neurons.models.source import LoadedModel
from neurons.text.batches import TokenBatch

Progress = Callable[[int], None]
Numbered = list[tuple[int, TokenBatch]]  # (language number, batch)


@dataclass(frozen=True)
class Position:
    """The position of a pass over text: the batch that the model reads.

    Attributes:
        index: the batch's index in the pass.
        language: its language's index k.
        batch: the batch, on the model's device.
        places: int64 [rows], each text's index among the texts of its language; None if no ``lines`` are given.
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
        """int64 [n], indices of the counted tokens among those of the batch, or among those routed to an expert."""
        if routed is None:
            return self._positions.to(device)
        return self.counted.flatten().to(device)[routed.tokens].nonzero().flatten()

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """[n, width]: the counted tokens of values [rows, length, width], detached."""
        return values.detach()[self.counted.to(values.device)]


# As ``neurons.architectures.sites.SiteHook``, with the position of the pass; it replaces no values.
PositionReader = Callable[[torch.Tensor, Routed | None, Position], None]


def forward(model: Any, batch: TokenBatch) -> torch.Tensor:
    """Final hidden states [rows, length, d] of a batch, on its device, without logits."""
    mask = batch.attention.long() if batch.padded else None
    hidden: torch.Tensor = body(model)(
        input_ids=batch.ids, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return hidden.to(batch.ids.device)


def numbered(batches: Mapping[str, Sequence[TokenBatch]]) -> Numbered:
    """Every language's batches with the language's index."""
    return [(k, batch) for k, of_language in enumerate(batches.values()) for batch in of_language]


def batches_of_process(batches: Numbered) -> Numbered:
    """The batches of this process, in the order of a single process."""
    number, processes = world()
    return batches[number::processes]


def line_numbers(batches: Mapping[str, Sequence[TokenBatch]]) -> dict[str, torch.Tensor]:
    """Language -> int64 [T], the lines of its texts, ascending."""
    return {
        language: torch.cat([batch.line_numbers for batch in of_language]).unique()
        for language, of_language in batches.items()
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
    """Run the model on every batch in order, with readers at some sites.

    Args:
        loaded: the model.
        batches: the batches, in order.
        readers: (site, layer) -> function called with the site's values.
        progress: called with the number of counted tokens of each batch that is done.
        lines: ``line_numbers`` of each language, for ``Position.places``.
        run: called with a batch's index and the batch on the device; None: ``forward``.
        gradients: whether gradients are enabled, for a backward pass in ``run``.
        after: called with the index of each batch that is done.

    Raises:
        BrocaError: an activation that is not finite.
    """
    current: list[Position] = []

    def bound(read: PositionReader) -> SiteHook:
        return lambda values, routed: read(values, routed, current[0])

    hooks = {place: bound(read) for place, read in readers.items()}
    with explained(loaded), site_hooks(loaded.anatomy, hooks), torch.set_grad_enabled(gradients):
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
