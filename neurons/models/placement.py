"""Placement of a model's weights: on one device if they fit, else on all devices and on disk."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from neurons.files.tensor_files import READABLE_DTYPES, tensor_entries
from neurons.models.memory import free_memory
from neurons.models.processes import local_processes

# Fraction of the free memory for weights; the rest is for activations.
FOR_WEIGHTS = 0.9


def max_memory_per_device(
    size: int, where: torch.device, max_memory: int | None = None
) -> dict[int | str, int] | None:
    """Maximum bytes of weights on each device, as accelerate's ``max_memory``; the rest is on disk.

    Args:
        size: bytes of all weights in memory.
        where: the device of the computation.
        max_memory: maximum bytes of weights on each GPU and in main memory.  Default: 90 % of the free memory.

    Returns:
        GPU number or "cpu" -> bytes; None if all weights fit on ``where``.
    """
    if size <= _allowed(_free(where), max_memory):
        return None
    main = _free(torch.device("cpu"))
    if where.type != "cuda":
        return {"cpu": _allowed(main, max_memory)}
    from accelerate.utils import get_max_memory

    free = get_max_memory()
    if "cpu" in free:  # not where main memory is the GPU's
        free["cpu"] = main
    if local_processes()[1] > 1:
        # The other GPUs belong to other processes.
        free = {device: left for device, left in free.items() if device in (where.index or 0, "cpu")}
    return {device: _allowed(left, max_memory) for device, left in free.items()}


def weight_bytes(checkpoint: Path, each: int | None) -> int:
    """Bytes of a checkpoint's weights in memory.

    Args:
        each: bytes of a weight; None: as stored.
    """
    return sum(
        entry.end - entry.begin
        if each is None or entry.dtype not in READABLE_DTYPES
        else prod(entry.shape) * each
        for entry in tensor_entries(checkpoint).values()
    )


def _free(where: torch.device) -> int:
    if where.type == "cuda":
        return int(torch.cuda.mem_get_info(where)[0])
    return free_memory() // local_processes()[1]


def _allowed(free: int, max_memory: int | None) -> int:
    planned = int(FOR_WEIGHTS * free)
    return planned if max_memory is None else min(planned, max_memory)
