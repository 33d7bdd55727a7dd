"""Recording: streamed sums by collectors at sites; no activation outlives its batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from neurons.architectures.anatomy import Anatomy
from neurons.architectures.sites import Routed
from neurons.errors import BrocaError
from neurons.models.next_token import token_losses
from neurons.models.not_finite import explained
from neurons.models.processes import all_reduce
from neurons.models.source import LoadedModel
from neurons.recording.collectors import (
    ATTRIBUTION,
    RESPONSES,
    WORST_RANK,
    Attribution,
    Collector,
    TextSums,
    TokenSums,
)
from neurons.recording.recomputation import recomputing
from neurons.recording.resume import Unfinished
from neurons.recording.text_losses import predicted
from neurons.recording.text_pass import (
    Position,
    PositionReader,
    Progress,
    batches_of_process,
    expect,
    forward,
    line_numbers,
    numbered,
    read_text,
)
from neurons.statistics.statistics import Statistics, combine_of, moment_dtype, parse_moment
from neurons.statistics.sums import OF_TEXTS, OF_TOKENS
from neurons.statistics.totals import Totals
from neurons.text.batches import TokenBatch, counted_tokens

CHECKED_EVERY = 64  # batches between two checks for values that are not finite


def loss_sum(model: Any, batch: TokenBatch) -> torch.Tensor:
    """The sum of the negative log-likelihoods (nats) of the predicted tokens."""
    mask = predicted(batch)
    hidden = forward(model, batch)[:, :-1]
    return token_losses(model, hidden[mask.to(hidden.device)], batch.ids[:, 1:][mask]).sum()


def record(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    moments: Sequence[str],
    progress: Progress | None = None,
    unfinished: Unfinished | None = None,
    recomputes: bool = False,
) -> Statistics:
    """Sum moments of activations over the counted tokens of each language.

    Under a launcher of several processes each process reads a part of the batches, and all get the same sums.

    Args:
        batches: language -> its batches.
        moments: the moments, as ``site:moment`` (``neurons.statistics.statistics.MOMENTS``).  ``mlp_in:attribution``
            and ``attn_in:attribution`` (of heads) need a backward pass; their loss is the sum of the negative
            log-likelihoods (nats) of a row's tokens.  ``mlp_in:responses`` keeps each text's mean, float32, so its size grows with the texts.
        progress: called with the number of tokens of each batch that is done.
        unfinished: keeps the state; a state of the same recording is resumed.
        recomputes: recompute activations in the backward pass (``neurons.recording.recomputation``).

    Returns:
        Statistics with every moment [layers, width, languages].

    Raises:
        BrocaError: an activation that is not finite; names layer and site; or processes with different batches.
    """
    anatomy, model, languages = loaded.anatomy, loaded.model, tuple(batches)
    keeps_responses = f"mlp_in:{RESPONSES}" in moments
    parsed = [parse_moment(moment) for moment in moments if moment != f"mlp_in:{RESPONSES}"]
    lines = line_numbers(batches) if keeps_responses else {}
    responses = {
        language: torch.zeros(len(of_language), anatomy.layers, anatomy.neurons)
        for language, of_language in lines.items()
    }
    for site, moment in parsed:
        if moment not in (*OF_TOKENS, *OF_TEXTS, WORST_RANK, ATTRIBUTION):
            raise ValueError(
                f"{site}:{moment} is recorded from prompts (neurons.recording.answers), not from text"
            )
    totals = _totals(anatomy, len(languages), parsed)
    collectors = _collectors(anatomy, parsed, totals, [responses[k] for k in lines])
    backward = any(moment == ATTRIBUTION for _, moment in parsed)
    counts = torch.zeros(2, len(languages), dtype=torch.int64)  # tokens, texts

    def reader_of(site: str, layer: int) -> PositionReader:
        def read(values: torch.Tensor, routed: Routed | None, at: Position) -> None:
            for collector in collectors.get(site, ()):
                # With recomputation the sites in a layer are read twice, first without gradients.
                once = not recomputes or site == "block_out"
                if once or isinstance(collector, Attribution) == torch.is_grad_enabled():
                    collector.add(layer, values, routed, at)
            if site == "block_out" and anatomy.mixed:
                for collector in (c for of_site in collectors.values() for c in of_site):
                    collector.finish(layer, at)

        return read

    sites = [*collectors, *(["block_out"] if anatomy.mixed and "block_out" not in collectors else [])]
    readers = {(site, layer): reader_of(site, layer) for site in sites for layer in range(anatomy.layers)}
    of_process = batches_of_process(numbered(batches))
    done, state = (0, {}) if unfinished is None else unfinished.load()
    if state:
        counts = state.pop("counts")
        for language in responses:
            responses[language].copy_(state.pop(f"responses {language}"))
        totals.restore(state)
        if progress is not None:
            before = counted_tokens(batch for _, batch in of_process[:done])
            expect(progress, before)
            progress(before)
    remaining = of_process[done:]

    def after(read: range) -> None:
        for k, batch in remaining[read.start : read.stop]:
            counts[:, k] += torch.tensor([int(batch.counted.sum()), len(batch.ids)])
        if (done + read.start) // CHECKED_EVERY < (done + read.stop) // CHECKED_EVERY:
            totals.require_finite()
        if unfinished is not None and unfinished.is_due():
            kept_responses = {f"responses {language}": values for language, values in responses.items()}
            unfinished.save(done + read.stop, {**totals.state(), "counts": counts, **kept_responses})

    with recomputing(anatomy) if recomputes and backward else nullcontext():
        read_text(
            loaded,
            remaining,
            readers,
            progress,
            lines=list(lines.values()) if keeps_responses else None,
            run=(lambda _, batch: loss_sum(model, batch).backward()) if backward else None,
            gradients=backward,
            after=after,
        )
    with explained(loaded):
        totals.require_finite()
    tokens, texts = all_reduce(counts, torch.add)
    if tokens.tolist() != [counted_tokens(of_language) for of_language in batches.values()]:
        raise BrocaError(
            "the processes did not read each batch once: their batches differ; start all with the same text and options"
        )
    return Statistics(
        languages=languages,
        tokens=tokens,
        texts=texts,
        moments={
            f"{site}:{moment}": all_reduce(totals.stacked(f"{site}:{moment}"), combine_of(f"{site}:{moment}"))
            for site, moment in parsed
        },
        fingerprint=loaded.fingerprint,
        routed=all_reduce(totals.stacked("routed"), torch.add) if anatomy.experts > 1 else None,
        responses={language: all_reduce(values, torch.add) for language, values in responses.items()},
        lines=lines,
    )


def _totals(anatomy: Anatomy, languages: int, parsed: Sequence[tuple[str, str]]) -> Totals:
    widths = {
        f"{site}:{moment}": anatomy.heads
        if (site, moment) == ("attn_in", ATTRIBUTION)
        else anatomy.width(site)
        for site, moment in parsed
    }
    dtypes = {f"{site}:{moment}": moment_dtype(moment) for site, moment in parsed}
    for site, moment in parsed:
        if moment == "positive":
            widths[site], dtypes[site] = anatomy.width(site), torch.float64
    if anatomy.experts > 1:
        widths["routed"], dtypes["routed"] = anatomy.experts, torch.int64
    return Totals(languages, anatomy.layers, widths, dtypes)


def _collectors(
    anatomy: Anatomy, parsed: Sequence[tuple[str, str]], totals: Totals, responses: Sequence[torch.Tensor]
) -> dict[str, list[Collector]]:
    """Site -> its collectors."""
    sites = dict.fromkeys(site for site, _ in parsed)
    if responses:
        sites["mlp_in"] = None
    if anatomy.experts > 1 and not any(site in ("mlp_act", "mlp_in") for site in sites):
        sites["mlp_in"] = None
    routing_site = next((site for site in sites if site in ("mlp_act", "mlp_in", "mlp_up")), None)
    collectors: dict[str, list[Collector]] = {}
    for site in sites:
        moments = [moment for at, moment in parsed if at == site]
        of_tokens = [moment for moment in moments if moment in OF_TOKENS]
        of_texts = [moment for moment in moments if moment in (*OF_TEXTS, WORST_RANK)]
        counts_routed = anatomy.experts > 1 and site == routing_site
        collectors[site] = []
        if of_tokens or counts_routed:
            collectors[site].append(TokenSums(site, of_tokens, anatomy, totals, counts_routed))
        if of_texts or (responses and site == "mlp_in"):
            of_site = responses if site == "mlp_in" else ()
            collectors[site].append(TextSums(site, of_texts, anatomy, totals, of_site))
        if ATTRIBUTION in moments:
            collectors[site].append(Attribution(site, anatomy, totals))
    return collectors
