"""Collectors: sums of a site's values over tokens, over texts and of gradients."""

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
# Only activations at the input of down_proj are weighted: by the norms of the neurons' output weights, and by the factors
# of experts' outputs.
WEIGHTED_SITE = "mlp_in"


class Collector(Protocol):
    """Adds a layer's values to its totals."""

    def add(self, layer: int, values: torch.Tensor, routed: Routed | None, at: Position) -> None: ...

    def finish(self, layer: int, at: Position) -> None:
        """Called at the end of a layer of a model of mixtures, when all routed tokens are added."""
        return


@dataclass
class TokenSums(Collector):
    """``OF_TOKENS`` of one site, and the number of tokens routed to each expert."""

    site: str
    moments: Sequence[str]
    anatomy: Anatomy
    totals: Totals
    counts_routed: bool = False
    _rows_by_key: dict[tuple[int, int, int | None, torch.device], dict[str, torch.Tensor]] = field(
        default_factory=dict
    )

    def add(self, layer: int, values: torch.Tensor, routed: Routed | None, at: Position) -> None:
        positions = at.positions(routed, values.device)
        if routed is not None and self.counts_routed:
            self.totals.of("routed", layer, values.device)[at.language, routed.expert] += len(positions)
        key = (layer, at.language, None if routed is None else routed.expert, values.device)
        if key not in self._rows_by_key:
            units = slice(None) if routed is None else expert_units(self.anatomy, routed)
            self._rows_by_key[key] = self._rows(layer, at.language, units, values.device)
        add_tokens(values, positions, self._rows_by_key[key])

    def _rows(self, layer: int, language: int, units: slice, device: torch.device) -> dict[str, torch.Tensor]:
        names = {moment: f"{self.site}:{moment}" for moment in self.moments}
        if "positive" in names and "sum" not in names:
            # NaN > 0 is False, so only a sum can show it.
            names["sum"] = self.site
        return {
            moment: self.totals.of(name, layer, device)[language, units] for moment, name in names.items()
        }


@dataclass
class TextSums(Collector):
    """``OF_TEXTS``, the worst rank and the responses of one site: a text's mean is over its counted tokens."""

    site: str
    moments: Sequence[str]
    anatomy: Anatomy
    totals: Totals
    responses: Sequence[torch.Tensor] = ()
    _gathered: dict[bool, torch.Tensor] = field(default_factory=dict)
    _norms: dict[int, torch.Tensor] = field(default_factory=dict)

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
        is_counted = counted.flatten()[routed.tokens]
        exact = values[is_counted].double()
        if absolute and self.site == WEIGHTED_SITE and routed.weights is not None:
            exact = exact * routed.weights.detach()[is_counted, None].double()
        self._gathered[absolute][:, expert_units(self.anatomy, routed)].index_add_(
            0, routed.tokens[is_counted] // length, exact.abs() if absolute else exact
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
            if self.responses and at.batch.fractions is None:
                self.responses[k][at.places, layer] = means.float().cpu()
            elif self.responses:
                assert at.places is not None and at.batch.fractions is not None
                parts = (means.cpu() * at.batch.fractions[:, None]).float()
                self.responses[k][:, layer].index_add_(0, at.places, parts)

    def _weight(self, layer: int, device: torch.device) -> torch.Tensor:
        """The norm of each neuron's column of down_proj at ``WEIGHTED_SITE``, else 1."""
        if self.site != WEIGHTED_SITE:
            return torch.ones((), dtype=torch.float64, device=device)
        if layer not in self._norms:
            norms = self.anatomy.output_norms(layer, "mlp").to(device)
            # Places without a neuron follow.
            self._norms[layer] = torch.nn.functional.pad(norms, (0, self.anatomy.neurons - len(norms)))
        return self._norms[layer]


def head_effects(values: torch.Tensor, gradient: torch.Tensor, heads: int, width: int) -> torch.Tensor:
    """The sum of x * dLoss/dx over the channels of each head, float64 [..., heads].

    Args:
        values: [..., n], the channels of head i from i * ``width`` on; others follow.
        gradient: of the loss, of the shape of ``values``.
        width: channels of a head.
    """
    exact = torch.promote_types(values.dtype, torch.float32)
    product = values[..., : heads * width].to(exact) * gradient[..., : heads * width].to(exact)
    return product.reshape(*product.shape[:-1], heads, width).sum(-1, dtype=torch.float64)


@dataclass
class Attribution(Collector):
    """|x * dLoss/dx| of one site, summed over tokens in the backward pass; at ``attn_in`` of each head."""

    site: str
    anatomy: Anatomy
    totals: Totals

    def add(self, layer: int, values: torch.Tensor, routed: Routed | None, at: Position) -> None:
        if not values.requires_grad:
            # The weights are frozen, so values below the first site require no gradient.
            values.requires_grad_(True)
        units = slice(None) if routed is None else expert_units(self.anatomy, routed)
        total = self.totals.of(f"{self.site}:{ATTRIBUTION}", layer, values.device)[at.language, units]
        positions = at.positions(routed, values.device)
        width = self.anatomy.head_dims[layer]
        heads = self.anatomy.width("attn_in", layer) // width if self.site == "attn_in" else None

        # Detached: a hook that refers to the values refers to their graph, which refers to the hook, a cycle.
        # In float32: products of small values and gradients are 0 in float16.
        exact = torch.promote_types(values.dtype, torch.float32)
        detached = values.detach()

        def on_gradient(gradient: torch.Tensor) -> None:
            if heads is None:
                add_tokens(detached.to(exact) * gradient.to(exact), positions, {"absolute": total})
            else:
                effects = head_effects(detached, gradient, heads, width)
                add_tokens(effects, positions, {"absolute": total[:heads]})

        values.register_hook(on_gradient)
