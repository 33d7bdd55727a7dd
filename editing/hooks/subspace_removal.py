"""Subspace removal (When Less Language is More, arXiv 2505.15257): h' = h - lambda M M^T h at the residual.

M [d, r] is the layer's language subspace.  Language information is removed in the middle layers
(lambda > 0) and added back in the top ones (lambda < 0), at all positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch

from editing.directions.direction import Direction
from editing.methods.material import Material
from editing.methods.method import Hook, Steering
from neurons.architectures.sites import Routed, SiteHook, site_hooks
from neurons.models.source import LoadedModel
from neurons.setting import setting


def middle_layers(layers: int) -> tuple[int, ...]:
    """The second and third quarter of a model's layers, at least one."""
    return tuple(range(layers // 4, max(layers // 4 + 1, (3 * layers) // 4)))


def top_layers(layers: int) -> tuple[int, ...]:
    """The last quarter; empty for a single layer."""
    return tuple(range(max((3 * layers) // 4, 1), layers))


def subspace_removal(
    loaded: LoadedModel, direction: Direction, strengths: Mapping[int, float]
) -> AbstractContextManager[None]:
    """Context in which a subspace is removed from the residual stream.

    Args:
        loaded: the model.
        direction: with a subspace at ``block_out``.
        strengths: layer -> lambda; 1 removes it, below 0 amplifies it.

    Raises:
        BrocaError: the direction has no subspace at ``block_out``.
    """
    hooks = {
        ("block_out", layer): _remove(direction.subspace("block_out", layer), strength)
        for layer, strength in strengths.items()
    }
    return site_hooks(loaded.anatomy, hooks)


def _remove(basis: torch.Tensor, strength: float) -> SiteHook:
    def hook(values: torch.Tensor, _: Routed | None) -> torch.Tensor:
        local = basis.to(values.device, values.dtype)
        return values - strength * ((values @ local) @ local.T)

    return hook


@dataclass(frozen=True, kw_only=True)
class Removal(Hook):
    """The registered method, with the language subspace of the text of a study."""

    name = "subspace-removal"
    title = "subspace removal hook"
    line = "removes the languages' subspace in middle layers and adds it back in the top ones"
    source = "arXiv 2505.15257"

    strength: float = setting(1.0, grid=(0.2, 0.5, 1.0))

    def prepare(self, material: Material) -> tuple[LoadedModel, Direction]:
        return material.loaded, material.subspace

    def hooks(self, prepared: tuple[LoadedModel, Direction]) -> Steering:
        depth, strength = prepared[0].anatomy.layers, float(self.strength)
        middle = dict.fromkeys(middle_layers(depth), strength)
        # A layer that is both, as in a small model, removes it.
        return partial(subspace_removal, *prepared, {**dict.fromkeys(top_layers(depth), -strength), **middle})
