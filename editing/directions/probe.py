"""Probe: the weights of a logistic classifier of target and source texts.

On x' = (x - m) / s, with m the mean of the two languages' means and s the root mean variance about m, one number
for all coordinates, so that the penalty is comparable between layers and the geometry is kept:

    w, b = argmin  1/2 ||w||^2 + C sum_i log(1 + exp(-y_i (w . x'_i + b)))      y = +1 target, -1 source
    u = w / ||w||

Both languages have the same weight (class weights n / (2 n_language)).  C = 1 is scikit-learn's default.  Only a
line is estimated: v = (u . delta) u with delta DiffMean (``editing.directions.length``).
CLaS-Bench (arXiv 2601.08331) compares it with DiffMean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from editing.directions.length import along
from editing.directions.method import DirectionMethod
from editing.directions.texts import Estimate, Texts
from neurons.errors import BrocaError, UsageError
from neurons.setting import setting

PENALTY = 1.0  # C of scikit-learn, its default
MAX_ITERATIONS = 10_000
TOLERANCE = 1e-8


@dataclass(frozen=True)
class Classifier:
    """The line.

    Attributes:
        unit: float64 [d], of length 1, towards the target.
        accuracy: balanced accuracy on the training texts.
    """

    unit: torch.Tensor
    accuracy: float


def probe(source: torch.Tensor, target: torch.Tensor, penalty: float = PENALTY) -> Classifier:
    """The classifier's weights on texts' means [n_source, d] and [n_target, d].

    Raises:
        BrocaError: all texts are equal.
    """
    from sklearn.linear_model import LogisticRegression

    source, target = source.double(), target.double()
    both = torch.cat([source, target]) - (source.mean(0) + target.mean(0)) / 2
    scale = both.square().mean().sqrt()
    if not scale > 0:
        raise BrocaError("source and target do not differ: all texts' means are the same")
    is_target = torch.arange(len(both)) >= len(source)
    classifier = LogisticRegression(
        C=penalty, class_weight="balanced", max_iter=MAX_ITERATIONS, tol=TOLERANCE
    )
    inputs = (both / scale).numpy()
    classifier.fit(inputs, is_target.numpy())
    correct = torch.from_numpy(classifier.predict(inputs)) == is_target
    weights = torch.from_numpy(classifier.coef_[0])
    length = weights.norm()
    if not length > 0:
        raise BrocaError("source and target cannot be separated: their means are the same")
    accuracy = (correct[is_target].double().mean() + correct[~is_target].double().mean()) / 2
    return Classifier(weights / length, float(accuracy))


@dataclass(frozen=True)
class Probe(DirectionMethod):
    """The registered method."""

    name = "probe"
    line = "weights of a logistic classifier of the two languages"
    source = "arXiv 2601.08331"

    penalty: float = setting(PENALTY, "C of the classifier: larger values regularise less")

    def __post_init__(self) -> None:
        if not self.penalty > 0:
            raise UsageError(f"probe needs a penalty above 0, not {self.penalty}")

    def estimate(self, texts: Texts) -> Estimate:
        classifier = probe(texts.source, texts.target, self.penalty)
        return Estimate(along(classifier.unit, texts.diffmean), measures={"accuracy": classifier.accuracy})
