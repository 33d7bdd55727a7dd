"""Norms whose output only linear modules read, and the modules that read it.

In a layer, a norm's output n is the input of q, k and v, of gate and up, or, if attention and MLP are parallel, of all of
them.  A linear map n -> R n after the norm is then exactly W -> W R in these modules: neither the norm's gain nor its
bias stands between.  No name of a norm is needed: it is the child of the layer whose output is the same tensor as
the input of a linear module.  That nothing else reads it (a residual connection, experts in one parameter) is measured:
the model with changed signs after the norm must equal the model with changed signs before each reader.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neurons.architectures.anatomy import Anatomy, first
from neurons.architectures.offload import execution_device
from neurons.architectures.self_check import example_ids
from neurons.architectures.sites import SiteHook, body, site_hooks
from neurons.errors import BrocaError

# Of the norm of a layer's output: the same computation may be rounded differently by a GPU.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ReadingNorm:
    """A norm, and all that reads its output.

    Attributes:
        path: of the norm in its layer; also the site of its output (``neurons.architectures.sites.site_hooks``).
        readers: paths of the linear modules in the layer that read its output, in their order.
    """

    layer: int
    path: str
    readers: tuple[str, ...]


@torch.no_grad()
def reading_norms(model: Any, anatomy: Anatomy, layers: Collection[int]) -> tuple[ReadingNorm, ...]:
    """The norms of layers in order, each with the modules that read its output; two runs on 16 tokens.

    Args:
        model: causal language model in eval mode.

    Raises:
        BrocaError: a layer without such a norm, one whose norm something else reads too, as fused experts, or an
            architecture that is not in the table; names the layer.
    """
    for layer in sorted(layers):
        if anatomy.mixed_in(layer):
            raise BrocaError(
                f"{anatomy.model_type}: layer {layer} is a mixture of experts, which read the norm's output with one "
                "parameter that plans cannot change: choose layers without experts"
            )
    device = execution_device(model.get_input_embeddings())
    ids = example_ids(model.config.get_text_config().vocab_size, device)
    norms = tuple(_followed(model, anatomy, sorted(layers), ids))
    for norm in norms:
        for path in norm.readers:
            anatomy.parts(norm.layer, path)  # raises if no plan can change it
    without = sorted({*layers} - {norm.layer for norm in norms})
    other = next(iter(without), None)
    if other is None:
        other = _read_elsewhere(model, anatomy, norms, ids)
    if other is not None:
        raise BrocaError(
            f"{anatomy.model_type}: layer {other} has no norm whose output only its linear modules read, so their "
            "weights cannot contain a change of it"
        )
    return norms


def _followed(model: Any, anatomy: Anatomy, layers: Sequence[int], ids: torch.Tensor) -> list[ReadingNorm]:
    """The norms whose output is the input of a linear module, by the addresses of the tensors of one run."""
    # The tensors are kept, so that no other can have their address.
    outputs: dict[tuple[int, str], torch.Tensor] = {}
    readers: dict[tuple[int, str], list[str]] = {}

    def keep(norm: tuple[int, str]) -> Callable[..., None]:
        return lambda _, __, output: outputs.__setitem__(norm, first(output))

    def compare(layer: int, path: str) -> Callable[..., None]:
        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            for norm, output in outputs.items():
                values = inputs[0] if inputs else None
                if norm[0] == layer and values is not None and values.data_ptr() == output.data_ptr():
                    readers.setdefault(norm, []).append(path)

        return before

    with ExitStack() as undo:
        for layer in layers:
            matrices = anatomy.matrices(layer)
            for path, child in anatomy.blocks[layer].named_children():
                if path not in matrices and not list(child.children()):
                    undo.callback(child.register_forward_hook(keep((layer, path))).remove)
            for path in matrices:
                reader = anatomy.blocks[layer].get_submodule(path)
                undo.callback(reader.register_forward_pre_hook(compare(layer, path)).remove)
        body(model)(input_ids=ids, use_cache=False)
    return [ReadingNorm(*norm, tuple(readers[norm])) for norm in outputs if norm in readers]


def _read_elsewhere(
    model: Any, anatomy: Anatomy, norms: Sequence[ReadingNorm], ids: torch.Tensor
) -> int | None:
    """The first layer whose output depends on what reads a norm beside its readers; None without one."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (anatomy.residual,), generator=generator) * 2 - 1

    def changed(values: torch.Tensor) -> torch.Tensor:
        # Exact in any dtype and for any shape.
        return values * signs.to(values.device, values.dtype)

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return changed(inputs[0]), *inputs[1:]

    with site_hooks(anatomy, {(norm.path, norm.layer): lambda values, _: changed(values) for norm in norms}):
        after_norms = _layer_outputs(model, anatomy, (norm.layer for norm in norms), ids)
    with ExitStack() as undo:
        for norm in norms:
            for path in norm.readers:
                reader = anatomy.blocks[norm.layer].get_submodule(path)
                undo.callback(reader.register_forward_pre_hook(before).remove)
        before_readers = _layer_outputs(model, anatomy, (norm.layer for norm in norms), ids)
    for layer, output in after_norms.items():
        if not bool((output - before_readers[layer]).norm() <= _TOLERANCE * output.norm()):
            return layer
    return None


def _layer_outputs(
    model: Any, anatomy: Anatomy, layers: Iterable[int], ids: torch.Tensor
) -> dict[int, torch.Tensor]:
    """Layer -> float32, its output."""
    outputs: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> SiteHook:
        return lambda values, _: outputs.__setitem__(layer, values.float())

    with site_hooks(anatomy, {("block_out", layer): keep(layer) for layer in layers}):
        body(model)(input_ids=ids, use_cache=False)
    return outputs
