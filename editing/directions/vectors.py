"""Steering vectors from files of other tools, as ``{layer: [d]}``.

    .gguf          repeng's and llama.cpp's control vectors: architecture "controlvector", tensors ``direction.N``
    .safetensors   tensors ``direction.N`` or ``N``; or a direction of Broca
    .pt, .pth      a tensor [d] or [L, d], or a dictionary of layer -> [d]; nothing that runs code is read
    .npy           [d] or [L, d]

Layer N is the N-th decoder layer, counted from 0, and its vector is added to that layer's output, as repeng trains
(``hidden_states[N + 1]``) and adds it, and as llama.cpp adds ``direction.N`` after its layer N.  Neither writes
layer 0 by default, and llama.cpp skips it.  Row i of an [L, d] array is layer i; rows of zeros are layers without a
vector.  Arrays over ``hidden_states``, in which 0 is the embeddings, have L + 1 rows and are rejected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from editing.directions.control_vectors import read_control_vectors
from editing.directions.direction import load_direction
from neurons.errors import BrocaError, UsageError, first_line
from neurons.models.source import ModelSource

_LAYER = re.compile(r"(?:direction\.)?(\d+)")

Vectors = torch.Tensor | Mapping[Any, torch.Tensor]


def read_vectors(
    path: Path, source: ModelSource, layers: Sequence[int] | None = None, site: str = "block_out"
) -> dict[int, torch.Tensor]:
    """The vectors of a file, for a model.

    Args:
        path: the file; its suffix gives the format.
        source: the model.
        layers: layers of the file to read; None reads all.  A file with one vector and no layer needs exactly
            one.
        site: the vectors to read from a direction of Broca.

    Returns:
        layer -> float64 [d], ascending, with the length in the file.

    Raises:
        UsageError: an unknown suffix, a layer that is missing or that the model does not have, or vectors of another
            size than the model's residual.
        BrocaError: no such file, or a damaged or unsuitable file.
    """
    readers: dict[str, Callable[[Path], Vectors]] = {
        ".gguf": read_control_vectors,
        ".safetensors": _read_safetensors,
        ".pt": _read_torch,
        ".pth": _read_torch,
        ".npy": _read_numpy,
    }
    if path.suffix not in readers:
        raise UsageError(
            f"{path}: vectors are read from {', '.join(readers)}: convert the file to one of these"
        )
    if not path.is_file():
        raise BrocaError(f"{path}: there is no such file")
    if path.suffix == ".safetensors" and _is_ours(path):
        return _checked(path, _of_direction(path, source, site), source, layers)
    return _checked(path, readers[path.suffix](path), source, layers)


def _checked(
    path: Path, content: Vectors, source: ModelSource, layers: Sequence[int] | None
) -> dict[int, torch.Tensor]:
    """The requested vectors by layer, after checks of their shapes."""
    depth, width = source.anatomy.layers, source.anatomy.residual
    vectors = _by_layer(path, content, depth, layers)
    for layer, vector in vectors.items():
        if vector.shape != (width,):
            raise UsageError(
                f"{path}: its vector for layer {layer} has shape {list(vector.shape)} where the model's residual "
                f"has {width} dimensions: it was made for another model"
            )
        if vector.is_complex() or not bool(torch.isfinite(vector).all()):
            raise BrocaError(f"{path}: its vector for layer {layer} is not finite: make it again")
    beyond = [layer for layer in vectors if not 0 <= layer < depth]
    if beyond:
        raise UsageError(
            f"{path}: has a vector for layer {beyond[0]} where the model has layers 0-{depth - 1}: it was made "
            "for another model"
        )
    return {layer: vectors[layer].double() for layer in sorted(vectors) if bool(vectors[layer].any())}


def _by_layer(
    path: Path, content: Vectors, depth: int, layers: Sequence[int] | None
) -> dict[int, torch.Tensor]:
    if isinstance(content, torch.Tensor):
        if content.ndim == 1:
            if layers is None or len(layers) != 1:
                raise UsageError(f"{path}: holds one vector and no layer: give its layer")
            return {layers[0]: content}
        if content.ndim != 2 or len(content) != depth:
            raise UsageError(
                f"{path}: holds an array of shape {list(content.shape)} where one vector [d], or one for each of the "
                f"model's {depth} layers, is needed"
            )
        content = {layer: row for layer, row in enumerate(content) if bool(row.any())}
    vectors = {_layer_of(path, name): vector for name, vector in content.items()}
    if not vectors or not any(bool(vector.any()) for vector in vectors.values()):
        raise BrocaError(f"{path}: holds no vector, or only zeros")
    if layers is None:
        return vectors
    missing = [layer for layer in layers if layer not in vectors]
    if missing:
        raise UsageError(
            f"{path}: has no vector for layer {missing[0]}: it has layers {', '.join(map(str, sorted(vectors)))}"
        )
    return {layer: vectors[layer] for layer in layers}


def _layer_of(path: Path, name: Any) -> int:
    if isinstance(name, int):
        return name
    matched = _LAYER.fullmatch(str(name))
    if matched is None:
        raise BrocaError(f"{path}: {str(name)!r} names no layer: call the tensors direction.N, N the layer")
    return int(matched[1])


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(str(path), framework="pt") as stream:
            return "broca" in (stream.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise BrocaError(f"{path}: not a readable .safetensors file ({first_line(error)})") from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(str(path), framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BrocaError(f"{path}: not a readable .safetensors file ({first_line(error)})") from error


def _of_direction(path: Path, source: ModelSource, site: str) -> torch.Tensor:
    direction = load_direction(path)
    direction.require_model(source)
    if site not in direction.vectors:
        raise UsageError(f"{path}: has no vectors at {site}: it has {', '.join(direction.vectors)}")
    return direction.vectors[site]


def _read_torch(path: Path) -> Vectors:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load raises many types for damaged files.
    except Exception as error:
        raise BrocaError(
            f"{path}: cannot be read without running code from it: save a tensor, or a dictionary of layer -> "
            "tensor, with torch.save"
        ) from error
    values = content.values() if isinstance(content, dict) else [content]
    if not all(isinstance(value, torch.Tensor) for value in values):
        raise BrocaError(
            f"{path}: holds a {type(content).__name__} of something other than tensors: save a tensor, or a "
            "dictionary of layer -> tensor, with torch.save"
        )
    result: Vectors = content
    return result


def _read_numpy(path: Path) -> torch.Tensor:
    try:
        content = np.load(path, allow_pickle=False)
        if content.dtype.kind not in "fiu":
            raise TypeError(f"numbers of kind {content.dtype}")
        return torch.from_numpy(content.astype(np.float64))
    except (ValueError, OSError, EOFError, TypeError, AttributeError) as error:
        raise BrocaError(f"{path}: not a readable .npy file of numbers ({first_line(error)})") from error
