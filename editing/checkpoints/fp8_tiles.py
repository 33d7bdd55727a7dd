"""FP8 weights with a scale for each tile.

DeepSeek-V3 (arXiv 2412.19437, section 3.3) stores a weight W [d, n] as Q (F8_E4M3) [d, n] and one scale
for each tile of a x b numbers, S [ceil(d/a), ceil(n/b)], usually a = b = 128; Qwen3 and others follow:

    W_ij = Q_ij S_(i//a)(j//b)

with S in the tensor ``<name of Q>_scale_inv`` and a, b in ``quantization_config.weight_block_size``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from editing.plans.rounding import round_once
from neurons.errors import BrocaError
from neurons.files.tensor_files import READABLE_DTYPES, TensorEntry, read_bytes, read_tensor

STORED = "F8_E4M3"
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Fp8Tiles:
    """The form of a checkpoint's FP8 weights.

    Attributes:
        tile: (a, b).
    """

    tile: tuple[int, int]
    kind = STORED

    def scales_of(self, entry: TensorEntry) -> str | None:
        """The name of the scales of a tensor; None if it is not quantised."""
        return f"{entry.name}_scale_inv" if entry.dtype == STORED else None

    def fits(self, entry: TensorEntry, scales: TensorEntry) -> bool:
        expected = tuple(-(-size // step) for size, step in zip(entry.shape, self.tile, strict=False))
        return len(entry.shape) == 2 and scales.shape == expected and scales.dtype in READABLE_DTYPES

    def result(self, entry: TensorEntry) -> tuple[str, tuple[int, ...]]:
        """The name and shape of the dequantised tensor."""
        return entry.name, entry.shape

    def chunks(self, entry: TensorEntry, scales: TensorEntry) -> Iterator[torch.Tensor]:
        """The dequantised tensor in order, some rows at a time, bfloat16: products in float64, rounded once."""
        of_tiles, (rows, columns), height = read_scales(scales), entry.shape, self.tile[0]
        step = height * max(1, _CHUNK_BYTES // max(1, height * columns))
        for first in range(0, rows if columns else 0, step):
            stored = read_rows(entry, slice(first, first + step))
            yield round_once(dequantised(stored, of_tiles[first // height :], self.tile), torch.bfloat16)

    def samples(
        self, entry: TensorEntry, scales: TensorEntry, offsets: Iterable[int], count: int
    ) -> Iterator[bytes]:
        """Bytes of the dequantised tensor from some offsets, without reading the rest."""
        of_tiles, columns = read_scales(scales), entry.shape[1]
        with entry.file.open("rb") as stream:
            for offset in offsets:
                places = torch.arange(offset // 2, -(-(offset + count) // 2))
                stream.seek(entry.begin + offset // 2)
                content = bytearray(stream.read(len(places)))
                stored = torch.frombuffer(content, dtype=torch.float8_e4m3fn).float().double()
                rows, at = places // columns, places % columns
                values = stored * of_tiles[rows // self.tile[0], at // self.tile[1]].double()
                sample = round_once(values, torch.bfloat16).view(torch.uint8).numpy().tobytes()
                yield sample[offset % 2 : offset % 2 + count]


def read_rows(entry: TensorEntry, rows: slice) -> torch.Tensor:
    """Rows of Q, float8 [rows, n]."""
    return read_bytes(entry, rows).view(torch.float8_e4m3fn).reshape(-1, entry.shape[1])


def read_scales(entry: TensorEntry) -> torch.Tensor:
    """S in its stored dtype.

    Raises:
        BrocaError: it is not finite.
    """
    scales = read_tensor(entry)
    if not bool(torch.isfinite(scales).all()):
        raise BrocaError(f"tensor {entry.name} is not finite: download the checkpoint again.")
    return scales


def dequantised(quantised: torch.Tensor, scales: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """The values of FP8 tiles, before rounding.

    Args:
        quantised: float8 [d, n].
        scales: [ceil(d/a), ceil(n/b)] or more rows, any float dtype.
        tile: (a, b).

    Returns:
        float64 [d, n], exact: 4 bits times 24 bits are fewer than 53.
    """
    return quantised.float().double() * expanded(scales.double(), tile, *quantised.shape)


def expanded(of_tiles: torch.Tensor, tile: tuple[int, int], rows: int, columns: int) -> torch.Tensor:
    """[rows, columns]: for each number, the value of its tile."""
    of_rows = of_tiles[: -(-rows // tile[0])].repeat_interleave(tile[0], 0)[:rows]
    return of_rows.repeat_interleave(tile[1], 1)[:, :columns]
