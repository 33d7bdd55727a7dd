"""One model that computes with another checkpoint's weights for a while: only what differs is ever held twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from editing.likelihood import Steering
from editing.same_model import require_same_settings
from neurons.errors import BrocaError
from neurons.offload import parameter_value, replaced, with_bias
from neurons.source import LoadedModel


def exchange(loaded: LoadedModel, other: LoadedModel) -> Steering:
    """What makes a context in which a model computes with another's weights, and with its own after it.

    The two are compared here, one tensor at a time; inside the context the tensors that differ are exchanged.
    Of an ``other`` whose weights were left on disk (``load_model(..., max_memory=0)``) nothing else is read
    into memory, and that only while the context is open.

    Both models name their tensors as transformers does, whatever their files call them; a bias that only the
    other one has is added.

    Args:
        loaded: the model that computes; unedited while this is called.
        other: of the same architecture and sizes; it may be closed to memory but not deleted from disk.

    Raises:
        BrocaError: the two do not have the same weights, by name, the model's are quantised, or the configs have
            the two compute otherwise.
    """
    loaded.require_exact("a comparison")
    require_same_settings(loaded, other)
    ours, theirs = (one.model.state_dict(keep_vars=True) for one in (loaded, other))
    added = [name for name in theirs if name not in ours and _can_be_added(loaded.model, name)]
    odd = ours.keys() ^ theirs.keys() - set(added)
    odd |= {name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape}
    if odd:
        raise BrocaError(
            f"{other.name} and {loaded.name} do not have the same weights, so cannot be compared: "
            f"{min(odd)} differs in shape or is in one of them alone"
        )
    differing = _differing(loaded, other, ours)

    @contextmanager
    def exchanged() -> Iterator[None]:
        with ExitStack() as undo:
            for name in differing:
                undo.enter_context(replaced(loaded.model, name, parameter_value(other.model, name)))
            for name in added:
                module = loaded.model.get_submodule(name.rpartition(".")[0])
                undo.enter_context(with_bias(module, parameter_value(other.model, name)))
            yield

    return exchanged


def _can_be_added(model: Any, name: str) -> bool:
    path, _, own = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return own == "bias" and "bias" in module._parameters


def _differing(loaded: LoadedModel, other: LoadedModel, ours: dict[str, torch.Tensor]) -> list[str]:
    """The tensors to exchange: of tied ones in memory, the first alone."""
    first_of: dict[int, str] = {}
    found = []
    for name, tensor in ours.items():
        values = parameter_value(other.model, name)
        first = name if tensor.is_meta else first_of.setdefault(id(tensor), name)
        if first != name:
            if not torch.equal(parameter_value(other.model, first), values):
                raise BrocaError(
                    f"{other.name} has two different tensors {first} and {name}, which are one in {loaded.name}: "
                    "they cannot be compared"
                )
            continue
        own = parameter_value(loaded.model, name)
        if not torch.equal(own, values.to(own.device, own.dtype)):
            found.append(name)
    return found
