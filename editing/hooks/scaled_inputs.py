"""Hooks that scale channels of the inputs of ``o_proj`` and ``down_proj``: x_i <- f_i x_i at all positions.

CLAS and AUSteer use them at inference time, with their own factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from neurons.architectures.sites import Routed, SiteHook, site_hooks
from neurons.models.source import LoadedModel


@contextmanager
def scaled_inputs(loaded: LoadedModel, factors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Context in which inputs are scaled.

    Args:
        loaded: the model.
        factors: block -> [L, n], of its input channels; layers with all factors 1 get no hook.
    """
    width = loaded.anatomy.expert_width
    hooks: dict[tuple[str, int], SiteHook] = {}
    for block, values in factors.items():
        for layer in (values != 1).any(1).nonzero()[:, 0].tolist():
            hooks[f"{block}_in", layer] = _scale(values[layer], width)
    with site_hooks(loaded.anatomy, hooks):
        yield


def _scale(factors: torch.Tensor, expert_width: int) -> SiteHook:
    def hook(values: torch.Tensor, routed: Routed | None) -> torch.Tensor:
        of_expert = factors
        if routed is not None:
            of_expert = factors[routed.expert * expert_width : (routed.expert + 1) * expert_width]
        return values * of_expert.to(values.device, values.dtype)

    return hook
