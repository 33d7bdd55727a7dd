"""Dequantise a checkpoint of FP8 tiles to bf16, one tensor at a time.

DeepSeek-V3 (arXiv 2412.19437, section 3.3) stores a weight W [d, n] as Q (F8_E4M3) [d, n] and one scale
for each tile of a x b numbers, S [ceil(d/a), ceil(n/b)], usually a = b = 128; Qwen3 and others follow:

    W_ij = Q_ij S_(i//a)(j//b)

with S in the tensor ``<name of Q>_scale_inv`` and a, b in ``quantization_config.weight_block_size``.
Everything else in such a checkpoint is copied byte for byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from editing.checkpoints.staging import check_room, check_target, place_apart, staging
from editing.plans.rounding import round_once
from neurons.architectures.quantisation import fp8_tile_size, is_quantised, quantisation, quantised_remedy
from neurons.errors import BrocaError
from neurons.files.tensor_files import READABLE_DTYPES, TensorEntry, read_tensor, tensor_entries, weight_files

STORED, SCALE_ENDING = "F8_E4M3", "_scale_inv"
_CHUNK_BYTES = 16 * 2**20
_NOT_COPIED = {".git", ".cache"}


@dataclass(frozen=True)
class Dequantised:
    """The result of a dequantisation.

    Attributes:
        path: of the new checkpoint.
        tensors: names of the dequantised tensors.
        bytes: size of the new weight files.
    """

    path: Path
    tensors: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class _NewTensor:
    """A tensor of the new checkpoint: its source, and its scales if it is dequantised."""

    entry: TensorEntry
    scales: TensorEntry | None

    @property
    def dtype(self) -> str:
        return self.entry.dtype if self.scales is None else "BF16"

    @property
    def size(self) -> int:
        return (self.entry.end - self.entry.begin) * (1 if self.scales is None else 2)


def dequantise(
    source: Path,
    target: Path,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Dequantised:
    """Write a checkpoint of FP8 tiles as an ordinary bf16 one.

    Each number is the product above, in float64, rounded once.  Files keep their names; only a few rows of a
    tensor are in memory.  The new directory is renamed into place at the end.

    Args:
        source: checkpoint directory; only read.
        target: directory to create.
        overwrite: replace an existing checkpoint.
        progress: called with (bytes done, bytes in all).

    Raises:
        BrocaError: the checkpoint is not quantised, or with another method; a scale is missing, has the wrong
            shape or is not finite; or the target must not or cannot be written.
    """
    target = place_apart(source, target)
    settings = _settings(source)
    tile = fp8_tile_size(settings)
    if tile is None:
        if is_quantised(settings):
            method = (quantisation(settings) or {}).get("quant_method")
            raise BrocaError(
                f"{source} is quantised by {method}, but only FP8 with a weight_block_size is supported here: "
                f"{quantised_remedy(settings)}."
            )
        raise BrocaError(f"{source} is not quantised: there is nothing to dequantise.")
    shards = _shards(source, tile)
    files = _other_files(source, target)
    check_target(target, overwrite)
    contents = {Path("config.json"): _unquantised(settings)} | _indexes(source, shards)
    total = sum(tensor.size for tensors in shards.values() for tensor in tensors)
    others = [path for path in files if path not in contents]
    check_room(target, total + sum((source / path).stat().st_size for path in others))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with staging(target, overwrite) as staged:
        for path in others:
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, staged / path)
        for path, content in contents.items():
            (staged / path).write_bytes(content)
        for name, tensors in shards.items():
            with (staged / name).open("xb") as stream:
                stream.write(_header(tensors))
                for tensor in tensors:
                    _write(tensor, tile, stream, advance)
    return Dequantised(
        path=target,
        tensors=tuple(
            sorted(t.entry.name for tensors in shards.values() for t in tensors if t.scales is not None)
        ),
        bytes=total,
    )


def dequantised(quantised: torch.Tensor, scales: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """The values of FP8 tiles, before rounding.

    Args:
        quantised: float8 [d, n].
        scales: [ceil(d/a), ceil(n/b)], any float dtype.
        tile: (a, b).

    Returns:
        float64 [d, n], exact: 4 bits times 24 bits are fewer than 53.
    """
    rows, columns = quantised.shape
    expanded = scales.double().repeat_interleave(tile[0], 0)[:rows].repeat_interleave(tile[1], 1)
    return quantised.float().double() * expanded[:, :columns]


def _settings(source: Path) -> Any:
    config = source / "config.json"
    try:
        return json.loads(config.read_bytes())
    except FileNotFoundError as error:
        raise BrocaError(f"{source} has no config.json: download it completely.") from error
    except ValueError as error:
        raise BrocaError(f"{config} is not valid JSON ({error}): download it again.") from error


def _unquantised(settings: Any) -> bytes:
    def without(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        return {key: without(value) for key, value in part.items() if key != "quantization_config"}

    return (json.dumps(without(settings), indent=2, ensure_ascii=False) + "\n").encode()


def _shards(source: Path, tile: tuple[int, int]) -> dict[str, list[_NewTensor]]:
    """File name -> its new tensors, in the order of the old ones."""
    entries = tensor_entries(source)
    shards: dict[str, list[_NewTensor]] = {}
    used = set()
    for entry in entries.values():
        if entry.dtype != STORED:
            continue
        scales = entries.get(entry.name + SCALE_ENDING)
        if scales is None:
            raise BrocaError(
                f"{source}: tensor {entry.name} is {STORED} without {entry.name}{SCALE_ENDING}, so its "
                "values are unknown: download the checkpoint again."
            )
        expected = tuple(-(-size // step) for size, step in zip(entry.shape, tile, strict=False))
        if len(entry.shape) != 2 or scales.shape != expected or scales.dtype not in READABLE_DTYPES:
            raise BrocaError(
                f"{source}: tensor {scales.name} ({scales.dtype}, {list(scales.shape)}) does not fit "
                f"{entry.name} {list(entry.shape)} in tiles of {list(tile)}: download the checkpoint again."
            )
        used.add(scales.name)
    for entry in sorted(entries.values(), key=lambda e: (e.file.name, e.begin)):
        if entry.name in used:
            continue
        scales = entries[entry.name + SCALE_ENDING] if entry.dtype == STORED else None
        shards.setdefault(entry.file.name, []).append(_NewTensor(entry, scales))
    if not used:
        raise BrocaError(f"{source} has no {STORED} tensor, so there is nothing to dequantise.")
    return shards


def _other_files(source: Path, target: Path) -> list[Path]:
    weights = set(weight_files(source))
    files = []
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if path in weights or not path.is_file() or _NOT_COPIED & set(inside.parts):
            continue
        if path.resolve().is_relative_to(target):
            raise BrocaError(f"{path} is a link into {target}: write to another directory.")
        files.append(inside)
    return files


def _indexes(source: Path, shards: Mapping[str, list[_NewTensor]]) -> dict[Path, bytes]:
    """The indexes of the source, without the scales and with the new size."""
    kept = {tensor.entry.name: name for name, tensors in shards.items() for tensor in tensors}
    size = sum(tensor.size for tensors in shards.values() for tensor in tensors)
    indexes = {}
    for path in source.glob("*.safetensors.index.json"):
        content = json.loads(path.read_bytes())
        content["weight_map"] = dict(sorted(kept.items()))
        content["metadata"] = {**(content.get("metadata") or {}), "total_size": size}
        indexes[path.relative_to(source)] = (json.dumps(content, indent=2) + "\n").encode()
    return indexes


def _header(tensors: list[_NewTensor]) -> bytes:
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        described[tensor.entry.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.entry.shape),
            "data_offsets": [place, place + tensor.size],
        }
        place += tensor.size
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(
    tensor: _NewTensor, tile: tuple[int, int], stream: BinaryIO, advance: Callable[[int], None]
) -> None:
    entry = tensor.entry
    with entry.file.open("rb") as reader:
        reader.seek(entry.begin)
        if tensor.scales is None:
            left = entry.end - entry.begin
            while left:
                content = _exactly(reader, min(left, _CHUNK_BYTES), entry)
                stream.write(content)
                left -= len(content)
                advance(len(content))
            return
        scales = read_tensor(tensor.scales)
        if not bool(torch.isfinite(scales).all()):
            raise BrocaError(f"tensor {tensor.scales.name} is not finite: download the checkpoint again.")
        rows, columns = entry.shape
        step = tile[0] * max(1, _CHUNK_BYTES // max(1, tile[0] * columns))
        for first in range(0, rows if columns else 0, step):
            count = min(step, rows - first)
            content = _exactly(reader, count * columns, entry)
            stored = torch.frombuffer(bytearray(content), dtype=torch.float8_e4m3fn).reshape(count, columns)
            new = round_once(dequantised(stored, scales[first // tile[0] :], tile), torch.bfloat16)
            if not bool(torch.isfinite(new).all()):
                raise BrocaError(f"tensor {entry.name} is not finite: download the checkpoint again.")
            stream.write(new.contiguous().view(torch.uint8).numpy().data)
            advance(2 * len(content))


def _exactly(reader: BinaryIO, count: int, entry: TensorEntry) -> bytes:
    content = reader.read(count)
    if len(content) != count:
        raise BrocaError(f"{entry.file} ends inside tensor {entry.name}: download the checkpoint again.")
    return content
