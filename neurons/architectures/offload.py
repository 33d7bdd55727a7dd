"""Weights that wait on disk or in main memory until their module runs: read there, and replaced there.

accelerate's hooks put an offloaded module's weights in place before it runs and take them away after it;
in between its parameters are on the meta device and hold nothing.  What is read or replaced is therefore
the entry in the hooks' map of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from neurons.architectures.low_bits import dequantised


def has_offloaded(module: nn.Module) -> bool:
    """Whether a module's own weights are taken away when it has run."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def execution_device(module: nn.Module) -> torch.device:
    """Where a module with a weight computes, also while its weights are elsewhere."""
    owner: Any = module
    if has_offloaded(module):
        return torch.device(owner._hf_hook.execution_device)
    found: torch.device = owner.weight.device
    return found


def waiting_bytes(model: nn.Module) -> int:
    """The bytes of the weights that are not on the device that computes with them until it does."""
    return sum(
        parameter.nbytes
        for module in model.modules()
        if has_offloaded(module)
        for parameter in module.parameters(recurse=False)
    )


def parameter_value(model: nn.Module, name: str) -> torch.Tensor:
    """The values of a parameter or buffer wherever they are: the live ones, or read from where they wait.

    Args:
        model: any module.
        name: of the tensor, from the model.
    """
    module, own = _owner(model, name)
    live: torch.Tensor = dequantised(module, getattr(module, own)).data
    waiting: torch.Tensor = module._hf_hook.weights_map[own] if live.is_meta else live
    return waiting


@contextmanager
def replaced(model: nn.Module, name: str, values: torch.Tensor) -> Iterator[None]:
    """The model computes with other values of a parameter or buffer inside the block, with its own after it.

    Of an offloaded parameter the values wait in a temporary file, so they cost memory only while their
    module runs.

    Args:
        model: any module.
        name: of the tensor, from the model; of tied ones that are offloaded, each waits for itself.
        values: of its shape; brought to its dtype and device.
    """
    module, own = _owner(model, name)
    parameter: torch.Tensor = getattr(module, own)
    if not parameter.is_meta:
        kept = parameter.data
        parameter.data = values.to(kept.device, kept.dtype)
        del values  # else this frame would hold them besides
        try:
            yield
        finally:
            parameter.data = kept
        return
    waiting = module._hf_hook.weights_map
    key, loader = f"{waiting.prefix}{own}", waiting.dataset
    kept_values, kept_place = loader.state_dict.pop(key, None), loader.index.get(key)
    with TemporaryDirectory(prefix="broca-") as folder:
        file = Path(folder) / "values.safetensors"
        save_file({own: values.to(parameter.dtype).contiguous()}, file)
        del values
        dtype = str(parameter.dtype).removeprefix("torch.")
        loader.index[key] = {"safetensors_file": str(file), "weight_name": own, "dtype": dtype}
        try:
            yield
        finally:
            if kept_place is None:
                del loader.index[key]
            else:
                loader.index[key] = kept_place
            if kept_values is not None:
                loader.state_dict[key] = kept_values


@contextmanager
def overwritten(model: nn.Module, name: str, values: torch.Tensor, folder: Path) -> Iterator[None]:
    """As ``replaced``, but a tensor in memory is written over, and its own values wait in a file.

    Args:
        model: any module.
        name: of the tensor, from the model.
        values: of its shape; brought to its dtype and device.
        folder: for the file, which is left there: it is not written again when the same is overwritten again.
    """
    module, own = _owner(model, name)
    live: torch.Tensor = getattr(module, own).data
    if live.is_meta:
        with replaced(model, name, values):
            yield
        return
    file = folder / f"{name}.safetensors"
    if not file.exists():
        save_file({own: live.contiguous()}, file)
    try:
        live.copy_(values)
        del values  # else this frame would hold them
        yield
    finally:
        live.copy_(load_file(file)[own])


@contextmanager
def with_bias(module: Any, values: torch.Tensor) -> Iterator[None]:
    """A linear module without a bias has one inside the block.

    Args:
        values: [d], brought to the dtype and device of the module's weight.
    """
    bias = values.to(module.weight.dtype)
    with ExitStack() as undo:
        undo.callback(setattr, module, "bias", None)
        module.bias = nn.Parameter(bias.to(module.weight.device), requires_grad=False)
        if has_offloaded(module):
            undo.enter_context(replaced(module, "bias", bias))
        yield


def let_gradients_read_again(model: nn.Module) -> None:
    """Have the backward pass read the offloaded weights again, and not hold all of them since the forward.

    The weights must be frozen.
    """
    for module in model.modules():
        owner: Any = module
        if has_offloaded(module):
            # What accelerate's hook calls once the weights are there.
            owner._old_forward = partial(_forward, module, owner._old_forward)


def _owner(model: nn.Module, name: str) -> tuple[Any, str]:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def _forward(module: Any, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    loader, prefix = module._hf_hook.weights_map.dataset, module._hf_hook.weights_map.prefix
    # Where each weight begins and ends in memory, and how it is read again: as now, whatever replaces it later.
    weights = {
        tensor.data_ptr(): (tensor.data_ptr() + tensor.nbytes, tensor.storage_offset(), tensor.device, again)
        for name, tensor in module.named_parameters(recurse=False)
        for again in [_reading(loader, f"{prefix}{name}")]
    }

    def pack(tensor: torch.Tensor) -> Any:
        place = tensor.data_ptr()
        for begin, (end, offset, device, again) in weights.items():
            if begin <= place < end and tensor.device == device:
                within = (tensor.storage_offset() - offset, tuple(tensor.shape), tensor.stride())
                return again, within, device
        return tensor

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        again, (offset, shape, stride), device = packed
        values: torch.Tensor = again().to(device)
        return values.as_strided(shape, stride, values.storage_offset() + offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return forward(*inputs, **named)


def _reading(loader: Any, key: str) -> Callable[[], torch.Tensor]:
    if key in loader.state_dict:
        return partial(loader.state_dict.__getitem__, key)
    place = loader.index[key]
    return partial(type(loader)(index={key: place}, device=loader.device).__getitem__, key)
