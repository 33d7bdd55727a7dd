"""The cause of a non-finite activation: non-finite weights, or a dtype with too small a range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from neurons.errors import ExplainedNotFiniteError, NotFiniteError
from neurons.files.tensor_files import READABLE_DTYPES, read_tensor, tensor_entries
from neurons.models.source import LoadedModel

AT_ONCE = 2**22  # values of a chunk, to keep masks small


def not_finite(loaded: LoadedModel, what: str) -> ExplainedNotFiniteError:
    """The error to raise if ``what`` of a loaded model is NaN or infinite.

    Reads all weights from disk to check whether they are finite.
    """
    return ExplainedNotFiniteError(f"{loaded.name}: {what} is not finite: {_remedy(loaded)}")


@contextmanager
def explained(loaded: LoadedModel) -> Iterator[None]:
    """Context that turns a NotFiniteError into the error of ``not_finite``."""
    try:
        yield
    except ExplainedNotFiniteError:
        raise
    except NotFiniteError as error:
        raise not_finite(loaded, str(error)) from error


def _remedy(loaded: LoadedModel) -> str:
    if damaged := _damaged_tensor(loaded):
        return f"tensor {damaged} of the checkpoint holds NaN or infinity, so no dtype helps: use another checkpoint"
    dtype = loaded.model.dtype
    if dtype == torch.float16:
        return "its weights are finite, but the maximum of float16 is 65504: try --dtype bfloat16 or float32"
    if dtype == torch.float32:
        return (
            "its weights are finite and float32 is the widest dtype: compare its config.json (eps, rope, scales) with "
            "that of the original model, or lower the strength of an edit"
        )
    return "its weights are finite: try --dtype float32"


def _damaged_tensor(loaded: LoadedModel) -> str | None:
    """The name of the first tensor on disk that is not finite."""
    for name, entry in sorted(tensor_entries(loaded.checkpoint).items()):
        if entry.dtype not in READABLE_DTYPES:
            continue
        for values in read_tensor(entry).flatten().split(AT_ONCE):
            if not bool(torch.isfinite(values).all()):
                return name
    return None
