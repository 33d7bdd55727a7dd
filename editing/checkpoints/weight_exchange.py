"""One model that computes with another checkpoint's weights for a while, in the memory of one."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from editing.checkpoints.same_model import require_same_reading, require_same_settings
from neurons.architectures.offload import overwritten, parameter_value, replaced, with_bias
from neurons.errors import BrocaError
from neurons.models.source import LoadedModel


class Exchange:
    """Called, it makes a context in which a model computes with another's weights, and with its own after it.

    The two are compared at the beginning, one tensor at a time; inside the context those that differ are written
    over, and the model's own wait in a temporary folder until it is left.  So beside one model, memory holds one
    tensor, and the head where that differs, if ``other`` was left on disk (``load_model(..., max_memory=0)``).

    Both models name their tensors as transformers does, whatever their files call them; a bias that only the
    other one has is added.

    Args:
        loaded: the model that computes; unedited now.
        other: of the same architecture and sizes.

    Raises:
        BrocaError: the two do not have the same weights, by name, the model's are quantised, or configs,
            tokenizers or end tokens have the two compute, read or end otherwise.
    """

    def __init__(self, loaded: LoadedModel, other: LoadedModel) -> None:
        loaded.require_exact("a comparison")
        require_same_settings(loaded, other)
        require_same_reading(loaded, other)
        ours, theirs = (one.model.state_dict(keep_vars=True) for one in (loaded, other))
        added = [name for name in theirs if name not in ours and _can_be_added(loaded.model, name)]
        odd = ours.keys() ^ theirs.keys() - set(added)
        odd |= {name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape}
        if odd:
            raise BrocaError(
                f"{other.name} and {loaded.name} do not have the same weights, so cannot be compared: "
                f"{min(odd)} differs in shape or is in one of them alone"
            )
        self._model, self._other, self._added = loaded.model, other.model, added
        self._differing = _differing(loaded, other, ours)
        folder = TemporaryDirectory(prefix="broca-")
        self._own = Path(folder.name)
        weakref.finalize(self, folder.cleanup)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        # Whoever compares the two models holds on to the head of the one while the other computes.
        head = self._model.get_output_embeddings().weight
        with ExitStack() as undo:
            for name in self._differing:
                undo.enter_context(
                    replaced(self._model, name, parameter_value(self._other, name))
                    if _tensor(self._model, name) is head
                    else overwritten(self._model, name, parameter_value(self._other, name), self._own)
                )
            for name in self._added:
                module = self._model.get_submodule(name.rpartition(".")[0])
                undo.enter_context(with_bias(module, parameter_value(self._other, name)))
            yield


def _tensor(model: Any, name: str) -> torch.Tensor:
    path, _, own = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(path), own)
    return found


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
