"""The methods by name: what each needs recorded, how it scores, and how its neurons are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from neurons.errors import UsageError
from neurons.scorers.average_precision import average_precision
from neurons.scorers.clas import clas
from neurons.scorers.culnig import LEAST_Z, RECOGNITION_RATE, culnig
from neurons.scorers.gradient import gradient
from neurons.scorers.gradient_contrast import gradient_contrast
from neurons.scorers.integrated_gradients import integrated_gradients
from neurons.scorers.lape import ACTIVATION_RATE, FILTER_RATE, lape
from neurons.scorers.lape_general import MOST_PENALTY, lape_general
from neurons.scorers.lape_gradient import lape_gradient
from neurons.scorers.localizer import localizer
from neurons.scorers.momentum import momentum
from neurons.scorers.plnd import plnd
from neurons.scorers.scores import Scores
from neurons.scorers.selection import Selection
from neurons.statistics.statistics import Statistics

# What a method reads: text in full blocks, a text a row, prompts with answers.
PACKED, TEXTS, PROMPTS, NOTHING = "blocks", "texts", "prompts", "nothing"
RESPONSES = "mlp_in:responses"

# (statistics, top rate, settings) -> scores
Scorer = Callable[[Statistics, float, Mapping[str, Any]], Scores]


@dataclass(frozen=True)
class Method:
    """One way of finding language neurons.

    Attributes:
        line: what it is, in a line.
        source: where it was published.
        moments: what must be recorded.
        reads: "blocks" (full blocks of joined text), "texts" (a text a row), "prompts" (with answers) or
            "nothing".
        selection: how neurons are chosen where nothing else is asked for.
        settings: name -> default, of the scorer.
        score: None for the controls, which follow another set.
        rate_in_score: whether the top rate is the scorer's business and selection takes all its members.
        parallel: whether line i must be the same text in every language.
    """

    line: str
    source: str
    moments: tuple[str, ...]
    reads: str
    selection: Selection
    score: Scorer | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate_in_score: bool = False
    parallel: bool = False

    @property
    def needs(self) -> str:
        """What ``broca identify`` must be given, as options; in brackets what it may."""
        if self.reads == NOTHING:
            return "--like, or MODEL --languages"
        if self.score is None:
            return "--like, and --statistics or MODEL --corpus"
        if self.reads == PROMPTS:
            control = " --control [--recognition]" if "mlp_act:answer_control" in self.moments else ""
            return f"MODEL --prompts{control}"
        return f"MODEL --corpus, or --statistics{'; parallel text' if self.parallel else ''}"

    def require_settings(self, settings: Iterable[str]) -> None:
        """
        Raises:
            UsageError: a setting that the method does not have.
        """
        unknown = sorted(set(settings) - set(self.settings))
        if unknown:
            known = ", ".join(self.settings) or "none"
            raise UsageError(f"setting {unknown[0]!r} is not one of this method's: it has {known}")

    def scores(self, statistics: Statistics, top_rate: float, settings: Mapping[str, Any]) -> Scores:
        """Score every neuron.

        Raises:
            UsageError: a setting that the method does not have, or statistics that lack what it needs.
        """
        self.require_settings(settings)
        assert self.score is not None
        return self.score(statistics, top_rate, {**self.settings, **settings})


def _responses(statistics: Statistics) -> list[torch.Tensor]:
    if not statistics.responses:
        raise UsageError(
            "the statistics hold no responses of single texts: record them with `broca record ... --for "
            "average-precision`"
        )
    return [statistics.responses[language] for language in statistics.languages]


def _parallel_responses(statistics: Statistics) -> list[torch.Tensor]:
    """Responses to the lines that every language has."""
    responses = _responses(statistics)
    lines = [statistics.lines[language] for language in statistics.languages]
    common = lines[0]
    for other in lines[1:]:
        common = common[torch.isin(common, other)]
    if not len(common):
        raise UsageError(
            "no line has a text in every language: parallel text is needed, line by line the same"
        )
    return [values[torch.isin(own, common)] for values, own in zip(responses, lines, strict=True)]


def _answers(statistics: Statistics, moment: str) -> tuple[torch.Tensor, torch.Tensor]:
    return statistics.moment(moment), statistics.prompts[moment.partition(":")[2]]


def _culnig(statistics: Statistics, top_rate: float, settings: Mapping[str, Any]) -> Scores:
    target, prompts = _answers(statistics, "mlp_act:answer")
    control, control_prompts = _answers(statistics, "mlp_act:answer_control")
    recognition = recognition_prompts = None
    if "mlp_act:answer_recognition" in statistics.moments:
        recognition, recognition_prompts = _answers(statistics, "mlp_act:answer_recognition")
    return culnig(
        target, control, recognition, prompts, control_prompts, recognition_prompts, top_rate, **settings
    )


_OF_EACH = Selection(scope="language", top_rate=0.01)
_OF_ALL = Selection(scope="global", top_rate=0.01)
_MEMBERS = Selection(scope="language", top_rate=0.01, kinds=("specific", "related"))
_LAPE = {"filter_rate": FILTER_RATE, "activation_rate": ACTIVATION_RATE}

METHODS: dict[str, Method] = {
    "lape": Method(
        "entropy of how often a neuron fires in each language",
        "arXiv 2402.16438",
        ("mlp_act:positive",),
        PACKED,
        _OF_ALL,
        lambda s, rate, settings: lape(s.moment("mlp_act:positive"), s.seen(), **settings),
        _LAPE,
    ),
    "lape-general": Method(
        "LAPE with a penalty that drives general neurons out",
        "NJUNLP/Language-Neurons-Alignment, AAAI 2026",
        ("mlp_act:positive",),
        PACKED,
        _OF_ALL,
        lambda s, rate, settings: lape_general(s.moment("mlp_act:positive"), s.seen(), rate, **settings),
        {"activation_rate": ACTIVATION_RATE, "most_penalty": MOST_PENALTY},
    ),
    "gradient": Method(
        "gradient x activation: what the language's likelihood leans on",
        "first-order attribution, arXiv 1611.06440",
        ("mlp_in:attribution",),
        PACKED,
        _OF_EACH,
        lambda s, rate, settings: gradient(s.moment("mlp_in:attribution"), s.seen()),
    ),
    "gradient-contrast": Method(
        "gradient x activation, less the largest of any other language",
        "Broca",
        ("mlp_in:attribution",),
        PACKED,
        _OF_EACH,
        lambda s, rate, settings: gradient_contrast(s.moment("mlp_in:attribution"), s.tokens),
    ),
    "lape-gradient": Method(
        "LAPE's entropy of gradient x activation instead of firing rates",
        "Broca, after arXiv 2402.16438",
        ("mlp_in:attribution",),
        PACKED,
        _OF_ALL,
        lambda s, rate, settings: lape_gradient(s.moment("mlp_in:attribution"), s.seen(), **settings),
        _LAPE,
    ),
    "culnig": Method(
        "gradient x activation of answers, less that of control prompts",
        "arXiv 2510.08284",
        ("mlp_act:answer", "mlp_act:answer_control"),
        PROMPTS,
        Selection(scope="language", top_rate=0.003),
        _culnig,
        {"recognition_rate": RECOGNITION_RATE, "least_z": LEAST_Z},
        rate_in_score=True,
    ),
    "integrated-gradients": Method(
        "integrated gradients of answers: knowledge neurons",
        "arXiv 2104.08696",
        ("mlp_in:integrated",),
        PROMPTS,
        _OF_EACH,
        lambda s, rate, settings: integrated_gradients(*_answers(s, "mlp_in:integrated")),
    ),
    "average-precision": Method(
        "how well a neuron's mean response tells the language's texts from others, top and bottom",
        "arXiv 2404.02431",
        (RESPONSES,),
        TEXTS,
        # 1000 + 1000 of Llama-2-7B's 352,256.
        Selection(scope="language", top_rate=0.003, ends="both"),
        lambda s, rate, settings: average_precision(_responses(s)),
    ),
    "plnd": Method(
        "neurons whose removal changes every text of a language most, exact",
        "arXiv 2402.18815",
        ("mlp_in:worst_rank",),
        TEXTS,
        _MEMBERS,
        lambda s, rate, settings: plnd(s.moment("mlp_in:worst_rank"), rate),
        rate_in_score=True,
    ),
    "plnd-released": Method(
        "the same as the released code has it: the size of up_proj's output alone",
        "arXiv 2402.18815, released code",
        ("mlp_up:worst_rank",),
        TEXTS,
        _MEMBERS,
        lambda s, rate, settings: plnd(s.moment("mlp_up:worst_rank"), rate),
        rate_in_score=True,
    ),
    "localizer": Method(
        "Welch's t of a neuron's size in the language's texts against all others",
        "arXiv 2411.02280",
        ("mlp_in:text_absolute", "mlp_in:text_square"),
        TEXTS,
        _OF_EACH,
        lambda s, rate, settings: localizer(
            s.moment("mlp_in:text_absolute"), s.moment("mlp_in:text_square"), s.texts, **settings
        ),
        {"false_discovery_rate": None},
    ),
    "momentum": Method(
        "how often a neuron goes the same way between a text and its translations",
        "AUSteer, ICLR 2026",
        (RESPONSES,),
        TEXTS,
        _OF_EACH,
        lambda s, rate, settings: momentum(_parallel_responses(s)),
        parallel=True,
    ),
    "clas": Method(
        "neurons whose mean is above 0 in one language of parallel text only",
        "arXiv 2601.16390",
        ("mlp_in:text_mean",),
        TEXTS,
        Selection(scope="language", top_rate=1.0, kinds=("specific",)),
        lambda s, rate, settings: clas(s.text_mean("mlp_in")),
        parallel=True,
    ),
    "random": Method("a control: as many neurons in the same layers, at random", "-", (), NOTHING, _OF_EACH),
    "random-matched": Method(
        "a control: the same, and alike in activity",
        "-",
        ("mlp_in:absolute",),
        PACKED,
        _OF_EACH,
    ),
}


def method_of(name: str) -> Method:
    """
    Raises:
        UsageError: no such method.
    """
    if name not in METHODS:
        raise UsageError(f"method {name!r} is unknown: choose from {', '.join(METHODS)}")
    return METHODS[name]


def moments_of(names: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """What one recording for several methods must hold, and how it reads the text.

    Raises:
        UsageError: an unknown method, or one that is not computed from text.
    """
    methods = [method_of(name) for name in names]
    for name, method in zip(names, methods, strict=True):
        if method.reads in (PROMPTS, NOTHING):
            raise UsageError(
                f"method {name!r} reads {'prompts' if method.reads == PROMPTS else 'nothing'}, so text cannot be "
                "recorded for it: call `broca identify` with it"
            )
    moments = tuple(dict.fromkeys(moment for method in methods for moment in method.moments))
    return moments, TEXTS if any(method.reads == TEXTS for method in methods) else PACKED
