"""Where each tensor of a checkpoint directory lies: file, dtype, shape and bytes, from the headers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch

from neurons.errors import BrocaError

READABLE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

_SINGLE = "model.safetensors"
_INDEX_ENDING = ".safetensors.index.json"
# The limit of the safetensors library itself: a longer header is a damaged length, not a model.
_LONGEST_HEADER = 100_000_000
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
OTHER_WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor on disk.

    ``file`` is the path inside the checkpoint directory (links not resolved), ``dtype`` the safetensors
    name (``"BF16"``), ``begin`` and ``end`` are byte offsets counted from the start of the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def tensor_entries(checkpoint: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint directory, in name order, without reading a weight.

    ``model.safetensors`` is taken before an index, as transformers does; without either, the one
    ``*.safetensors`` file there is.  Only the top level of the directory is looked at.

    Raises:
        BrocaError: no safetensors weights, several without an index, a missing shard, a tensor that the
            index promises and its shard lacks, or a file that is cut short or damaged.
    """
    files, weight_map = _layout(checkpoint)
    headers = {file.name: _header(file) for file in files}
    if weight_map is None:
        found = headers[files[0].name]
    else:
        found = {}
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                raise BrocaError(
                    f"tensor {name} is not in {checkpoint / shard}, where the index of the checkpoint "
                    "places it: download the checkpoint again."
                )
            found[name] = headers[shard][name]
    return dict(sorted(found.items()))


def weight_files(checkpoint: Path) -> list[Path]:
    """The distinct files that hold the tensors, sorted; the paths lie inside ``checkpoint``.

    Raises:
        BrocaError: as :func:`tensor_entries`, except for damage inside the files, which are not opened.
    """
    return _layout(checkpoint)[0]


def read_tensor(entry: TensorEntry, rows: slice | None = None) -> torch.Tensor:
    """The values of one tensor in their stored dtype, on the CPU, read from its bytes alone.

    Args:
        entry: where the tensor lies.
        rows: a slice without a step that picks entries of the first dimension; None reads all.

    Raises:
        BrocaError: the dtype is not F64, F32, F16 or BF16, the tensor has no rows to slice, or the file
            ends early.
    """
    if entry.dtype not in READABLE_DTYPES:
        raise BrocaError(
            f"tensor {entry.name} in {entry.file} is stored as {entry.dtype}, and only "
            f"{', '.join(READABLE_DTYPES)} can be read: start from an unquantised checkpoint."
        )
    shape, begin, end = entry.shape, entry.begin, entry.end
    if rows is not None:
        if not shape or rows.step not in (None, 1):
            raise BrocaError(
                f"tensor {entry.name} of shape {list(shape)} cannot be read by the rows {rows}: "
                "rows need a first dimension and no step."
            )
        first, last, _ = rows.indices(shape[0])
        count = max(0, last - first)
        row_bytes = (end - begin) // shape[0] if shape[0] else 0
        begin += first * row_bytes
        end = begin + count * row_bytes
        shape = (count, *shape[1:])
    content = torch.empty(end - begin, dtype=torch.uint8)
    with entry.file.open("rb") as stream:
        stream.seek(begin)
        if stream.readinto(content.numpy().data) != end - begin:
            raise BrocaError(f"{entry.file} ends inside tensor {entry.name}: download the checkpoint again.")
    return content.view(READABLE_DTYPES[entry.dtype]).reshape(shape)


def _layout(checkpoint: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The sorted weight files and, for a checkpoint with an index, the shard of each tensor."""
    if not checkpoint.is_dir():
        raise BrocaError(
            f"{checkpoint} is not a directory: give the one that holds config.json and the weights."
        )
    single = checkpoint / _SINGLE
    if single.exists() or single.is_symlink():
        return [_present(single)], None
    indexes = sorted(file for file in checkpoint.iterdir() if file.name.endswith(_INDEX_ENDING))
    usual = checkpoint / f"model{_INDEX_ENDING}"
    if usual in indexes:
        indexes = [usual]
    if len(indexes) > 1:
        raise BrocaError(
            f"{checkpoint} has several indexes ({_names(indexes)}): keep one, or name it {usual.name}."
        )
    if indexes:
        weight_map = _weight_map(_present(indexes[0]))
        return [_present(checkpoint / shard) for shard in sorted(set(weight_map.values()))], weight_map
    singles = sorted(checkpoint.glob("*.safetensors"))
    if len(singles) > 1:
        raise BrocaError(
            f"{checkpoint} has several weight files ({_names(singles)}) and no index that says which tensor "
            f"lies where: add the *{_INDEX_ENDING} of the checkpoint, or keep one file."
        )
    if singles:
        return [_present(singles[0])], None
    others = sorted(file for file in checkpoint.iterdir() if file.suffix in OTHER_WEIGHT_SUFFIXES)
    if others:
        raise BrocaError(
            f"{checkpoint} has no safetensors weights, only {_names(others)}: convert it to safetensors first."
        )
    raise BrocaError(
        f"{checkpoint} has no weights ({_SINGLE} or *{_INDEX_ENDING}), "
        f"only {_names(sorted(checkpoint.iterdir())) or 'nothing'}: download the checkpoint completely."
    )


def _names(files: list[Path], most: int = 5) -> str:
    left_out = f" and {len(files) - most} more" if len(files) > most else ""
    return ", ".join(file.name for file in files[:most]) + left_out


def _present(file: Path) -> Path:
    # A hub cache whose blob was deleted, or whose download broke off, leaves a link that leads nowhere.
    if not file.is_file():
        fault = "is a link to a file that is gone" if file.is_symlink() else "is missing or not a file"
        raise BrocaError(f"{file} {fault}: download the checkpoint again.")
    return file


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_bytes())
    except ValueError as error:
        raise BrocaError(f"{index} is not valid JSON ({error}): download it again.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BrocaError(f"{index} has no weight_map that names its tensors: download it again.")
    for name, shard in weight_map.items():
        # A shard elsewhere would be read, and later written, outside the checkpoint directory.
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\\" in shard:
            raise BrocaError(
                f"{index} places tensor {name} in {shard!r}, which is not the name of a file beside it: "
                "put all shards into the checkpoint directory."
            )
    return weight_map


def _header(file: Path) -> dict[str, TensorEntry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise BrocaError(f"{file} is a Git LFS pointer, not the weights: run git lfs pull.")
        if len(start) < 8 or length > size - 8 or length > _LONGEST_HEADER:
            raise BrocaError(f"{file} ({size} bytes) is cut short or no safetensors file: download it again.")
        content = stream.read(length)
    try:
        described = json.loads(content)
    except ValueError as error:
        raise BrocaError(f"{file} has a damaged header ({error}): download it again.") from error
    if not isinstance(described, dict):
        raise BrocaError(f"{file} has a header that names no tensors: download it again.")
    described.pop("__metadata__", None)
    entries = {name: _entry(file, name, value, 8 + length, size) for name, value in described.items()}
    filled = sorted((e for e in entries.values() if e.end > e.begin), key=lambda e: e.begin)
    for before, after in pairwise(filled):
        if after.begin < before.end:
            raise BrocaError(
                f"{file} is damaged: tensors {before.name} and {after.name} overlap; download it again."
            )
    return entries


def _entry(file: Path, name: str, value: Any, data_start: int, size: int) -> TensorEntry:
    damaged = BrocaError(
        f"{file} is damaged: its header describes tensor {name} as {value}; download it again."
    )
    if not isinstance(value, dict):
        raise damaged
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise damaged
    begin, end = offsets
    # A dtype newer than this table has an unknown width; its place in the file is still checked.
    if begin > end or (dtype in _BITS and (end - begin) * 8 != prod(shape) * _BITS[dtype]):
        raise damaged
    if data_start + end > size:
        raise BrocaError(
            f"{file} is cut short: it has {size} bytes and tensor {name} ends at {data_start + end}; "
            "download it again."
        )
    return TensorEntry(name, file, dtype, tuple(shape), data_start + begin, data_start + end)


def _counts(value: object) -> TypeGuard[list[int]]:
    # bool is an int in Python, and true is no size.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
