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
    numba.set_num_threads(min(torch.get_num_threads(), _most_threads()))
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
def _add_block(values: Any, positions: Any, total: Any, square: Any, absolute: Any, positive: Any) -> None:
    # Four tokens a turn, because reading and writing the sums costs as much as the values.
    fours = len(positions) - len(positions) % 4
    for i in range(0, fours, 4):
        first, second = values[positions[i]], values[positions[i + 1]]
        third, fourth = values[positions[i + 2]], values[positions[i + 3]]
        for j in range(values.shape[1]):
            a, b = np.float64(first[j]), np.float64(second[j])
            c, d = np.float64(third[j]), np.float64(fourth[j])
            if total is not None:
                total[j] += (a + b) + (c + d)
            if square is not None:
                square[j] += (a * a + b * b) + (c * c + d * d)
            if absolute is not None:
                absolute[j] += (abs(a) + abs(b)) + (abs(c) + abs(d))
            if positive is not None:
                positive[j] += np.int64(a > 0) + np.int64(b > 0) + np.int64(c > 0) + np.int64(d > 0)
    for i in range(fours, len(positions)):
        row = values[positions[i]]
        for j in range(values.shape[1]):
            a = np.float64(row[j])
            if total is not None:
                total[j] += a
            if square is not None:
                square[j] += a * a
            if absolute is not None:
                absolute[j] += abs(a)
            if positive is not None:
                positive[j] += np.int64(a > 0)


@_compiled(parallel=False)
def _add_up(of_blocks: Any, total: Any) -> None:
    for block in range(of_blocks.shape[0]):
        for j in range(of_blocks.shape[1]):
            total[j] += of_blocks[block, j]


@_compiled(parallel=True)
def _add_blocks(
    values: Any,
    positions: Any,
    totals: Any,
    squares: Any,
    absolutes: Any,
    positives: Any,
    total: Any,
    square: Any,
    absolute: Any,
    positive: Any,
) -> None:
    for block in numba.prange((len(positions) + TOKENS_A_BLOCK - 1) // TOKENS_A_BLOCK):
        _add_block(
            values,
            positions[block * TOKENS_A_BLOCK : (block + 1) * TOKENS_A_BLOCK],
            None if totals is None else totals[block],
            None if squares is None else squares[block],
            None if absolutes is None else absolutes[block],
            None if positives is None else positives[block],
        )
    if total is not None:
        _add_up(totals, total)
    if square is not None:
        _add_up(squares, square)
    if absolute is not None:
        _add_up(absolutes, absolute)
    if positive is not None:
        _add_up(positives, positive)
