"""The registry of scorers.  To add one, write its file and list its class here."""

from __future__ import annotations

from neurons.errors import UsageError
from neurons.scorers.average_precision import AveragePrecision
from neurons.scorers.clas import Clas
from neurons.scorers.culnig import Culnig
from neurons.scorers.gradient import Gradient, HeadGradient
from neurons.scorers.gradient_contrast import GradientContrast, HeadGradientContrast
from neurons.scorers.head_shapley import HeadShapley
from neurons.scorers.integrated_gradients import IntegratedGradients
from neurons.scorers.language_confusion import LanguageConfusion
from neurons.scorers.lape import Lape
from neurons.scorers.lape_general import LapeGeneral
from neurons.scorers.lape_gradient import LapeGradient
from neurons.scorers.localizer import Localizer
from neurons.scorers.method import PACKED, TEXTS, Scorer
from neurons.scorers.momentum import Momentum
from neurons.scorers.plnd import Plnd, PlndReleased
from neurons.scorers.random_control import Random, RandomMatched

_ALL: tuple[type[Scorer], ...] = (
    Lape,
    LapeGeneral,
    Gradient,
    GradientContrast,
    LapeGradient,
    Culnig,
    IntegratedGradients,
    AveragePrecision,
    Plnd,
    PlndReleased,
    Localizer,
    Momentum,
    Clas,
    LanguageConfusion,
    HeadGradient,
    HeadGradientContrast,
    HeadShapley,
    Random,
    RandomMatched,
)
METHODS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in _ALL}


def method_of(name: str) -> type[Scorer]:
    """
    Raises:
        UsageError: no such method.
    """
    if name not in METHODS:
        raise UsageError(f"method {name!r} is unknown: choose from {', '.join(METHODS)}")
    return METHODS[name]


def moments_of(names: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The moments that one recording for several methods must hold, and how it reads the text.

    Raises:
        UsageError: an unknown method, or one that is not computed from text.
    """
    methods = [method_of(name) for name in names]
    for name, method in zip(names, methods, strict=True):
        if not method.records():
            raise UsageError(
                f"method {name!r} reads {method.reads}, so text cannot be recorded for it: call `broca identify` with it"
            )
    moments = tuple(dict.fromkeys(moment for method in methods for moment in method.moments))
    return moments, TEXTS if any(method.reads == TEXTS for method in methods) else PACKED
