"""Average precision: neurons that separate a language's texts from all others (Kojima et al., NAACL 2024).

arXiv 2404.02431, after the expert units of Cuadros et al. (ICML 2022).  A neuron's response to a text is
its mean over the text's tokens; for language k the texts of k are positive, all others negative, and

    AP = sum_n (R_n - R_{n-1}) P_n

over the distinct responses as thresholds, from the largest: P_n and R_n are precision and recall of
"response >= threshold", so texts of equal response count together.  The paper takes the N neurons of
largest AP and the N of smallest, and forces a neuron to the median of its responses to the positive texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neurons.errors import BrocaError, UsageError
from neurons.scorers.means import require_several
from neurons.scorers.method import RESPONSES, TEXTS, Scorer
from neurons.scorers.scores import Scores
from neurons.scorers.selection import Selection
from neurons.statistics.statistics import Statistics

CHUNK = 128  # neurons sorted at a time: about 60 bytes for each neuron and text


def average_precision(responses: Sequence[torch.Tensor]) -> Scores:
    """Score every neuron for every language.

    Args:
        responses: a tensor for each language, [n_k, L, I], the mean response to each of its texts.

    Returns:
        Scores with AP in (0, 1] as values; every neuron may belong to every language.  Its note ``chance``
        is each language's fraction of the texts, about the AP of an uninformative neuron.

    Raises:
        UsageError: fewer than two languages, a language without texts, or responses of different models.
        BrocaError: a response that is not finite.
    """
    require_several(len(responses), "average precision")
    _, layers, width = responses[0].shape
    for k, texts in enumerate(responses):
        if len(texts) == 0:
            raise UsageError(f"average precision: language number {k + 1} has no texts")
        if texts.shape[1:] != (layers, width):
            raise UsageError(
                f"average precision: language number {k + 1} has responses of {texts.shape[1]} x {texts.shape[2]} "
                f"neurons, the first of {layers} x {width}: record all languages with one model"
            )
    counts = [len(texts) for texts in responses]
    values = torch.empty(layers, width, len(responses), dtype=torch.float64)
    for layer in range(layers):
        for start in range(0, width, CHUNK):
            part = slice(start, start + CHUNK)
            chunk = torch.cat([texts[:, layer, part] for texts in responses]).T
            if not bool(torch.isfinite(chunk).all()):
                neuron = start + int((~torch.isfinite(chunk)).any(-1).nonzero()[0])
                raise BrocaError(f"a response of neuron {neuron} in layer {layer} is not finite")
            values[layer, part] = _average_precision(chunk, counts).cpu()
    return Scores(
        values=values,
        member=torch.ones_like(values, dtype=torch.bool),
        notes={"chance": [count / sum(counts) for count in counts]},
    )


def _average_precision(responses: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """AP [neurons, K] of responses [neurons, N] to texts grouped by language, n_k of each."""
    ranked, order = responses.sort(dim=-1, descending=True)
    # The number of texts, then of texts of the language, with at least this response.
    ranks = torch.empty_like(order).scatter_(-1, order, _up_to(ranked))
    columns = []
    for unsorted in ranks.split(list(counts), dim=-1):
        ranks_of_language = unsorted.sort(dim=-1).values
        # Each positive text raises the recall by 1 / n_k at its threshold.
        columns.append((_up_to(ranks_of_language).double() / ranks_of_language).mean(-1))
    return torch.stack(columns, dim=-1)


def _up_to(ranked: torch.Tensor) -> torch.Tensor:
    """int64: the 1-based position of the last value equal to each value of a sorted row."""
    places = torch.arange(1, ranked.shape[-1] + 1, device=ranked.device)
    last = torch.ones_like(ranked, dtype=torch.bool)
    last[:, :-1] = ranked[:, :-1] != ranked[:, 1:]
    if bool(last.all()):
        return places.expand(ranked.shape)
    return torch.where(last, places, len(places)).flip(-1).cummin(-1).values.flip(-1)


def responses_of(statistics: Statistics) -> list[torch.Tensor]:
    """The responses to texts, by language.

    Raises:
        UsageError: the statistics hold none.
    """
    if not statistics.responses:
        raise UsageError(
            "the statistics hold no responses to single texts: record them with `broca record ... --for "
            "average-precision`"
        )
    return [statistics.responses[language] for language in statistics.languages]


class AveragePrecision(Scorer):
    """The registered scorer."""

    name = "average-precision"
    line = "how well a neuron's mean response separates the language's texts from others, top and bottom"
    source = "arXiv 2404.02431"
    moments = (RESPONSES,)
    reads = TEXTS
    # 1000 + 1000 of Llama-2-7B's 352,256.
    selection = Selection(scope="language", top_rate=0.003, ends="both")

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        return average_precision(responses_of(statistics))
