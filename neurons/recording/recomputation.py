"""Gradients in a layer's memory: activations are not kept, the backward pass computes each layer's again.

Gradient checkpointing (arXiv 1604.06174), a decoder layer a segment; a third more time.  A layer's sites are passed
twice: first with gradients disabled, then, last layer first, with gradients enabled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from neurons.architectures.anatomy import Anatomy


@contextmanager
def recomputing(anatomy: Anatomy) -> Iterator[None]:
    """Inside, a pass with gradients enabled keeps of each layer what enters it, and nothing else.

    Gradients reach what the layers compute from; tensors that a hook brings in from outside get none.
    """
    with ExitStack() as undo:
        for block in anatomy.blocks:
            own = vars(block).get("forward")
            vars(block)["forward"] = _again(block.forward)
            if own is None:
                undo.callback(vars(block).pop, "forward")
            else:
                undo.callback(vars(block).__setitem__, "forward", own)
        yield


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*given: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*given, **named)
        hidden, rest = (given[0], given[1:]) if given else (named.pop("hidden_states"), ())
        if not hidden.requires_grad:
            # The embeddings are frozen, and a segment without an input that wants a gradient has none.
            hidden = hidden.detach().requires_grad_(True)
        return checkpoint(
            lambda entering: forward(entering, *rest, **named),
            hidden,
            use_reentrant=True,
            preserve_rng_state=False,
        )

    return run
