"""Streamed means and pooled within-language covariances of selected units of a site.

A covariance of 14,336 neurons takes 1.6 GB.  Unless those of all layers fit into memory, layers are processed one
after another.  No layer runs twice: the passes over all batches pause after each (``neurons.recording.in_step``).
Only a text of too many batches to pause is read again for each group of layers that fits.

The experts of a mixture see different tokens, so each has moments of its own, over the tokens that are routed to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from neurons.architectures.sites import Routed
from neurons.errors import BrocaError
from neurons.models.memory import (
    covariance_bytes,
    covariance_room,
    max_room,
    solving_bytes,
)
from neurons.models.not_finite import not_finite
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import (
    MAX_PAUSED,
    Position,
    PositionReader,
    Progress,
    TextInStep,
    expect,
    numbered,
    read_text,
)
from neurons.statistics.gram import Gram, Workspace
from neurons.statistics.sums import column_sums
from neurons.text.batches import TokenBatch, counted_tokens

Place = tuple[str, int]  # site, layer
Expert = tuple[int, int]  # layer, expert or another group of as many neurons
_Place = tuple[str, int, int | None]  # with the expert


@dataclass(frozen=True)
class Moments:
    """First and second moments of one layer's site.

    Attributes:
        languages: names of the K languages, or of other groups of tokens.
        units: int64 [S], indices of the units (neurons).
        mean: float64 [S, K], mean over the tokens of each language.
        covariance: float64 [S, S], over all tokens, about the mean of each token's language.
        start: float64 [S], mean over the beginning-of-sequence tokens, which are excluded from ``mean`` and
            ``covariance``; None if there are none.
        tokens: float64 [K], tokens of each language; None if not counted.  The mean of a language without tokens is 0.
        weights: float64 [K], of an expert: the sum over these tokens of the router's weight of its output; else, and for
            experts with weighted inputs, that of 1.
    """

    languages: tuple[str, ...]
    units: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor
    start: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    @property
    def all_zero(self) -> bool:
        """Whether every unit is 0 on every token: a dead layer, or neurons that never fire."""
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
        batches: language -> its batches.
        site: a site of ``neurons.architectures.anatomy.SITES``.
        units: layer -> int64 [S], indices of units.
        progress: as in ``each_moments``.

    Raises:
        BrocaError: as ``each_moments``.
    """
    by_place = {(site, layer): index for layer, index in units.items()}
    return {layer: moments for (_, layer), moments in each_moments(loaded, batches, by_place, progress)}


def each_moments(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    units: Mapping[Place, torch.Tensor],
    progress: Progress | None = None,
    groups: Sequence[str] | None = None,
) -> Iterator[tuple[Place, Moments]]:
    """Moments of several sites in order of layers.

    The model must not change during the iteration.

    Args:
        batches: language -> its batches.
        units: (site, layer) -> int64 [S], indices of units.
        progress: called with numbers of tokens that add up to the number of all tokens.
        groups: names of the batches' groups of tokens, which replace the languages.

    Raises:
        BrocaError: neurons of a mixture of experts, or moments that are not finite; names site and layer.
    """
    places: dict[_Place, torch.Tensor] = {(*place, None): index for place, index in units.items()}
    for (site, layer, _), moments in _each(loaded, batches, places, progress, groups):
        yield (site, layer), moments
        # So that the caller decides when the covariance is freed.
        del moments


def expert_moments(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    site: str,
    units: Mapping[Expert, torch.Tensor],
    progress: Progress | None = None,
    weighted: bool = False,
) -> Iterator[tuple[Expert, Moments]]:
    """Moments of a mixture's experts over the tokens that are routed to each, in order of layers.

    Args:
        loaded: the model, which must not change during the iteration.
        batches: language -> its batches.
        site: a site of ``EXPERT_SITES``.
        units: (layer, expert) -> int64 [S], indices in the expert; shared experts and the neurons of dense layers are
            groups that every token reaches (``neurons.architectures.anatomy``).
        progress: as in ``each_moments``.
        weighted: multiply each token's values by the router's weight of the expert's output.

    Raises:
        BrocaError: moments that are not finite.
    """
    places: dict[_Place, torch.Tensor] = {
        (site, layer, expert): index for (layer, expert), index in units.items()
    }
    for (_, layer, expert), moments in _each(loaded, batches, places, progress, None, weighted):
        assert expert is not None
        yield (layer, expert), moments
        del moments


def _each(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    units: Mapping[_Place, torch.Tensor],
    progress: Progress | None,
    groups: Sequence[str] | None,
    weighted: bool = False,
) -> Iterator[tuple[_Place, Moments]]:
    """The moments of all places, as many layers at a time as fit into memory."""
    flat = numbered(batches)
    parts = _parts(loaded, units)
    layers = 1 + max(layer for _, layer, _ in units)
    done = 0
    expect(progress, counted_tokens(batch for _, batch in flat))
    with ExitStack() as open_now:
        in_step = None
        if len(parts) > 1 and len(flat) <= MAX_PAUSED:
            parts = _layer_by_layer(units)
            solving = max(sum(covariance_bytes(len(index)) for index in part.values()) for part in parts)
            solving += max(solving_bytes(len(index)) for index in units.values())
            in_step = open_now.enter_context(TextInStep(loaded, flat, layers=layers, solving=solving))
        for part in parts:
            stop = 1 + max(layer for _, layer, _ in part)
            sums = _Sums(loaded, batches, part, groups, weighted)
            if in_step is not None:
                in_step.read(sums.readers(), progress, stop)
            else:
                partial_progress = (
                    None if progress is None else _partial_progress(progress, done, stop, layers)
                )
                read_text(loaded, flat, sums.readers(), partial_progress, layers=stop)
            yield from sums.moments()
            done = stop


def _partial_progress(progress: Progress, done: int, stop: int, layers: int) -> Progress:
    """Reports the fraction of a batch's tokens that corresponds to the layers ``done`` to ``stop - 1``."""
    return lambda tokens: progress(tokens * stop // layers - tokens * done // layers)


class _Sums:
    """Sums of several places in one pass over the text."""

    def __init__(
        self,
        loaded: LoadedModel,
        batches: Mapping[str, Sequence[TokenBatch]],
        units: Mapping[_Place, torch.Tensor],
        groups: Sequence[str] | None,
        weighted: bool,
    ) -> None:
        languages = tuple(batches) if groups is None else tuple(groups)
        self.loaded, self.languages, self.units, self.weighted = loaded, languages, units, weighted
        device = loaded.device

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(*size, dtype=torch.float64, device=device)

        self.tokens, self.weights = (
            {place: torch.zeros(len(languages), dtype=torch.float64) for place in units} for _ in range(2)
        )
        self.start_tokens = dict.fromkeys(units, 0)
        self.sums = {place: zeros(len(index), len(languages)) for place, index in units.items()}
        self.starts = {place: zeros(len(index)) for place, index in units.items()}
        self._groups: dict[int, list[torch.Tensor]] = {}
        workspace = Workspace()
        self.grams = {place: Gram(len(index), device, workspace) for place, index in units.items()}

    def readers(self) -> dict[Place, PositionReader]:
        return {
            (site, layer): self._reader(site, layer)
            for site, layer in {place[:2]: None for place in self.units}
        }

    def _reader(self, site: str, layer: int) -> PositionReader:
        def read(values: torch.Tensor, routed: Routed | None, at: Position) -> None:
            if routed is not None and (site, layer, routed.expert) in self.units:
                self._add((site, layer, routed.expert), values, routed, at)
            elif (site, layer, None) in self.units:
                whole = values if routed is None else self._joined(layer, values, at)
                if whole is not None:
                    self._add((site, layer, None), whole, None, at)

        return read

    def _add(self, place: _Place, values: torch.Tensor, routed: Routed | None, at: Position) -> None:
        """Add the values [rows, length, width] of all tokens, or [n, I] of those routed to an expert."""
        values, index, gram = values.detach().flatten(0, -2), self.units[place], self.grams[place]
        columns = slice(None) if len(index) == values.shape[-1] else index.to(values.device)

        def of_place(mask: torch.Tensor) -> torch.Tensor:
            mask = mask.flatten().to(values.device)
            return mask if routed is None else mask[routed.tokens]

        factors = None if routed is None else routed.weights
        if self.weighted and factors is not None:
            values = values * factors.to(values.dtype)[:, None]
        counted = of_place(at.counted)
        rows = values[counted][:, columns]
        gram.add(rows.to(gram.centre.device))
        for number, mask in _by_group(at.batch, at.language):
            of_group = rows if at.batch.groups is None else rows[of_place(mask)[counted]]
            self.tokens[place][number] += len(of_group)
            total = (
                len(of_group) if factors is None else factors[of_place(mask)].sum(dtype=torch.float64).cpu()
            )
            self.weights[place][number] += total
            self.sums[place][:, number] += column_sums(of_group).to(gram.centre.device)
        starts = values[of_place(at.batch.at_start)][:, columns]
        self.start_tokens[place] += len(starts)
        self.starts[place] += column_sums(starts).to(gram.centre.device)

    def _joined(self, layer: int, group: torch.Tensor, at: Position) -> torch.Tensor | None:
        """The values [rows, length, I] of a dense layer in a model of mixtures, once all its groups are here.

        Raises:
            BrocaError: a mixture of experts.
        """
        anatomy = self.loaded.anatomy
        if anatomy.mixed_in(layer):
            raise BrocaError(
                f"{anatomy.model_type}: the neurons of different experts see different tokens, so they have no common "
                "covariance: read attn_in"
            )
        groups = self._groups.setdefault(layer, [])
        groups.append(group)
        width = anatomy.width("mlp_in", layer)
        if len(groups) * anatomy.expert_width < width:
            return None
        return torch.cat(self._groups.pop(layer), dim=-1)[:, :width].view(*at.counted.shape, width)

    def moments(self) -> Iterator[tuple[_Place, Moments]]:
        for place, index in self.units.items():
            gram, tokens = self.grams.pop(place), self.tokens[place]
            mean = self.sums[place].cpu() / tokens.clamp(min=1)
            covariance = gram.total().cpu()
            centre = gram.centre.double().cpu()
            del gram  # with its workspace
            about = mean - centre[:, None]
            covariance.addmm_(about * tokens, about.T, alpha=-1)
            covariance /= tokens.sum().clamp(min=1)
            starts = self.start_tokens[place]
            start = (self.starts[place] / starts).cpu() if starts else None
            of_start = torch.zeros(1) if start is None else start
            # A sum is finite only if every term is, and needs no second matrix.
            if not bool(torch.isfinite(covariance.sum()) & torch.isfinite(of_start.sum())):
                raise not_finite(self.loaded, f"{place[0]} in layer {place[1]}")
            yield place, Moments(self.languages, index, mean, covariance, start, tokens, self.weights[place])
            # So that the caller decides when the covariance is freed.
            del covariance


def _by_group(batch: TokenBatch, language: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(number, bool [rows, length] of its counted tokens) of every group with tokens in a batch."""
    if batch.groups is None:
        yield language, batch.counted
        return
    for number in batch.groups[batch.counted].unique().tolist():
        yield number, batch.counted & (batch.groups == number)


def _layer_by_layer(units: Mapping[_Place, torch.Tensor]) -> list[dict[_Place, torch.Tensor]]:
    layers = sorted({layer for _, layer, _ in units})
    return [{place: index for place, index in units.items() if place[1] == layer} for layer in layers]


def _parts(loaded: LoadedModel, units: Mapping[_Place, torch.Tensor]) -> list[dict[_Place, torch.Tensor]]:
    """Places in groups of consecutive layers that fit into memory; a layer is never split.

    Raises:
        BrocaError: a single layer needs more than is allowed.
    """
    parts: list[dict[_Place, torch.Tensor]] = []
    solving = max(solving_bytes(len(index)) for index in units.values())
    remaining = 0
    for of_layer in _layer_by_layer(units):
        layer = next(layer for _, layer, _ in of_layer)
        size = sum(covariance_bytes(len(index)) for index in of_layer.values())
        if size + solving > max_room(loaded):
            raise BrocaError(
                f"{loaded.name}: the covariances of layer {layer} and solving with them take "
                f"{(size + solving) / 1e9:.1f} GB besides weights and libraries, but only {max_room(loaded) / 1e9:.1f} "
                "GB are left: allow more (--max-memory), or restrict the key to some neurons (--neurons)"
            )
        if not parts or size > remaining:
            parts.append({})
            remaining = covariance_room(loaded) - solving
        parts[-1].update(of_layer)
        remaining -= size
    return parts
