"""Integrated gradients of the answer: knowledge neurons by language (Dai et al., ACL 2022, arXiv 2104.08696).

With P(y | a) the probability of a prompt's answer when the activations of one layer's neurons at the prompt's last token
are set to a, the integral from 0 to the prompt's own activations along their line, as a right Riemann sum of m steps (the
paper has m = 20):

    (a_j / m) * sum_{i=1..m} dP(y | (i/m) * a) / da_j

All neurons of the layer change together, as in the released code (Hunter-DDM/knowledge-neurons); the paper's formula changes
neuron j alone.  Each language has the neurons of largest mean over its prompts.  As m goes to infinity the sum over the
neurons of a layer converges to P(y | a) - P(y | 0), of which each neuron has its part.
"""

from __future__ import annotations

import torch

from neurons.errors import BrocaError
from neurons.scorers.means import means
from neurons.scorers.method import PROMPTS, Scorer, answers
from neurons.scorers.scores import Scores, fractions
from neurons.statistics.statistics import Statistics


def integrated_gradients(integrated: torch.Tensor, prompts: torch.Tensor) -> Scores:
    """Score every neuron for every language, one language or more.

    Args:
        integrated: float64 [L, I, K], sum over prompts of ``integrate``.
        prompts: int64 [K], number of prompts.

    Returns:
        values, the mean over prompts; member where it is above 0; exclusivity of its positive part.

    Raises:
        UsageError: a language without prompts.
        BrocaError: a sum that is not finite.
    """
    mean = means(integrated, prompts, "prompts")
    return Scores(values=mean, member=mean > 0, exclusivity=fractions(mean.clamp(min=0)))


def integrate(activation: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """The integrated gradient of a batch of prompts, float64 [rows, I].

    Args:
        activation: [rows, I], a.
        gradients: [m, rows, I]; index i - 1 is the gradient at the activation (i / m) * a.

    Raises:
        BrocaError: no step, or gradients of another shape.
    """
    if not len(gradients) or gradients.shape[1:] != activation.shape:
        raise BrocaError(
            f"gradients {list(gradients.shape)} do not fit activations {list(activation.shape)}: "
            "at least one step of the same shape is needed"
        )
    return activation.double() * gradients.sum(0, dtype=torch.float64) / len(gradients)


class IntegratedGradients(Scorer):
    """The registered scorer."""

    name = "integrated-gradients"
    line = "integrated gradients of answers: knowledge neurons"
    source = "arXiv 2104.08696"
    moments = ("mlp_in:integrated",)
    reads = PROMPTS

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        return integrated_gradients(*answers(statistics, "mlp_in:integrated"))
