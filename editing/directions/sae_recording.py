"""What autoencoders are trained on and read: sampled states, features on texts, and random-token sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from editing.directions.autoencoder import Autoencoder, Firing
from neurons.architectures.sites import Routed
from neurons.errors import UsageError
from neurons.models.source import LoadedModel
from neurons.models.start_tokens import start_tokens
from neurons.recording.text_pass import (
    Position,
    Progress,
    line_numbers,
    numbered,
    read_text,
)
from neurons.text.batches import TokenBatch, counted_tokens, row_batches

CHUNK = 2**26  # features of tokens held at once


def require_fit(loaded: LoadedModel, autoencoder: Autoencoder) -> None:
    """
    Raises:
        UsageError: a layer or a width that the model does not have, or a module's output that a norm follows.
        BrocaError: it was trained on another model, by its fingerprint.
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
    # TransformerLens's hooks, which SAE-Lens names, are after that norm; Broca's sites before it.
    if autoencoder.site != "block_out" and not anatomy.residual_output:
        raise UsageError(
            f"{autoencoder.name} was trained after the norm that follows the module in {loaded.name}: give one of the "
            "residual stream"
        )
    if autoencoder.fingerprint is not None:
        loaded.require_fingerprint({"fingerprint": autoencoder.fingerprint}, autoencoder.name)


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
    sums = [torch.zeros(2, sae.features, dtype=torch.float64, device=loaded.device) for sae in moved]

    def read(at: int, values: torch.Tensor, _: Routed | None, position: Position) -> None:
        counted = position.counted
        rows = max(1, CHUNK // (values.shape[1] * moved[at].features))
        for first in range(0, len(values), rows):
            inside = counted[first : first + rows, :, None]
            active = torch.where(inside, moved[at].encode(values[first : first + rows]), 0.0)
            fired[at] += (active > 0).any(1).sum(0)
            of_texts = active.sum(1, dtype=torch.float64) / inside.sum(1)
            sums[at] += torch.stack([of_texts.sum(0), of_texts.square().sum(0)])

    readers = {place: partial(read, at) for at, place in enumerate(places)}
    read_text(loaded, [(0, batch) for batch in batches], readers, progress)
    texts = sum(len(batch.ids) for batch in batches)
    return [Firing(texts, fired[at].cpu(), *(sums[at] / texts).cpu()) for at in range(len(moved))]


def text_codes(
    loaded: LoadedModel,
    batches: Sequence[TokenBatch],
    autoencoders: Sequence[Autoencoder],
    features: Sequence[torch.Tensor],
    progress: Progress | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Some features' activation on each text, its mean over the text's counted tokens.

    Args:
        loaded: the model.
        batches: of one language, one text a row or in several.
        autoencoders: each at another site or layer.
        features: int64 [S] of each autoencoder.
        progress: called with the number of tokens of each batch.

    Returns:
        (int64 [n], the line of each text, ascending; float64 [n, S] for each autoencoder).
    """
    (lines,) = line_numbers({"": batches}).values()
    moved = [sae.to(loaded.device) for sae in autoencoders]
    sums = [torch.zeros(len(lines), len(chosen), dtype=torch.float64) for chosen in features]
    tokens = torch.zeros(len(lines), dtype=torch.float64)
    for batch in batches:
        tokens.index_add_(0, torch.searchsorted(lines, batch.line_numbers), batch.counted.sum(1).double())

    def read(at: int, values: torch.Tensor, _: Routed | None, position: Position) -> None:
        assert position.places is not None
        of_rows = position.places.repeat_interleave(position.counted.sum(1).cpu())
        states = position.rows(values)
        chunk = max(1, CHUNK // moved[at].features)
        for rows, places in zip(states.split(chunk), of_rows.split(chunk), strict=True):
            active = moved[at].encode(rows)[:, features[at].to(rows.device)]
            sums[at].index_add_(0, places, active.double().cpu())

    readers = {(sae.site, sae.layer): partial(read, at) for at, sae in enumerate(autoencoders)}
    read_text(loaded, [(0, batch) for batch in batches], readers, progress, lines=[lines])
    return lines, [of_texts / tokens[:, None] for of_texts in sums]


def sampled_states(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    layers: Sequence[int],
    count: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> torch.Tensor:
    """The residual stream after some layers at sampled tokens, equally many of each language.

    The memory depends on ``count``, not on the text.

    Args:
        loaded: the model.
        batches: text of each language.
        layers: the layers, each once.
        count: number of tokens; fewer are taken of a language that has fewer than its part.
        seed: of the sample.
        progress: called with the number of tokens of each batch.

    Returns:
        float32 [len(layers), n, d], in a random order, the same for all layers.

    Raises:
        UsageError: no text.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []  # of all counted tokens, in the order of reading
    before = 0
    for of_language in batches.values():
        tokens = counted_tokens(of_language)
        drawn.append(before + torch.randperm(tokens, generator=generator)[: count // len(batches)])
        before += tokens
    order = torch.cat(drawn)
    if not len(order):
        raise UsageError("no text has more than one token, or there are fewer states than languages")
    order = order[torch.randperm(len(order), generator=generator)]
    taken = torch.full((before,), -1)
    taken[order] = torch.arange(len(order))
    of_batches = numbered(batches)
    first = torch.tensor([0, *(counted_tokens([batch]) for _, batch in of_batches)]).cumsum(0)
    states = torch.zeros(len(layers), len(order), loaded.anatomy.residual)

    def read(at: int, values: torch.Tensor, _: Routed | None, position: Position) -> None:
        places = taken[first[position.index] : first[position.index + 1]]
        rows = position.rows(values).float().cpu()
        states[at, places[places >= 0]] = rows[places >= 0]

    readers = {("block_out", layer): partial(read, at) for at, layer in enumerate(layers)}
    read_text(loaded, of_batches, readers, progress)
    return states


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
