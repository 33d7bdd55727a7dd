"""Activity of autoencoders' features on texts, and random-token sequences for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from editing.directions.sae import Autoencoder, Firing
from neurons.architectures.sites import Routed
from neurons.errors import UsageError
from neurons.models.source import LoadedModel
from neurons.models.start_tokens import start_tokens
from neurons.recording.text_pass import Position, PositionReader, Progress, read_text
from neurons.text.batches import TokenBatch, row_batches

CHUNK = 2**26  # features of tokens held at once


def require_fit(loaded: LoadedModel, autoencoder: Autoencoder) -> None:
    """
    Raises:
        UsageError: a layer or a width that the model does not have.
    """
    anatomy = loaded.anatomy
    if not 0 <= autoencoder.layer < anatomy.layers:
        raise UsageError(
            f"{autoencoder.name} reads layer {autoencoder.layer}, but {loaded.name} has layers 0-{anatomy.layers - 1}"
        )
    if len(autoencoder.encoder) != anatomy.residual:
        raise UsageError(
            f"{autoencoder.name} reads {len(autoencoder.encoder)} numbers, but the residual of {loaded.name} has "
            f"{anatomy.residual}: it was trained on another model"
        )


def firing(
    loaded: LoadedModel,
    batches: Sequence[TokenBatch],
    autoencoders: Sequence[Autoencoder],
    progress: Progress | None = None,
) -> list[Firing]:
    """Activity of the features of each autoencoder on the texts, in one pass.

    Args:
        loaded: the model.
        batches: one text a row.
        autoencoders: each at another site or layer.
        progress: called with the number of tokens of each batch.

    Raises:
        UsageError: no text, an autoencoder that does not fit the model, or two at the same site and layer.
    """
    if not batches:
        raise UsageError("no text has more than one token: give more text")
    places = [(sae.site, sae.layer) for sae in autoencoders]
    if len(set(places)) < len(places):
        raise UsageError("two autoencoders read the same layer: give at most one for each layer")
    for sae in autoencoders:
        require_fit(loaded, sae)
    moved = [sae.to(loaded.device) for sae in autoencoders]
    fired = [torch.zeros(sae.features, dtype=torch.int64, device=loaded.device) for sae in moved]
    sums = [torch.zeros(sae.features, dtype=torch.float64, device=loaded.device) for sae in moved]

    def reader_of(at: int) -> PositionReader:
        def read(values: torch.Tensor, _: Routed | None, position: Position) -> None:
            counted = position.counted
            rows = max(1, CHUNK // (values.shape[1] * moved[at].features))
            for first in range(0, len(values), rows):
                inside = counted[first : first + rows, :, None]
                active = torch.where(inside, moved[at].encode(values[first : first + rows]), 0.0)
                fired[at] += (active > 0).any(1).sum(0)
                sums[at] += (active.sum(1, dtype=torch.float64) / inside.sum(1)).sum(0)

        return read

    readers = {place: reader_of(at) for at, place in enumerate(places)}
    read_text(loaded, [(0, batch) for batch in batches], readers, progress)
    texts = sum(len(batch.ids) for batch in batches)
    return [Firing(texts, fired[at].cpu(), (sums[at] / texts).cpu()) for at in range(len(moved))]


def random_batches(loaded: LoadedModel, like: Sequence[TokenBatch], seed: int = 0) -> list[TokenBatch]:
    """Sequences of random tokens, as many and as long as the texts ``like``.

    Tokens are drawn uniformly from the vocabulary without special tokens; start tokens are kept.
    """
    tokenizer = loaded.tokenizer
    special = set(tokenizer.all_special_ids)
    width = min(len(tokenizer), loaded.model.get_input_embeddings().weight.shape[0])
    allowed = torch.tensor([token for token in range(width) if token not in special])
    start = [*start_tokens(tokenizer)]
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.cat([batch.attention.sum(1) for batch in like]) - len(start)
    drawn = allowed[torch.randint(len(allowed), (int(lengths.sum()),), generator=generator)]
    rows = [start + row.tolist() for row in drawn.split(lengths.tolist())]
    return row_batches(rows, uncounted=max(1, len(start)))
