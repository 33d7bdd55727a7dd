"""All sums over tokens in one pass over the values, compiled with numba.

Tensor operations would read the values again for each sum and write float64 intermediates, which costs more
than 5 % of a small model's forward pass.  Here each value is read once, and the sums of a chunk of tokens
stay in the L1 cache.  The chunks are the same on every machine and added in order, so the sums do not depend
on the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numba
import numpy as np
import torch

CHUNK_TOKENS = 256


def add_fused(values: torch.Tensor, positions: torch.Tensor, totals: Mapping[str, torch.Tensor]) -> None:
    """Add the values at the given positions to the totals.

    Args:
        values: [tokens, units], float32 or float64, on the CPU.
        positions: int64 [n], indices of tokens.
        totals: any of ``sum``, ``square`` and ``absolute``, float64 [units], and ``positive``, int64 [units].
    """
    threads = min(torch.get_num_threads(), _max_threads())
    if numba.get_num_threads() != threads:
        numba.set_num_threads(threads)
    outputs = [totals[m].numpy() if m in totals else None for m in ("sum", "square", "absolute", "positive")]
    shape = (-(-len(positions) // CHUNK_TOKENS), values.shape[1])
    of_chunks = (None if total is None else np.zeros(shape, total.dtype) for total in outputs)
    _add_chunks(values.contiguous().numpy(), positions.numpy(), *of_chunks, *outputs)


@cache
def _max_threads() -> int:
    """Number of numba threads.  Starting them changes torch's thread count if both share one OpenMP."""
    before = torch.get_num_threads()
    threads: int = numba.get_num_threads()
    torch.set_num_threads(before)
    return threads


def _compiled(parallel: bool) -> Any:
    """A decorator that compiles a function and caches the result on disk if possible."""

    def compiled(function: Any) -> Any:
        try:
            return numba.njit(parallel=parallel, error_model="numpy", cache=True)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache is writable
            return numba.njit(parallel=parallel, error_model="numpy")(function)

    return compiled


# Numba drops the branches for arguments that are None.
@_compiled(parallel=False)
def _add_rows(rows: Any, sums: Any, squares: Any, absolutes: Any, positives: Any, chunk: Any) -> None:
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
            sums[chunk, j] += summed
        if squares is not None:
            squares[chunk, j] += squared
        if absolutes is not None:
            absolutes[chunk, j] += size
        if positives is not None:
            positives[chunk, j] += above


@_compiled(parallel=False)
def _add_chunk(
    values: Any, at: Any, sums: Any, squares: Any, absolutes: Any, positives: Any, chunk: Any
) -> None:
    # Eight tokens at a time, because reading and writing the sums costs as much as reading the values.
    eights = len(at) - len(at) % 8
    for i in range(0, eights, 8):
        a, b, c, d = values[at[i]], values[at[i + 1]], values[at[i + 2]], values[at[i + 3]]
        e, f, g, h = values[at[i + 4]], values[at[i + 5]], values[at[i + 6]], values[at[i + 7]]
        _add_rows((a, b, c, d, e, f, g, h), sums, squares, absolutes, positives, chunk)
    for i in range(eights, len(at)):
        _add_rows((values[at[i]],), sums, squares, absolutes, positives, chunk)


@_compiled(parallel=False)
def _add_up(of_chunks: Any, total: Any) -> None:
    for chunk in range(of_chunks.shape[0]):
        for j in range(of_chunks.shape[1]):
            total[j] += of_chunks[chunk, j]


@_compiled(parallel=True)
def _add_chunks(
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
    for chunk in numba.prange((len(positions) + CHUNK_TOKENS - 1) // CHUNK_TOKENS):
        at = positions[chunk * CHUNK_TOKENS : (chunk + 1) * CHUNK_TOKENS]
        _add_chunk(values, at, sums, squares, absolutes, positives, chunk)
    if total is not None:
        _add_up(sums, total)
    if square is not None:
        _add_up(squares, square)
    if absolute is not None:
        _add_up(absolutes, absolute)
    if positive is not None:
        _add_up(positives, positive)
