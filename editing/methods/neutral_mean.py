"""The neutral mean: where the residual stream, or what a block writes, lies in text that no language is steered in.

    m = mean over languages of mean_language,    mean_language over its texts of the mean over a text's tokens

as DiffMean takes its means (``editing.directions.diffmean``); every language weighs the same, however much
text it has.  The biprojected ablation (``editing.methods.directional_ablation``) spares it.
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
        corpus: neutral text, of one language or more.
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
