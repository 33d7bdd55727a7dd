"""A checkpoint directory copied with some tensors' bytes replaced: all of it is there afterwards, or nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save

from editing.checkpoints.file_copy import copies
from editing.checkpoints.staging import check_room, check_target, place_apart, staging
from editing.plans.rounding import EditedChunk, all_finite, round_once
from neurons.architectures.quantisation import is_quantised, quantised_remedy
from neurons.errors import BrocaError
from neurons.files.tensor_files import READABLE_DTYPES, TensorEntry, read_tensor, tensor_entries, weight_files

Replacement = Callable[[torch.Tensor, int], torch.Tensor | EditedChunk]
Progress = Callable[[int, int], None]

BLOCK_BYTES = 2**18  # larger ones leave the processor's cache, and fresh pages are dear

_NOT_COPIED = {".git", ".cache"}
_ROUNDED_AT_ONCE = 1 << 20
_SINGLE, _INDEX_ENDING = "model.safetensors", ".safetensors.index.json"
# Readers of GGUF converters' kind look for files that begin with "model".
_ADDED = "model-added.safetensors"
_FIRST_OF_TWO, _SECOND_OF_TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@dataclass(frozen=True)
class Additions:
    """What a checkpoint's files become when tensors are added to it; paths relative to the checkpoint.

    Attributes:
        renamed: file of the source -> its name in the copy: ``model.safetensors`` would hide an index.
        files: content of the new shard and of the index.
    """

    renamed: dict[str, str]
    files: dict[str, bytes]


def write_checkpoint(
    source: Path,
    target: Path,
    replacements: Mapping[str, Replacement],
    extra_files: Mapping[str, bytes],
    *,
    added: Mapping[str, torch.Tensor] | None = None,
    left_out: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
    complete: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    block_bytes: int = BLOCK_BYTES,
    progress: Progress | None = None,
) -> None:
    """Copy ``source`` to ``target`` with the named tensors' values replaced; ``source`` is only read.

    Everything is written beside the target and renamed into place at the end, so that a failure, an
    interrupt or a kill leaves what was there before.  Links are followed: the copy holds only regular
    files.  Directories called ``.git`` and ``.cache`` are left out.

    Args:
        source: checkpoint directory with safetensors weights (stored as F32, F16, BF16 or F64).
        target: directory to make; missing parents are made too.
        replacements: by tensor name, a function of (a block of whole rows ``[n, ...]`` in the stored
            dtype, index of its first row) that gives the new block, same shape: float32 or float64,
            which is rounded once, to nearest even, to the stored dtype, or an ``EditedChunk`` that is
            rounded already.  A tensor without dimensions comes as one block of shape ``[]``.
        extra_files: content by path relative to ``target``; it takes the place of a copied file.
        added: small tensors that the source lacks, in a shard of their own (see ``additions``).
        left_out: files of the source that the copy shall not have.
        renamed: file of the source -> its path in the copy.
        complete: called with the directory when all is in it and before it takes its place; it may add
            files, and what it raises stops the run.
        overwrite: replace a target that is a checkpoint (has a ``config.json``).
        block_bytes: stored bytes per block; a single row larger than this is one block.
        progress: called with (bytes done, bytes in all) after each block, from several threads, never at once.

    Raises:
        BrocaError: before anything is written, if the target may not be replaced or lies in the source
            (or the other way round), the source is quantised or damaged, a name is unknown or, of an
            added tensor, there already, or there is no room or no permission; later, if a new block is
            not finite, has another shape or less than float32 precision, or the disk fails.
    """
    target = place_apart(source, target)
    entries = tensor_entries(source)
    _check_source(source, entries, replacements)
    found = additions(source, added or {})
    placed = {Path(old): Path(new) for old, new in {**found.renamed, **(renamed or {})}.items()}
    directories, sizes = _tree(source, target)
    extras = _checked_extras(source, extra_files)
    extras |= {Path(name): content for name, content in found.files.items()}
    check_target(target, overwrite)
    dropped = {*extras, *map(Path, left_out)}
    copied = {path: size for path, size in sizes.items() if path not in dropped}
    directories = _still_needed(directories, sizes.keys(), copied.keys())
    check_room(target, sum(copied.values()) + sum(map(len, extras.values())))

    edited = sorted((entries[name] for name in replacements), key=lambda e: (e.file, e.begin))
    total = sum(copied.values()) + sum(e.end - e.begin for e in edited)
    done = 0
    lock = threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None and count:
                progress(done, total)

    with staging(target, overwrite) as staged:
        for directory in directories:
            (staged / directory).mkdir()
        # Unchanged bytes are copied, and finished files put on the disk, while changed ones are computed.
        with copies(advance) as under_way:
            own = {path: [entry for entry in edited if entry.file == source / path] for path in copied}
            for path, changed in own.items():
                spans = [(entry.begin, entry.end) for entry in changed if entry.begin < entry.end]
                under_way.begin(source / path, staged / placed.get(path, path), spans)
            with _workers() as pool:
                patches = {
                    path: [
                        pool.submit(
                            _patch,
                            entry,
                            replacements[entry.name],
                            staged / placed.get(path, path),
                            block_bytes,
                            advance,
                        )
                        for entry in changed
                    ]
                    for path, changed in own.items()
                }
                for path, under_work in patches.items():
                    for patch in under_work:
                        patch.result()
                        under_way.check()
                    under_way.written(staged / placed.get(path, path))
        for path, content in extras.items():
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            (staged / path).write_bytes(content)
        if complete is not None:
            complete(staged)


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that compute a tensor each, on one core each: blocks are too small to be shared by cores.

    Where one fails or the user stops, the tensors under work are the last.
    """
    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
    stopped = True
    try:
        yield pool
        stopped = False
    finally:
        pool.shutdown(wait=True, cancel_futures=stopped)
        torch.set_num_threads(cores)


def blocks(entry: TensorEntry, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, slice | None]]:
    """(index of the first row, rows to read) of the blocks in which a tensor is worked on, in order.

    Args:
        entry: the tensor; one without dimensions is one block, read whole.
        block_bytes: stored bytes per block; a single row larger than this is one block.
    """
    if entry.begin == entry.end:
        return
    if not entry.shape:
        yield 0, None
        return
    step = max(1, block_bytes // ((entry.end - entry.begin) // entry.shape[0]))
    for first in range(0, entry.shape[0], step):
        yield first, slice(first, first + step)


def _largest_block(entry: TensorEntry, block_bytes: int) -> int:
    """Bytes of the largest of ``blocks``."""
    size = entry.end - entry.begin
    row = size // entry.shape[0] if entry.shape and entry.shape[0] else size
    return min(size, max(block_bytes, row))


def additions(source: Path, added: Mapping[str, torch.Tensor]) -> Additions:
    """How the files of a checkpoint change when tensors are added to it.

    The new tensors get a shard of their own, and the index names them.  A checkpoint of one file becomes
    one of two shards; shards that are there keep their names.

    Raises:
        BrocaError: a tensor that is there already, of a dtype that cannot be stored, not finite, or a
            file that is in the way.
    """
    if not added:
        return Additions({}, {})
    entries = tensor_entries(source)
    for name, tensor in added.items():
        if name in entries:
            raise BrocaError(f"{source} has a tensor {name} already: replace it instead of adding it.")
        if tensor.dtype not in READABLE_DTYPES.values() or not bool(torch.isfinite(tensor).all()):
            raise BrocaError(
                f"the new tensor {name} is {tensor.dtype} or not finite: give finite numbers in one of "
                f"{', '.join(READABLE_DTYPES)}."
            )
    files = {file.name for file in weight_files(source)}
    single = files == {_SINGLE}
    shard = _SECOND_OF_TWO if single else _ADDED
    renamed = {_SINGLE: _FIRST_OF_TWO} if single else {}
    for name in (shard, *renamed.values()):
        if (source / name).exists():
            raise BrocaError(f"{source / name} is in the way of the tensors to add: remove or rename it.")
    index, content = _index(source, single)
    sizes = [entry.end - entry.begin for entry in entries.values()]
    metadata = content.get("metadata") if isinstance(content.get("metadata"), dict) else {}
    total = (metadata or {}).get("total_size", sum(sizes))
    new = sum(tensor.numel() * tensor.element_size() for tensor in added.values())
    weight_map = {name: renamed.get(entry.file.name, entry.file.name) for name, entry in entries.items()}
    document = {
        **content,
        "metadata": {**(metadata or {}), "total_size": total + new},
        "weight_map": dict(sorted({**weight_map, **dict.fromkeys(added, shard)}.items())),
    }
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(added.items())}
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    return Additions(renamed, {shard: save(stored, metadata={"format": "pt"}), index: text.encode()})


def _index(source: Path, single: bool) -> tuple[str, dict[str, Any]]:
    """Name and content of the index in use; of the usual one to make where there is none."""
    usual = f"model{_INDEX_ENDING}"
    found = sorted(file.name for file in source.iterdir() if file.name.endswith(_INDEX_ENDING))
    if single or not found:
        return usual, {}
    name = usual if usual in found else found[0]
    return name, json.loads((source / name).read_bytes())


def _check_source(source: Path, entries: Mapping[str, TensorEntry], names: Mapping[str, Replacement]) -> None:
    config = source / "config.json"
    try:
        settings = json.loads(config.read_bytes()) if config.exists() else {}
    except (ValueError, RecursionError) as error:
        raise BrocaError(f"{config} is not valid JSON ({error}): download it again.") from error
    if is_quantised(settings):
        raise BrocaError(
            f"{source} is quantised (quantization_config in config.json), and its stored numbers are not its "
            f"weights: {quantised_remedy(settings)}."
        )
    for name in names:
        if name not in entries:
            raise BrocaError(
                f"{source} has no tensor {name} to replace: the edit was made for another model."
            )
        if entries[name].dtype not in READABLE_DTYPES:
            raise BrocaError(
                f"tensor {name} is stored as {entries[name].dtype}, and only {', '.join(READABLE_DTYPES)} "
                "can be edited: start from an unquantised checkpoint."
            )


def _still_needed(directories: list[Path], before: Collection[Path], after: Collection[Path]) -> list[Path]:
    """The directories without those that lose all their files."""

    def filled(directory: Path, files: Collection[Path]) -> bool:
        return any(directory in file.parents for file in files)

    return [folder for folder in directories if filled(folder, after) or not filled(folder, before)]


def _tree(source: Path, target: Path) -> tuple[list[Path], dict[Path, int]]:
    """Directories (each after its parent) and sizes of the files in bytes; paths relative to the source."""
    directories: list[Path] = []
    sizes: dict[Path, int] = {}

    def walk(directory: Path, above: frozenset[Path]) -> None:
        here = directory.resolve()
        if here in above:
            raise BrocaError(f"{directory} is a link to a directory that holds it: remove the link.")
        for item in sorted(directory.iterdir()):
            inside = item.relative_to(source)
            if item.is_dir():
                if item.name not in _NOT_COPIED:
                    directories.append(inside)
                    walk(item, above | {here})
            elif not item.is_file():
                fault = "is a link to a file that is gone" if item.is_symlink() else "is not a regular file"
                raise BrocaError(f"{item} {fault}: mend or remove it, then run again.")
            elif item.resolve().is_relative_to(target):
                # Replacing the target would leave the source with a link that leads nowhere.
                raise BrocaError(f"{item} is a link into {target}: write to another directory.")
            else:
                sizes[inside] = item.stat().st_size

    walk(source, frozenset())
    return directories, sizes


def _checked_extras(source: Path, extra_files: Mapping[str, bytes]) -> dict[Path, bytes]:
    weights = set(weight_files(source))
    extras = {}
    for name, content in extra_files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or not path.parts or ".." in path.parts:
            raise BrocaError(
                f"the extra file {name!r} is not a path inside the checkpoint: make it relative."
            )
        if source / path in weights:
            raise BrocaError(f"the extra file {name} would replace weights: give it another name.")
        extras[Path(path)] = content
    return extras


def _patch(
    entry: TensorEntry, replace: Replacement, file: Path, block_bytes: int, advance: Callable[[int], None]
) -> None:
    with file.open("r+b") as stream:
        stream.seek(entry.begin)
        room = torch.empty(_largest_block(entry, block_bytes), dtype=torch.uint8)
        for first, rows in blocks(entry, block_bytes):
            block = read_tensor(entry, rows, room)
            new = _stored(entry, block, replace(block, first))
            stream.write(new.view(torch.uint8).numpy().data)
            advance(new.nbytes)


def _stored(entry: TensorEntry, block: torch.Tensor, given: torch.Tensor | EditedChunk) -> torch.Tensor:
    """The checked result, rounded to the stored dtype, as one flat tensor."""
    result = given.stored if isinstance(given, EditedChunk) else given
    if result.shape != block.shape:
        raise BrocaError(
            f"the new values of tensor {entry.name} have shape {list(result.shape)} and not {list(block.shape)}: "
            "the edit does not fit this model."
        )
    if isinstance(given, EditedChunk):
        return _finite(entry, result.contiguous().reshape(-1))
    if result.dtype not in (torch.float32, torch.float64):
        raise BrocaError(
            f"the new values of tensor {entry.name} are {result.dtype}, which rounds before the one rounding "
            "there should be: compute them in float32 or float64."
        )
    flat = result.detach().cpu().reshape(-1)
    new = torch.empty(flat.numel(), dtype=block.dtype)
    for first in range(0, flat.numel(), _ROUNDED_AT_ONCE):
        piece = slice(first, first + _ROUNDED_AT_ONCE)
        new[piece] = round_once(flat[piece], block.dtype)
        _finite(entry, new[piece])
    return new


def _finite(entry: TensorEntry, new: torch.Tensor) -> torch.Tensor:
    """The values, looked at after rounding: a finite number may be too large for the stored dtype."""
    if not all_finite(new):
        raise BrocaError(
            f"the new values of tensor {entry.name} are not all finite in {entry.dtype}: "
            "use a weaker edit, or start from a checkpoint stored in a wider dtype."
        )
    return new
