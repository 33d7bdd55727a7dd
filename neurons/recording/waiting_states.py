"""The hidden states of a paused pass in a temporary file, while other passes run."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import nn

MIN_BYTES = 2**16  # smaller tensors stay in memory


@dataclass(frozen=True)
class _Place:
    """Where a storage is in the file, and the version of its numbers there; of free space, without a storage."""

    offset: int
    size: int
    version: int
    storage: Any


class WaitingStates:
    """Moves tensors of one pass to a file and back; whatever refers to them sees the same values afterwards.

    A tensor that has not changed since it was last in the file, such as embeddings, is not written again.

    Args:
        fixed: addresses of storages that never move, because others use them meanwhile (``addresses``).
    """

    def __init__(self, fixed: frozenset[int]) -> None:
        self._fixed = fixed
        self._file = TemporaryFile(prefix="broca-", buffering=0)  # noqa: SIM115
        self._away: list[_Place] = []
        # By the address of the storage, which no other can have while this holds it.
        self._written: dict[int, _Place] = {}
        self._free: list[_Place] = []
        self._end = 0

    def move(self, tensors: Iterable[torch.Tensor]) -> None:
        """Move the storages of tensors to the file."""
        moved: dict[int, tuple[torch.UntypedStorage, int]] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            fixed = storage.data_ptr() in self._fixed
            if storage.nbytes() >= MIN_BYTES and not fixed and storage.resizable():
                moved[storage._cdata] = storage, tensor._version
        unchanged = {
            name: place
            for name, place in self._written.items()
            if name in moved and (place.size, place.version) == (moved[name][0].nbytes(), moved[name][1])
        }
        self._free += [
            replace(place, storage=None) for name, place in self._written.items() if name not in unchanged
        ]
        self._written = unchanged
        for name, (storage, version) in moved.items():
            if name not in unchanged:
                place = _Place(self._offset(storage.nbytes()), storage.nbytes(), version, storage)
                self._file.seek(place.offset)
                _transfer(storage, self._file.write)
                self._written[name] = place
        self._away = [*self._written.values()]
        for place in self._away:
            place.storage.resize_(0)

    def restore(self) -> None:
        """Read everything back."""
        for place in self._away:
            self._file.seek(place.offset)
            place.storage.resize_(place.size)
            _transfer(place.storage, self._file.readinto)
        self._away.clear()

    def close(self) -> None:
        """Remove the file, and what is in it."""
        self._away.clear()
        self._written.clear()
        self._file.close()

    def _offset(self, size: int) -> int:
        """The offset of free space in the file."""
        for at, free in enumerate(self._free):
            if free.size == size:
                return self._free.pop(at).offset
        self._end += size
        return self._end - size


def _transfer(storage: Any, some: Callable[[memoryview], int | None]) -> None:
    """Write all bytes of a storage, or read them.

    Args:
        storage: on any device.
        some: transfers some of the bytes that it is given, and returns their number.

    Raises:
        OSError: the disk is full, or the file ended.
    """
    held = storage if storage.device.type == "cpu" else storage.cpu()
    # Numpy would hold a reference to the storage, which could then not be resized.
    rest = memoryview((ctypes.c_char * held.nbytes()).from_address(held.data_ptr())).cast("B")
    while rest:
        count = some(rest)
        if not count:
            raise OSError(f"temporary file: {len(rest)} bytes are missing")
        rest = rest[count:]
    if held is not storage:
        storage.copy_(held)


def addresses(model: nn.Module) -> frozenset[int]:
    """Addresses of the storages of a model's parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors if not tensor.is_meta)
