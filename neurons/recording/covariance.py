"""Means and pooled within-language covariance of a site, streamed, on the units that are asked for.

A covariance of 14,336 neurons takes 1.6 GB, so as many layers at a time are taken as memory has room for.  No
layer runs twice for that: what leaves the last layer of a group is kept for every batch, and the next group
starts there (``neurons.recording.partial_forward``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from neurons.architectures.sites import Routed
from neurons.errors import BrocaError
from neurons.models.memory import (
    covariance_bytes,
    covariance_room,
    kept_bytes,
    max_room,
    room,
    solving_bytes,
)
from neurons.models.not_finite import not_finite
from neurons.models.source import LoadedModel
from neurons.recording.partial_forward import Kept, forward_between, starts_in_the_middle
from neurons.recording.text_pass import Position, PositionReader, Progress, numbered, read_text
from neurons.statistics.gram import Gram
from neurons.text.batches import TokenBatch

Place = tuple[str, int]  # site, layer


@dataclass(frozen=True)
class Moments:
    """First and second moments of one layer's site.

    Attributes:
        languages: the K names: of languages, or of other groups of tokens.
        units: int64 [S], the units (neurons) that the rest is about.
        mean: float64 [S, K], mean over the tokens of each language.
        covariance: float64 [S, S], about each token's own language mean, over all tokens together.
        start: float64 [S], mean over the beginning-of-sequence tokens, which are not in the rest; None
            where the texts have none.
    """

    languages: tuple[str, ...]
    units: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor
    start: torch.Tensor | None = None

    @property
    def silent(self) -> bool:
        """Whether every unit is 0 on every token: of a dead layer, or of neurons that never fire."""
        return not bool(self.mean.any() | self.covariance.any())


def language_moments(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    site: str,
    units: Mapping[int, torch.Tensor],
    progress: Progress | None = None,
) -> dict[int, Moments]:
    """Moments of ``site`` in each layer of ``units``, in one pass.

    Args:
        loaded: the model.
        batches: language -> its batches.
        site: a site of ``neurons.architectures.anatomy.SITES``.
        units: layer -> int64 [S], which units.
        progress: called with the number of tokens done.

    Raises:
        BrocaError: as ``site_moments``.
    """
    found = site_moments(loaded, batches, {(site, layer): index for layer, index in units.items()}, progress)
    return {layer: moments for (_, layer), moments in found.items()}


def site_moments(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    units: Mapping[Place, torch.Tensor],
    progress: Progress | None = None,
) -> dict[Place, Moments]:
    """All of ``each_moments``, which take 8 S^2 bytes a place together."""
    return dict(each_moments(loaded, batches, units, progress))


def each_moments(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    units: Mapping[Place, torch.Tensor],
    progress: Progress | None = None,
    groups: Sequence[str] | None = None,
) -> Iterator[tuple[Place, Moments]]:
    """Moments of several sites, one after the other from the lowest layer up, some layers in memory at a time.

    The model must not change between two of them.

    Args:
        loaded: the model.
        batches: language -> its batches.
        units: (site, layer) -> int64 [S], which units of it.
        progress: called with numbers of tokens whose sum is that of all tokens.
        groups: names of the batches' groups of tokens, which take the place of the languages.

    Raises:
        BrocaError: neurons of a mixture of experts, or moments that are not finite, by site and layer.
    """
    flat = numbered(batches)
    parts = _parts(loaded, units)
    layers = 1 + max(layer for _, layer in units)
    from_kept = len(parts) > 1 and _starts_between(loaded, flat)
    kept: list[Kept | None] = [None] * len(flat)
    start = done = 0
    for part in parts:
        stop = 1 + max(layer for _, layer in part)
        sums = _Sums(loaded, batches, part, groups)
        read_text(
            loaded,
            flat,
            sums.readers(),
            None if progress is None else _share_of(progress, done, stop, layers),
            run=_layers_between(loaded, start, stop, kept, from_kept),
        )
        yield from sums.moments()
        done = stop
        start = stop if from_kept else 0


def _layers_between(
    loaded: LoadedModel, start: int, stop: int, kept: list[Kept | None], keeps: bool
) -> Callable[[int, TokenBatch], None]:
    """Runs some layers on a batch, from what the pass before kept of it."""

    def run(at: int, batch: TokenBatch) -> None:
        left = forward_between(loaded.model, loaded.anatomy, batch, start, stop, kept[at])
        kept[at] = left if keeps else None

    return run


def _share_of(progress: Progress, done: int, stop: int, layers: int) -> Progress:
    """Of a batch's tokens, the part that the layers from ``done`` to ``stop`` are of all."""
    return lambda tokens: progress(tokens * stop // layers - tokens * done // layers)


class _Sums:
    """The sums of some places on one pass over the text."""

    def __init__(
        self,
        loaded: LoadedModel,
        batches: Mapping[str, Sequence[TokenBatch]],
        units: Mapping[Place, torch.Tensor],
        groups: Sequence[str] | None,
    ) -> None:
        languages = tuple(batches) if groups is None else tuple(groups)
        self.loaded, self.languages, self.units = loaded, languages, units
        device = loaded.device
        self.tokens = torch.zeros(len(languages), dtype=torch.float64)
        for k, some in enumerate(batches.values()):
            for batch in some:
                for number, own in _by_group(batch, k):
                    self.tokens[number] += float(own.sum())
        self.start_tokens = sum(
            int((batch.attention & ~batch.counted).sum()) for some in batches.values() for batch in some
        )
        self.sums = {
            place: torch.zeros(len(index), len(languages), dtype=torch.float64, device=device)
            for place, index in units.items()
        }
        self.starts = {
            place: torch.zeros(len(index), dtype=torch.float64, device=device)
            for place, index in units.items()
        }
        self.grams = {place: Gram(len(index), device) for place, index in units.items()}

    def readers(self) -> dict[Place, PositionReader]:
        return {place: self._reader(place, index) for place, index in self.units.items()}

    def _reader(self, place: Place, index: torch.Tensor) -> PositionReader:
        def read(values: torch.Tensor, routed: Routed | None, at: Position) -> None:
            if routed is not None:
                raise BrocaError(
                    f"{self.loaded.anatomy.model_type}: each expert's neurons see other tokens, so they have no "
                    "covariance in common: read attn_in"
                )
            some = slice(None) if len(index) == values.shape[-1] else index.to(values.device)
            rows = at.rows(values)[:, some]
            gram = self.grams[place]
            gram.add(rows.to(gram.centre.device))
            for number, own in _by_group(at.batch, at.language):
                picked = rows if at.batch.groups is None else rows[own[at.counted].to(rows.device)]
                self.sums[place][:, number] += picked.sum(0, dtype=torch.float64).to(gram.centre.device)
            starts = (at.batch.attention & ~at.counted).to(values.device)
            at_start = values.detach()[starts][:, some]
            self.starts[place] += at_start.sum(0, dtype=torch.float64).to(gram.centre.device)

        return read

    def moments(self) -> Iterator[tuple[Place, Moments]]:
        for place, index in self.units.items():
            gram = self.grams.pop(place)
            mean = self.sums[place].cpu() / self.tokens
            about = mean - gram.centre.double().cpu()[:, None]
            covariance = gram.total().cpu()
            covariance.addmm_(about * self.tokens, about.T, alpha=-1)
            covariance /= self.tokens.sum()
            start = (self.starts[place] / self.start_tokens).cpu() if self.start_tokens else None
            of_start = torch.zeros(1) if start is None else start
            # A sum is finite only where every term is, and takes no second matrix.
            if not bool(torch.isfinite(covariance.sum()) & torch.isfinite(of_start.sum())):
                site, layer = place
                raise not_finite(self.loaded, f"{site} in layer {layer}")
            yield place, Moments(self.languages, index, mean, covariance, start)
            # Only whoever took them holds them now, or has let them go.
            del covariance


def _by_group(batch: TokenBatch, language: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(number, bool [rows, length] of its counted tokens) of every group that a batch has tokens of."""
    if batch.groups is None:
        yield language, batch.counted
        return
    for number in batch.groups[batch.counted].unique().tolist():
        yield number, batch.counted & (batch.groups == number)


def _parts(loaded: LoadedModel, units: Mapping[Place, torch.Tensor]) -> list[dict[Place, torch.Tensor]]:
    """Places in order of their layers, as many together as memory has room for; a layer is never parted.

    Raises:
        BrocaError: one layer is more than is allowed.
    """
    parts: list[dict[Place, torch.Tensor]] = []
    solving = max(solving_bytes(len(index)) for index in units.values())
    left = 0
    for layer in sorted({layer for _, layer in units}):
        own = {place: index for place, index in units.items() if place[1] == layer}
        size = sum(covariance_bytes(len(index)) for index in own.values())
        if size + solving > max_room(loaded):
            raise BrocaError(
                f"{loaded.name}: the covariances of layer {layer} and what is solved with them take "
                f"{(size + solving) / 1e9:.1f} GB beside weights and libraries, and {max_room(loaded) / 1e9:.1f} GB are "
                "left of what is allowed: allow more (--max-memory), or let the key use some neurons only (--neurons)"
            )
        if not parts or size > left:
            parts.append({})
            left = covariance_room(loaded) - solving
        parts[-1].update(own)
        left -= size
    return parts


def _starts_between(loaded: LoadedModel, batches: Sequence[tuple[int, TokenBatch]]) -> bool:
    """Whether groups can start where the one before stopped: the model allows it, and hidden states have room."""
    tokens = sum(batch.ids.numel() for _, batch in batches)
    return kept_bytes(loaded, tokens) <= room(loaded) and starts_in_the_middle(loaded.model, loaded.anatomy)
