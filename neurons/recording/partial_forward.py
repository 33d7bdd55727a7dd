"""Partial forward passes, which start at a layer from kept hidden states.

The model runs with its own embeddings, masks and positions.  Only the ``forward`` of the skipped layers is replaced,
by one that returns the kept hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from neurons.architectures.anatomy import Anatomy, first
from neurons.architectures.offload import execution_device
from neurons.architectures.self_check import example_ids
from neurons.architectures.sites import replace_forward
from neurons.errors import BrocaError
from neurons.recording.text_pass import forward
from neurons.text.batches import TokenBatch


@dataclass(frozen=True)
class Kept:
    """Kept values from which a forward pass of one batch can start.

    Attributes:
        entering: layer -> copy of its input hidden states [rows, length, d], or [streams, rows, length, d]; layer L is
            the output of the last.
        other_outputs: layer -> its outputs besides hidden states; None: it returns only hidden states.
    """

    entering: Mapping[int, torch.Tensor]
    other_outputs: Mapping[int, tuple[Any, ...] | None]


@torch.no_grad()
def forward_keeping(
    model: Any,
    anatomy: Anatomy,
    batch: TokenBatch,
    layers: Collection[int],
    keep_on: torch.device | None = None,
) -> tuple[torch.Tensor, Kept]:
    """A whole forward pass that keeps the inputs of some layers.

    Args:
        model: causal language model.
        batch: the batch, on the model's device.
        layers: layers from which a later pass starts, 1 to L (0 needs nothing kept).
        keep_on: device of the copies; None: the device of the layer.

    Returns:
        The final hidden states [rows, length, d], as ``neurons.recording.text_pass.forward``, and what was kept.
    """
    entering: dict[int, torch.Tensor] = {}
    other_outputs: dict[int, tuple[Any, ...] | None] = {}

    def note(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            other_outputs[layer] = _other_outputs(output)
            if layer + 1 in layers:
                # A copy, because some models write into the output of a layer.
                hidden = first(output)
                entering[layer + 1] = hidden.clone() if keep_on is None else hidden.to(keep_on, copy=True)

        return after

    with ExitStack() as open_now:
        for layer in range(max(layers, default=0)):
            handle = anatomy.blocks[layer].register_forward_hook(note(layer))
            open_now.callback(handle.remove)
        hidden = forward(model, batch)
    return hidden, Kept(entering, other_outputs)


def _other_outputs(output: Any) -> tuple[Any, ...] | None:
    return tuple(output[1:]) if isinstance(output, tuple) else None


@torch.no_grad()
def forward_from(
    model: Any, anatomy: Anatomy, batch: TokenBatch, layer: int, kept: Kept | None
) -> torch.Tensor:
    """The final hidden states [rows, length, d] of a pass that skips the layers below ``layer``.

    Args:
        model: causal language model.
        batch: the batch of ``kept``, on the model's device.
        layer: the first layer that runs, 0 to L; 0 is a whole pass, L runs only the final norm.
        kept: from ``forward_keeping``; not needed for layer 0.

    Raises:
        BrocaError: nothing was kept for the layer.
    """
    if layer == 0:
        return forward(model, batch)
    if kept is None or layer not in kept.entering:
        raise BrocaError(f"no input hidden states of layer {layer} were kept")
    with _skipped(anatomy, layer, kept, batch.ids.device):
        return forward(model, batch)


@torch.no_grad()
def ending(model: Any, anatomy: Anatomy, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The final norm as a function of vectors [n, d] in the residual stream after the last layer, n at most ``rows``.

    Its result [n, d] is the input of ``neurons.architectures.sites.logits``; one whole pass of the model serves all calls.
    """
    device = execution_device(model.get_input_embeddings())
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    seen = torch.ones_like(ids, dtype=torch.bool)
    batch = TokenBatch(ids, seen, seen)
    last = anatomy.layers
    _, kept = forward_keeping(model, anatomy, batch, [last])

    def end(vectors: torch.Tensor) -> torch.Tensor:
        hidden = torch.zeros_like(kept.entering[last])
        # Of several streams, the layers' modules read and write the first.
        stream = hidden[0] if hidden.ndim == 4 else hidden
        stream[: len(vectors), 0] = vectors.to(hidden)
        entering = replace(kept, entering={last: hidden})
        return forward_from(model, anatomy, batch, last, entering)[: len(vectors), 0]

    return end


@torch.no_grad()
def supports_partial_forward(model: Any, anatomy: Anatomy) -> bool:
    """Whether partial passes from the first, middle and last layer are bit-identical to the whole pass on a few tokens.

    They are not if layers exchange more than hidden states, for example shared keys and values.
    """
    device = execution_device(model.get_input_embeddings())
    ids = example_ids(model.config.get_text_config().vocab_size, device)
    seen = torch.ones_like(ids, dtype=torch.bool)
    batch = TokenBatch(ids, seen, seen)
    layers = range(1, anatomy.layers)
    whole, kept = forward_keeping(model, anatomy, batch, layers)
    try:
        return all(
            torch.equal(forward_from(model, anatomy, batch, layer, kept), whole)
            for layer in sorted({*layers[:1], *layers[len(layers) // 2 :][:1], *layers[-1:]})
        )
    # An unknown model may fail in many ways if a layer did not run.
    except (RuntimeError, TypeError, KeyError, AttributeError, IndexError, ValueError):
        return False


@contextmanager
def _skipped(anatomy: Anatomy, layer: int, kept: Kept, device: torch.device) -> Iterator[None]:
    # A copy, because the model may write into it; every skipped layer returns the same tensor.
    hidden = kept.entering[layer].to(device, copy=True)

    def stub(below: int) -> Callable[..., Any]:
        rest = kept.other_outputs[below]
        return lambda *_, **__: hidden if rest is None else (hidden, *rest)

    with ExitStack() as undo:
        for below in range(layer):
            replace_forward(anatomy.blocks[below], stub(below), undo)
        yield
