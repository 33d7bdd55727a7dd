"""Ablation at ``mlp_in``: what takes the place of some neurons' values while a model runs.

    zero      0, at every position: what zeroing their columns of ``down_proj`` does
    mean      each neuron's mean over text, or over one language's, at every counted token
    resample  the values, all neurons of a layer together, of a random other counted token of the batch;
              of a mixture, of a random other counted token that reached the expert

What is not counted (the first position, which serves as an attention sink) keeps its values under ``mean``
and ``resample``: neither means nor draws come from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from neurons.architectures.anatomy import Anatomy
from neurons.architectures.sites import Reader, Routed
from neurons.errors import UsageError

WAYS = ("zero", "mean", "resample")


@dataclass(frozen=True)
class Replacement:
    """A way of ablating.

    Attributes:
        way: one of ``WAYS``.
        means: float32 [L, I], for "mean".
        seed: of the draws of "resample".
    """

    way: str = "zero"
    means: torch.Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise UsageError(f"neurons are not ablated by {self.way!r}: choose {', '.join(WAYS)}")
        if self.way == "mean" and self.means is None:
            raise UsageError("to ablate by the mean, means of the neurons are needed: record mlp_in:sum")


# (values [..., n of the columns], which of them are counted, layer, expert) -> what takes their place
_Fill = Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]


def ablating_readers(
    anatomy: Anatomy, rows: torch.Tensor, replacement: Replacement, counted: torch.Tensor, turn: str
) -> dict[tuple[str, int], Reader]:
    """Readers for ``neurons.architectures.sites.reading`` that ablate neurons on one batch.

    They write into the values that they are given, so gradients must be off.

    Args:
        anatomy: of the model.
        rows: int64 [n, 2], (layer, neuron).
        replacement: how.
        counted: bool [rows, length] of the batch, on the model's device.
        turn: names the batch: draws of "resample" follow from it and the seed.
    """
    readers: dict[tuple[str, int], Reader] = {}
    for layer in rows[:, 0].unique().tolist():
        own = rows[rows[:, 0] == layer, 1].to(counted.device)
        fill = _fill_of(replacement, own, turn, anatomy)
        readers["mlp_in", layer] = _reader(anatomy, layer, own, fill, counted)
    return readers


def _reader(
    anatomy: Anatomy, layer: int, own: torch.Tensor, fill: _Fill | None, counted: torch.Tensor
) -> Reader:
    width = anatomy.expert_width
    columns = {expert: own[own // width == expert] % width for expert in (own // width).unique().tolist()}

    def read(values: torch.Tensor, routed: Routed | None) -> torch.Tensor | None:
        expert = 0 if routed is None else routed.expert
        if expert not in columns:
            return None
        here = columns[expert]
        if fill is None:
            return values.index_fill_(-1, here, 0)
        seen = counted if routed is None else counted.flatten()[routed.tokens]
        values[..., here] = fill(values[..., here], seen, layer, expert).to(values.dtype)
        return values

    return read


def _fill_of(replacement: Replacement, own: torch.Tensor, turn: str, anatomy: Anatomy) -> _Fill | None:
    """None: zero."""
    if replacement.way == "mean":
        means = replacement.means
        assert means is not None

        def by_mean(values: torch.Tensor, seen: torch.Tensor, layer: int, expert: int) -> torch.Tensor:
            here = own[own // anatomy.expert_width == expert].cpu()
            return torch.where(seen[..., None], means[layer, here].to(values), values)

        return by_mean
    if replacement.way == "resample":

        def by_another(values: torch.Tensor, seen: torch.Tensor, layer: int, expert: int) -> torch.Tensor:
            flat = values.flatten(0, -2)
            places = seen.flatten().nonzero()[:, 0]
            # In a dense model every layer draws the same tokens, so that what is written fits together.
            name = f"{replacement.seed} {turn}" + (f" {layer} {expert}" if anatomy.mixed else "")
            changed = flat.clone()
            changed[places] = flat[places[others(len(places), name).to(places.device)]]
            return changed.view(values.shape)

        return by_another
    return None


def others(count: int, name: str) -> torch.Tensor:
    """For each of ``count`` items a random other one, int64 [count]; equal names give equal draws.

    A single item has no other and stays.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, max(2, count), (count,), generator=generator)
    return (torch.arange(count) + steps) % max(1, count)
