"""Copy a checkpoint directory with the values of some tensors replaced, atomically."""

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

CHUNK_BYTES = 2**18  # larger chunks do not fit in the cache, and new memory pages are slow

_NOT_COPIED = {".git", ".cache"}
_ROUNDED_AT_ONCE = 1 << 20
_SINGLE, _INDEX_ENDING = "model.safetensors", ".safetensors.index.json"
# GGUF converters read files whose names begin with "model".
_ADDED = "model-added.safetensors"
_FIRST_OF_TWO, _SECOND_OF_TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@dataclass(frozen=True)
class Additions:
    """Changes of a checkpoint's files that add tensors; paths relative to the checkpoint.

    Attributes:
        renamed: file of the source -> its name in the copy; ``model.safetensors`` would hide an index.
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
    quantised: bool = False,
    complete: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
) -> None:
    """Copy ``source`` to ``target`` with the named tensors' values replaced; ``source`` is only read.

    Everything is written beside the target and renamed at the end, so that a failure, an interrupt or a kill
    leaves the previous state.  Links are followed: the copy has only regular files.  Directories named ``.git``
    and ``.cache`` are skipped.

    Args:
        source: checkpoint directory with safetensors weights (stored as F32, F16, BF16 or F64).
        target: directory to create, with missing parents.
        replacements: by tensor name, a function of (a chunk of whole rows ``[n, ...]`` in the stored dtype,
            index of its first row) that returns the new chunk of the same shape: float32 or float64, which
            is rounded once, to nearest even, to the stored dtype, or a rounded ``EditedChunk``.  A tensor
            without dimensions is one chunk of shape ``[]``.
        extra_files: content by path relative to ``target``; replaces copied files.
        added: small tensors that are not in the source, in a new shard (see ``additions``).
        left_out: files of the source to skip.
        renamed: file of the source -> its path in the copy.
        quantised: accept a quantised source, of which ``complete`` may change the quantised tensors.
        complete: called with the full directory before it is renamed; it may add files, and its errors
            stop the run.
        overwrite: replace a target that is a checkpoint (has a ``config.json``).
        chunk_bytes: stored bytes of a chunk; a larger row is one chunk.
        progress: called with (bytes done, bytes in all) after each chunk, from several threads, one at a time.

    Raises:
        BrocaError: before any write, if the target may not be replaced or is inside the source (or the
            reverse), the source is quantised or damaged, a path leaves the target, a name is unknown or, for an
            added tensor, already present, or space or permissions are missing; later, if a new chunk is not finite, has another
            shape or less than float32 precision, or the disk fails.
    """
    target = place_apart(source, target)
    entries = tensor_entries(source)
    _check_source(source, entries, replacements, quantised)
    extra_shard = additions(source, added or {})
    placed = {Path(old): _inside(new) for old, new in {**extra_shard.renamed, **(renamed or {})}.items()}
    directories, sizes = checkpoint_tree(source, target)
    extras = _checked_extras(source, extra_files)
    extras |= {Path(name): content for name, content in extra_shard.files.items()}
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
        # Unchanged bytes are copied, and finished files synced, while changed tensors are computed.
        with copies(advance) as under_way:
            by_file = {path: [entry for entry in edited if entry.file == source / path] for path in copied}
            for path, changed in by_file.items():
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
                            chunk_bytes,
                            advance,
                        )
                        for entry in changed
                    ]
                    for path, changed in by_file.items()
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
    """Threads that each compute a tensor on one core: chunks are too small for several cores.

    After an error or an interrupt no further tensor is started.
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


def chunks(entry: TensorEntry, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, slice | None]]:
    """(index of the first row, rows to read) of the chunks of a tensor, in order.

    Args:
        entry: the tensor; one without dimensions is a single chunk.
        chunk_bytes: stored bytes of a chunk; a larger row is one chunk.
    """
    if entry.begin == entry.end:
        return
    if not entry.shape:
        yield 0, None
        return
    step = max(1, chunk_bytes // ((entry.end - entry.begin) // entry.shape[0]))
    for first in range(0, entry.shape[0], step):
        yield first, slice(first, first + step)


def _largest_chunk(entry: TensorEntry, chunk_bytes: int) -> int:
    """Bytes of the largest of ``chunks``."""
    size = entry.end - entry.begin
    row = size // entry.shape[0] if entry.shape and entry.shape[0] else size
    return min(size, max(chunk_bytes, row))


def additions(source: Path, added: Mapping[str, torch.Tensor]) -> Additions:
    """The changes of a checkpoint's files that add tensors.

    The new tensors get their own shard, and the index lists them.  A checkpoint of one file becomes two
    shards; existing shards keep their names.

    Raises:
        BrocaError: a tensor that exists, is not finite or has a dtype that cannot be stored, or a file with
            the name of the shard.
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
    """Name and content of the index; the usual name and {} without one."""
    usual = f"model{_INDEX_ENDING}"
    indexes = sorted(file.name for file in source.iterdir() if file.name.endswith(_INDEX_ENDING))
    if single or not indexes:
        return usual, {}
    name = usual if usual in indexes else indexes[0]
    return name, json.loads((source / name).read_bytes())


def _check_source(
    source: Path, entries: Mapping[str, TensorEntry], names: Mapping[str, Replacement], quantised: bool
) -> None:
    config = source / "config.json"
    try:
        settings = json.loads(config.read_bytes()) if config.exists() else {}
    except (ValueError, RecursionError) as error:
        raise BrocaError(f"{config} is not valid JSON ({error}): download it again.") from error
    if is_quantised(settings) and not quantised:
        raise BrocaError(
            f"{source} is quantised (quantization_config in config.json), so its stored numbers are not its "
            f"weights: {quantised_remedy(settings)}."
        )
    for name in names:
        if name not in entries:
            raise BrocaError(f"{source} has no tensor {name}: the edit was made for another model.")
        if entries[name].dtype not in READABLE_DTYPES:
            raise BrocaError(
                f"tensor {name} is stored as {entries[name].dtype}, but only {', '.join(READABLE_DTYPES)} "
                "can be edited: use an unquantised checkpoint."
            )


def _still_needed(directories: list[Path], before: Collection[Path], after: Collection[Path]) -> list[Path]:
    """The directories except those that lose all their files."""

    def filled(directory: Path, files: Collection[Path]) -> bool:
        return any(directory in file.parents for file in files)

    return [folder for folder in directories if filled(folder, after) or not filled(folder, before)]


def checkpoint_tree(source: Path, target: Path) -> tuple[list[Path], dict[Path, int]]:
    """Directories (each after its parent) and sizes of the files in bytes; paths relative to the source.

    Raises:
        BrocaError: a broken link, one to a parent directory or into the target, or a file that is not regular.
    """
    directories: list[Path] = []
    sizes: dict[Path, int] = {}

    def walk(directory: Path, above: frozenset[Path]) -> None:
        resolved = directory.resolve()
        if resolved in above:
            raise BrocaError(f"{directory} is a link to a parent directory: remove the link.")
        for item in sorted(directory.iterdir()):
            inside = item.relative_to(source)
            if item.is_dir():
                if item.name not in _NOT_COPIED:
                    directories.append(inside)
                    walk(item, above | {resolved})
            elif not item.is_file():
                fault = "is a broken link" if item.is_symlink() else "is not a regular file"
                raise BrocaError(f"{item} {fault}: fix or remove it, then run again.")
            elif item.resolve().is_relative_to(target):
                # Replacing the target would break this link of the source.
                raise BrocaError(f"{item} is a link into {target}: write to another directory.")
            else:
                sizes[inside] = item.stat().st_size

    walk(source, frozenset())
    return directories, sizes


def preferred_by_vllm(checkpoint: Path) -> tuple[str, ...]:
    """Weights in Mistral's format, with their index, relative to the checkpoint; vLLM searches all its folders."""
    own = weight_files(checkpoint)
    return tuple(
        path.relative_to(checkpoint).as_posix()
        for path in sorted(checkpoint.rglob("consolidated*.safetensors*"))
        if path.suffix in (".safetensors", ".json") and path not in own
    )


def _checked_extras(source: Path, extra_files: Mapping[str, bytes]) -> dict[Path, bytes]:
    weights = set(weight_files(source))
    extras = {}
    for name, content in extra_files.items():
        path = _inside(name)
        if source / path in weights:
            raise BrocaError(f"the extra file {name} would replace weights: give it another name.")
        extras[path] = content
    return extras


def _inside(name: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise BrocaError(f"the file {name!r} is not a path inside the checkpoint: make it relative.")
    return Path(path)


def _patch(
    entry: TensorEntry, replace: Replacement, file: Path, chunk_bytes: int, advance: Callable[[int], None]
) -> None:
    with file.open("r+b") as stream:
        stream.seek(entry.begin)
        buffer = torch.empty(_largest_chunk(entry, chunk_bytes), dtype=torch.uint8)
        for first, rows in chunks(entry, chunk_bytes):
            chunk = read_tensor(entry, rows, buffer)
            new = _stored(entry, chunk, replace(chunk, first))
            stream.write(new.view(torch.uint8).numpy().data)
            advance(new.nbytes)


def _stored(entry: TensorEntry, chunk: torch.Tensor, given: torch.Tensor | EditedChunk) -> torch.Tensor:
    """The checked result in the stored dtype, as a flat tensor."""
    result = given.stored if isinstance(given, EditedChunk) else given
    if result.shape != chunk.shape:
        raise BrocaError(
            f"the new values of tensor {entry.name} have shape {list(result.shape)}, not {list(chunk.shape)}: "
            "the edit does not fit this model."
        )
    if isinstance(given, EditedChunk):
        return _finite(entry, result.contiguous().reshape(-1))
    if result.dtype not in (torch.float32, torch.float64):
        raise BrocaError(
            f"the new values of tensor {entry.name} are {result.dtype}, which would be rounded twice: "
            "compute them in float32 or float64."
        )
    flat = result.detach().cpu().reshape(-1)
    new = torch.empty(flat.numel(), dtype=chunk.dtype)
    for first in range(0, flat.numel(), _ROUNDED_AT_ONCE):
        part = slice(first, first + _ROUNDED_AT_ONCE)
        new[part] = round_once(flat[part], chunk.dtype)
        _finite(entry, new[part])
    return new


def _finite(entry: TensorEntry, new: torch.Tensor) -> torch.Tensor:
    """Check the values after rounding: a finite number may overflow the stored dtype."""
    if not all_finite(new):
        raise BrocaError(
            f"the new values of tensor {entry.name} are not all finite in {entry.dtype}: "
            "use a weaker edit, or a checkpoint in a wider dtype."
        )
    return new
