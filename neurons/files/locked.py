"""A lock, so that two processes do not write the same output."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neurons.errors import BrocaError


@contextmanager
def locked(path: Path | None, refusal: str) -> Iterator[None]:
    """Context that holds the lock of a file or a directory.

    The system releases the lock when the process ends, also after a crash.

    Args:
        path: an existing directory, or a file that is never replaced by another; it is created if missing, and removed
            if it is empty at the end.  None: no lock.
        refusal: what to tell if another process holds the lock.

    Raises:
        BrocaError: another process holds the lock.
    """
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BrocaError(f"{refusal}: wait for its end, or choose another --out") from error
        except OSError:
            pass  # a network file system without locks
        try:
            yield
        finally:
            if path.is_file() and not path.stat().st_size:
                path.unlink()
    finally:
        os.close(owner)
