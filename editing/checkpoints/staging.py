"""Write a directory atomically: fill it beside the target and rename it at the end."""

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

# Content of the temporary directory beside the target: the lock of the process, the new checkpoint and, during
# an overwrite, the old one.
_OWNER, _STAGED, _PREVIOUS = "owner", "checkpoint", "previous"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def place_apart(source: Path, target: Path) -> Path:
    """The resolved target, after a check that neither directory is inside the other.

    Raises:
        BrocaError: the target is a link or the source, or one is inside the other.
    """
    if target.is_symlink():
        raise BrocaError(f"{target} is a symbolic link: give the directory itself.")
    resolved, place = source.resolve(), target.resolve()
    if place.is_relative_to(resolved) or resolved.is_relative_to(place):
        relation = "is the source itself" if resolved == place else "and the source are one inside the other"
        raise BrocaError(f"{target} {relation} ({source}): write to a directory of its own.")
    return place


def check_target(target: Path, overwrite: bool = False, marker: str = "config.json") -> None:
    """Check, before any work, that a checkpoint or another directory can be written to the target.

    Leftovers of killed runs beside the target are removed first, and an old target that they had moved is
    restored.

    Args:
        target: directory to create; its parents may be missing.
        overwrite: whether a directory with the file ``marker`` there may be replaced.
        marker: a file that every such directory has.

    Raises:
        BrocaError: the target exists and must not be replaced, or cannot be written.
    """
    if target.is_symlink():
        raise BrocaError(f"{target} is a symbolic link: give the directory itself.")
    target = target.resolve()
    _clear_leftovers(target)
    if target.exists():
        if not target.is_dir():
            raise BrocaError(f"{target} is a file: name a directory to write.")
        if not overwrite:
            raise BrocaError(f"{target} exists already: add --overwrite, or write to another directory.")
        if not (target / marker).is_file():
            raise BrocaError(
                f"{target} has no {marker}, so it is not overwritten: write to another directory."
            )
        if target.is_mount():
            raise BrocaError(f"{target} is where a disk is mounted: write to a directory in it.")
        # Moving a directory to another parent needs write permission on it: its ".." changes.
        if not os.access(target, os.W_OK):
            raise BrocaError(f"{target} cannot be written to, so not be replaced: choose another directory.")
    folder = _nearest(target)
    if not folder.is_dir():
        raise BrocaError(f"{folder} is a file, so {target} cannot be made in it: write to another directory.")
    refusal = f"{folder} cannot be written to, so {target} cannot be made"
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BrocaError(f"{refusal}: choose another directory.")
    try:
        # Quotas, network disks and too long names fail only here, not in permissions.
        Path(tempfile.mkdtemp(prefix=_shelter_prefix(target), dir=folder)).rmdir()
    except OSError as error:
        raise BrocaError(f"{refusal} ({error.strerror}): choose another directory.") from error


def check_room(target: Path, size: int) -> None:
    """Check that the disk has space for ``size`` bytes and one per cent more.

    Raises:
        BrocaError: too little space.
    """
    folder = _nearest(target)
    needed, free = size + size // 100, shutil.disk_usage(folder).free
    if free < needed:
        raise BrocaError(
            f"{target} needs {needed / 1e9:.2f} GB but {folder} has {free / 1e9:.2f} GB free: free space there, "
            "or write to another disk."
        )


def _nearest(target: Path) -> Path:
    return next(folder for folder in target.parents if folder.exists())


def _shelter_prefix(target: Path) -> str:
    return f".{target.name}.broca-"


def _clear_leftovers(target: Path) -> None:
    if not target.parent.is_dir():
        return
    # Exactly the suffixes of mkdtemp: those of a target named "x.broca-y" are longer.
    ours = re.compile(re.escape(_shelter_prefix(target)) + r"[a-z0-9_]{8}")
    for shelter in [item for item in target.parent.iterdir() if ours.fullmatch(item.name)]:
        # The system releases the lock of a killed process; a process id alone may belong to another container or
        # to a later process.
        if not (shelter / _OWNER).exists():
            # Killed before the lock was created or after it was removed: the directory is empty.
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
    # The lock is removed last, so that leftovers of a kill here are still recognised.
    for name in (_STAGED, _PREVIOUS):
        shutil.rmtree(shelter / name, ignore_errors=True)
    shutil.rmtree(shelter, ignore_errors=True)


@contextmanager
def staging(target: Path, overwrite: bool) -> Iterator[Path]:
    """Context with a directory to fill, which becomes the target on success and is removed on failure.

    If the system can exchange two names (Linux), an overwritten target exists at every moment.

    Args:
        target: resolved, and checked by ``check_target``; missing parents are created.
        overwrite: replace an existing target.

    Raises:
        BrocaError: the disk fails, or a target appeared in the meantime.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _shelter(target) as shelter:
            staged = shelter / _STAGED
            # By mkdir, not mkdtemp: the checkpoint gets the user's usual permissions.
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
                f"{target} could not be written ({error}); the previous content is unchanged: fix the cause "
                "and run again."
            ) from error
        raise


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names atomically; False if the system or the disk does not support it.

    Raises:
        OSError: the exchange failed.
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
    """Context with a locked directory beside the target, removed at the end."""
    shelter, owner = _marked(target)
    with owner:
        owner.write(f"{os.getpid()}\n")
        owner.flush()
        try:
            yield shelter
        finally:
            _discard(shelter, target)


def _marked(target: Path) -> tuple[Path, TextIO]:
    """A new directory beside the target, and its lock file."""
    while True:
        shelter = Path(tempfile.mkdtemp(prefix=_shelter_prefix(target), dir=target.parent))
        # Until it is locked, another run may take it for a leftover and remove it.
        try:
            owner = (shelter / _OWNER).open("x")
        except FileNotFoundError:
            continue
        # On a network disk without locks leftovers are never removed, which is safe.
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
        # Some network file systems do not support this.
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)
