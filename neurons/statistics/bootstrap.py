"""Bootstrap intervals of a ratio of sums over texts (Efron, "Better Bootstrap Confidence Intervals", 1987).

With a_d the change of text d's loss and n_d its tokens, the estimate is sum_d a_d / sum_d n_d.  Samples are
of as many texts, with replacement; all conditions use the same samples.  BCa: with B replicates r_b,

    z0 = Phi^-1( (#{r_b < r} + #{r_b <= r}) / 2B )
    a  = 1/6 * sum_d u_d^3 / (sum_d u_d^2)^1.5,    u_d = mean_e r_(e) - r_(d)
    interval = quantiles of r_b at Phi(z0 + (z0 + z) / (1 - a (z0 + z))),  z = Phi^-1(alpha / 2), Phi^-1(1 - alpha / 2)

with r_(d) the estimate without text d.
"""

from __future__ import annotations

import numpy as np
import torch

from neurons.errors import UsageError

DRAWS = 2000
CONFIDENCE = 0.95
_DRAWN_AT_ONCE = 4_000_000  # indices
_ROUNDING = 1e-12


def ratio(sums: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The estimate, float64 [C], of sums [texts, C] and tokens [texts]."""
    return sums.sum(0) / tokens.double().sum()


def replicates(sums: torch.Tensor, tokens: torch.Tensor, draws: int, seed: int) -> torch.Tensor:
    """The estimate on ``draws`` samples of the texts, float64 [draws, C].

    Args:
        sums: float64 [texts, C].
        tokens: [texts], each at least 1.
        draws: number of samples.
        seed: equal seeds and numbers of texts give equal samples.

    Raises:
        UsageError: no samples, or no texts.
    """
    texts = len(tokens)
    if draws < 1 or texts < 1:
        raise UsageError(f"{draws} bootstrap samples of {texts} texts: at least one of each is needed")
    generator = np.random.default_rng(seed % 2**64)
    weights = tokens.double()
    estimates = []
    step = max(1, _DRAWN_AT_ONCE // texts)
    for begin in range(0, draws, step):
        rows = min(step, draws - begin)
        drawn = generator.integers(0, texts, (rows, texts)) + texts * np.arange(rows)[:, None]
        counts = torch.from_numpy(np.bincount(drawn.ravel(), minlength=rows * texts)).view(rows, texts)
        multiplicity = counts.double()
        estimates.append((multiplicity @ sums) / (multiplicity @ weights)[:, None])
    return torch.cat(estimates)


def without_each(sums: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Leave-one-out estimates, float64 [texts, C]; NaN where no text is left."""
    weights = tokens.double()
    return (sums.sum(0) - sums) / (weights.sum() - weights)[:, None]


def percentile_interval(drawn: torch.Tensor, confidence: float = CONFIDENCE) -> torch.Tensor:
    """Quantiles of replicates [draws, ...]: float64 [2, ...], the low end first; infinities are allowed."""
    _require_confidence(confidence)
    tail = (1 - confidence) / 2
    ordered = drawn.sort(dim=0).values
    return torch.stack(
        [_quantile(ordered, torch.full(drawn.shape[1:], p, dtype=torch.float64)) for p in (tail, 1 - tail)]
    )


def bca_interval(
    drawn: torch.Tensor, estimate: torch.Tensor, without: torch.Tensor, confidence: float = CONFIDENCE
) -> torch.Tensor:
    """The bias-corrected and accelerated interval.

    Args:
        drawn: replicates, float64 [draws, C].
        estimate: float64 [C].
        without: ``without_each``, float64 [texts, C].
        confidence: nominal coverage of the interval; default 95 %, the convention.

    Returns:
        float64 [2, C], the low end first; the estimate twice where all replicates are equal, NaN for
        a single text.

    Raises:
        UsageError: a confidence outside (0, 1).
    """
    _require_confidence(confidence)
    if len(without) < 2:
        return torch.full((2, len(estimate)), torch.nan, dtype=torch.float64)
    # With few texts some samples are permutations of all texts: equal to the estimate up to rounding.
    apart = torch.where((drawn - estimate).abs() <= _ROUNDING * estimate.abs(), 0.0, drawn - estimate)
    below = ((apart < 0).double() + (apart <= 0).double()).mean(0) / 2
    bias = torch.special.ndtri(below)
    pull = without.mean(0) - without
    acceleration = pull.pow(3).sum(0) / (6 * pull.pow(2).sum(0).pow(1.5))
    tail = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    ordered = drawn.sort(dim=0).values
    ends = []
    for z in torch.special.ndtri(tail):
        shifted = bias + z
        place = torch.special.ndtr(bias + shifted / (1 - acceleration * shifted))
        ends.append(_quantile(ordered, place.nan_to_num(0.5)))
    interval = torch.stack(ends)
    # Where every text changes by the same amount, replicates differ only by rounding.
    constant = ordered[-1] == ordered[0]
    return torch.where(constant, ordered[0], interval)


def _quantile(ordered: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """Linear interpolation between order statistics [draws, ...], at a fraction for each column."""
    place = fraction.double() * (len(ordered) - 1)
    low = place.floor().clamp(0, len(ordered) - 1).long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    below, above = ordered.gather(0, low[None])[0], ordered.gather(0, high[None])[0]
    rest = place - low
    # Without the equality test, two equal infinities would give NaN.
    return torch.where(rest == 0, below, torch.where(below == above, below, below + rest * (above - below)))


def _require_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UsageError(f"confidence {confidence} must lie between 0 and 1, such as 0.95")
