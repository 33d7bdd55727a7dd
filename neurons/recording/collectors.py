"""Collectors: what is summed of a site's values, for tokens, for texts and for gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from neurons.architectures.anatomy import Anatomy
from neurons.architectures.sites import Routed, expert_units
from neurons.errors import NotFiniteError
from neurons.recording.text_pass import Position
from neurons.scorers.plnd import document_importance_ranks
from neurons.statistics.sums import add_texts, add_tokens, text_sums
from neurons.statistics.totals import Totals

WORST_RANK = "worst_rank"  # of a neuron in any text (``neurons.scorers.plnd``)
ATTRIBUTION = "attribution"
RESPONSES = "responses"
# The value of a neuron weighs its effect where the effect is measured, at the input of down_proj only.
WEIGHTED_SITE = "mlp_in"


class Collector(Protocol):
    """Adds a layer's values to its totals."""

    def add(self, layer: int, values: torch.Tensor, routed: Routed | None, at: Position) -> None: ...

    def finish(self, layer: int, at: Position) -> None:
        """The layer's mixture of experts is through: all that was routed has been added."""


@dataclass
class TokenSums:
    """``OF_TOKENS`` of one site, and how many tokens were routed to each expert."""

    site: str
    moments: Sequence[str]
    anatomy: Anatomy
    totals: Totals
    counts_routed: bool = False
    _own: dict[tuple[int, int, int | None, torch.device], dict[str, torch.Tensor]] = field(
        default_factory=dict
    )

    def add(self, layer: int, values: torch.Tensor, routed: Routed | None, at: Position) -> None:
        positions = at.positions(routed, values.device)
        if routed is not None and self.counts_routed:
            self.totals.of("routed", layer, values.device)[at.language, routed.expert] += len(positions)
        key = (layer, at.language, None if routed is None else routed.expert, values.device)
        if key not in self._own:
            units = slice(None) if routed is None else expert_units(self.anatomy, routed)
            self._own[key] = self._rows(layer, at.language, units, values.device)
        add_tokens(values, positions, self._own[key])

    def _rows(self, layer: int, language: int, units: slice, device: torch.device) -> dict[str, torch.Tensor]:
        names = {moment: f"{self.site}:{moment}" for moment in self.moments}
        if "positive" in names and "sum" not in names:
            # NaN > 0 is False: a count alone would hide it.
            names["sum"] = self.site
        return {
            moment: self.totals.of(name, layer, device)[language, units] for moment, name in names.items()
        }

    def finish(self, layer: int, at: Position) -> None:
        pass


@dataclass
class TextSums:
    """``OF_TEXTS``, the worst rank and the responses of one site: a text's mean is over its counted tokens."""

    site: str
    moments: Sequence[str]
    anatomy: Anatomy
    totals: Totals
    responses: Sequence[torch.Tensor] = ()
    _gathered: dict[bool, torch.Tensor] = field(default_factory=dict)
    _lengths: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, layer: int, values: torch.Tensor, routed: Routed | None, at: Position) -> None:
        values = values.detach()
        counted = at.counted.to(values.device)
        for absolute in self._needed():
            if routed is None:
                self._gathered[absolute] = text_sums(values, counted, absolute)
            else:
                self._gather(values, routed, counted, absolute)
        if routed is None:
            self.finish(layer, at)

    def _needed(self) -> list[bool]:
        signed = any(moment != WORST_RANK for moment in self.moments) or bool(self.responses)
        return [*([False] if signed else []), *([True] if WORST_RANK in self.moments else [])]

    def _gather(self, values: torch.Tensor, routed: Routed, counted: torch.Tensor, absolute: bool) -> None:
        rows, length = counted.shape
        if absolute not in self._gathered:
            width = self.anatomy.width(self.site)
            self._gathered[absolute] = torch.zeros(rows, width, dtype=torch.float64, device=values.device)
        inside = counted.flatten()[routed.tokens]
        exact = values[inside].double()
        self._gathered[absolute][:, expert_units(self.anatomy, routed)].index_add_(
            0, routed.tokens[inside] // length, exact.abs() if absolute else exact
        )

    def finish(self, layer: int, at: Position) -> None:
        gathered, self._gathered = self._gathered, {}
        for absolute, sums in gathered.items():
            device, k = sums.device, at.language
            if not bool(torch.isfinite(sums).all()):
                raise NotFiniteError(f"a text's mean of {self.site} in layer {layer}")
            if absolute:
                ranks = document_importance_ranks(sums * self._weight(layer, device))
                worst = self.totals.of(f"{self.site}:{WORST_RANK}", layer, device)[k]
                torch.maximum(worst, ranks.amax(0), out=worst)
                continue
            means = sums / at.counted.to(device).sum(1)[:, None]
            add_texts(
                means,
                {
                    moment: self.totals.of(f"{self.site}:{moment}", layer, device)[k]
                    for moment in self.moments
                    if moment != WORST_RANK
                },
            )
            if self.responses and at.batch.shares is None:
                self.responses[k][at.places, layer] = means.float().cpu()
            elif self.responses:
                assert at.places is not None and at.batch.shares is not None
                parts = (means.cpu() * at.batch.shares[:, None]).float()
                self.responses[k][:, layer].index_add_(0, at.places, parts)

    def _weight(self, layer: int, device: torch.device) -> torch.Tensor:
        """The length of each neuron's value, or 1 where the effect of the values is not in question."""
        if self.site != WEIGHTED_SITE:
            return torch.ones((), dtype=torch.float64, device=device)
        if layer not in self._lengths:
            weight = self.anatomy.weight_values(layer, "mlp")
            self._lengths[layer] = weight.double().norm(dim=-2).flatten().to(device)
        return self._lengths[layer]


@dataclass
class Attribution:
    """|x * dLoss/dx| of one site, summed over tokens when the backward pass comes by."""

    site: str
    anatomy: Anatomy
    totals: Totals

    def add(self, layer: int, values: torch.Tensor, routed: Routed | None, at: Position) -> None:
        if not values.requires_grad:
            # The weights are frozen, so nothing below the first site asks for a gradient.
            values.requires_grad_(True)
        units = slice(None) if routed is None else expert_units(self.anatomy, routed)
        total = self.totals.of(f"{self.site}:{ATTRIBUTION}", layer, values.device)[at.language, units]
        positions = at.positions(routed, values.device)

        # A hook that holds the values themselves holds their graph, which holds the hook: nothing would free it.
        held = values.detach()

        def on_gradient(gradient: torch.Tensor) -> None:
            add_tokens(held * gradient, positions, {"absolute": total})

        values.register_hook(on_gradient)

    def finish(self, layer: int, at: Position) -> None:
        pass
