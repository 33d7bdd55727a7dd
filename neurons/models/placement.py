"""Where a model's weights go: on one device where they fit, else over all that there is, down to the disk."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from neurons.files.tensor_files import READABLE_DTYPES, tensor_entries
from neurons.models.processes import local_processes

# Of what is free, for weights: activations take the rest.
FOR_WEIGHTS = 0.9


def memory_to_spread_over(
    checkpoint: Path, where: torch.device, each: float | None, max_memory: int | None = None
) -> dict[int | str, int] | None:
    """The bytes of each device that weights may take, as accelerate's ``max_memory``; the rest goes to disk.

    Args:
        checkpoint: a local directory.
        where: the device that is to compute.
        each: bytes of a weight in memory; None: as it is stored.
        max_memory: most bytes of weights on each GPU and in main memory.  Default: 90 % of what is free.

    Returns:
        GPU number or "cpu" -> bytes; None where all weights fit on ``where``.
    """
    if _size(checkpoint, each) <= _allowed(_free(where), max_memory):
        return None
    from accelerate.utils import get_max_memory

    _, here = local_processes()
    free = get_max_memory()
    if here > 1:
        # The other GPUs are other processes' own.
        own = (where.index or 0,) if where.type == "cuda" else ()
        free = {device: free[device] for device in (*own, "cpu")} | {"cpu": free["cpu"] // here}
    return {device: _allowed(size, max_memory) for device, size in free.items()}


def _size(checkpoint: Path, each: float | None) -> float:
    return sum(
        entry.end - entry.begin
        if each is None or entry.dtype not in READABLE_DTYPES
        else prod(entry.shape) * each
        for entry in tensor_entries(checkpoint).values()
    )


def _free(where: torch.device) -> int:
    if where.type == "cuda":
        return int(torch.cuda.mem_get_info(where)[0])
    from accelerate.utils import get_max_memory

    _, here = local_processes()
    return int(get_max_memory()["cpu"]) // here


def _allowed(free: int, max_memory: int | None) -> int:
    planned = int(FOR_WEIGHTS * free)
    return planned if max_memory is None else min(planned, max_memory)
