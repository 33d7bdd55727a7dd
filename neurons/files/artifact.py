"""Broca's artifacts: safetensors files with JSON metadata.

The header's ``__metadata__`` has one key, ``broca``; its value is a JSON object with ``kind``,
``format_version``, ``packages`` and the fields of that kind (languages, settings, fingerprint, ...).
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from neurons.errors import BrocaError, UsageError

FORMAT_VERSION = 1
KINDS = ("statistics", "neurons", "direction", "edit", "unfinished")


@dataclass(frozen=True)
class Artifact:
    """The content of a Broca file: kind, metadata (JSON values) and tensors by name."""

    kind: str
    metadata: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def write_atomically(path: Path | str, content: bytes) -> None:
    """Write a file so that a crash leaves either the old or the new content."""
    with _replacing(Path(path)) as temporary:
        temporary.write_bytes(content)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which replaces it at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with Path(name).open("rb+") as stream:
            os.fsync(stream.fileno())
        # mkstemp creates files that only the owner can read; results get the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def text_bytes(text: str) -> bytes:
    r"""UTF-8; bytes of paths that are not UTF-8 as \udcXX, which JSON reads back."""
    return text.encode("utf-8", "backslashreplace")


def json_bytes(value: Any) -> bytes:
    """A valid JSON document: NaN and infinities become null.

    Dataclasses are objects of their fields (``neurons.files.json_file`` reads them back).
    """
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False)
    return text_bytes(text + "\n")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        value = {one.name: getattr(value, one.name) for one in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def package_versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    versions = {}
    for package in ("broca", "torch", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def artifact_bytes(kind: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> bytes:
    """The bytes of a file; equal input gives equal bytes.

    Args:
        kind: one of ``KINDS``.
        tensors: name -> tensor; stored contiguous, on the CPU, in the dtype given.
        metadata: JSON-serialisable fields.
    """
    content: bytes = save(*_content(kind, tensors, metadata))
    return content


def _content(
    kind: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the header's metadata as they are stored."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not a kind of Broca file: {', '.join(KINDS)}")
    document = {
        **metadata,
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "packages": package_versions(),
    }
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    text = json.dumps(document, sort_keys=True, ensure_ascii=False)
    return stored, {"broca": text_bytes(text).decode()}


def save_artifact(
    path: Path | str, kind: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write ``artifact_bytes`` to ``path``, atomically and without a copy of the tensors."""
    stored, header = _content(kind, tensors, metadata)
    with _replacing(Path(path)) as temporary:
        save_file(stored, temporary, header)


def load_artifact(path: Path | str, kind: str | None = None) -> Artifact:
    """Read a Broca file; arguments and errors as of ``load_metadata``."""
    metadata = load_metadata(path, kind)
    try:
        with safe_open(str(path), framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise BrocaError(f"{path}: not a file that Broca wrote, or a damaged one") from error
    return Artifact(kind=str(metadata["kind"]), metadata=metadata, tensors=tensors)


def load_metadata(path: Path | str, kind: str | None = None) -> dict[str, Any]:
    """Read the metadata of a Broca file, without its tensors.

    Args:
        kind: the expected kind, or None for any.

    Raises:
        UsageError: no such file, or a directory.
        BrocaError: not a Broca file, another kind, or a newer format version.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path}: is a directory: name the file in it")
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    try:
        with safe_open(str(path), framework="pt") as stream:
            text = (stream.metadata() or {}).get("broca")
            if text is None:
                raise BrocaError(f"{path}: a safetensors file, but not one that Broca wrote")
            metadata = json.loads(text)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise BrocaError(f"{path}: not a file that Broca wrote, or a damaged one") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("format_version"), int):
        raise BrocaError(f"{path}: not a readable Broca file (its metadata is damaged)")
    of_file = metadata["kind"] = str(metadata.get("kind"))
    if metadata["format_version"] > FORMAT_VERSION:
        raise BrocaError(
            f"{path}: written by a newer Broca (format {metadata['format_version']}, this one reads "
            f"{FORMAT_VERSION}): update broca"
        )
    if kind is not None and of_file != kind:
        raise BrocaError(f"{path}: holds {of_file!r}, but {kind!r} is needed here")
    return metadata
