"""Output weights of a checkpoint, read from disk one at a time."""

from __future__ import annotations

import torch

from neurons.errors import BrocaError
from neurons.source import ModelSource
from neurons.tensor_files import TensorEntry, read_tensor, tensor_entries


class Weights:
    """Reads the weight [d, n] of a block's output module by (layer, block)."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._entries = tensor_entries(source.checkpoint)

    def entry(self, layer: int, block: str) -> TensorEntry:
        """Where the weight lies on disk.

        Raises:
            BrocaError: the checkpoint has no tensor of that name.
        """
        name = self._source.anatomy.tensor_name(layer, block)
        if name not in self._entries:
            raise BrocaError(f"{self._source.name}: the checkpoint has no tensor {name!r}")
        return self._entries[name]

    def read(self, layer: int, block: str) -> torch.Tensor:
        """The weight in float64 [d, n]."""
        return read_tensor(self.entry(layer, block)).double()
