"""CULNIG: neurons that answers in one language or about one culture depend on (arXiv 2510.08284).

For a prompt x with an answer token y, p = softmax(logits at the last position)[y], and a the output of the
linear map before the nonlinearity (``gate_proj``):

    s_j(x)   = p * max_t (a_tj * dp/da_tj)
    score    = mean of s over target prompts - mean of max(0, s) over control prompts

(a control prompt has the options and no question).  A neuron belongs to language k if it is

1. among the round(top_rate * L*I) largest scores of k,
2. not among the round(recognition_rate * L*I) largest means of s over k's recognition prompts, and
3. at least min_z standard deviations (of the population) above its own mean over languages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neurons.errors import BrocaError, UsageError
from neurons.scorers.means import means, rate_count, require_several
from neurons.scorers.method import PROMPTS, Scorer, answers
from neurons.scorers.scores import Scores, every_place
from neurons.scorers.selection import Selection
from neurons.setting import setting
from neurons.statistics.statistics import Statistics

TOP_RATE = 0.003  # arXiv 2510.08284, as are the next two
RECOGNITION_RATE = 0.01
MIN_Z = 0.5


def culnig(
    target: torch.Tensor,
    control: torch.Tensor,
    recognition: torch.Tensor | None,
    prompts: torch.Tensor,
    control_prompts: torch.Tensor,
    recognition_prompts: torch.Tensor | None,
    top_rate: float = TOP_RATE,
    recognition_rate: float = RECOGNITION_RATE,
    min_z: float = MIN_Z,
    places: torch.Tensor | None = None,
) -> Scores:
    """Score every neuron for every language.

    Args:
        target: float64 [L, I, K], sum of s over the target prompts.
        control: float64 [L, I, K], sum of max(0, s) over the control prompts.
        recognition: float64 [L, I, K], sum of s over the recognition prompts; None skips step 2.
        prompts: int64 [K], number of target prompts.
        control_prompts: int64 [K], number of control prompts.
        recognition_prompts: int64 [K]; None if ``recognition`` is.
        top_rate: fraction of all neurons that may belong to a language.
        recognition_rate: fraction of all neurons that step 2 excludes from a language.
        min_z: minimum z-score over languages; a neuron with equal scores for all has 0.
        places: bool [L, I], where a layer has a neuron; None: everywhere.

    Returns:
        values score; member as in 1 to 3 (select with a top rate of ``top_rate`` or more); no exclusivity;
        notes "recognition", whether step 2 was applied.

    Raises:
        UsageError: fewer than two languages, a language without prompts of one kind, recognition
            scores without their count, or a rate outside (0, 1] or too small to keep a neuron.
        BrocaError: a sum that is not finite, or a negative control.
    """
    require_several(target.shape[-1], "CULNIG")
    places = every_place(target) if places is None else places
    kept = rate_count("top rate", top_rate, int(places.sum()))
    if (recognition is None) != (recognition_prompts is None):
        raise UsageError("recognition scores need the number of their prompts: give both or neither")
    if bool((control < 0).any()):
        raise BrocaError("a control score is negative, but negative scores of control prompts count as 0")
    values = means(target, prompts, "prompts") - means(control, control_prompts, "control prompts")
    member = _largest(values, kept, places) & (_deviations(values) >= min_z)
    if recognition is not None and recognition_prompts is not None:
        excluded = rate_count("recognition rate", recognition_rate, int(places.sum()))
        recognised = means(recognition, recognition_prompts, "recognition prompts")
        member &= ~_largest(recognised, excluded, places)
    return Scores(values=values, member=member, notes={"recognition": recognition is not None})


def answer_scores(
    activation: torch.Tensor, gradient: torch.Tensor, probability: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """s of every prompt of a batch, float64 [rows, I].

    Args:
        activation: [rows, length, I], a.
        gradient: [rows, length, I], dp/da of the row's own p.
        probability: [rows], p.
        counted: bool [rows, length], False at padding.

    Raises:
        BrocaError: a row without a counted position.
    """
    if not bool(counted.any(1).all()):
        raise BrocaError("a prompt has no counted token: leave empty prompts out")
    dtype = torch.promote_types(activation.dtype, torch.float32)
    product = activation.to(dtype) * gradient.to(dtype)
    # -inf at padding: a 0 there would exceed negative products.
    largest = product.masked_fill(~counted[..., None], -torch.inf).amax(1)
    return probability.double()[:, None] * largest.double()


def _largest(values: torch.Tensor, count: int, places: torch.Tensor) -> torch.Tensor:
    """bool [L, I, K]: each language's ``count`` largest values at ``places``, ties by (layer, neuron)."""
    flat = values.masked_fill(~places[..., None], -torch.inf).flatten(0, 1)
    order = torch.argsort(flat, dim=0, descending=True, stable=True)[:count]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(0, order, True).view_as(values)


def _deviations(values: torch.Tensor) -> torch.Tensor:
    """z-scores over languages by the population standard deviation; 0 where all languages are equal."""
    centred = values - values.mean(-1, keepdim=True)
    # Equal values have a standard deviation of about 1e-17 from rounding, so it cannot be compared with 0.
    equal = values.amax(-1, keepdim=True) == values.amin(-1, keepdim=True)
    return torch.where(equal, 0.0, centred / values.std(-1, correction=0, keepdim=True))


@dataclass(frozen=True)
class Culnig(Scorer):
    """The registered scorer."""

    name = "culnig"
    line = "gradient x activation of answers minus that of control prompts"
    source = "arXiv 2510.08284"
    moments = ("mlp_act:answer", "mlp_act:answer_control")
    reads = PROMPTS
    selection = Selection(scope="language", top_rate=TOP_RATE)
    rate_in_score = True

    recognition_rate: float = setting(RECOGNITION_RATE, "fraction of neurons excluded by the second control")
    least_z: float = setting(MIN_Z, "minimum z-score over languages")

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        target, prompts = answers(statistics, "mlp_act:answer")
        control, control_prompts = answers(statistics, "mlp_act:answer_control")
        recognition = recognition_prompts = None
        if "mlp_act:answer_recognition" in statistics.moments:
            recognition, recognition_prompts = answers(statistics, "mlp_act:answer_recognition")
        return culnig(
            target,
            control,
            recognition,
            prompts,
            control_prompts,
            recognition_prompts,
            top_rate,
            self.recognition_rate,
            self.least_z,
            statistics.places(self.unit, target),
        )
