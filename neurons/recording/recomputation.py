"""Gradient checkpointing (arXiv 1604.06174), with each decoder layer as a segment.

The backward pass recomputes the activations of each layer, which takes a third more time.  The hooks of a layer run
twice: first with gradients disabled, then, from the last layer down, with gradients enabled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from neurons.architectures.anatomy import Anatomy
from neurons.architectures.sites import replace_forward


@contextmanager
def recomputing(anatomy: Anatomy) -> Iterator[None]:
    """A context in which a pass with gradients keeps only the input of each layer.

    Gradients flow to the inputs of the layers and to leaves, not to other tensors that a hook adds from outside.
    """
    with ExitStack() as undo:
        for layer in anatomy.blocks:
            replace_forward(layer, _checkpointed(layer.forward), undo)
        yield


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        hidden, rest = (arguments[0], arguments[1:]) if arguments else (named.pop("hidden_states"), ())
        if not hidden.requires_grad:
            # The embeddings are frozen, and a segment computes gradients only if its input requires them.
            hidden = hidden.detach().requires_grad_(True)
        return checkpoint(
            lambda entering: forward(entering, *rest, **named),
            hidden,
            use_reentrant=True,
            preserve_rng_state=False,
        )

    return run
