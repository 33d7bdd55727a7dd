"""Means and pooled within-language covariance of a site, streamed, on the units that are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from neurons.batches import TokenBatch
from neurons.errors import BrocaError
from neurons.not_finite import not_finite
from neurons.recording import Progress, forward
from neurons.sites import Reader, Routed, reading
from neurons.source import LoadedModel


@dataclass(frozen=True)
class Moments:
    """First and second moments of one layer's site.

    Attributes:
        languages: the K names.
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
        site: a site of ``neurons.anatomy.SITES``.
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
    units: Mapping[tuple[str, int], torch.Tensor],
    progress: Progress | None = None,
) -> dict[tuple[str, int], Moments]:
    """Moments of several sites, in one pass.

    Args:
        loaded: the model.
        batches: language -> its batches.
        units: (site, layer) -> int64 [S], which units of it.
        progress: called with the number of tokens done.

    Raises:
        BrocaError: neurons of a mixture of experts, or moments that are not finite, by site and layer.
    """
    languages = tuple(batches)
    device = loaded.device
    sums = {
        place: torch.zeros(len(index), len(languages), dtype=torch.float64, device=device)
        for place, index in units.items()
    }
    squares = {
        place: torch.zeros(len(index), len(index), dtype=torch.float64, device=device)
        for place, index in units.items()
    }
    starts = {
        place: torch.zeros(len(index), dtype=torch.float64, device=device) for place, index in units.items()
    }
    start_tokens = 0
    current: dict[str, torch.Tensor] = {}
    tokens = torch.zeros(len(languages), dtype=torch.float64, device=device)
    k = 0

    def reader_of(place: tuple[str, int], index: torch.Tensor) -> Reader:
        def read(values: torch.Tensor, routed: Routed | None) -> None:
            if routed is not None:
                raise BrocaError(
                    f"{loaded.anatomy.model_type}: each expert's neurons see other tokens, so they have no covariance "
                    "in common: read attn_in"
                )
            rows = values.detach()[current["counted"]].double()[:, index]
            sums[place][:, k] += rows.sum(0)
            squares[place].addmm_(rows.T, rows)
            starts[place] += values.detach()[current["start"]].double()[:, index].sum(0)

        return read

    readers = {place: reader_of(place, index.to(device)) for place, index in units.items()}
    with reading(loaded.anatomy, readers), torch.no_grad():
        for k, language in enumerate(languages):
            for batch in batches[language]:
                on_device = batch.to(device)
                current["counted"] = on_device.counted
                current["start"] = on_device.attention & ~on_device.counted
                start_tokens += int(current["start"].sum())
                forward(loaded.model, on_device)
                tokens[k] += batch.counted.sum()
                if progress is not None:
                    progress(int(batch.counted.sum()))
    found = {}
    for place, index in units.items():
        mean = sums[place] / tokens
        within = squares[place] - (mean * tokens) @ mean.T
        start = (starts[place] / start_tokens).cpu() if start_tokens else None
        found[place] = Moments(languages, index, mean.cpu(), (within / tokens.sum()).cpu(), start)
        of_start = torch.zeros(1) if start is None else start
        if not bool(torch.isfinite(found[place].covariance).all() & torch.isfinite(of_start).all()):
            site, layer = place
            raise not_finite(loaded, f"{site} in layer {layer}")
    return found
