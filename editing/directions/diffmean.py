"""DiffMean: the difference of two languages' mean activations.

    v = mean_target - mean_source          mean of a language: over its texts, of the mean over a text's tokens

per layer, at the outputs of o_proj (``attn_out``) and down_proj (``mlp_out``), before the residual
addition, as in Steer2Edit (arXiv 2602.09870), and at the residual stream (``block_out``), where it
is the best method for language forcing in CLaS-Bench (arXiv 2601.08331).  Steer2Edit averages over the positions
that predict a response's tokens, as this does on conversations with the role ``before-answer``.  Plain text has no
response, so this averages over all its tokens but the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from editing.directions.direction import Direction
from editing.directions.method import DirectionMethod
from editing.directions.texts import Estimate, Texts
from neurons.errors import UsageError
from neurons.models.source import LoadedModel
from neurons.recording.record import record
from neurons.recording.text_pass import Progress
from neurons.statistics.statistics import Statistics
from neurons.text.batches import common_tokens, language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import DIRECTIONS, text_read

OUTPUT_SITES = ("attn_out", "mlp_out", "block_out")
INPUT_SITES = ("attn_in", "mlp_in")


def diffmean(statistics: Statistics, source: str, target: str) -> Direction:
    """The direction from statistics with ``text_mean`` at all five sites.

    Raises:
        UsageError: a language that the statistics do not have, or equal source and target.
    """
    for language in (source, target):
        if language not in statistics.languages:
            raise UsageError(
                f"no language {language!r}: the statistics have {', '.join(statistics.languages)}"
            )
    if source == target:
        raise UsageError(f"source and target are both {source!r}")
    s, t = statistics.languages.index(source), statistics.languages.index(target)
    means = {site: statistics.text_mean(site) for site in OUTPUT_SITES + INPUT_SITES}
    return Direction(
        source=source,
        target=target,
        vectors={site: (means[site][..., t] - means[site][..., s]).contiguous() for site in OUTPUT_SITES},
        input_means={
            site: ((means[site][..., t] + means[site][..., s]) / 2).contiguous() for site in INPUT_SITES
        },
        metadata={},
    )


def diffmean_direction(
    loaded: LoadedModel, corpus: Corpus, source: str, target: str, progress: Progress | None = None
) -> Direction:
    """Record two languages and compute their DiffMean.

    Raises:
        UsageError: as ``diffmean``.
    """
    corpus.require(source, target)
    pair = corpus.only(source, target)
    sites = OUTPUT_SITES + INPUT_SITES
    batches = language_batches(loaded, pair, None, common_tokens(loaded), DIRECTIONS.tokens)
    statistics = record(loaded, batches, [f"{site}:text_mean" for site in sites], progress)
    direction = diffmean(statistics, source, target)
    metadata = {
        "model": loaded.label,
        "fingerprint": loaded.fingerprint,
        **loaded.provenance,
        "method": "diffmean",
        "corpus": corpus.provenance,
        "tokens": dict(zip(statistics.languages, statistics.tokens.tolist(), strict=True)),
        "texts": dict(zip(statistics.languages, statistics.texts.tolist(), strict=True)),
        "settings": {},
        "read": text_read(pair, batches),
    }
    return Direction(direction.source, direction.target, direction.vectors, direction.input_means, metadata)


@dataclass(frozen=True)
class DiffMean(DirectionMethod):
    """The registered method."""

    name = "diffmean"
    line = "difference of the two languages' means; the best for language forcing in CLaS-Bench"
    source = "arXiv 2601.08331"

    def estimate(self, texts: Texts) -> Estimate:
        return Estimate(texts.diffmean)
