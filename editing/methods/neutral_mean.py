"""The neutral mean: the mean of the residual stream, or of a module's output, on neutral text.

    m = mean over languages of mean_language,    mean_language over its texts of the mean over a text's tokens

as in DiffMean (``editing.directions.diffmean``); every language has the same weight.  The biprojected ablation
(``editing.methods.directional_ablation``) preserves it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neurons.models.source import LoadedModel
from neurons.recording.record import record
from neurons.recording.text_pass import Progress
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import DIRECTIONS


def neutral_means(
    loaded: LoadedModel, corpus: Corpus, sites: Sequence[str], progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """Record the mean of a corpus.

    Args:
        loaded: the model.
        corpus: neutral text in one or more languages.
        sites: of "attn_out", "mlp_out" and "block_out".
        progress: called with the number of tokens done.

    Returns:
        Site -> float64 [L, d].
    """
    statistics = record(
        loaded,
        language_batches(loaded, corpus, default=DIRECTIONS.tokens),
        [f"{site}:text_mean" for site in sites],
        progress,
    )
    return {site: statistics.text_mean(site).mean(-1) for site in sites}
