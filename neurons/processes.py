"""Several processes that share one recording (``accelerate launch``): who does what, and whose sums are kept."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def world() -> tuple[int, int]:
    """(number of this process, how many there are); (0, 1) without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    import accelerate

    state = accelerate.PartialState(cpu=not torch.cuda.is_available())
    return int(state.process_index), int(state.num_processes)


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
