"""The pass over text: the only loop that runs the model on batches while hooks read its sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from neurons.architectures.offload import offloaded_bytes
from neurons.architectures.sites import Routed, SiteHook, body, site_hooks
from neurons.models.memory import paused_bytes, paused_room
from neurons.models.not_finite import explained
from neurons.models.processes import world
from neurons.models.source import LoadedModel
from neurons.recording.in_step import PassesInStep
from neurons.text.batches import TokenBatch, counted_tokens

Progress = Callable[[int], None]
Numbered = list[tuple[int, TokenBatch]]  # (language number, batch)

MAX_PAUSED = 512  # batches, of which each has a thread


def expect(progress: Progress | None, count: int) -> None:
    """Announce work that will be reported, if the progress has an ``expect``: a display then tells the time left."""
    announce = getattr(progress, "expect", None)
    if announce is not None:
        announce(count)


def begin_stage(progress: Progress | None, title: str, total: int, unit: str) -> None:
    """Announce that what is reported from now on are units of other work, if the progress has a ``begin_stage``."""
    begin = getattr(progress, "begin_stage", None)
    if begin is not None:
        begin(title, total, unit)


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


class TextInStep(AbstractContextManager["TextInStep"]):
    """Batches that the model reads in step (``neurons.recording.in_step``), from layer to layer.

    Args:
        batches: the batches, in order.
        lines: as in ``read_text``.
        layers: number of layers that run; None: the whole model.
        first: index of the first batch, for ``Position.index``.
        solving: bytes that the caller needs while the model is paused.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batches: Numbered,
        lines: Sequence[torch.Tensor] | None = None,
        layers: int | None = None,
        first: int = 0,
        solving: int = 0,
    ) -> None:
        self._loaded = loaded
        self._layers = loaded.anatomy.layers if layers is None else layers
        self._tokens = [int(batch.counted.sum()) for _, batch in batches]
        self._positions = [
            _position(loaded, first + at, numbered_batch, lines) for at, numbered_batch in enumerate(batches)
        ]
        passes = [partial(forward, loaded.model, at.batch) for at in self._positions]
        positions = sum(batch.ids.numel() for _, batch in batches)
        on_disk = len(batches) > 1 and paused_bytes(loaded, positions) > paused_room(loaded, solving)
        self._passes = PassesInStep(loaded.model, loaded.anatomy, passes, on_disk)

    def __exit__(self, *error: object) -> None:
        self._passes.__exit__(*error)

    def read(
        self,
        readers: Mapping[tuple[str, int], PositionReader],
        progress: Progress | None = None,
        stop: int | None = None,
    ) -> None:
        """Run the layers that follow, with readers at some sites.

        Args:
            readers: as in ``read_text``.
            progress: called with numbers of tokens that add up to the number of all tokens when all layers have run.
            stop: the layer before which the model pauses; None: the last layer is run.

        Raises:
            BrocaError: an activation that is not finite.
        """
        current: list[Position] = []

        def before(number: int) -> None:
            current[:] = [self._positions[number]]

        def after_layer(number: int, layer: int) -> None:
            if progress is not None:
                tokens = self._tokens[number]
                progress(tokens * (layer + 1) // self._layers - tokens * layer // self._layers)

        stop = self._layers if stop is None else stop
        with explained(self._loaded), _hooked(self._loaded, readers, current):
            self._passes.run(stop, before, after_layer)


def read_text(
    loaded: LoadedModel,
    batches: Numbered,
    readers: Mapping[tuple[str, int], PositionReader],
    progress: Progress | None = None,
    *,
    lines: Sequence[torch.Tensor] | None = None,
    run: Callable[[int, TokenBatch], object] | None = None,
    gradients: bool = False,
    after: Callable[[range], None] | None = None,
    layers: int | None = None,
) -> None:
    """Run the model on every batch in order, with readers at some sites.

    Offloaded weights are read once for as many batches as can be kept in step (``TextInStep``), except with
    ``run`` or gradients.

    Args:
        batches: the batches, in order.
        readers: (site, layer) -> function called with the site's values.
        progress: told the number of all counted tokens (``expect``), and called with that of each batch that is done.
        lines: ``line_numbers`` of each language, for ``Position.places``.
        run: called with a batch's index and the batch on the device; None: ``forward``.
        gradients: whether gradients are enabled, for a backward pass in ``run``.
        after: called with the indices of the batches that are done since the last call; nothing has been read of
            any other.
        layers: number of layers to run; None: the whole model.

    Raises:
        BrocaError: an activation that is not finite.
    """
    expect(progress, counted_tokens(batch for _, batch in batches))
    if layers == loaded.anatomy.layers:
        layers = None
    if run is None and not gradients and (layers is not None or offloaded_bytes(loaded.model)):
        for begin, end in _groups(loaded, batches):
            with TextInStep(loaded, batches[begin:end], lines, layers, begin) as in_step:
                in_step.read(readers, progress)
            if after is not None:
                after(range(begin, end))
        return
    current: list[Position] = []
    with explained(loaded), _hooked(loaded, readers, current), torch.set_grad_enabled(gradients):
        for at, numbered_batch in enumerate(batches):
            current[:] = [_position(loaded, at, numbered_batch, lines)]
            if run is None:
                forward(loaded.model, current[0].batch)
            else:
                run(at, current[0].batch)
            if progress is not None:
                progress(int(numbered_batch[1].counted.sum()))
            if after is not None:
                after(range(at, at + 1))


def _position(
    loaded: LoadedModel,
    at: int,
    numbered_batch: tuple[int, TokenBatch],
    lines: Sequence[torch.Tensor] | None,
) -> Position:
    k, batch = numbered_batch
    places = None if lines is None else torch.searchsorted(lines[k], batch.line_numbers)
    return Position(at, k, batch.to(loaded.device), places)


def _hooked(
    loaded: LoadedModel, readers: Mapping[tuple[str, int], PositionReader], current: Sequence[Position]
) -> AbstractContextManager[None]:
    """Context with the readers at their sites, called with the position in ``current``."""

    def bound(read: PositionReader) -> SiteHook:
        return lambda values, routed: read(values, routed, current[0])

    return site_hooks(loaded.anatomy, {place: bound(read) for place, read in readers.items()})


def _groups(loaded: LoadedModel, batches: Numbered) -> Iterator[tuple[int, int]]:
    """(begin, end) of consecutive batches that are read in step; one at a time if all weights are in memory."""
    size = MAX_PAUSED if offloaded_bytes(loaded.model) else 1
    for begin in range(0, len(batches), size):
        yield begin, min(begin + size, len(batches))
