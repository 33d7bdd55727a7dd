"""Why an activation is not finite: the weights themselves, or a dtype too narrow for what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from neurons.errors import BrocaError, NotFiniteError
from neurons.files.tensor_files import READABLE_DTYPES, read_tensor, tensor_entries
from neurons.models.source import LoadedModel

AT_ONCE = 2**22  # values looked at together: a mask of all would be half as large as they are


def not_finite(loaded: LoadedModel, what: str) -> BrocaError:
    """The error to raise where ``what`` of a loaded model is NaN or infinite.

    All weights are read from disk once, to see whether they are finite.
    """
    return BrocaError(f"{loaded.name}: {what} is not finite: {_remedy(loaded)}")


@contextmanager
def explained(loaded: LoadedModel) -> Iterator[None]:
    """A NotFiniteError inside the block leaves it as what ``not_finite`` says of it."""
    try:
        yield
    except NotFiniteError as error:
        raise not_finite(loaded, str(error)) from error


def _remedy(loaded: LoadedModel) -> str:
    if damaged := _damaged_tensor(loaded):
        return f"tensor {damaged} of the checkpoint holds NaN or infinity, so no dtype helps: take another checkpoint"
    dtype = loaded.model.dtype
    if dtype == torch.float16:
        return "its weights are finite, but float16 ends at 65504: try --dtype bfloat16 or float32"
    if dtype == torch.float32:
        return (
            "its weights are finite and float32 is the widest dtype: compare its config.json (eps, rope, scales) with "
            "that of the model that they are from, or, with an edit, lower its strength"
        )
    return "its weights are finite: try --dtype float32"


def _damaged_tensor(loaded: LoadedModel) -> str | None:
    """The first tensor on disk, by name, that is not finite."""
    for name, entry in sorted(tensor_entries(loaded.checkpoint).items()):
        if entry.dtype not in READABLE_DTYPES:
            continue
        for values in read_tensor(entry).flatten().split(AT_ONCE):
            if not bool(torch.isfinite(values).all()):
                return name
    return None
