"""The sha256 of a file or a directory, independent of its path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from neurons.files.file_states import OncePerState

DIGESTS = OncePerState()


def digest(path: Path) -> str | None:
    """sha256 of a file, or of a directory's file names and contents; None if it does not exist.

    A file is read once in a process while it is unchanged (``neurons.files.file_states``).
    """
    if path.is_dir():
        inside = {
            item.relative_to(path).as_posix(): digest(item)
            for item in sorted(path.rglob("*"))
            if item.is_file()
        }
        return digest_of(inside)
    if not path.is_file():
        return None
    return DIGESTS.get(path, [path], lambda: _digest_of_file(path))


def digests_of(directory: Path, suffixes: Collection[str]) -> dict[str, str | None]:
    """File name -> sha256 of the files of a directory with one of the suffixes."""
    return {path.name: digest(path) for path in sorted(directory.iterdir()) if path.suffix in suffixes}


def digest_of(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
