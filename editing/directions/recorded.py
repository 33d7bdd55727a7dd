"""Recording for directions: each text's mean at the outputs, and the inputs' means, in one pass.

A text's mean is over its counted tokens: neither padding nor the first position (the start token) counts.
The outputs (``attn_out``, ``mlp_out``, ``block_out``) are kept for each text in float32: 3 * L * d * 4 bytes.  Of
the inputs (``attn_in``, ``mlp_in``), which are wide, only a float64 sum is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import pad

from editing.directions.diffmean import INPUT_SITES, OUTPUT_SITES
from neurons.architectures.anatomy import COMMON
from neurons.architectures.sites import Routed
from neurons.errors import UsageError
from neurons.models.memory import LIBRARIES, forward_bytes, max_room, memory_limit, sizes_of
from neurons.models.not_finite import explained
from neurons.models.processes import all_reduce
from neurons.models.source import LoadedModel
from neurons.recording.collectors import TextSums
from neurons.recording.text_pass import (
    Position,
    Progress,
    batches_of_process,
    line_numbers,
    numbered,
    read_text,
)
from neurons.statistics.totals import Totals
from neurons.text.batches import TokenBatch

_MEAN = "text_mean"


@dataclass(frozen=True)
class Recorded:
    """Means of texts.

    Attributes:
        languages: the K languages.
        tokens: int64 [K], counted tokens.
        lines: language -> int64 [n], the line of each text in its file, ascending.
        outputs: language -> site -> float32 [n, L, width], each text's mean.
        means: site (outputs and inputs) -> float64 [L, width, K], the mean over texts of their means.
    """

    languages: tuple[str, ...]
    tokens: torch.Tensor
    lines: dict[str, torch.Tensor]
    outputs: dict[str, dict[str, torch.Tensor]]
    means: dict[str, torch.Tensor]

    @property
    def texts(self) -> dict[str, int]:
        return {language: len(lines) for language, lines in self.lines.items()}

    def mean(self, site: str, language: str) -> torch.Tensor:
        """Float64 [L, width], the mean over a language's texts."""
        return self.means[site][..., self.languages.index(language)]

    def common(self, first: str, second: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The indices (int64 [m], int64 [m]) of the lines that both languages have, in line order.

        Raises:
            UsageError: there are none.
        """
        places = common_lines(self.lines[first], self.lines[second])
        if not len(places[0]):
            raise UsageError(
                f"no line has a text in {first!r} and in {second!r}: parallel text is needed, with equal line numbers"
            )
        return places


def common_lines(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices (int64 [m], int64 [m]) of the lines that are in both, each int64 and ascending."""
    return torch.isin(first, second).nonzero().flatten(), torch.isin(second, first).nonzero().flatten()


def record_texts(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    progress: Progress | None = None,
    kept: Sequence[str] = OUTPUT_SITES,
    summed: Sequence[str] = OUTPUT_SITES + INPUT_SITES,
    layers: Sequence[int] | None = None,
) -> Recorded:
    """One pass over the text of each language.

    With several processes each reads a part of the batches, and all get the same means.

    Args:
        loaded: the model.
        batches: language -> its batches, one text a row.
        progress: called with the number of tokens of each batch.
        kept: sites of ``Recorded.outputs``; where a layer is narrower than others, zeros follow.
        summed: sites of ``Recorded.means``.
        layers: layers to read, the others are 0; None: all.

    Raises:
        UsageError: a language without a text of more than one token, or more texts than memory allows.
        BrocaError: an activation that is not finite, by layer and site.
    """
    anatomy, languages = loaded.anatomy, tuple(batches)
    for language, of_language in batches.items():
        if not of_language:
            raise UsageError(f"language {language!r} has no text of more than one token: give more text")
    lines = line_numbers(batches)
    _require_room(loaded, batches, 4 * anatomy.layers * sum(map(anatomy.width, kept)))
    outputs = {
        language: {site: torch.zeros(len(numbers), anatomy.layers, anatomy.width(site)) for site in kept}
        for language, numbers in lines.items()
    }
    sites = tuple(dict.fromkeys((*summed, *kept)))
    totals = Totals(
        len(languages),
        anatomy.layers,
        {f"{site}:{_MEAN}": anatomy.width(site) for site in summed},
        dict.fromkeys((f"{site}:{_MEAN}" for site in summed), torch.float64),
    )
    collectors = {
        site: TextSums(
            site,
            (_MEAN,) if site in summed else (),
            anatomy,
            totals,
            [outputs[language][site] for language in languages] if site in kept else (),
        )
        for site in sites
    }
    of_process = batches_of_process(numbered(batches))
    counted = torch.zeros(len(languages), dtype=torch.int64)
    for k, batch in of_process:
        counted[k] += batch.counted.sum()

    def add(site: str, layer: int, values: torch.Tensor, routed: Routed | None, at: Position) -> None:
        if site == COMMON:
            values = pad(values, (0, anatomy.width(site) - values.shape[-1]))
        if site in collectors:
            collectors[site].add(layer, values, routed, at)
        if site == "block_out" and by_expert:
            # All experts have passed their neurons by now.
            collectors["mlp_in"].finish(layer, at)

    by_expert = anatomy.mixed and "mlp_in" in sites
    read = dict.fromkeys((*sites, "block_out") if by_expert else sites)
    chosen = range(anatomy.layers) if layers is None else layers
    readers = {(site, layer): partial(add, site, layer) for site in read for layer in chosen}
    read_text(loaded, of_process, readers, progress, lines=list(lines.values()), layers=1 + max(chosen))
    with explained(loaded):
        totals.require_finite()
    texts = torch.tensor([sum(len(batch.ids) for batch in of_language) for of_language in batches.values()])
    return Recorded(
        languages=languages,
        tokens=all_reduce(counted, torch.add),
        lines=lines,
        outputs={
            language: {site: all_reduce(values, torch.add) for site, values in sites.items()}
            for language, sites in outputs.items()
        },
        means={site: all_reduce(totals.stacked(f"{site}:{_MEAN}"), torch.add) / texts for site in summed},
    )


def _require_room(loaded: LoadedModel, batches: Mapping[str, Sequence[TokenBatch]], text_bytes: int) -> None:
    """Check that the main memory holds ``text_bytes`` of each text, beside a batch if it is read there."""
    if loaded.device.type == "cuda":
        left = max(0, memory_limit() - LIBRARIES)
    else:
        largest = max(batch.ids.numel() for of_language in batches.values() for batch in of_language)
        left = max(0, max_room(loaded) - forward_bytes(sizes_of(loaded), largest))
    texts = sum(map(len, line_numbers(batches).values()))
    if texts * text_bytes > left:
        raise UsageError(
            f"the means of {texts:,} texts would take {texts * text_bytes / 1e9:.1f} GB, and {left / 1e9:.1f} GB are "
            f"left: read fewer tokens (--tokens), at most {left // text_bytes // len(batches):,} texts of each "
            "language, or allow more (--max-memory)"
        )
