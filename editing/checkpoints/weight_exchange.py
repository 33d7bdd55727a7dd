"""Compute with another checkpoint's weights in the same model, with the memory of one model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from editing.checkpoints.same_model import require_same_settings, require_same_tokens
from neurons.architectures.offload import overwritten, parameter_value, replaced, with_bias
from neurons.errors import BrocaError
from neurons.models.source import LoadedModel


class Exchange:
    """A callable that returns a context in which a model computes with another's weights.

    The two are compared at construction, one tensor at a time; in the context the tensors that differ are
    overwritten, with the model's own saved in a temporary folder.  Beside one model, memory holds one tensor, and
    the head if it differs, provided that ``other`` is on disk (``load_model(..., max_memory=0)``).

    Tensors are matched by their names in transformers; a bias that only the other model has is added.

    Args:
        loaded: the model that computes; currently unedited.
        other: of the same architecture and sizes.

    Raises:
        BrocaError: tensors of different names or shapes, quantised weights, or different configs, tokenizers or
            end tokens.
    """

    def __init__(self, loaded: LoadedModel, other: LoadedModel) -> None:
        loaded.require_exact("a comparison")
        require_same_settings(loaded, other)
        require_same_tokens(loaded, other)
        ours, theirs = (each.model.state_dict(keep_vars=True) for each in (loaded, other))
        added = [name for name in theirs if name not in ours and _can_be_added(loaded.model, name)]
        unmatched = ours.keys() ^ theirs.keys() - set(added)
        unmatched |= {name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape}
        if unmatched:
            raise BrocaError(
                f"{other.name} and {loaded.name} do not have the same weights, so cannot be compared: "
                f"{min(unmatched)} differs in shape or is in only one of them"
            )
        self._model, self._other, self._added = loaded.model, other.model, added
        self._differing = _differing(loaded, other, ours)
        folder = TemporaryDirectory(prefix="broca-")
        self._own = Path(folder.name)
        weakref.finalize(self, folder.cleanup)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        # Comparisons keep the head of one model while the other computes.
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
    path, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def _can_be_added(model: Any, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return leaf == "bias" and "bias" in module._parameters


def _differing(loaded: LoadedModel, other: LoadedModel, ours: dict[str, torch.Tensor]) -> list[str]:
    """The tensors to exchange; only the first of tied ones in memory."""
    first_of: dict[int, str] = {}
    differing = []
    for name, tensor in ours.items():
        values = parameter_value(other.model, name)
        first = name if tensor.is_meta else first_of.setdefault(id(tensor), name)
        if first != name:
            if not torch.equal(parameter_value(other.model, first), values):
                raise BrocaError(
                    f"{other.name} has two different tensors {first} and {name}, one in {loaded.name}: they cannot be "
                    "compared"
                )
            continue
        values_of_model = parameter_value(loaded.model, name)
        if not torch.equal(values_of_model, values.to(values_of_model.device, values_of_model.dtype)):
            differing.append(name)
    return differing
