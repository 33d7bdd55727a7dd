"""Language-confusion neurons: those that make a wrong token more probable where an answer changes its language
(Nie et al., arXiv 2505.16538).

At the last token before the first token w in a wrong language, with x_l the residual stream before the MLP of layer l
adds to it, h_lj a neuron's activation (the input of ``down_proj``) and c_lj its value (column j), neuron (l, j) has

    rise_lj = log p(w | x_l + h_lj c_lj) - log p(w | x_l)        p(. | x) = softmax(U N(x))

N is the final norm with the scale that it has at the output of the last layer, so that it is linear.  A prompt counts its
``top`` largest rises.  The score of a neuron is the mean over the prompts of a language of the rises that count, 0 where
they do not, less the same in a sibling if there is one: a model of the same architecture that was tuned on many languages
and reads the same prompts.  A zero of ``scale`` removes the neurons from ``down_proj``, as the paper does.

As in the released code (ercong21/lang_confusion): 300 rises a prompt, and the 100 neurons of highest score, which are
.022 % of Llama 3 8B's.  Differences: there scores are sums over the prompts, in the same order; there w is the token
that each model itself predicts, so that the sibling is scored for another token than the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neurons.errors import UsageError
from neurons.scorers.means import means
from neurons.scorers.method import CONFUSIONS, Scorer, answers
from neurons.scorers.scores import Scores
from neurons.scorers.selection import Selection
from neurons.setting import COUNT, setting
from neurons.statistics.statistics import Statistics

MOMENT, SIBLING = "mlp_in:confusion", "mlp_in:confusion_sibling"
TOP = 300
TOP_RATE = 100 / (32 * 14336)


def rises(changes: torch.Tensor, log_probabilities: torch.Tensor, token: int) -> torch.Tensor:
    """log p(token | z + change) - log p(token | z) of each change, float64 [n].

    Args:
        changes: [n, vocabulary], of the logits z.
        log_probabilities: [vocabulary], log softmax(z).
        token: w.
    """
    return changes[:, token].double() - (changes + log_probabilities).logsumexp(-1).double()


def language_confusion(
    counted: torch.Tensor, prompts: torch.Tensor, sibling: torch.Tensor | None = None
) -> Scores:
    """Score every neuron for every language, one language or more.

    Args:
        counted: float64 [L, I, K], sum over prompts of the rises that count.
        prompts: int64 [K], number of prompts.
        sibling: the same in the sibling, on the same prompts; None without one.

    Returns:
        values in nats a prompt; member where they are above 0; no exclusivity.

    Raises:
        UsageError: a language without prompts, or a sibling of another shape.
        BrocaError: a sum that is not finite.
    """
    values = means(counted, prompts, "prompts")
    if sibling is not None:
        if sibling.shape != counted.shape:
            raise UsageError(
                f"the sibling has {sibling.shape[0]} layers of {sibling.shape[1]} neurons, the model {counted.shape[0]} of "
                f"{counted.shape[1]}: give a model that was tuned from the same checkpoint"
            )
        values = values - means(sibling, prompts, "prompts")
    return Scores(values=values, member=values > 0)


@dataclass(frozen=True)
class LanguageConfusion(Scorer):
    """The registered scorer."""

    name = "language-confusion"
    line = "rise of a wrong token's log-probability where an answer changes its language"
    source = "arXiv 2505.16538"
    moments = (MOMENT,)
    reads = CONFUSIONS
    selection = Selection(scope="language", top_rate=TOP_RATE)

    top: int = setting(TOP, "number of rises that a prompt counts", kind=COUNT)

    def scores(self, statistics: Statistics, top_rate: float) -> Scores:
        sibling = statistics.moment(SIBLING) if SIBLING in statistics.moments else None
        return language_confusion(*answers(statistics, MOMENT), sibling)
