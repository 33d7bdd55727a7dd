"""Start a forward pass in the middle, or stop it there: layers are skipped, what they gave is kept from before.

No architecture is taken apart: the model runs as it is, with its own embeddings, masks and positions, and
only the layers to skip have their ``forward`` exchanged for one that returns the hidden states kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from neurons.architectures.anatomy import Anatomy, first
from neurons.architectures.offload import execution_device
from neurons.architectures.self_check import example_ids
from neurons.errors import BrocaError
from neurons.recording.text_pass import forward
from neurons.text.batches import TokenBatch


@dataclass(frozen=True)
class Kept:
    """What a forward pass of one batch can be started from.

    Attributes:
        entering: layer -> copy of the hidden states [rows, length, d] that enter it; layer L is what
            leaves the last one.
        beside: layer -> what it returned beside its hidden states; None: it returned them alone.
    """

    entering: Mapping[int, torch.Tensor]
    beside: Mapping[int, tuple[Any, ...] | None]


@torch.no_grad()
def forward_keeping(
    model: Any,
    anatomy: Anatomy,
    batch: TokenBatch,
    layers: Collection[int],
    keep_on: torch.device | None = None,
) -> tuple[torch.Tensor, Kept]:
    """A whole forward pass that keeps what enters some layers.

    Args:
        model: causal language model.
        anatomy: of the model.
        batch: on the model's device.
        layers: that a later pass starts from, 1 to L (0 needs nothing kept).
        keep_on: device of the copies; None: where they arise.

    Returns:
        The last hidden states [rows, length, d], as ``neurons.recording.record.forward``, and what was kept.
    """
    entering: dict[int, torch.Tensor] = {}
    beside: dict[int, tuple[Any, ...] | None] = {}

    def note(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            beside[layer] = tuple(output[1:]) if isinstance(output, tuple) else None
            if layer + 1 in layers:
                # A copy: some models go on writing into what a layer returned.
                hidden = first(output)
                entering[layer + 1] = hidden.clone() if keep_on is None else hidden.to(keep_on, copy=True)

        return after

    with ExitStack() as open_now:
        for layer in range(max(layers, default=0)):
            handle = anatomy.blocks[layer].register_forward_hook(note(layer))
            open_now.callback(handle.remove)
        hidden = forward(model, batch)
    return hidden, Kept(entering, beside)


@torch.no_grad()
def forward_from(
    model: Any, anatomy: Anatomy, batch: TokenBatch, layer: int, kept: Kept | None
) -> torch.Tensor:
    """The last hidden states [rows, length, d] of a pass in which the layers below ``layer`` are skipped.

    Args:
        model: causal language model.
        anatomy: of the model.
        batch: the one that was kept of, on the model's device.
        layer: the first that runs, 0 to L; 0 is a whole pass, and L runs the final norm alone.
        kept: from ``forward_keeping``; not needed for layer 0.

    Raises:
        BrocaError: nothing was kept for the layer.
    """
    if layer == 0:
        return forward(model, batch)
    if kept is None or layer not in kept.entering:
        raise BrocaError(f"no hidden states were kept that enter layer {layer}")
    with _skipped(anatomy, layer, kept, batch.ids.device):
        return forward(model, batch)


@torch.no_grad()
def forward_between(
    model: Any, anatomy: Anatomy, batch: TokenBatch, start: int, stop: int, kept: Kept | None
) -> Kept | None:
    """Run only the layers ``start`` to ``stop - 1``.

    Args:
        model: causal language model.
        anatomy: of the model.
        batch: on the model's device.
        start: the first layer that runs; 0 needs nothing kept.
        stop: the first that does not run any more, start + 1 to L.
        kept: what an earlier call that stopped at ``start`` gave.

    Returns:
        What the next call needs to start at ``stop``, on the CPU; None after the last layer.

    Raises:
        BrocaError: nothing was kept for the layer that starts.
    """
    if stop == anatomy.layers:
        forward_from(model, anatomy, batch, start, kept)
        return None
    entering: list[torch.Tensor] = []
    beside: dict[int, tuple[Any, ...] | None] = {} if kept is None else dict(kept.beside)

    def end(_: nn.Module, arguments: Any, named: Any) -> None:
        hidden = arguments[0] if arguments else named["hidden_states"]
        entering.append(hidden.to("cpu", copy=True))
        raise _StopError

    def note(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            beside[layer] = tuple(output[1:]) if isinstance(output, tuple) else None

        return after

    with ExitStack() as open_now:
        handle = anatomy.blocks[stop].register_forward_pre_hook(end, with_kwargs=True)
        open_now.callback(handle.remove)
        for layer in range(start, stop):
            open_now.callback(anatomy.blocks[layer].register_forward_hook(note(layer)).remove)
        with suppress(_StopError):
            forward_from(model, anatomy, batch, start, kept)
    return Kept({stop: entering[0]}, beside)


class _StopError(Exception):
    """The layers that are wanted have run."""


def end_of_model(model: Any, anatomy: Anatomy, vectors: torch.Tensor) -> torch.Tensor:
    """What the model makes of vectors in the residual stream after its last layer: the final norm.

    Args:
        vectors: [n, d].

    Returns:
        [n, d], which ``neurons.architectures.sites.logits`` takes.
    """
    device = execution_device(model.get_input_embeddings())
    ids = torch.zeros(len(vectors), 1, dtype=torch.int64, device=device)
    seen = torch.ones_like(ids, dtype=torch.bool)
    batch = TokenBatch(ids, seen, seen)
    last = anatomy.layers
    _, kept = forward_keeping(model, anatomy, batch, [last])
    given = vectors[:, None].to(kept.entering[last])
    return forward_from(model, anatomy, batch, last, replace(kept, entering={last: given}))[:, 0]


@torch.no_grad()
def starts_in_the_middle(model: Any, anatomy: Anatomy) -> bool:
    """Whether a pass from any layer gives the bits of the whole pass, on a few tokens.

    It does not where layers hand each other more than hidden states, as where they share keys and values.
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
    # A model of which little is known may fail in any way where a layer did not run.
    except (RuntimeError, TypeError, KeyError, AttributeError, IndexError, ValueError):
        return False


@contextmanager
def _skipped(anatomy: Anatomy, layer: int, kept: Kept, device: torch.device) -> Iterator[None]:
    # A copy, for the model may write into it; every skipped layer hands on the same.
    hidden = kept.entering[layer].to(device, copy=True)

    def standing_in(below: int) -> Callable[..., Any]:
        rest = kept.beside[below]
        return lambda *_, **__: hidden if rest is None else (hidden, *rest)

    with ExitStack() as undo:
        for below in range(layer):
            block = anatomy.blocks[below]
            own = vars(block).get("forward")
            vars(block)["forward"] = standing_in(below)
            if own is None:
                undo.callback(vars(block).pop, "forward")
            else:
                undo.callback(vars(block).__setitem__, "forward", own)
        yield
