"""What directions are taken from: each text's mean at the outputs, and the inputs' means, in one pass.

A text's mean is over its counted tokens: neither padding nor the first position (the start token) counts.
The outputs (``attn_out``, ``mlp_out``, ``block_out``) are kept text by text, float32, which grows with the
texts: 3 * L * d * 4 bytes each.  Of the inputs (``attn_in``, ``mlp_in``), which are wide and of which only
the mean is wanted, a float64 sum is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from editing.directions.diffmean import INPUT_SITES, OUTPUT_SITES
from neurons.architectures.sites import Routed
from neurons.errors import UsageError
from neurons.models.not_finite import explained
from neurons.models.processes import all_reduce
from neurons.models.source import LoadedModel
from neurons.recording.collectors import TextSums
from neurons.recording.text_pass import (
    Position,
    PositionReader,
    Progress,
    line_numbers,
    numbered,
    own_share,
    read_text,
)
from neurons.statistics.totals import Totals
from neurons.text.batches import TokenBatch

_MEAN = "text_mean"


@dataclass(frozen=True)
class Recorded:
    """Means of texts.

    Attributes:
        languages: the K names.
        tokens: int64 [K], counted tokens.
        lines: language -> int64 [n], which line of its file each text is, ascending.
        outputs: language -> site -> float32 [n, L, d], each text's mean.
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

    def common(self, one: str, other: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The places (int64 [m], int64 [m]) of the lines that both languages have, in line order.

        Raises:
            UsageError: there is none.
        """
        first, second = self.lines[one], self.lines[other]
        places = (
            torch.isin(first, second).nonzero().flatten(),
            torch.isin(second, first).nonzero().flatten(),
        )
        if not len(places[0]):
            raise UsageError(
                f"no line has a text in {one!r} and in {other!r}: parallel text is needed, line by line the same"
            )
        return places


def record_texts(
    loaded: LoadedModel, batches: Mapping[str, Sequence[TokenBatch]], progress: Progress | None = None
) -> Recorded:
    """One pass over the text of each language.

    Under a launcher of several processes each takes its share of the batches, and all get the same means.

    Args:
        loaded: the model.
        batches: language -> its batches, a text a row.
        progress: called with the number of tokens of each batch that is done.

    Raises:
        UsageError: a language without a text that has a token to count.
        BrocaError: an activation that is not finite, by layer and site.
    """
    anatomy, languages = loaded.anatomy, tuple(batches)
    for language, some in batches.items():
        if not some:
            raise UsageError(f"language {language!r} has no text of more than one token: give more text")
    lines = line_numbers(batches)
    outputs = {
        language: {site: torch.zeros(len(own), anatomy.layers, anatomy.width(site)) for site in OUTPUT_SITES}
        for language, own in lines.items()
    }
    sites = OUTPUT_SITES + INPUT_SITES
    totals = Totals(
        len(languages),
        anatomy.layers,
        {f"{site}:{_MEAN}": anatomy.width(site) for site in sites},
        dict.fromkeys((f"{site}:{_MEAN}" for site in sites), torch.float64),
    )
    collectors = {
        site: TextSums(
            site,
            (_MEAN,),
            anatomy,
            totals,
            [outputs[language][site] for language in languages] if site in OUTPUT_SITES else (),
        )
        for site in sites
    }
    own = own_share(numbered(batches))
    counted = torch.zeros(len(languages), dtype=torch.int64)
    for k, batch in own:
        counted[k] += batch.counted.sum()

    def reader_of(site: str, layer: int) -> PositionReader:
        def read(values: torch.Tensor, routed: Routed | None, at: Position) -> None:
            collectors[site].add(layer, values, routed, at)
            if site == "mlp_out" and anatomy.mixed:
                # The experts hand over their neurons one after the other; now all have.
                collectors["mlp_in"].finish(layer, at)

        return read

    readers = {(site, layer): reader_of(site, layer) for site in sites for layer in range(anatomy.layers)}
    read_text(loaded, own, readers, progress, lines=list(lines.values()))
    with explained(loaded):
        totals.require_finite()
    texts = torch.tensor([sum(len(batch.ids) for batch in some) for some in batches.values()])
    return Recorded(
        languages=languages,
        tokens=all_reduce(counted, torch.add),
        lines=lines,
        outputs={
            language: {site: all_reduce(values, torch.add) for site, values in own.items()}
            for language, own in outputs.items()
        },
        means={site: all_reduce(totals.stacked(f"{site}:{_MEAN}"), torch.add) / texts for site in sites},
    )
