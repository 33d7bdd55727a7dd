"""Several processes that share one recording (``accelerate launch``): who does what, and whose sums are kept."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from neurons.errors import UsageError


def world() -> tuple[int, int]:
    """(number of this process, how many there are); (0, 1) without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    import accelerate

    state = accelerate.PartialState(cpu=not torch.cuda.is_available())
    return int(state.process_index), int(state.num_processes)


def local_processes() -> tuple[int, int]:
    """(number of this process on this machine, how many are here); (0, 1) without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    number = int(os.environ.get("LOCAL_RANK", "0"))
    # torchrun and accelerate set it; another launcher may not.
    return number, max(number + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def own_gpu() -> torch.device:
    """The GPU of this process: each on a machine takes one of its own.

    Raises:
        UsageError: more processes than GPUs.
    """
    number, here = local_processes()
    if here == 1:
        return torch.device("cuda")
    gpus = torch.cuda.device_count()
    if here > gpus:
        raise UsageError(
            f"{here} processes were started on a machine with {gpus} GPU{'s' * (gpus != 1)}, and each takes one of "
            f"its own: start at most {gpus}, or choose --device cpu"
        )
    return torch.device("cuda", number)


def is_first() -> bool:
    """Whether this process prints and writes."""
    return world()[0] == 0


def together(
    values: torch.Tensor, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Every process's values combined, in the order of the processes, so that each gets the same bits."""
    if world()[1] == 1:
        return values
    import accelerate

    device = accelerate.PartialState().device
    everyone = accelerate.utils.gather(values[None].contiguous().to(device)).to(values.device)
    total: torch.Tensor = everyone[0]
    for other in everyone[1:]:
        total = combine(total, other)
    return total


def wait() -> None:
    """Until every process is here."""
    if world()[1] > 1:
        import accelerate

        accelerate.PartialState().wait_for_everyone()
