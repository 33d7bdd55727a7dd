"""The ablation study: for every neuron set a matrix over languages, random controls and dose curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from neurons.ablation.accuracy import PromptBatches
from neurons.ablation.conditions import UNTOUCHED, Condition, InMemory, condition_losses
from neurons.ablation.ledger import LedgerFile
from neurons.ablation.matrix import Changes, Specificity, bootstrapped, specificity
from neurons.ablation.replacement import REPLACEMENTS, Replacement, means_of
from neurons.architectures.anatomy import UNITS, Anatomy
from neurons.errors import UsageError
from neurons.files.artifact import package_versions
from neurons.models.memory import batches_for
from neurons.models.source import LoadedModel
from neurons.neuron_sets.identify import random_set
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.recording.corpus_recording import record_corpus, recording_key
from neurons.scorers.method import TEXTS
from neurons.statistics.bootstrap import CONFIDENCE, DRAWS
from neurons.statistics.statistics import Statistics
from neurons.text.batches import TokenBatch, counted_tokens, language_batches
from neurons.text.corpus import Corpus
from neurons.text.prompts import Prompts
from neurons.text.token_budget import LOSSES, text_read

CONTROLS = ("random", "matched")


@dataclass(frozen=True)
class Settings:
    """What is done; defaults are Broca's own choices.

    Attributes:
        way: one of ``neurons.ablation.replacement.REPLACEMENTS``.
        mean_of: "mean": the language whose mean it is; None: of all text together.
        controls: of ``CONTROLS``: as many random neurons in each layer, and random ones about as active.
        draws: of each control.
        doses: shares of each language's neurons, in the order of ``dosed``; with ``dose_of_model`` of all neurons of
            the model.
        resamples: bootstrap samples.
    """

    way: str = "zero"
    mean_of: str | None = None
    controls: tuple[str, ...] = CONTROLS
    draws: int = 3
    doses: tuple[float, ...] = ()
    dose_of_model: bool = False
    seed: int = 0
    resamples: int = DRAWS
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        if self.way not in REPLACEMENTS:
            raise UsageError(f"neurons are not ablated by {self.way!r}: choose {', '.join(REPLACEMENTS)}")
        if self.mean_of is not None and self.way != "mean":
            raise UsageError(f"a language's mean is not supported by the way {self.way!r}: take 'mean'")
        unknown = [control for control in self.controls if control not in CONTROLS]
        if unknown:
            raise UsageError(f"control {unknown[0]!r} is unknown: choose from {', '.join(CONTROLS)}")
        if self.draws < 0 or self.resamples < 1:
            raise UsageError("controls are drawn 0 times or more, texts once or more")
        if any(not 0 < dose <= 1 for dose in self.doses):
            raise UsageError("a dose is a share above 0 and at most 1, as 0.1")
        if not 0 < self.confidence < 1:
            raise UsageError(f"a confidence of {self.confidence} is impossible: write one such as 0.95")

    def moments(self, sets: Iterable[NeuronSet]) -> tuple[str, ...]:
        """What must be known of the activity of the sets' neurons or heads."""
        matched = bool("matched" in self.controls and self.draws)
        names = (*(["absolute"] if matched else []), *(["sum"] if self.way == "mean" else []))
        sites = sorted({one.site for one in sets}, reverse=True)
        return tuple(f"{site}:{name}" for site in sites for name in names)


@dataclass(frozen=True)
class Dose:
    """One point of the dose curves.

    Attributes:
        share: of the set, or of the model's neurons.
        sizes: neurons of each language.
        changes: [K, K].
    """

    share: float
    sizes: tuple[int, ...]
    changes: Changes


def set_title(name: str, method: str) -> str:
    """What a neuron set is headed with: its name, and the method where the name does not say it."""
    return name if name == method else f"{name} ({method})"


@dataclass(frozen=True)
class Effects:
    """What ablating one neuron set does to one measure.

    Attributes:
        own: [K, K], row i without language i's neurons; its ``nll`` is the mean of the measure.
        controls: control -> [K, K] of each draw.
    """

    own: Changes
    controls: Mapping[str, tuple[Changes, ...]]


@dataclass(frozen=True)
class SetOutcome:
    """What ablating one neuron set does.

    Attributes:
        sizes: neurons of each language.
        own: [K, K], row i without language i's neurons.
        controls: control -> [K, K] of each draw.
        doses: in the order asked for.
        specificity: of ``own``.
        answers: measure of ``neurons.ablation.accuracy`` -> what becomes of it; empty without prompts.
        unit: what is ablated, "neuron" or "head".
    """

    name: str
    method: str
    sizes: tuple[int, ...]
    own: Changes
    controls: dict[str, tuple[Changes, ...]]
    doses: tuple[Dose, ...]
    specificity: Specificity
    answers: Mapping[str, Effects] = field(default_factory=dict)
    unit: str = "neuron"


@dataclass(frozen=True)
class Study:
    """The whole study.

    Attributes:
        languages: the K names.
        tokens: predicted tokens of each language.
        baseline: float64 [K], mean negative log-likelihood of the untouched model, nats a token.
        metadata: JSON values: model, fingerprint, corpus, packages, sets.
        prompts: of each language; empty without prompts.
        answers: measure of ``neurons.ablation.accuracy`` -> float64 [K] of the untouched model.
    """

    languages: tuple[str, ...]
    texts: tuple[int, ...]
    tokens: tuple[int, ...]
    baseline: torch.Tensor
    sets: tuple[SetOutcome, ...]
    settings: Settings
    metadata: dict[str, Any]
    prompts: tuple[int, ...] = ()
    answers: Mapping[str, torch.Tensor] = field(default_factory=dict)


def units_of(study: Study) -> str:
    """What the sets of a study hold: "neurons", "heads" or "neurons or heads"."""
    return " or ".join(f"{unit}s" for unit in UNITS if any(one.unit == unit for one in study.sets))


@dataclass(frozen=True)
class _SetPlan:
    """Numbers of one set's conditions."""

    own: list[int]
    controls: dict[str, list[list[int]]]
    doses: list[tuple[float, dict[str, torch.Tensor], list[int]]]

    @property
    def on_prompts(self) -> list[int]:
        """The conditions that answers are measured under: all but the doses."""
        return [*self.own, *(one for draws in self.controls.values() for draw in draws for one in draw)]


def ablation_study(
    loaded: LoadedModel,
    corpus: Corpus,
    sets: Mapping[str, NeuronSet],
    settings: Settings | None = None,
    statistics: Statistics | None = None,
    tokens: int | None = None,
    batch_tokens: int | None = None,
    out: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    prompts: Prompts | None = None,
) -> Study:
    """Ablate each language's neurons and read every language without them.

    Args:
        loaded: the model, unchanged afterwards.
        corpus: held-out text; its languages, in its order, are ablated and measured.
        sets: name -> neuron set that has all of the corpus's languages.
        settings: None takes the defaults.
        statistics: with ``mlp_in:absolute`` for matched controls and ``mlp_in:sum`` for means, of heads
            ``attn_in:...``; None records them from the corpus, text by text.
        tokens: most tokens a language; None: the corpus's, else ``LOSSES.tokens``.
        batch_tokens: tokens read at once; None takes what memory allows.
        out: where the study will be written: unfinished work is kept beside it, and gone on with.
        progress: called with (tokens done, tokens in all), counting each condition's tokens.
        prompts: with answers, of the corpus's languages, to measure accuracy on too; None: none.

    Raises:
        UsageError: a language that a set or the prompts lack, no set, statistics that lack what is needed, a dose that
            the set does not have, or a layer in which no control is left.
        BrocaError: a set or statistics of another model, or a loss that is not finite.
    """
    how = Settings() if settings is None else settings
    languages = corpus.languages
    _require_fit(loaded, languages, sets, how)
    if prompts is not None:
        if missing := [language for language in languages if language not in prompts.of]:
            raise UsageError(f"there are no prompts for {', '.join(missing)}: write some, or leave them out")
        prompts = replace(prompts, of={language: prompts.of[language] for language in languages})
    moments = how.moments(sets.values())
    if moments and statistics is None:
        statistics = record_corpus(loaded, corpus, moments, TEXTS, tokens, None, batch_tokens)
    if statistics is not None and moments:
        loaded.require_fingerprint({"fingerprint": statistics.fingerprint}, "the statistics")
    conditions = [UNTOUCHED]
    plans = {
        name: _planned(conditions, one, languages, loaded.anatomy, how, statistics)
        for name, one in sets.items()
    }

    size = batches_for(loaded, False, 1)[0] if batch_tokens is None else batch_tokens
    batches = language_batches(loaded, corpus, tokens, size, LOSSES.tokens)
    for language, some in batches.items():
        if not some:
            raise UsageError(f"language {language!r} has no text of two tokens or more")
    asked = None if prompts is None else PromptBatches(loaded, prompts, size)
    on_prompts = [0, *(number for one in plans.values() for number in one.on_prompts)]
    distinct = {condition.digest for condition in conditions}
    of_prompts = {conditions[number].digest for number in on_prompts}
    total = len(distinct) * _counted(batches) + (len(of_prompts) * _counted(asked.of) if asked else 0)

    def advance(count: int) -> None:
        if progress is not None:
            progress(count, total)

    of_study = ["ablation", "" if prompts is None else prompts.digest]
    key = recording_key(loaded, {**batches, **(asked.of if asked else {})}, of_study)
    with nullcontext(InMemory()) if out is None else LedgerFile(out, key) as ledger:
        losses = condition_losses(loaded, batches, conditions, ledger, advance)
        answers = (
            asked.measured(loaded, [conditions[number] for number in on_prompts], ledger, advance)
            if asked
            else {}
        )
    of_answers = {
        measure: bootstrapped(values, (), how.resamples, how.seed, how.confidence)[0]
        for measure, values in answers.items()
    }
    place = {number: i for i, number in enumerate(on_prompts)}
    kept = [condition for one in plans.values() for condition in one.own]
    changes_of_text, drawn = bootstrapped(losses, kept, how.resamples, how.seed, how.confidence)
    return Study(
        languages=languages,
        texts=tuple(len(losses.tokens[language]) for language in languages),
        tokens=tuple(int(losses.tokens[language].sum()) for language in languages),
        baseline=changes_of_text.nll[0],
        sets=tuple(
            replace(
                _outcome(name, sets[name], one, changes_of_text, drawn, languages, how),
                answers={measure: _effects(one, changes, place) for measure, changes in of_answers.items()},
            )
            for name, one in plans.items()
        ),
        settings=how,
        metadata={
            "model": loaded.label,
            "fingerprint": loaded.fingerprint,
            **loaded.provenance,
            "corpus": corpus.provenance,
            "read": text_read(corpus, batches),
            "packages": package_versions(),
            "settings": {
                **asdict(how),
                "tokens": tokens,
                "batch_tokens": size,
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
            },
            "statistics": None if statistics is None else statistics.metadata.get("corpora"),
            "neuron_sets": {
                name: {key: one.metadata.get(key) for key in ("method", "fingerprint", "settings")}
                for name, one in sets.items()
            },
            "conditions": len(distinct),
            **({} if prompts is None else {"prompts_digest": prompts.digest}),
        },
        prompts=() if prompts is None else tuple(len(prompts.of[language]) for language in languages),
        answers={measure: changes.nll[0] for measure, changes in of_answers.items()},
    )


def _effects(plan: _SetPlan, changes: Changes, place: Mapping[int, int]) -> Effects:
    def of(numbers: Sequence[int]) -> Changes:
        return changes.of([place[number] for number in numbers])

    return Effects(of(plan.own), {control: tuple(map(of, draws)) for control, draws in plan.controls.items()})


def _counted(batches: Mapping[str, Sequence[TokenBatch]]) -> int:
    return sum(counted_tokens(some) for some in batches.values())


def _require_fit(
    loaded: LoadedModel, languages: Sequence[str], sets: Mapping[str, NeuronSet], how: Settings
) -> None:
    if not sets:
        raise UsageError("there is no neuron set to ablate")
    for name, one in sets.items():
        one.require_places(loaded)
        missing = [language for language in languages if language not in one.members]
        if missing:
            raise UsageError(
                f"the neuron set {name} has no language {', '.join(missing)}, which the corpus has: choose "
                f"languages that both have, of {', '.join(one.languages)}"
            )
    if len(languages) < 2:
        raise UsageError("an ablation matrix needs at least two languages")


def _planned(
    conditions: list[Condition],
    neurons: NeuronSet,
    languages: Sequence[str],
    anatomy: Anatomy,
    how: Settings,
    statistics: Statistics | None,
) -> _SetPlan:
    """Appends the conditions of a set to ``conditions``."""
    means = None
    if how.way == "mean" and statistics is not None:
        means = means_of(statistics, neurons.site, how.mean_of)
    replacement = Replacement(how.way, means, how.seed)

    def add(members: Mapping[str, torch.Tensor]) -> list[int]:
        """A condition for each language; their numbers."""
        first = len(conditions)
        for language in languages:
            columns = anatomy.unit_columns(neurons.unit, members[language])
            conditions.append(Condition(columns, replacement, neurons.site))
        return list(range(first, len(conditions)))

    own = add(neurons.members)
    controls: dict[str, list[list[int]]] = {}
    for control in how.controls:
        known = statistics if control == "matched" else None
        controls[control] = [
            add(_control(neurons, how.seed * how.draws + draw, known).members) for draw in range(how.draws)
        ]
    doses = []
    for share in how.doses:
        members = {k: dosed(neurons, k, share, how.seed, how.dose_of_model) for k in languages}
        doses.append((share, members, add(members)))
    return _SetPlan(own, controls, doses)


def _control(neurons: NeuronSet, seed: int, statistics: Statistics | None) -> NeuronSet:
    try:
        return random_set(neurons, seed, statistics)
    except UsageError as error:
        raise UsageError(
            f"{error}; ablate fewer {neurons.unit}s, or ask for no controls (0 draws)"
        ) from error


def dosed(neurons: NeuronSet, language: str, share: float, seed: int, of_model: bool = False) -> torch.Tensor:
    """A language's best neurons, at least one, int64 [n, 2] in (layer, neuron) order.

    The best are those with the largest scores; in a set that was selected with the ends "bottom" the smallest, with
    "both" largest and smallest in turn.  Equal scores are in (layer, neuron) order (the smallest of "both" in the
    reverse), but where all are equal, as in a random set, a random order takes the place of the scores.

    Args:
        share: of the language's neurons, or of the model's.

    Raises:
        UsageError: the set has fewer.
    """
    rows, scores = neurons.of(language), neurons.scores[language]
    if not len(rows):
        return rows
    whole = sum(neurons.counts) if of_model else len(rows)
    count = max(1, round(share * whole))
    if count > len(rows):
        raise UsageError(
            f"language {language!r}: a dose of {share:g} of the model is {count} {neurons.unit}s, and the set has "
            f"{len(rows)}: identify with --top-rate {share:g} or more"
        )
    if bool((scores == scores[0]).all()):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    else:
        ends = neurons.metadata.get("settings", {}).get("ends", "top")
        order = scores.argsort(descending=ends != "bottom", stable=True)
        if ends == "both":
            order = torch.stack([order, order.flip(0)], dim=1).flatten()[: len(rows)]
    return rows[order[:count].sort().values]


def _outcome(
    name: str,
    neurons: NeuronSet,
    plan: _SetPlan,
    changes: Changes,
    drawn: Mapping[int, torch.Tensor],
    languages: Sequence[str],
    how: Settings,
) -> SetOutcome:
    own = changes.of(plan.own)
    matrices = torch.stack([drawn[condition] for condition in plan.own], dim=1)
    return SetOutcome(
        name=name,
        method=str(neurons.metadata.get("method", "unknown")),
        sizes=tuple(len(neurons.of(language)) for language in languages),
        own=own,
        controls={
            control: tuple(changes.of(one) for one in draws) for control, draws in plan.controls.items()
        },
        doses=tuple(
            Dose(share, tuple(len(members[language]) for language in languages), changes.of(numbers))
            for share, members, numbers in plan.doses
        ),
        specificity=specificity(own.change, matrices, how.confidence),
        unit=neurons.unit,
    )
