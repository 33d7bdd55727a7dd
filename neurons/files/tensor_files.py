"""The file, dtype, shape and byte range of each tensor of a checkpoint directory, from the headers."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import torch

from neurons.errors import BrocaError

READABLE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

_SINGLE = "model.safetensors"
INDEX_ENDING = ".safetensors.index.json"
# The limit of the safetensors library: a longer header is a damaged length.
_MAX_HEADER = 100_000_000
# Limits of torch: sizes of 63 bits, and the maximum number of dimensions.
_MAX_SIZE = 2**63 - 1
_MAX_DIMENSIONS = 64
# Maximum characters of a name or value in a message.
_MAX_SHOWN = 120
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
# Names of dtypes in the format, also of future ones.
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,31}")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
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

    The files are ``model.safetensors`` or those of an index; without either, the only ``*.safetensors`` file.
    Only the top level of the directory is searched.

    Raises:
        BrocaError: no safetensors weights, several without an index, ``model.safetensors`` beside an index of
            other files or beside a file with tensors of the same names, a missing shard, a tensor that is in
            none or in two of the index's shards, or a truncated or damaged file; names the file, and the tensor
            if there is one.
    """
    files, weight_map = _layout(checkpoint)
    headers = {file.name: file_entries(file) for file in files}
    if weight_map is None:
        entries = headers[files[0].name]
        others = [file for file in sorted(checkpoint.glob("*.safetensors")) if file not in files]
        # transformers reads only this file; vLLM reads all files if there is no index.
        _each_once([*files, *others], headers | {file.name: file_entries(_present(file)) for file in others})
    else:
        _each_once(files, headers)
        entries = {}
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                raise BrocaError(
                    f"tensor {_shown(name)} is not in {checkpoint / shard}, where the index places "
                    "it: download the checkpoint again."
                )
            entries[name] = headers[shard][name]
    return dict(sorted(entries.items()))


def file_entries(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one file, in the order of its header, without reading a value.

    Raises:
        BrocaError: a truncated, damaged or unreadable file.
    """
    with _opened(file) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise BrocaError(f"{file} is a Git LFS pointer, not the weights: run git lfs pull.")
            if len(start) < 8 or length > size - 8 or length > _MAX_HEADER:
                raise BrocaError(
                    f"{file} ({size} bytes) is truncated or not a safetensors file: download it again."
                )
            content = stream.read(length)
        except OSError as error:
            _unreadable(file, error)
    try:
        described = _parsed(content)
    except ValueError as error:
        raise BrocaError(f"{file} has a damaged header ({error}): download it again.") from error
    if not isinstance(described, dict) or not _is_metadata(described.pop("__metadata__", None)):
        raise BrocaError(f"{file} has a header that names no tensors: download it again.")
    entries = {name: _entry(file, name, value, 8 + length, size) for name, value in described.items()}
    _check_places(file, list(entries.values()), 8 + length, size)
    return entries


def header_bytes(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]
) -> bytes:
    """The header of a safetensors file, which the bytes of its tensors follow.

    Args:
        tensors: (name, dtype, shape, number of bytes) of each, in order.
        metadata: strings of the whole file.
    """
    described: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for name, dtype, shape, size in tensors:
        described[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def weight_files(checkpoint: Path) -> list[Path]:
    """The distinct files of the tensors, sorted, as paths inside ``checkpoint``.

    Raises:
        BrocaError: as :func:`tensor_entries`, except for damage inside the files, which are not opened.
    """
    return _layout(checkpoint)[0]


def read_tensor(
    entry: TensorEntry, rows: slice | None = None, into: torch.Tensor | None = None
) -> torch.Tensor:
    """The values of a tensor in its stored dtype, on the CPU; reads only its bytes.

    Args:
        rows: a slice of the first dimension without a step; None reads all.
        into: a contiguous uint8 buffer of at least the bytes to read, which the result then shares.  Default:
            new memory, whose first use costs more than the reading.

    Raises:
        BrocaError: the dtype is not F64, F32, F16 or BF16, the tensor has no rows, the file
            is truncated or unreadable, or the values do not fit in memory.
    """
    if entry.dtype not in READABLE_DTYPES:
        raise BrocaError(
            f"tensor {_shown(entry.name)} in {entry.file} is stored as {_shown(entry.dtype)}, but only "
            f"{', '.join(READABLE_DTYPES)} can be read: use an unquantised checkpoint."
        )
    shape, begin, end = _span(entry, rows)
    return _read(entry, begin, end, into).view(READABLE_DTYPES[entry.dtype]).reshape(shape)


def read_bytes(entry: TensorEntry, rows: slice | None = None) -> torch.Tensor:
    """The stored bytes of a tensor of any dtype, flat uint8, on the CPU.

    Args:
        rows: as in ``read_tensor``.

    Raises:
        BrocaError: as ``read_tensor``, except for the dtype.
    """
    _, begin, end = _span(entry, rows)
    return _read(entry, begin, end, None)


def _span(entry: TensorEntry, rows: slice | None) -> tuple[tuple[int, ...], int, int]:
    """The shape of some rows of a tensor, and the offsets of their bytes in the file."""
    shape, begin, end = entry.shape, entry.begin, entry.end
    if rows is None:
        return shape, begin, end
    if not shape or rows.step not in (None, 1):
        raise BrocaError(
            f"tensor {_shown(entry.name)} of shape {list(shape)} cannot be read by the rows {rows}: "
            "rows need a first dimension and no step."
        )
    first, last, _ = rows.indices(shape[0])
    count = max(0, last - first)
    row_bytes = (end - begin) // shape[0] if shape[0] else 0
    begin += first * row_bytes
    return (count, *shape[1:]), begin, begin + count * row_bytes


def _read(entry: TensorEntry, begin: int, end: int, into: torch.Tensor | None) -> torch.Tensor:
    content = _buffer(entry, end - begin) if into is None else into[: end - begin]
    with _opened(entry.file) as stream:
        stream.seek(begin)
        try:
            filled = stream.readinto(content.numpy().data)
        except OSError as error:
            _unreadable(entry.file, error)
    if filled != end - begin:
        raise BrocaError(
            f"{entry.file} ends inside tensor {_shown(entry.name)}: download the checkpoint again."
        )
    return content


def _buffer(entry: TensorEntry, size: int) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        # torch raises these if the system refuses; a sparse file can claim terabytes.
        raise BrocaError(
            f"tensor {_shown(entry.name)} in {entry.file} has {size / 1e9:.1f} GB, which do not fit in memory: "
            "use a machine with more memory."
        ) from error


def _opened(file: Path) -> BufferedReader:
    try:
        return file.open("rb")
    except OSError as error:
        _unreadable(file, error)


def _unreadable(file: Path, error: OSError) -> NoReturn:
    raise BrocaError(
        f"{file} cannot be read ({error.strerror}): fix its permissions or its disk, then run again."
    ) from error


def _layout(checkpoint: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The sorted weight files and, for a checkpoint with an index, the shard of each tensor."""
    if not checkpoint.is_dir():
        raise BrocaError(
            f"{checkpoint} is not a directory: give the one that holds config.json and the weights."
        )
    single, usual = checkpoint / _SINGLE, checkpoint / f"model{INDEX_ENDING}"
    if single.exists() or single.is_symlink():
        if usual.exists() and {*_weight_map(usual).values()} != {_SINGLE}:
            raise BrocaError(
                f"{checkpoint} has {_SINGLE}, which transformers reads, and an index ({usual.name}) of other files, "
                f"which vLLM reads: remove {_SINGLE}, or the index and its shards, whichever is not the model."
            )
        return [_present(single)], None
    indexes = sorted(file for file in checkpoint.iterdir() if file.name.endswith(INDEX_ENDING))
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
            f"{checkpoint} has several weight files ({_names(singles)}) and no index that maps tensors "
            f"to files: add the *{INDEX_ENDING} of the checkpoint, or keep one file."
        )
    if singles:
        return [_present(singles[0])], None
    others = sorted(file for file in checkpoint.iterdir() if file.suffix in OTHER_WEIGHT_SUFFIXES)
    if others:
        raise BrocaError(
            f"{checkpoint} has no safetensors weights, only {_names(others)}: convert it to safetensors first."
        )
    raise BrocaError(
        f"{checkpoint} has no weights ({_SINGLE} or *{INDEX_ENDING}), "
        f"only {_names(sorted(checkpoint.iterdir())) or 'nothing'}: download the checkpoint completely."
    )


def _names(files: list[Path], maximum: int = 5) -> str:
    left_out = f" and {len(files) - maximum} more" if len(files) > maximum else ""
    return ", ".join(file.name for file in files[:maximum]) + left_out


def _present(file: Path) -> Path:
    # A deleted blob or an interrupted download leaves a broken link in a hub cache.  Links out of the directory
    # are valid: a hub cache consists of them.
    try:
        exists, linked = file.is_file(), file.is_symlink()
    except OSError:
        # For example a name in an index that is too long for the file system.
        exists = linked = False
    if not exists:
        fault = "is a broken link" if linked else "is missing or not a file"
        raise BrocaError(f"{file.parent / _shown(file.name)} {fault}: download the checkpoint again.")
    return file


def _each_once(files: list[Path], headers: dict[str, dict[str, TensorEntry]]) -> None:
    """Reject a tensor in two files: transformers loads the later one, whatever the index says."""
    holder: dict[str, Path] = {}
    for file in files:
        for name in headers[file.name]:
            if name in holder:
                raise BrocaError(
                    f"tensor {_shown(name)} is in both {holder[name]} and {file.name}, and loaders differ in which they "
                    "use: keep it in one of them, or remove the file that is not part of the model."
                )
            holder[name] = file


def _shown(text: object) -> str:
    """A name or value from a file, shortened and made printable for a message."""
    plain = text if isinstance(text, str) else reprlib.repr(text)
    plain = plain if plain.isprintable() else ascii(plain)
    return plain if len(plain) <= _MAX_SHOWN else f"{plain[:_MAX_SHOWN]}..."


def _parsed(content: bytes) -> Any:
    """Parse JSON in UTF-8, as strictly as loaders in other languages.

    Raises:
        ValueError: invalid JSON, or a duplicate name.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for name, value in pairs:
            if name in members:
                raise ValueError(f"the name {_shown(name)} is duplicated")
            # JSON can escape half of a surrogate pair, which cannot be encoded.
            for text in (name, value):
                if isinstance(text, str) and _SURROGATE.search(text):
                    raise ValueError(f"{_shown(text)} is not valid text")
            members[name] = value
        return members

    def not_a_number(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=without_duplicates, parse_constant=not_a_number
        )
    except (RecursionError, MemoryError) as error:
        raise ValueError("it is too large or nested too deeply") from error


def _weight_map(index: Path) -> dict[str, str]:
    with _opened(index) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            if size > _MAX_HEADER:
                raise BrocaError(f"{index} ({size} bytes) is too large to be an index: download it again.")
            content = _parsed(stream.read())
        except ValueError as error:
            raise BrocaError(f"{index} is not valid JSON ({error}): download it again.") from error
        except OSError as error:
            _unreadable(index, error)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BrocaError(f"{index} has no weight_map that names its tensors: download it again.")
    for name, shard in weight_map.items():
        # A path would be read, and later written, outside the checkpoint directory.
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\\" in shard:
            raise BrocaError(
                f"{index} places tensor {_shown(name)} in {_shown(repr(shard))}, which is not the name of a file "
                "beside it: put all shards into the checkpoint directory."
            )
    return weight_map


def _check_places(file: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    """Check that the tensors are contiguous and fill the file, as the format requires."""
    before, reached = "the header", data_start
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.begin < reached:
            raise BrocaError(
                f"{file} is damaged: tensors {before} and {_shown(entry.name)} overlap; download it again."
            )
        if entry.begin > reached:
            raise BrocaError(
                f"{file} is damaged: {entry.begin - reached} bytes between {before} and tensor "
                f"{_shown(entry.name)} belong to no tensor; download it again."
            )
        before, reached = _shown(entry.name), entry.end
    if reached != size:
        raise BrocaError(
            f"{file} is damaged: {size - reached} bytes after {before} belong to no tensor; download it again."
        )


def _entry(file: Path, name: str, value: Any, data_start: int, size: int) -> TensorEntry:
    damaged = BrocaError(
        f"{file} is damaged: its header describes tensor {_shown(name)} as {_shown(value)}; download it again."
    )
    if not isinstance(value, dict):
        raise damaged
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise damaged
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise damaged
    begin, end = offsets
    numbers = _product(shape)
    # A dtype that is not in the table has an unknown width; its byte range is still checked.
    if numbers is None or begin > end or (dtype in _BITS and (end - begin) * 8 != numbers * _BITS[dtype]):
        raise damaged
    if data_start + end > size:
        raise BrocaError(
            f"{file} is truncated: it has {size} bytes and tensor {_shown(name)} ends at {data_start + end}; "
            "download it again."
        )
    return TensorEntry(name, file, dtype, tuple(shape), data_start + begin, data_start + end)


def _is_metadata(value: object) -> bool:
    return value is None or (
        isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    )


def _product(shape: list[int]) -> int | None:
    """Number of values of a tensor, or None for a shape beyond the limits."""
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) > _MAX_SIZE:
        return None
    return math.prod(shape)


def _counts(value: object) -> TypeGuard[list[int]]:
    # bool is an int in Python, but true is not a size.
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_SIZE for item in value)
