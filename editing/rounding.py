"""Numbers cast to a stored dtype with one rounding: torch casts float64 to 16 bits with two."""

from __future__ import annotations

import torch


def round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values`` (float32 or float64) in ``dtype``, rounded once to nearest even."""
    if values.dtype != torch.float64 or dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    # torch goes from float64 to the 16-bit types through float32 and so rounds twice.  A middle step that
    # rounds inexact values to the odd neighbour keeps the second rounding right (Boldo and Melquiond).
    middle = values.to(torch.float32)
    back = middle.to(torch.float64)
    even = (middle.view(torch.int32) & 1) == 0
    towards = torch.where(values > back, torch.inf, -torch.inf).to(torch.float32)
    return torch.where((back != values) & even, torch.nextafter(middle, towards), middle).to(dtype)
