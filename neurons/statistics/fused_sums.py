"""Every sum over tokens in one reading of the values, compiled for the processor.

Tensor operations would read the values again for each sum and write them out in float64 in between, which
costs more than a twentieth of a small model's forward pass.  Here a value is read once, and the sums of a
block of tokens stay in the processor's nearest cache.  The blocks are the same on every machine and added in
their order, so the sums do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numba
import numpy as np
import torch

TOKENS_A_BLOCK = 256


def add_fused(values: torch.Tensor, positions: torch.Tensor, totals: Mapping[str, torch.Tensor]) -> None:
    """Add the values at some positions to the totals that are there.

    Args:
        values: [tokens, units], float32 or float64, on the CPU.
        positions: int64 [n], which tokens.
        totals: of ``sum``, ``square`` and ``absolute``, float64 [units], and ``positive``, int64 [units].
    """
    threads = min(torch.get_num_threads(), _most_threads())
    if numba.get_num_threads() != threads:
        numba.set_num_threads(threads)
    own = [totals[m].numpy() if m in totals else None for m in ("sum", "square", "absolute", "positive")]
    shape = (-(-len(positions) // TOKENS_A_BLOCK), values.shape[1])
    of_blocks = (None if total is None else np.zeros(shape, total.dtype) for total in own)
    _add_blocks(values.contiguous().numpy(), positions.numpy(), *of_blocks, *own)


@cache
def _most_threads() -> int:
    """Starts numba's threads, which changes how many torch uses where both have one OpenMP between them."""
    own = torch.get_num_threads()
    most: int = numba.get_num_threads()
    torch.set_num_threads(own)
    return most


def _compiled(parallel: bool) -> Any:
    """A decorator.  What it compiles is kept on disk, where there is a place for it."""

    def compiled(function: Any) -> Any:
        try:
            return numba.njit(parallel=parallel, error_model="numpy", cache=True)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written
            return numba.njit(parallel=parallel, error_model="numpy")(function)

    return compiled


# What is None is left out when these are compiled.
@_compiled(parallel=False)
def _add_rows(rows: Any, sums: Any, squares: Any, absolutes: Any, positives: Any, block: Any) -> None:
    for j in range(rows[0].size):
        summed = squared = size = 0.0
        above = np.int64(0)
        for i in range(len(rows)):
            value = np.float64(rows[i][j])
            summed += value
            squared += value * value
            size += abs(value)
            above += np.int64(value > 0)
        if sums is not None:
            sums[block, j] += summed
        if squares is not None:
            squares[block, j] += squared
        if absolutes is not None:
            absolutes[block, j] += size
        if positives is not None:
            positives[block, j] += above


@_compiled(parallel=False)
def _add_block(
    values: Any, at: Any, sums: Any, squares: Any, absolutes: Any, positives: Any, block: Any
) -> None:
    # Eight tokens a turn, because reading and writing the sums costs as much as the values.
    eights = len(at) - len(at) % 8
    for i in range(0, eights, 8):
        a, b, c, d = values[at[i]], values[at[i + 1]], values[at[i + 2]], values[at[i + 3]]
        e, f, g, h = values[at[i + 4]], values[at[i + 5]], values[at[i + 6]], values[at[i + 7]]
        _add_rows((a, b, c, d, e, f, g, h), sums, squares, absolutes, positives, block)
    for i in range(eights, len(at)):
        _add_rows((values[at[i]],), sums, squares, absolutes, positives, block)


@_compiled(parallel=False)
def _add_up(of_blocks: Any, total: Any) -> None:
    for block in range(of_blocks.shape[0]):
        for j in range(of_blocks.shape[1]):
            total[j] += of_blocks[block, j]


@_compiled(parallel=True)
def _add_blocks(
    values: Any,
    positions: Any,
    sums: Any,
    squares: Any,
    absolutes: Any,
    positives: Any,
    total: Any,
    square: Any,
    absolute: Any,
    positive: Any,
) -> None:
    for block in numba.prange((len(positions) + TOKENS_A_BLOCK - 1) // TOKENS_A_BLOCK):
        at = positions[block * TOKENS_A_BLOCK : (block + 1) * TOKENS_A_BLOCK]
        _add_block(values, at, sums, squares, absolutes, positives, block)
    if total is not None:
        _add_up(sums, total)
    if square is not None:
        _add_up(squares, square)
    if absolute is not None:
        _add_up(absolutes, absolute)
    if positive is not None:
        _add_up(positives, positive)
