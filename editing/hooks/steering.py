"""Residual steering with a forward hook, the baseline of permanent edits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from neurons.architectures.anatomy import first
from neurons.models.source import LoadedModel


@contextmanager
def residual_steering(
    loaded: LoadedModel, vector: torch.Tensor, layer: int, strength: float = 1.0
) -> Iterator[None]:
    """Residual DiffMean: h += strength * vector after one layer, at all positions (arXiv 2601.08331).

    Args:
        loaded: the model.
        vector: [d], not normalised: strength 1 adds the difference of the means.
        layer: the layer after which the vector is added.
        strength: multiplies the vector.
    """
    added = (vector * strength).to(loaded.device, loaded.model.dtype)

    def after(_: Any, __: Any, output: Any) -> Any:
        hidden = first(output)
        steered = hidden + added.to(hidden.device)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    handle = loaded.anatomy.blocks[layer].register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
