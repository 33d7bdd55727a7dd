"""Channels of the inputs of ``o_proj`` and ``down_proj`` times a factor each: x_i <- f_i x_i, at all positions.

What CLAS and AUSteer do while the model runs; both decide on the factors in files of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from neurons.architectures.sites import Routed, SiteHook, site_hooks
from neurons.models.source import LoadedModel


@contextmanager
def scaled_inputs(loaded: LoadedModel, factors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Scale inside the block.

    Args:
        loaded: the model.
        factors: block -> [L, n], those of its input channels; layers whose factors are all 1 are left alone.
    """
    width = loaded.anatomy.expert_width
    readers: dict[tuple[str, int], SiteHook] = {}
    for block, values in factors.items():
        for layer in (values != 1).any(1).nonzero()[:, 0].tolist():
            readers[f"{block}_in", layer] = _scale(values[layer], width)
    with site_hooks(loaded.anatomy, readers):
        yield


def _scale(factors: torch.Tensor, expert_width: int) -> SiteHook:
    def read(values: torch.Tensor, routed: Routed | None) -> torch.Tensor:
        own = factors
        if routed is not None:
            own = factors[routed.expert * expert_width : (routed.expert + 1) * expert_width]
        return values * own.to(values.device, values.dtype)

    return read
