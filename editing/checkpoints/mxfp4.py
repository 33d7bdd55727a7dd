"""MXFP4 experts of gpt-oss (OCP Microscaling Formats, version 1.0): 4 bits a number, a scale for each 32.

A weight of E experts [E, n, d] is stored as ``<name>_blocks``, U8 [E, d, n/32, 16], and ``<name>_scales``, U8
[E, d, n/32].  The low half of byte k of a block is its number 2k, the high half number 2k + 1, in E2M1; scale s is
2^(s - 127), 255 not a number.  Every product is exact in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import nan

import torch

from neurons.files.tensor_files import TensorEntry, read_bytes

_HALVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = (*_HALVES, *(-value for value in _HALVES))
_BLOCKS, _IN_BLOCK = "_blocks", 16


@dataclass(frozen=True)
class Mxfp4:
    """The form of a checkpoint's MXFP4 weights; the methods are those of ``Fp8Tiles``."""

    kind = "MXFP4"

    def scales_of(self, entry: TensorEntry) -> str | None:
        quantised = entry.name.endswith(_BLOCKS) and entry.dtype == "U8"
        return f"{entry.name.removesuffix(_BLOCKS)}_scales" if quantised else None

    def fits(self, entry: TensorEntry, scales: TensorEntry) -> bool:
        return (
            len(entry.shape) == 4
            and entry.shape[-1] == _IN_BLOCK
            and scales.shape == entry.shape[:-1]
            and scales.dtype == "U8"
        )

    def result(self, entry: TensorEntry) -> tuple[str, tuple[int, ...]]:
        experts, outputs, blocks, _ = entry.shape
        return entry.name.removesuffix(_BLOCKS), (experts, blocks * 2 * _IN_BLOCK, outputs)

    def chunks(self, entry: TensorEntry, scales: TensorEntry) -> Iterator[torch.Tensor]:
        """The dequantised tensor, one expert [n, d] at a time, bfloat16."""
        for expert in range(entry.shape[0]):
            rows = slice(expert, expert + 1)
            blocks = read_bytes(entry, rows).reshape(entry.shape[1:])
            yield dequantised_blocks(blocks, read_bytes(scales, rows).reshape(scales.shape[1:])).T.bfloat16()


def dequantised_blocks(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers of MXFP4 blocks; not finite where a scale is 255.

    Args:
        blocks: uint8 [..., G, 16].
        scales: uint8 [..., G].

    Returns:
        float32 [..., G * 32].
    """
    pairs = torch.tensor([(_NUMBERS[byte & 15], _NUMBERS[byte >> 4]) for byte in range(256)])
    powers = torch.tensor([*(2.0 ** (scale - 127) for scale in range(255)), nan])
    numbers = pairs[blocks.int()].flatten(-2) * powers[scales.int()].unsqueeze(-1)
    return numbers.flatten(-2)
