"""Several processes of one recording (``accelerate launch``): ranks, devices and reductions."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from neurons.errors import UsageError

SLICE = 2**23  # values of each process that are gathered at once


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    import accelerate

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # With more processes than GPUs they compute on CPUs: NCCL refuses two on one GPU.
    state = accelerate.PartialState(cpu=local_processes()[1] > gpus)
    return int(state.process_index), int(state.num_processes)


def local_processes() -> tuple[int, int]:
    """(local rank, rank of processes on this machine); (0, 1) without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    # torchrun and accelerate set it; another launcher may not.
    return rank, max(rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def own_gpu() -> torch.device:
    """The GPU of this process; each process on a machine has its own.

    Raises:
        UsageError: more processes than GPUs.
    """
    rank, processes = local_processes()
    if processes == 1:
        return torch.device("cuda")
    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise UsageError(
            f"{processes} processes were started on a machine with {gpus} GPU{'s' * (gpus != 1)}, but each needs its "
            f"own: start at most {gpus}, or use --device cpu"
        )
    return torch.device("cuda", rank)


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return world()[0] == 0


def all_reduce(
    values: torch.Tensor, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The values of all processes combined one by one in order of rank, so that all get the same bits."""
    if world()[1] == 1:
        return values
    import accelerate

    device = accelerate.PartialState().device
    flat = values.flatten()
    total = torch.empty_like(flat)
    # In slices: the values of all processes together may not fit.
    for own, into in zip(flat.split(SLICE), total.split(SLICE), strict=True):
        gathered = accelerate.utils.gather(own[None].contiguous().to(device)).to(values.device)
        combined: torch.Tensor = gathered[0]
        for other in gathered[1:]:
            combined = combine(combined, other)
        into.copy_(combined)
    return total.view(values.shape)
