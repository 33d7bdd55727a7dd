"""A directory filled beside its place and moved there at the end: all of it is there afterwards, or nothing."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from neurons.errors import BrocaError

# What lies in the temporary directory beside the target: the mark of the process at work, the new
# checkpoint and, for the moment of an overwrite, the old one.
_OWNER, _STAGED, _PREVIOUS = "owner", "checkpoint", "previous"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def place_apart(source: Path, target: Path) -> Path:
    """The resolved target, once it is known that neither directory lies in the other.

    Raises:
        BrocaError: the target is a link, the source, or lies in it, or the other way round.
    """
    if target.is_symlink():
        raise BrocaError(f"{target} is a symbolic link: name the directory to write itself.")
    origin, place = source.resolve(), target.resolve()
    if place.is_relative_to(origin) or origin.is_relative_to(place):
        relation = "is the source itself" if origin == place else "and the source lie one inside the other"
        raise BrocaError(f"{target} {relation} ({source}): write to a directory of its own.")
    return place


def check_target(target: Path, overwrite: bool = False) -> None:
    """Refuse a place that a checkpoint could not be written to, before any work is done.

    What killed runs left beside the target is cleared away first, and an old target that they had moved
    away is put back.

    Args:
        target: directory to make; its parents may be missing.
        overwrite: whether a checkpoint (a directory with a ``config.json``) there may be replaced.

    Raises:
        BrocaError: something is there that may not be replaced, or the place cannot be written to.
    """
    if target.is_symlink():
        raise BrocaError(f"{target} is a symbolic link: name the directory to write itself.")
    target = target.resolve()
    _clear_leftovers(target)
    if target.exists():
        if not target.is_dir():
            raise BrocaError(f"{target} is a file: name a directory to write.")
        if not overwrite:
            raise BrocaError(f"{target} exists already: add --overwrite, or write to another directory.")
        if not (target / "config.json").is_file():
            raise BrocaError(
                f"{target} is not a checkpoint (it has no config.json) and is not overwritten: "
                "write to another directory."
            )
        if target.is_mount():
            raise BrocaError(f"{target} is where a disk is mounted: write to a directory in it.")
        # Moved to another parent, a directory must let itself be written to: its ".." changes.
        if not os.access(target, os.W_OK):
            raise BrocaError(f"{target} cannot be written to, so not be replaced: choose another place.")
    folder = _nearest(target)
    if not folder.is_dir():
        raise BrocaError(f"{folder} is a file, so {target} cannot be made in it: write to another directory.")
    refusal = f"{folder} cannot be written to, so {target} cannot be made"
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BrocaError(f"{refusal}: choose another place.")
    try:
        # Permissions do not tell all: quotas, network disks and names that are too long say no only here.
        Path(tempfile.mkdtemp(prefix=_shelter_prefix(target), dir=folder)).rmdir()
    except OSError as error:
        raise BrocaError(f"{refusal} ({error.strerror}): choose another place.") from error


def check_room(target: Path, size: int) -> None:
    """Refuse a disk without room for ``size`` bytes and one per cent more.

    Raises:
        BrocaError: too little room.
    """
    folder = _nearest(target)
    needed, free = size + size // 100, shutil.disk_usage(folder).free
    if free < needed:
        raise BrocaError(
            f"{target} needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free: make room there, "
            "or write to another disk."
        )


def _nearest(target: Path) -> Path:
    return next(folder for folder in target.parents if folder.exists())


def _shelter_prefix(target: Path) -> str:
    return f".{target.name}.broca-"


def _clear_leftovers(target: Path) -> None:
    if not target.parent.is_dir():
        return
    # Exactly the endings of mkdtemp: a target called "x.broca-y" has its own, longer ones.
    ours = re.compile(re.escape(_shelter_prefix(target)) + r"[a-z0-9_]{8}")
    for shelter in [item for item in target.parent.iterdir() if ours.fullmatch(item.name)]:
        # The system drops a lock with the process that held it, whatever killed that; a process number
        # alone may belong to another container or to a later process.
        if not (shelter / _OWNER).exists():
            # Killed before the mark was made or after it was removed: then there is nothing in it.
            with suppress(OSError):
                shelter.rmdir()
            continue
        with suppress(OSError), (shelter / _OWNER).open("r+") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    # The mark goes last: what a kill leaves here must still be known for a killed run's.
    for name in (_STAGED, _PREVIOUS):
        shutil.rmtree(shelter / name, ignore_errors=True)
    shutil.rmtree(shelter, ignore_errors=True)


@contextmanager
def staging(target: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to fill, which becomes the target when the block ends well and is gone when it does not.

    Where the system can exchange two names (Linux), a target that is overwritten is there at every moment.

    Args:
        target: resolved, and passed by ``check_target``; missing parents are made.
        overwrite: replace a target that is there.

    Raises:
        BrocaError: the disk fails, or a target appeared meanwhile.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _shelter(target) as shelter:
            staged = shelter / _STAGED
            # Made by mkdir, not mkdtemp: the checkpoint gets the user's usual permissions.
            staged.mkdir()
            yield staged
            _sync(staged)
            if not (overwrite and target.exists()):
                staged.rename(target)
            elif not exchange(staged, target):
                target.rename(shelter / _PREVIOUS)
                staged.rename(target)
            _sync_directory(target.parent)
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


def exchange(first: Path, second: Path) -> bool:
    """Exchange what two names stand for in one step; False where the system or the disk cannot.

    Raises:
        OSError: it can, and it failed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = (os.fsencode(first), os.fsencode(second))
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


@contextmanager
def _shelter(target: Path) -> Iterator[Path]:
    """A directory beside the target that is marked as in use for as long as the block runs, then gone."""
    shelter, owner = _marked(target)
    with owner:
        owner.write(f"{os.getpid()}\n")
        owner.flush()
        try:
            yield shelter
        finally:
            _discard(shelter, target)


def _marked(target: Path) -> tuple[Path, TextIO]:
    """A new directory beside the target, and the file in it by which it is locked."""
    while True:
        shelter = Path(tempfile.mkdtemp(prefix=_shelter_prefix(target), dir=target.parent))
        # Until it is locked, another run may take it for a killed run's, and clear it away.
        try:
            owner = (shelter / _OWNER).open("x")
        except FileNotFoundError:
            continue
        # Where a network disk has no locks, the directory of a killed run is never cleared, which is safe.
        with suppress(OSError):
            fcntl.flock(owner, fcntl.LOCK_EX)
        if (shelter / _OWNER).exists():
            return shelter, owner
        owner.close()


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
