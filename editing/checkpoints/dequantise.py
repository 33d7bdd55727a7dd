"""Dequantise a checkpoint of FP8 tiles or MXFP4 experts to bf16, one tensor at a time.

Everything else in such a checkpoint is copied byte for byte.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from editing.checkpoints.checkpoint import checkpoint_tree, preferred_by_vllm
from editing.checkpoints.fp8_tiles import Fp8Tiles
from editing.checkpoints.mxfp4 import Mxfp4
from editing.checkpoints.staging import check_room, check_target, place_apart, staging
from neurons.architectures.quantisation import (
    fp8_tile_size,
    is_mxfp4,
    is_quantised,
    quantisation,
    quantised_remedy,
)
from neurons.errors import BrocaError
from neurons.files.tensor_files import TensorEntry, header_bytes, tensor_entries, weight_files
from neurons.models.fingerprint import digest_of, stored_samples
from neurons.models.source import ModelSource, locate, open_model

_COPIED_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Dequantised:
    """The result of a dequantisation.

    Attributes:
        path: of the new checkpoint.
        tensors: names of the dequantised tensors.
        bytes: size of the new weight files.
        left_out: files of the source that are not in the output: quantised weights that vLLM prefers.
    """

    path: Path
    tensors: tuple[str, ...]
    bytes: int
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _NewTensor:
    """A tensor of the new checkpoint: its source, and its scales if it is dequantised."""

    name: str
    shape: tuple[int, ...]
    entry: TensorEntry
    scales: TensorEntry | None

    @property
    def dtype(self) -> str:
        return self.entry.dtype if self.scales is None else "BF16"

    @property
    def size(self) -> int:
        return self.entry.end - self.entry.begin if self.scales is None else 2 * math.prod(self.shape)


def dequantise(
    source: Path,
    target: Path,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Dequantised:
    """Write a quantised checkpoint as an ordinary bf16 one.

    Each number is the exact product of its stored number and scale, rounded once.  Files keep their names; only
    a few rows, or one expert, of a tensor are in memory.  Weights in Mistral's own format, which vLLM would serve
    instead, are left out.  The new directory is renamed into place at the end.

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
    form = _form(settings)
    if form is None:
        if is_quantised(settings):
            method = (quantisation(settings) or {}).get("quant_method")
            raise BrocaError(
                f"{source} is quantised by {method}, but only MXFP4 and FP8 with a weight_block_size are supported "
                f"here: {quantised_remedy(settings)}."
            )
        raise BrocaError(f"{source} is not quantised: there is nothing to dequantise.")
    shards = _shards(source, form)
    sizes = checkpoint_tree(source, target)[1]
    check_target(target, overwrite)
    contents = {Path("config.json"): _unquantised(settings)} | _indexes(source, shards)
    total = sum(tensor.size for tensors in shards.values() for tensor in tensors)
    left_out = preferred_by_vllm(source)
    weights = {*weight_files(source), *(source / name for name in left_out)}
    others = [path for path in sizes if source / path not in weights and path not in contents]
    check_room(target, total + sum(sizes[path] for path in others))
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
                rows = ((tensor.name, tensor.dtype, tensor.shape, tensor.size) for tensor in tensors)
                stream.write(header_bytes(rows, {"format": "pt"}))
                for tensor in tensors:
                    for part in _contents(tensor, form):
                        stream.write(part)
                        advance(len(part))
    return Dequantised(
        path=target,
        tensors=tuple(sorted(t.name for tensors in shards.values() for t in tensors if t.scales is not None)),
        bytes=total,
        left_out=left_out,
    )


def open_for_export(model: str) -> ModelSource:
    """As ``open_model``, but a checkpoint of FP8 tiles is accepted too, with the fingerprint of its dequantised copy.

    Raises:
        UsageError, BrocaError: as ``open_model``, or as ``dequantise`` for the tensors.
    """
    checkpoint = locate(model)
    settings = _settings(checkpoint)
    tile = fp8_tile_size(settings)
    if tile is None:
        return open_model(model)
    form = Fp8Tiles(tile)
    tensors = sorted(
        (tensor for of_file in _shards(checkpoint, form).values() for tensor in of_file),
        key=lambda tensor: tensor.name,
    )
    digest = digest_of(
        json.loads(_unquantised(settings)),
        (
            (tensor.name, tensor.dtype, tensor.shape, tensor.size, partial(_samples, tensor, form))
            for tensor in tensors
        ),
    )
    return replace(open_model(model, quantised=True), fingerprint=digest)


def _samples(tensor: _NewTensor, form: Fp8Tiles, offsets: Iterable[int], count: int) -> Iterator[bytes]:
    if tensor.scales is None:
        return stored_samples(tensor.entry, offsets, count)
    return form.samples(tensor.entry, tensor.scales, offsets, count)


def _form(settings: Any) -> Fp8Tiles | Mxfp4 | None:
    tile = fp8_tile_size(settings)
    if tile is not None:
        return Fp8Tiles(tile)
    return Mxfp4() if is_mxfp4(settings) else None


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


def _shards(source: Path, form: Fp8Tiles | Mxfp4) -> dict[str, list[_NewTensor]]:
    """File name -> its new tensors, in the order of the old ones."""
    entries = tensor_entries(source)
    scales_of: dict[str, TensorEntry] = {}
    for entry in entries.values():
        name = form.scales_of(entry)
        if name is None:
            continue
        if name not in entries:
            raise BrocaError(
                f"{source}: tensor {entry.name} is {form.kind} without {name}, so its values are unknown: download "
                "the checkpoint again."
            )
        scales = entries[name]
        if not form.fits(entry, scales):
            raise BrocaError(
                f"{source}: tensor {name} ({scales.dtype}, {list(scales.shape)}) does not fit {entry.name} "
                f"({entry.dtype}, {list(entry.shape)}): download the checkpoint again."
            )
        scales_of[entry.name] = scales
    if not scales_of:
        raise BrocaError(f"{source} has no {form.kind} tensor, so there is nothing to dequantise.")
    used = {scales.name for scales in scales_of.values()}
    shards: dict[str, list[_NewTensor]] = {}
    for entry in sorted(entries.values(), key=lambda e: (e.file.name, e.begin)):
        if entry.name in used:
            continue
        scales_entry = scales_of.get(entry.name)
        name, shape = (entry.name, entry.shape) if scales_entry is None else form.result(entry)
        shards.setdefault(entry.file.name, []).append(_NewTensor(name, shape, entry, scales_entry))
    return shards


def _indexes(source: Path, shards: Mapping[str, list[_NewTensor]]) -> dict[Path, bytes]:
    """The indexes of the source, without the scales and with the new size."""
    kept = {tensor.name: name for name, tensors in shards.items() for tensor in tensors}
    size = sum(tensor.size for tensors in shards.values() for tensor in tensors)
    indexes = {}
    for path in source.glob("*.safetensors.index.json"):
        content = json.loads(path.read_bytes())
        content["weight_map"] = dict(sorted(kept.items()))
        content["metadata"] = {**(content.get("metadata") or {}), "total_size": size}
        indexes[path.relative_to(source)] = (json.dumps(content, indent=2) + "\n").encode()
    return indexes


def _contents(tensor: _NewTensor, form: Fp8Tiles | Mxfp4) -> Iterator[memoryview | bytes]:
    """The bytes of a new tensor, in order."""
    entry = tensor.entry
    if tensor.scales is not None:
        for chunk in form.chunks(entry, tensor.scales):
            if not bool(torch.isfinite(chunk).all()):
                raise BrocaError(f"tensor {entry.name} is not finite: download the checkpoint again.")
            yield chunk.contiguous().view(torch.uint8).numpy().reshape(-1).data
        return
    with entry.file.open("rb") as reader:
        reader.seek(entry.begin)
        left = entry.end - entry.begin
        while left:
            content = reader.read(min(left, _COPIED_BYTES))
            if not content:
                raise BrocaError(
                    f"{entry.file} ends inside tensor {entry.name}: download the checkpoint again."
                )
            yield content
            left -= len(content)
