"""Placement of a model's weights: on one device if they fit, else on all devices and on disk."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from neurons.files.tensor_files import READABLE_DTYPES, tensor_entries
from neurons.models.memory import within_container
from neurons.models.processes import local_processes

# Fraction of the free memory for weights; the rest is for activations.
FOR_WEIGHTS = 0.9


def max_memory_per_device(
    checkpoint: Path, where: torch.device, each: float | None, max_memory: int | None = None
) -> dict[int | str, int] | None:
    """Maximum bytes of weights on each device, as accelerate's ``max_memory``; the rest is on disk.

    Args:
        checkpoint: a local directory.
        where: the device of the computation.
        each: bytes of a weight in memory; None: as stored.
        max_memory: maximum bytes of weights on each GPU and in main memory.  Default: 90 % of the free memory.

    Returns:
        GPU number or "cpu" -> bytes; None if all weights fit on ``where``.
    """
    if _size(checkpoint, each) <= _allowed(_free(where), max_memory):
        return None
    from accelerate.utils import get_max_memory

    _, processes = local_processes()
    free = get_max_memory()
    if "cpu" in free:  # not where main memory is the GPU's
        free["cpu"] = within_container(free["cpu"])
    if processes > 1:
        # The other GPUs belong to other processes.
        gpus = (where.index or 0,) if where.type == "cuda" else ()
        free = {device: free[device] for device in (*gpus, "cpu")} | {"cpu": free["cpu"] // processes}
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

    _, processes = local_processes()
    return within_container(int(get_max_memory()["cpu"])) // processes


def _allowed(free: int, max_memory: int | None) -> int:
    planned = int(FOR_WEIGHTS * free)
    return planned if max_memory is None else min(planned, max_memory)
