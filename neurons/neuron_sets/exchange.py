"""Import and export of other projects' files: language masks and activation counts of the LAPE family.

Masks (arXiv 2402.16438, RUCAIBox/Language-Specific-Neurons): a list of K languages, each a list of L layers,
each a sorted int64 tensor of neuron indices; the languages have no names.  Counts, a file for each language:
``{"n": int, "over_zero": integers [L, I]}`` there, ``total_tokens`` for ``n`` in
NJUNLP/Language-Neurons-Alignment.  Only plain tensors and numbers are read: no code in a file ever runs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from neurons.errors import BrocaError, UsageError, first_line
from neurons.files.artifact import write_atomically
from neurons.neuron_sets.neuron_set import NeuronSet, neuron_set
from neurons.statistics.statistics import Statistics

MOMENT = "mlp_act:positive"
TOKEN_NAMES = ("n", "total_tokens")


def is_torch_file(path: Path) -> bool:
    """Whether a file starts like one of ``torch.save``: a zip archive, or the older pickle.

    Raises:
        BrocaError: no such file.
    """
    if not path.is_file():
        raise BrocaError(f"{path}: there is no such file")
    with path.open("rb") as stream:
        start = stream.read(9)
    # The ninth byte of a safetensors file opens its JSON header, after 8 bytes of its length.
    return start[8:] != b"{" and (start.startswith(b"PK") or start.startswith(b"\x80"))


def load_torch_file(path: Path) -> tuple[Any, str]:
    """The content of a file of ``torch.save``, of plain tensors and numbers, and its sha256; no code in it runs.

    Raises:
        BrocaError: no such file, a damaged one, or one of other objects.
    """
    if not path.is_file():
        raise BrocaError(f"{path}: there is no such file")
    data = path.read_bytes()
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        # torch.load raises many types, from a cut archive to a pickle that wants to run code.
        raise BrocaError(
            f"{path}: not a torch file of plain tensors, or damaged; nothing in it was run "
            f"({type(error).__name__}: {first_line(error)[:120]})"
        ) from error
    return content, hashlib.sha256(data).hexdigest()


def read_masks(path: Path, languages: Sequence[str], width: int) -> NeuronSet:
    """A published mask file as a neuron set.

    Args:
        path: the file, list[K] of list[L] of integer tensors [n]; an empty tensor may be of any dtype,
            as ``torch.tensor([])`` is a float.
        languages: names of the K languages, in the file's order.
        width: neurons I a layer, which the file does not hold.

    Returns:
        The set, with all scores 0 (the file has none) and without a fingerprint: it fits any model.

    Raises:
        BrocaError: no such file, or not a mask file.
        UsageError: another number of languages or neurons than given, or bad names.
    """
    if width < 1:
        raise UsageError(f"the width is {width}, but a layer has at least one neuron")
    _require_names(languages)
    content, digest = load_torch_file(path)
    shape = "a mask file is a list of languages, each a list of layers, each a tensor of neuron indices"
    if not _is_list(content) or not content or not all(_is_list(of_layers) for of_layers in content):
        raise BrocaError(f"{path}: {shape}, but this is {_what(content)}")
    if len(content) != len(languages):
        raise UsageError(
            f"{path}: the file has {len(content)} languages, but {len(languages)} names are given "
            f"({', '.join(languages)})"
        )
    depths = {len(of_layers) for of_layers in content}
    if len(depths) > 1 or 0 in depths:
        depth_of_each = ", ".join(f"{k} {len(rows)}" for k, rows in zip(languages, content, strict=True))
        raise BrocaError(f"{path}: the languages differ in their number of layers ({depth_of_each})")
    depth = depths.pop()
    members = {
        language: torch.cat(
            [
                _rows(layer, indices, width, f"{path}: language {language!r}, layer {layer}", shape)
                for layer, indices in enumerate(of_layers)
            ]
        )
        for language, of_layers in zip(languages, content, strict=True)
    }
    return neuron_set(
        members,
        {language: torch.zeros(len(rows), dtype=torch.float64) for language, rows in members.items()},
        depth,
        width,
        {"method": "foreign masks", "file": path.name, "sha256": digest},
    )


def write_masks(neurons: NeuronSet, path: Path) -> None:
    """Write a neuron set as a mask file, without scores, kinds and names of languages.

    The languages are in the order of ``neurons.languages``; a language without neurons has L empty tensors.
    A neuron of an expert is written by its number in the layer, e * (I / E) + j.

    Raises:
        UsageError: a set of heads.
    """
    if neurons.unit != "neuron":
        raise UsageError(
            f"published masks are of neurons, and the set is of {neurons.unit}s: it has no mask file"
        )
    masks = [neurons.by_layer(language) for language in neurons.languages]
    stream = io.BytesIO()
    torch.save(masks, stream)
    write_atomically(path, stream.getvalue())


def read_counts(paths: Mapping[str, Path]) -> Statistics:
    """Published activation counts, one file for each language, as statistics.

    Args:
        paths: language -> file, a dictionary of ``n`` or ``total_tokens`` (int) and ``over_zero``
            [L, I].  Floats are accepted if they are whole and below the size from which their dtype
            skips integers (2^24 for float32): larger sums have lost counts.

    Returns:
        Statistics with ``mlp_act:positive``; the unknown texts are 0 and the fingerprint is "".

    Raises:
        BrocaError: no such file, not a count file, or impossible counts.
        UsageError: no languages, bad names, or files of different shapes.
    """
    _require_names(list(paths))
    counts: list[torch.Tensor] = []
    tokens: list[int] = []
    digests: dict[str, str] = {}
    for language, path in paths.items():
        content, digests[language] = load_torch_file(path)
        count, seen = _counts(path, content)
        if counts and count.shape != counts[0].shape:
            other = next(iter(paths))
            raise UsageError(
                f"{path}: counts of {_by(count)} neurons for {language!r}, but {_by(counts[0])} for {other!r}"
            )
        counts.append(count)
        tokens.append(seen)
    return Statistics(
        languages=tuple(paths),
        tokens=torch.tensor(tokens, dtype=torch.int64),
        texts=torch.zeros(len(paths), dtype=torch.int64),
        moments={MOMENT: torch.stack(counts, dim=-1)},
        fingerprint="",
        metadata={
            "method": "foreign counts",
            "files": digests,
            # These let ``merge`` detect the same file twice.
            "corpora": [{"digest": digest, "language": k} for k, digest in digests.items()],
        },
    )


def _rows(layer: int, indices: Any, width: int, where: str, shape: str) -> torch.Tensor:
    """One layer's indices as rows (layer, neuron)."""
    if not _is_dense(indices) or indices.dim() != 1:
        raise BrocaError(f"{where}: {shape}, but this is {_what(indices)}")
    if len(indices) == 0:
        return torch.zeros(0, 2, dtype=torch.int64)
    if not _is_integer(indices):
        raise BrocaError(f"{where}: neuron indices are integers, but these are {_dtype(indices)}")
    if len(indices) > width:
        raise UsageError(f"{where}: {len(indices)} neurons, but a layer has {width} (--width)")
    neurons = indices.to(torch.int64)
    low, high = int(neurons.min()), int(neurons.max())
    if low < 0:
        raise BrocaError(f"{where}: neuron {low} is negative")
    if high >= width:
        raise UsageError(f"{where}: neuron {high} is outside a layer of {width} neurons (--width)")
    unique, counts = neurons.unique(return_counts=True)
    if len(unique) != len(neurons):
        raise BrocaError(f"{where}: neuron {int(unique[counts > 1][0])} is named twice")
    return torch.stack([torch.full_like(unique, layer), unique], dim=1)


def _counts(path: Path, content: Any) -> tuple[torch.Tensor, int]:
    """int64 [L, I] and the number of tokens."""
    if not isinstance(content, dict):
        raise BrocaError(f"{path}: a count file is a dictionary, but this is {_what(content)}")
    given = {name: content[name] for name in TOKEN_NAMES if name in content}
    if not given or "over_zero" not in content:
        raise BrocaError(
            f"{path}: a count file has over_zero and n or total_tokens, but this has "
            f"{', '.join(map(str, list(content)[:10])) or 'nothing'}"
        )
    tokens = {name: _whole_number(path, name, value) for name, value in given.items()}
    if len(set(tokens.values())) > 1:
        raise BrocaError(f"{path}: n is {tokens['n']}, but total_tokens is {tokens['total_tokens']}")
    seen = next(iter(tokens.values()))
    if seen < 1:
        raise BrocaError(f"{path}: counted over {seen} tokens, but at least one is needed")
    count = content["over_zero"]
    if not _is_dense(count) or count.dim() != 2 or count.numel() == 0:
        raise BrocaError(f"{path}: over_zero is a tensor of layers x neurons, but this is {_what(count)}")
    count = _whole(path, count)
    for wrong, what in ((count < 0, "is negative"), (count > seen, f"is more than its {seen} tokens")):
        if bool(wrong.any()):
            layer, neuron = wrong.nonzero()[0].tolist()
            value = int(count[layer, neuron])
            raise BrocaError(f"{path}: the count {value} of neuron {neuron} in layer {layer} {what}")
    return count, seen


def _whole(path: Path, count: torch.Tensor) -> torch.Tensor:
    """Counts as int64, exactly."""
    if _is_integer(count):
        return count.to(torch.int64)
    if not count.is_floating_point():
        raise BrocaError(f"{path}: over_zero holds {_dtype(count)}, but counts are integers")
    wrong = ~torch.isfinite(count) | (count != count.round())
    if bool(wrong.any()):
        layer, neuron = wrong.nonzero()[0].tolist()
        value = float(count[layer, neuron])
        raise BrocaError(
            f"{path}: the count {value} of neuron {neuron} in layer {layer} is not a whole number"
        )
    exact = int(2 / torch.finfo(count.dtype).eps)
    if float(count.max()) >= exact:
        raise BrocaError(
            f"{path}: over_zero is {_dtype(count)}, which skips integers from {exact} on, and has larger "
            "counts, so some may be lost: count again in integers"
        )
    return count.to(torch.int64)


def _whole_number(path: Path, name: str, value: Any) -> int:
    if _is_dense(value) and value.numel() == 1 and _is_integer(value):
        value = value.item()
    if not isinstance(value, int) or isinstance(value, bool):
        raise BrocaError(f"{path}: {name} is a number of tokens, but this is {_what(value)}")
    return value


def _require_names(languages: Sequence[str]) -> None:
    if not languages:
        raise UsageError("no language is named")
    for language in languages:
        if not language:
            raise UsageError("a language has an empty name")
        if list(languages).count(language) > 1:
            raise UsageError(f"language {language!r} is named twice")


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_dense(value: Any) -> bool:
    """Whether it is a dense CPU tensor: not sparse, quantised or on the meta device."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _is_integer(values: torch.Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _dtype(values: torch.Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _by(values: torch.Tensor) -> str:
    return " x ".join(map(str, values.shape))


def _what(value: Any) -> str:
    """A short description of a value."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {_dtype(value)}"
    if isinstance(value, dict):
        return f"a dictionary of {', '.join(map(str, list(value)[:5])) or 'nothing'}"
    if isinstance(value, list | tuple):
        kinds = ", ".join(sorted({type(item).__name__ for item in value})) or "nothing"
        return f"a list of {len(value)} ({kinds})"
    return f"{type(value).__name__} {value!r}"[:80]
