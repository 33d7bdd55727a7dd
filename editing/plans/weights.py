"""Weights of a checkpoint, read from disk one at a time and assembled from their tensors."""

from __future__ import annotations

import torch

from neurons.architectures.anatomy import BLOCKS, OUTSIDE, StoredPiece
from neurons.errors import BrocaError
from neurons.files.tensor_files import READABLE_DTYPES, TensorEntry, read_tensor, tensor_entries
from neurons.models.checkpoint_files import tied_copies
from neurons.models.source import ModelSource


class Weights:
    """Reads the weight W [d, n] of a module by (layer, block), as plans name it."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._entries = tensor_entries(source.checkpoint)

    def pieces(self, layer: int, block: str) -> tuple[tuple[StoredPiece, TensorEntry], ...]:
        """The location of W on disk: pieces that cover its columns once, in order.

        Raises:
            BrocaError: a tensor is missing, has another shape, or is tied to another that is stored too.
        """
        anatomy = self._source.anatomy
        rows = anatomy.rows(layer, block)
        try:
            pieces = anatomy.stored(layer, block, self._entries.keys())
        except BrocaError as error:
            raise BrocaError(f"{self._source.name}: {error}") from error
        located = []
        for piece in pieces:
            entry = self._entries[piece.tensor]
            oriented = piece.stored_as(entry.shape, rows)
            if entry.shape != oriented.shape(rows):
                raise BrocaError(
                    f"{self._source.name}: tensor {piece.tensor} has shape {list(entry.shape)} where the "
                    f"model has {list(piece.shape(rows))}"
                )
            copies = tied_copies(self._source.checkpoint) if layer == OUTSIDE else ()
            if piece.tensor in copies:
                raise BrocaError(
                    f"{self._source.name}: {' and '.join(copies)} are tied and both stored, so one cannot change alone: "
                    f"remove {copies[0]} from the weights"
                )
            located.append((oriented, entry))
        return tuple(located)

    def read_piece(self, piece: StoredPiece, entry: TensorEntry) -> torch.Tensor:
        """A piece as [d, columns] in its stored dtype; of a fused tensor it reads only this expert."""
        return piece.of(read_tensor(entry, piece.rows))

    def bias(self, layer: int, block: str) -> TensorEntry | None:
        """The location of a module's bias on disk; None without a bias.

        Raises:
            BrocaError: experts of a mixture, a module that gets no bias, or a bias of another shape.
        """
        anatomy = self._source.anatomy
        if anatomy.output_bias(layer, block) is None:
            return None
        name, rows = anatomy.stored_bias(layer, block, self._entries.keys()), anatomy.rows(layer, block)
        entry = self._entries.get(name)
        if entry is None or entry.shape != (rows,):
            fault = "is missing" if entry is None else f"has shape {list(entry.shape)}"
            raise BrocaError(f"{self._source.name}: tensor {name} {fault} where the model has {rows} numbers")
        return entry

    def switched_biases(self, block: str) -> dict[str, int]:
        """Names and lengths of the tensors that a checkpoint needs if its config enables the bias.

        Raises:
            BrocaError: the architecture has no such setting.
        """
        anatomy = self._source.anatomy
        if block not in BLOCKS:
            raise BrocaError(
                f"{anatomy.model_type}: {block} has no bias, and no setting adds one: change its weight"
            )
        return {
            name: length
            for layer in anatomy.layers_with(block)
            for name, length in anatomy.switched_biases(layer, block, self._entries.keys()).items()
        }

    def bias_name(self, layer: int, block: str) -> str:
        """The name of the tensor for the output module's bias."""
        return self._source.anatomy.stored_bias(layer, block, self._entries.keys())

    def stored_dtype(self, layer: int, block: str) -> torch.dtype:
        """The stored dtype of W, also for a bias beside it."""
        return READABLE_DTYPES[self.pieces(layer, block)[0][1].dtype]

    def read(self, layer: int, block: str) -> torch.Tensor:
        """W in float64 [d, n]."""
        pieces = self.pieces(layer, block)
        if len(pieces) == 1:
            return self.read_piece(*pieces[0]).double().contiguous()
        whole = torch.empty(self._source.anatomy.residual, pieces[-1][0].columns.stop, dtype=torch.float64)
        for piece, entry in pieces:
            whole[:, piece.columns] = self.read_piece(piece, entry).double()
        return whole
