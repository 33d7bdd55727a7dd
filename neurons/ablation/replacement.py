"""Ablation at ``mlp_in`` or ``attn_in``: hooks that replace the values of neurons or heads while a model runs.

    zero      0 at every position, as if their columns of ``down_proj`` or ``o_proj`` were zeroed
    mean      each value's mean over text, or over the text of one language, at every counted token
    resample  the values, all neurons or heads of a layer together, of a random other counted token of the batch;
              of a mixture, of a random other counted token that reached the expert

Uncounted positions (the first, which serves as an attention sink) keep their values under ``mean`` and
``resample``: neither means nor draws come from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from neurons.architectures.anatomy import Anatomy
from neurons.architectures.sites import Routed, SiteHook
from neurons.errors import UsageError
from neurons.statistics.statistics import Statistics

REPLACEMENTS = ("zero", "mean", "resample")


@dataclass(frozen=True)
class Replacement:
    """What replaces the values of ablated neurons or heads.

    Attributes:
        kind: one of ``REPLACEMENTS``.
        means: float32 [L, width] of the site, for "mean".
        seed: for the draws of "resample".
    """

    kind: str = "zero"
    means: torch.Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in REPLACEMENTS:
            raise UsageError(f"replacement {self.kind!r} is unknown: choose from {', '.join(REPLACEMENTS)}")
        if self.kind == "mean" and self.means is None:
            raise UsageError("mean ablation needs the means of the values: record mlp_in:sum or attn_in:sum")


def means_of(statistics: Statistics, site: str, language: str | None = None) -> torch.Tensor:
    """Means over the text of one language, or of all, float32 [L, width].

    Raises:
        UsageError: no sums of the site, or no such language.
    """
    sums = statistics.moment(f"{site}:sum")
    seen = statistics.seen() if site == "mlp_in" else statistics.tokens
    if language is None:
        # Where an expert saw no token there is nothing that could be replaced.
        return (sums.sum(-1) / seen.sum(-1).clamp(min=1)).float()
    if language not in statistics.languages:
        raise UsageError(
            f"the statistics have no language {language!r} to take the mean of: they have "
            f"{', '.join(statistics.languages)}"
        )
    k = statistics.languages.index(language)
    return (sums[..., k] / seen[..., k].clamp(min=1)).float()


# (values [..., n of the columns], mask of counted positions, layer, expert) -> new values
_Fill = Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]


def ablation_hooks(
    anatomy: Anatomy,
    rows: torch.Tensor,
    replacement: Replacement,
    counted: torch.Tensor,
    turn: str,
    site: str = "mlp_in",
) -> dict[tuple[str, int], SiteHook]:
    """Hooks for ``neurons.architectures.sites.site_hooks`` that ablate values on one batch.

    They write into the values in place, so gradients must be off.

    Args:
        rows: int64 [n, 2], (layer, column of the site).
        counted: bool [rows, length] of the batch, on the model's device.
        turn: name of the batch; the draws of "resample" depend on it and the seed.
        site: "mlp_in" or "attn_in".
    """
    hooks: dict[tuple[str, int], SiteHook] = {}
    mixed = anatomy.mixed and site == "mlp_in"
    # Without experts all columns are one group.
    width = anatomy.expert_width if mixed else anatomy.width(site)
    for layer in rows[:, 0].unique().tolist():
        own = rows[rows[:, 0] == layer, 1].to(counted.device)
        fill = _fill_of(replacement, own, turn, width, mixed)
        hooks[site, layer] = _hook(width, layer, own, fill, counted)
    return hooks


def _hook(width: int, layer: int, own: torch.Tensor, fill: _Fill | None, counted: torch.Tensor) -> SiteHook:
    columns = {expert: own[own // width == expert] % width for expert in (own // width).unique().tolist()}

    def hook(values: torch.Tensor, routed: Routed | None) -> torch.Tensor | None:
        expert = 0 if routed is None else routed.expert
        if expert not in columns:
            return None
        of_expert = columns[expert]
        if fill is None:
            return values.index_fill_(-1, of_expert, 0)
        seen = counted if routed is None else counted.flatten()[routed.tokens]
        values[..., of_expert] = fill(values[..., of_expert], seen, layer, expert).to(values.dtype)
        return values

    return hook


def _fill_of(replacement: Replacement, own: torch.Tensor, turn: str, width: int, mixed: bool) -> _Fill | None:
    """The function that gives new values; None stands for zero."""
    if replacement.kind == "mean":
        means = replacement.means
        assert means is not None

        def by_mean(values: torch.Tensor, seen: torch.Tensor, layer: int, expert: int) -> torch.Tensor:
            of_expert = own[own // width == expert].cpu()
            return torch.where(seen[..., None], means[layer, of_expert].to(values), values)

        return by_mean
    if replacement.kind == "resample":

        def by_another(values: torch.Tensor, seen: torch.Tensor, layer: int, expert: int) -> torch.Tensor:
            flat = values.flatten(0, -2)
            places = seen.flatten().nonzero()[:, 0]
            # In a dense model every layer draws the same tokens, so that the layers stay consistent.
            name = f"{replacement.seed} {turn}" + (f" {layer} {expert}" if mixed else "")
            changed = flat.clone()
            changed[places] = flat[places[others(len(places), name).to(places.device)]]
            return changed.view(values.shape)

        return by_another
    return None


def others(count: int, name: str) -> torch.Tensor:
    """For each of ``count`` items the index of a random other, int64 [count]; equal names give equal draws.

    A single item maps to itself.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, max(2, count), (count,), generator=generator)
    return (torch.arange(count) + steps) % max(1, count)
