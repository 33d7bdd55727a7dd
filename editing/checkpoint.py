"""A checkpoint directory copied with some tensors' bytes replaced: all of it is there afterwards, or nothing."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from editing.rounding import round_once
from neurons.errors import BrocaError
from neurons.tensor_files import READABLE_DTYPES, TensorEntry, read_tensor, tensor_entries, weight_files

Replacement = Callable[[torch.Tensor, int], torch.Tensor]
Progress = Callable[[int, int], None]

_NOT_COPIED = {".git", ".cache"}
_FICLONE = 0x40049409
# What lies in the temporary directory beside the target: the mark of the process at work, the new
# checkpoint and, for the moment of an overwrite, the old one.
_OWNER, _STAGED, _PREVIOUS = "owner", "checkpoint", "previous"
_ROUNDED_AT_ONCE = 1 << 20


def write_checkpoint(
    source: Path,
    target: Path,
    replacements: Mapping[str, Replacement],
    extra_files: Mapping[str, bytes],
    *,
    overwrite: bool = False,
    block_bytes: int = 64 * 2**20,
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
            dtype, index of its first row) that gives the new block: same shape, float32 or float64.
            It is rounded once, to nearest even, to the stored dtype.  A tensor without dimensions
            comes as one block of shape ``[]``.
        extra_files: content by path relative to ``target``; it takes the place of a copied file.
        overwrite: replace a target that is a checkpoint (has a ``config.json``).
        block_bytes: stored bytes per block; a single row larger than this is one block.
        progress: called with (bytes done, bytes in all) after each file and each block.

    Raises:
        BrocaError: before anything is written, if the target may not be replaced or lies in the source
            (or the other way round), the source is quantised or damaged, a name is unknown, or there
            is no room or no permission; later, if a new block is not finite, has another shape or
            less than float32 precision, or the disk fails.
    """
    target = _place(source, target)
    entries = tensor_entries(source)
    _check_source(source, entries, replacements)
    directories, sizes = _tree(source, target)
    extras = _checked_extras(source, extra_files)
    _clear_leftovers(target)
    _check_target(target, overwrite)
    copied = {path: size for path, size in sizes.items() if path not in extras}
    _check_room(target, sum(copied.values()) + sum(map(len, extras.values())))

    edited = sorted((entries[name] for name in replacements), key=lambda e: (e.file, e.begin))
    total = sum(copied.values()) + sum(e.end - e.begin for e in edited)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with _staging(target, overwrite) as staged:
        for directory in directories:
            (staged / directory).mkdir()
        for path, size in copied.items():
            _copy(source / path, staged / path)
            advance(size)
        for entry in edited:
            _patch(entry, replacements[entry.name], staged / entry.file.name, block_bytes, advance)
        for path, content in extras.items():
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            (staged / path).write_bytes(content)


def _place(source: Path, target: Path) -> Path:
    """The resolved target, once it is known that neither directory lies in the other."""
    if target.is_symlink():
        raise BrocaError(f"{target} is a symbolic link: name the directory to write itself.")
    origin, place = source.resolve(), target.resolve()
    if place.is_relative_to(origin) or origin.is_relative_to(place):
        relation = "is the source itself" if origin == place else "and the source lie one inside the other"
        raise BrocaError(f"{target} {relation} ({source}): write to a directory of its own.")
    return place


def _check_source(source: Path, entries: Mapping[str, TensorEntry], names: Mapping[str, Replacement]) -> None:
    config = source / "config.json"
    try:
        settings = json.loads(config.read_bytes()) if config.exists() else {}
    except ValueError as error:
        raise BrocaError(f"{config} is not valid JSON ({error}): download it again.") from error
    if _is_quantised(settings):
        raise BrocaError(
            f"{source} is quantised (quantization_config in config.json), and its stored numbers are not its "
            "weights: start from the unquantised checkpoint."
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


def _is_quantised(settings: Any) -> bool:
    # Models of several parts keep the setting in the part, for example under text_config.
    if not isinstance(settings, dict):
        return False
    return settings.get("quantization_config") is not None or any(map(_is_quantised, settings.values()))


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


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise BrocaError(f"{target} exists already: add --overwrite, or write to another directory.")
    if not (target / "config.json").is_file():
        raise BrocaError(
            f"{target} is not a checkpoint (it has no config.json) and is not overwritten: "
            "write to another directory."
        )


def _check_room(target: Path, size: int) -> None:
    folder = next(folder for folder in target.parents if folder.exists())
    if not folder.is_dir():
        raise BrocaError(f"{folder} is a file, so {target} cannot be made in it: write to another directory.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BrocaError(f"{folder} cannot be written to, so {target} cannot be made: choose another place.")
    needed, free = size + size // 100, shutil.disk_usage(folder).free
    if free < needed:
        raise BrocaError(
            f"{target} needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free: make room there, "
            "or write to another disk."
        )


def _shelter_prefix(target: Path) -> str:
    return f".{target.name}.broca-"


def _clear_leftovers(target: Path) -> None:
    """Remove what killed runs left beside the target, and put back an old target they had moved away."""
    if not target.parent.is_dir():
        return
    # Exactly the endings of mkdtemp: a target called "x.broca-y" has its own, longer ones.
    ours = re.compile(re.escape(_shelter_prefix(target)) + r"[a-z0-9_]{8}")
    for shelter in [item for item in target.parent.iterdir() if ours.fullmatch(item.name)]:
        # The system drops a lock with the process that held it, whatever killed that; a process number
        # alone may belong to another container or to a later process.
        with suppress(OSError), (shelter / _OWNER).open("r+") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Empty: its owner is at this moment between making the file and locking it.
            if owner.read():
                _discard(shelter, target)


def _discard(shelter: Path, target: Path) -> None:
    previous = shelter / _PREVIOUS
    if previous.exists() and not target.exists():
        try:
            previous.rename(target)
        except OSError as error:
            raise BrocaError(
                f"the old {target} could not be put back ({error.strerror}): move it back from {previous}."
            ) from error
    shutil.rmtree(shelter, ignore_errors=True)


@contextmanager
def _staging(target: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to fill, which becomes the target when the block ends well and is gone when it does not."""
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shelter = Path(tempfile.mkdtemp(prefix=_shelter_prefix(target), dir=target.parent))
        try:
            with _owned(shelter):
                staged = shelter / _STAGED
                # Made by mkdir, not mkdtemp: the checkpoint gets the user's usual permissions.
                staged.mkdir()
                yield staged
                _sync(staged)
                if overwrite and target.exists():
                    target.rename(shelter / _PREVIOUS)
                staged.rename(target)
                _sync_directory(target.parent)
        finally:
            _discard(shelter, target)
    except BaseException as error:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise BrocaError(
                f"{target} could not be written ({error}); what was there before is unchanged: mend the cause "
                "and run again."
            ) from error
        raise


@contextmanager
def _owned(shelter: Path) -> Iterator[None]:
    """Mark the directory as in use by this process for as long as the block runs."""
    with (shelter / _OWNER).open("w") as owner:
        # Where a network disk has no locks, the directory of a killed run is never cleared, which is safe.
        with suppress(OSError):
            fcntl.flock(owner, fcntl.LOCK_EX)
        owner.write(f"{os.getpid()}\n")
        owner.flush()
        yield


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("xb") as writer:
        try:
            # Copy-on-write: the blocks are shared until an edit, which then stays in the copy.
            fcntl.ioctl(writer, _FICLONE, reader.fileno())
            return
        except OSError:
            pass
    shutil.copyfile(source, target)


def _patch(
    entry: TensorEntry, replace: Replacement, file: Path, block_bytes: int, advance: Callable[[int], None]
) -> None:
    if entry.begin == entry.end:
        return
    rows = entry.shape[0] if entry.shape else 1
    step = max(1, block_bytes // ((entry.end - entry.begin) // rows))
    with file.open("r+b") as stream:
        stream.seek(entry.begin)
        for first in range(0, rows, step):
            block = read_tensor(entry, slice(first, first + step) if entry.shape else None)
            new = _stored(entry, block, replace(block, first))
            stream.write(new.view(torch.uint8).numpy().data)
            advance(new.nbytes)


def _stored(entry: TensorEntry, block: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """The checked result, rounded to the stored dtype, as one flat tensor."""
    if result.shape != block.shape:
        raise BrocaError(
            f"the new values of tensor {entry.name} have shape {list(result.shape)} and not {list(block.shape)}: "
            "the edit does not fit this model."
        )
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
        # Looked at after rounding: a finite number may be too large for the stored dtype.
        if not torch.isfinite(new[piece]).all():
            raise BrocaError(
                f"the new values of tensor {entry.name} are not all finite in {entry.dtype}: "
                "use a weaker edit, or start from a checkpoint stored in a wider dtype."
            )
    return new


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync_directory(path)
        else:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot; the names are then as safe as those make them.
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
