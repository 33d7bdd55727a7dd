"""The hidden states of a paused pass in a temporary file, while other passes run."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import nn

MIN_BYTES = 2**16  # smaller tensors stay in memory


class WaitingStates:
    """Moves tensors of one pass to a file and back; whatever refers to them sees the same values afterwards.

    A tensor that has not changed since it was last in the file, such as embeddings, is not written again.

    Args:
        fixed: addresses of storages that never move, because others use them meanwhile (``addresses``).
    """

    def __init__(self, fixed: frozenset[int]) -> None:
        self._fixed = fixed
        self._file = TemporaryFile(prefix="broca-", buffering=0)  # noqa: SIM115
        self._away: list[tuple[torch.UntypedStorage, int, int]] = []  # storage, bytes, offset
        self._written: dict[int, tuple[int, int, int]] = {}  # storage -> version, bytes, offset
        self._free: list[tuple[int, int]] = []  # bytes, offset
        self._end = 0

    def move(self, tensors: Iterable[torch.Tensor]) -> None:
        """Move the storages of tensors to the file."""
        moved: dict[int, tuple[torch.UntypedStorage, int]] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            fixed = storage.data_ptr() in self._fixed
            if storage.nbytes() >= MIN_BYTES and not fixed and storage.resizable():
                moved[storage._cdata] = storage, tensor._version
        self._free += [place[1:] for name, place in self._written.items() if name not in moved]
        self._written = {name: place for name, place in self._written.items() if name in moved}
        for name, (storage, version) in moved.items():
            size, known = storage.nbytes(), self._written.get(name)
            if known is not None and known[:2] == (version, size):
                offset = known[2]
            else:
                if known is not None:
                    self._free.append(known[1:])
                offset = self._place(size)
                self._file.seek(offset)
                _transfer(storage, self._file.write)
            self._written[name] = version, size, offset
            self._away.append((storage, size, offset))
        for storage, _, _ in self._away:
            storage.resize_(0)

    def restore(self) -> None:
        """Read everything back."""
        for storage, size, offset in self._away:
            self._file.seek(offset)
            storage.resize_(size)
            _transfer(storage, self._file.readinto)
        self._away.clear()

    def close(self) -> None:
        """Remove the file, and what is in it."""
        self._away.clear()
        self._file.close()

    def _place(self, size: int) -> int:
        """The offset of free space in the file."""
        for at, (free, offset) in enumerate(self._free):
            if free == size:
                del self._free[at]
                return offset
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
