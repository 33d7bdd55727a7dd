"""Localizer: neurons that respond more to a language than to all others (AlKhamissi et al., NAACL 2025).

arXiv 2411.02280, "The LLM Language Network", a localizer contrast of neuroscience.  With |m| the absolute
value of a unit's mean over a text, a and s^2 its mean and variance over the n texts of language k, and
a', s'^2, n' those over the texts of all other languages pooled, Welch's

    t = (a - a') / sqrt(s^2/n + s'^2/n')

    df = (s^2/n + s'^2/n')^2 / ((s^2/n)^2/(n - 1) + (s'^2/n')^2/(n' - 1))

The paper takes the top 1 % of t.  An optional false discovery rate keeps only units with a two-sided p,
adjusted over all units of the language (Benjamini & Hochberg 1995), of at most the rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy import stats

from neurons.errors import UsageError
from neurons.scorers.means import require_finite, require_rate, require_several
from neurons.scorers.method import TEXTS, Scorer
from neurons.scorers.scores import Scores
from neurons.setting import setting
from neurons.statistics.statistics import Statistics

# Below this fraction of the sum of squares the squared deviations are rounding error, not variance: it
# corresponds to a standard deviation of a millionth of the mean.
ROUNDING = 1e-12


def localizer(
    text_absolute: torch.Tensor,
    text_square: torch.Tensor,
    texts: torch.Tensor,
    false_discovery_rate: float | None = None,
) -> Scores:
    """Score every unit for every language.

    Args:
        text_absolute: float64 [L, I, K], sum over texts of |m|.
        text_square: float64 [L, I, K], sum over texts of m^2.
        texts: int64 [K], number of texts.
        false_discovery_rate: maximum adjusted p of a member; None skips the test.

    Returns:
        Scores with t as values; a member has t > 0 (and is significant).  For a unit without variance t is
        undefined: it is 0 where the two means are equal, otherwise -inf, which is never selected; p is 1.

    Raises:
        UsageError: fewer than two languages, fewer than two texts of a language, or a rate outside (0, 1].
        BrocaError: a sum that is not finite.
    """
    languages = len(texts)
    require_several(languages, "the localizer")
    if bool((texts < 2).any()):
        k = int((texts < 2).nonzero()[0])
        raise UsageError(
            f"the localizer needs at least two texts of a language: number {k + 1} has {int(texts[k])}"
        )
    if false_discovery_rate is not None:
        require_rate("false discovery rate", false_discovery_rate)
    require_finite(text_absolute)
    require_finite(text_square)
    values = torch.empty(text_absolute.shape, dtype=torch.float64)
    member = torch.empty(text_absolute.shape, dtype=torch.bool)
    for k in range(languages):
        # Summed, not subtracted from the total: the total's rounding error could exceed a rare language.
        others = [other for other in range(languages) if other != k]
        t, freedom = _welch(
            *_moments(text_absolute[..., k], text_square[..., k], int(texts[k])),
            int(texts[k]),
            *_moments(
                text_absolute[..., others].sum(-1), text_square[..., others].sum(-1), int(texts[others].sum())
            ),
            int(texts[others].sum()),
        )
        values[..., k] = t
        member[..., k] = t > 0
        if false_discovery_rate is not None:
            member[..., k] &= _adjusted(t, freedom) <= false_discovery_rate
    notes = {} if false_discovery_rate is None else {"false_discovery_rate": false_discovery_rate}
    return Scores(values=values, member=member, notes=notes)


def _moments(total: torch.Tensor, square: torch.Tensor, texts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance [L, I] from sums over texts."""
    mean = total.double().cpu() / texts
    square = square.double().cpu()
    deviation = square - mean * mean * texts
    # Also where it is negative: the difference may round below 0.
    deviation = torch.where(deviation <= ROUNDING * square, 0.0, deviation)
    return mean, deviation / (texts - 1)


def _welch(
    mean: torch.Tensor,
    variance: torch.Tensor,
    texts: int,
    other_mean: torch.Tensor,
    other_variance: torch.Tensor,
    other_texts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """t and its degrees of freedom, [L, I]; without variance t as in ``localizer`` and df = 1."""
    error, other_error = variance / texts, other_variance / other_texts
    both = error + other_error
    fraction = torch.where(both > 0, error / both, 1.0)
    # Normalised by ``both``, the square of which may underflow.
    freedom = 1 / (fraction**2 / (texts - 1) + (1 - fraction) ** 2 / (other_texts - 1))
    constant = torch.where(torch.isclose(mean, other_mean, rtol=ROUNDING**0.5, atol=0), 0.0, -torch.inf)
    return torch.where(both > 0, (mean - other_mean) / both.sqrt(), constant), freedom


def _adjusted(t: torch.Tensor, freedom: torch.Tensor) -> torch.Tensor:
    """Two-sided p of every unit, adjusted after Benjamini and Hochberg, [L, I]."""
    tail = 2 * stats.t.sf(t.abs().numpy(), freedom.numpy())
    p = torch.where(torch.isfinite(t), torch.from_numpy(tail), 1.0)
    adjusted = stats.false_discovery_control(p.flatten().numpy(), method="bh")
    return torch.from_numpy(adjusted).view_as(t)


@dataclass(frozen=True)
class Localizer(Scorer):
    """The registered scorer."""

    name = "localizer"
    line = "Welch's t of a neuron's absolute mean in the language's texts against all others"
    source = "arXiv 2411.02280"
    moments = ("mlp_in:text_absolute", "mlp_in:text_square")
    reads = TEXTS

    false_discovery_rate: float | None = setting(None, "maximum false discovery rate; by default no test")

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        total, square = (statistics.moment(moment) for moment in self.moments)
        return localizer(total, square, statistics.texts, self.false_discovery_rate)
