"""Offloaded weights, on disk or in main memory: how to read and to replace them.

accelerate's hooks load an offloaded module's weights before it runs and remove them afterwards; in between
its parameters are on the meta device.  So this module reads and replaces entries in the hooks' map of weights.
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
    """Whether a module's own weights are offloaded."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def execution_device(module: nn.Module) -> torch.device:
    """The device on which a module with a weight computes, also while its weights are offloaded."""
    owner: Any = module
    if has_offloaded(module):
        return torch.device(owner._hf_hook.execution_device)
    device: torch.device = owner.weight.device
    return device


def offloaded_bytes(model: nn.Module) -> int:
    """Bytes of the offloaded weights."""
    return sum(
        parameter.nbytes
        for module in model.modules()
        if has_offloaded(module)
        for parameter in module.parameters(recurse=False)
    )


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Context in which the offloaded weights of a module and its parts are read once, and not for every call.

    Not for calls with gradients, after which the weights would have to stay (``reload_for_gradients``).
    """
    with ExitStack() as undo:
        for part in module.modules():
            if not has_offloaded(part):
                continue
            owner: Any = part
            waiting, device = owner._hf_hook.weights_map, execution_device(part)
            for leaf, _ in part.named_parameters(recurse=False):
                key, read = f"{waiting.prefix}{leaf}", waiting.dataset.state_dict
                if key in read:
                    undo.callback(read.__setitem__, key, read[key])
                else:
                    undo.callback(read.pop, key)
                read[key] = waiting[leaf].to(device)
        yield


def parameter_value(model: nn.Module, name: str) -> torch.Tensor:
    """The values of a parameter or buffer, whether live or offloaded.

    Args:
        name: of the tensor, relative to ``model``.
    """
    module, leaf = _owner(model, name)
    live: torch.Tensor = dequantised(module, getattr(module, leaf)).data
    values: torch.Tensor = module._hf_hook.weights_map[leaf] if live.is_meta else live
    return values


@contextmanager
def replaced(model: nn.Module, name: str, values: torch.Tensor) -> Iterator[None]:
    """Context in which the model computes with other values of a parameter or buffer.

    For an offloaded parameter the values are in a temporary file, so they take memory only while their
    module runs.

    Args:
        name: of the tensor, relative to ``model``; tied offloaded tensors are replaced one by one.
        values: of its shape; cast to its dtype and device.
    """
    module, leaf = _owner(model, name)
    parameter: torch.Tensor = getattr(module, leaf)
    if not parameter.is_meta:
        kept = parameter.data
        parameter.data = values.to(kept.device, kept.dtype)
        del values  # otherwise this frame keeps them
        try:
            yield
        finally:
            parameter.data = kept
        return
    waiting = module._hf_hook.weights_map
    key, loader = f"{waiting.prefix}{leaf}", waiting.dataset
    kept_values, kept_entry = loader.state_dict.pop(key, None), loader.index.get(key)
    with TemporaryDirectory(prefix="broca-") as folder:
        file = Path(folder) / "values.safetensors"
        save_file({leaf: values.to(parameter.dtype).contiguous()}, file)
        del values
        dtype = str(parameter.dtype).removeprefix("torch.")
        loader.index[key] = {"safetensors_file": str(file), "weight_name": leaf, "dtype": dtype}
        try:
            yield
        finally:
            if kept_entry is None:
                del loader.index[key]
            else:
                loader.index[key] = kept_entry
            if kept_values is not None:
                loader.state_dict[key] = kept_values


@contextmanager
def overwritten(model: nn.Module, name: str, values: torch.Tensor, folder: Path) -> Iterator[None]:
    """As ``replaced``, but a tensor in memory is overwritten, with its own values saved in a file.

    Args:
        name: of the tensor, relative to ``model``.
        values: of its shape; cast to its dtype and device.
        folder: for the file, which remains there and is reused when the same tensor is overwritten again.
    """
    module, leaf = _owner(model, name)
    live: torch.Tensor = getattr(module, leaf).data
    if live.is_meta:
        with replaced(model, name, values):
            yield
        return
    file = folder / f"{name}.safetensors"
    if not file.exists():
        save_file({leaf: live.contiguous()}, file)
    try:
        live.copy_(values)
        del values  # otherwise this frame keeps them
        yield
    finally:
        live.copy_(load_file(file)[leaf])


@contextmanager
def with_bias(module: Any, values: torch.Tensor) -> Iterator[None]:
    """Context in which a linear module without a bias has one.

    Args:
        values: [d], cast to the dtype and device of the module's weight.
    """
    bias = values.to(module.weight.dtype)
    with ExitStack() as undo:
        undo.callback(setattr, module, "bias", None)
        module.bias = nn.Parameter(bias.to(module.weight.device), requires_grad=False)
        if has_offloaded(module):
            undo.enter_context(replaced(module, "bias", bias))
        yield


def reload_for_gradients(model: nn.Module) -> None:
    """Reload offloaded weights in the backward pass instead of keeping all of them from the forward pass.

    The weights must be frozen.
    """
    for module in model.modules():
        owner: Any = module
        if has_offloaded(module):
            # accelerate's hook calls this once the weights are loaded.
            owner._old_forward = partial(_forward, module, owner._old_forward)


def _owner(model: nn.Module, name: str) -> tuple[Any, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _forward(module: Any, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    loader, prefix = module._hf_hook.weights_map.dataset, module._hf_hook.weights_map.prefix
    # Address range of each weight, and a function that reloads it as it is now, even if it is replaced later.
    weights = {
        tensor.data_ptr(): (tensor.data_ptr() + tensor.nbytes, tensor.storage_offset(), tensor.device, reload)
        for name, tensor in module.named_parameters(recurse=False)
        for reload in [_reloader(loader, f"{prefix}{name}")]
    }

    def pack(tensor: torch.Tensor) -> Any:
        address = tensor.data_ptr()
        for begin, (end, offset, device, reload) in weights.items():
            if begin <= address < end and tensor.device == device:
                within = (tensor.storage_offset() - offset, tuple(tensor.shape), tensor.stride())
                return reload, within, device
        return tensor

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        reload, (offset, shape, stride), device = packed
        values: torch.Tensor = reload().to(device)
        return values.as_strided(shape, stride, values.storage_offset() + offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return forward(*inputs, **named)


def _reloader(loader: Any, key: str) -> Callable[[], torch.Tensor]:
    if key in loader.state_dict:
        return partial(loader.state_dict.__getitem__, key)
    entry = loader.index[key]
    return partial(type(loader)(index={key: entry}, device=loader.device).__getitem__, key)
