"""The hidden states of a paused pass in a temporary file, while other passes run."""

from __future__ import annotations

from collections.abc import Iterable
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from torch import nn

MIN_BYTES = 2**16  # smaller tensors stay in memory


class WaitingStates:
    """Moves tensors of one pass to a file and back; whatever refers to them sees the same values afterwards.

    Args:
        fixed: addresses of storages that never move, because others use them meanwhile (``addresses``).
    """

    def __init__(self, fixed: frozenset[int]) -> None:
        self._fixed = fixed
        self._file = TemporaryFile(prefix="broca-")  # noqa: SIM115
        self._away: list[tuple[torch.UntypedStorage, int]] = []

    def move(self, tensors: Iterable[torch.Tensor]) -> None:
        """Move the storages of tensors to the file."""
        self._file.seek(0)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        for address, storage in storages.items():
            if storage.nbytes() < MIN_BYTES or address in self._fixed or not storage.resizable():
                continue
            # A copy, because a storage that numpy refers to cannot be resized.
            self._file.write(_bytes(storage).to("cpu", copy=True).numpy().data)
            self._away.append((storage, storage.nbytes()))
        for storage, _ in self._away:
            storage.resize_(0)

    def restore(self) -> None:
        """Read everything back."""
        self._file.seek(0)
        for storage, size in self._away:
            values = np.empty(size, dtype=np.uint8)
            self._file.readinto(values.data)
            storage.resize_(size)
            _bytes(storage).copy_(torch.from_numpy(values))
        self._away.clear()

    def close(self) -> None:
        """Remove the file, and what is in it."""
        self._away.clear()
        self._file.close()


def addresses(model: nn.Module) -> frozenset[int]:
    """Addresses of the storages of a model's parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors if not tensor.is_meta)


def _bytes(storage: Any) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
