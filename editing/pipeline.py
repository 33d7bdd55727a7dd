"""The main job, end to end: neurons, a direction and an edit for each target, checkpoints, measurements.

The corpus is cut by line number: one half to estimate from, a quarter to choose settings on, a quarter to
report.  What is reported of the edit is measured on the checkpoint that was written, loaded again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from editing.comparison import (
    Candidate,
    choose,
    hook_candidates,
    keyed_candidates,
    measure_candidates,
    steer2edit_candidates,
)
from editing.direction import Direction, load_direction
from editing.directions.diffmean import diffmean_direction
from editing.evaluation import Evaluation, Outcome
from editing.export import export
from editing.live import exchanged
from editing.plan import load_plan, parse_layers
from editing.recipe import Recipe
from editing.report import Report, outcome_from_json, report_files
from editing.stages import Stages, digest
from neurons.artifact import write_atomically
from neurons.corpus import Corpus, read_corpus
from neurons.errors import UsageError
from neurons.identify import identify
from neurons.neuron_set import load_neuron_set
from neurons.source import LoadedModel, ModelSource, load_model, open_model


class Screen(Protocol):
    """What the pipeline tells a person while it works."""

    def stage(self, name: str, skipped: bool) -> None:
        """A stage begins, or is skipped as unchanged."""

    def progress(self, title: str, total: int | None, unit: str) -> Any:
        """A context that gives a function to call with the amount of work done."""


@dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        out: directory of the results.
        reports: one a target, in the recipe's order.
        neurons: language -> how many neurons were found.
    """

    out: Path
    reports: tuple[Report, ...]
    neurons: dict[str, int]


def run(recipe: Recipe, screen: Screen) -> Result:
    """Do what the recipe says, skipping the stages that are done and unchanged.

    Raises:
        UsageError: a recipe that names languages or files that are not there.
        BrocaError: whatever a stage refuses.
    """
    return _Run(recipe, screen).all()


class _Run:
    def __init__(self, recipe: Recipe, screen: Screen) -> None:
        self.recipe, self.screen = recipe, screen
        self.source: ModelSource = open_model(recipe.model)
        self.corpora: dict[str, Corpus] = {
            part: read_corpus(recipe.corpus, recipe.languages, part)
            for part in ("estimate", "choose", "report")
        }
        for language in (recipe.source, *recipe.targets):
            if language not in self.corpora["report"].languages:
                raise UsageError(
                    f"{recipe.corpus}: no text for {language} (there is "
                    f"{', '.join(self.corpora['report'].languages)})"
                )
        self.layers = (
            None if recipe.layers is None else parse_layers(recipe.layers, self.source.anatomy.layers)
        )
        self.out = recipe.out
        self.stages = Stages(recipe.out, screen.stage)

    @cached_property
    def loaded(self) -> LoadedModel:
        return load_model(self.recipe.model, self.recipe.device, self.recipe.dtype)

    def all(self) -> Result:
        recipe = self.recipe
        common = {
            "fingerprint": self.source.fingerprint,
            "model": recipe.model,
            "device": recipe.device,
            "dtype": recipe.dtype,
        }
        text = {part: corpus.digest for part, corpus in self.corpora.items()}
        self.stages.run(
            "identify",
            {**common, "method": recipe.method, "top_rate": recipe.top_rate, "text": text["estimate"]},
            ["neurons.safetensors"],
            self.identify,
        )
        steering = {
            **common,
            "source": recipe.source,
            "layers": recipe.layers,
            "key_neurons": recipe.key_neurons,
            "strengths": recipe.strengths,
            "samples": recipe.samples,
            "seed": recipe.seed,
        }
        for target in recipe.targets:
            direction, edit, choice = (
                f"direction-{target}.safetensors",
                f"edit-{target}.safetensors",
                f"choice-{target}.json",
            )
            self.stages.run(
                f"direction to {target}",
                {**common, "source": recipe.source, "text": text["estimate"]},
                [direction],
                partial(self.direction, target),
            )
            self.stages.run(
                f"edit to {target}",
                {
                    **steering,
                    "text": [text["estimate"], text["choose"]],
                    "direction": digest(self.out / direction),
                    "neurons": digest(self.out / "neurons.safetensors"),
                },
                [edit, choice],
                partial(self.edit, target),
            )
            self.stages.run(
                f"export to {target}",
                {**common, "edit": digest(self.out / edit)},
                [f"checkpoint-{target}"],
                partial(self.export, target),
            )
            self.stages.run(
                f"measure {target}",
                {
                    **steering,
                    "text": text["report"],
                    "choice": digest(self.out / choice),
                    "direction": digest(self.out / direction),
                    "checkpoint": digest(self.out / f"checkpoint-{target}"),
                },
                [f"measured-{target}.json"],
                partial(self.measure, target),
            )
        measured = [f"measured-{target}.json" for target in recipe.targets]
        self.stages.run(
            "report",
            {"measured": [digest(self.out / name) for name in measured]},
            ["report.json", "report.md", "report.png", "report.svg"],
            self.report,
        )
        neurons = load_neuron_set(self.out / "neurons.safetensors")
        return Result(
            self.out,
            tuple(self.read_report(target) for target in recipe.targets),
            {language: len(neurons.of(language)) for language in neurons.languages},
        )

    def identify(self) -> None:
        corpus = self.corpora["estimate"]
        with self.screen.progress("Recording activations", None, "tokens") as advance:
            found = identify(self.loaded, corpus, self.recipe.method, self.recipe.top_rate, progress=advance)
        found.save(self.out / "neurons.safetensors")

    def direction(self, target: str) -> None:
        with self.screen.progress("Recording the direction", None, "tokens") as advance:
            found = diffmean_direction(
                self.loaded, self.corpora["estimate"], self.recipe.source, target, advance
            )
        found.save(self.out / f"direction-{target}.safetensors")

    def candidates(self, direction: Direction) -> list[list[Candidate]]:
        neurons = (
            load_neuron_set(self.out / "neurons.safetensors")
            if self.recipe.key_neurons == "identified"
            else None
        )
        return [
            hook_candidates(self.loaded, direction),
            steer2edit_candidates(self.loaded, direction),
            keyed_candidates(
                self.loaded,
                direction,
                self.corpora["estimate"],
                self.recipe.strengths,
                self.layers,
                neurons,
            ),
        ]

    def evaluation(self, target: str, part: str) -> Evaluation:
        recipe = self.recipe
        return Evaluation(
            self.loaded,
            self.corpora[part],
            recipe.source,
            target,
            samples=recipe.samples,
            seed=recipe.seed,
        )

    def edit(self, target: str) -> None:
        direction = load_direction(self.out / f"direction-{target}.safetensors")
        ways = self.candidates(direction)
        with self.screen.progress(
            f"Choosing settings, {self.recipe.source} to {target}", sum(map(len, ways)), "settings"
        ) as advance:
            evaluation = self.evaluation(target, "choose")
            chosen = {}
            tried = []
            for candidates in ways:
                measured = []
                for candidate, outcome in measure_candidates(evaluation, candidates):
                    measured.append((candidate, outcome))
                    tried.append(outcome.as_json())
                    advance(1)
                if measured:
                    best, _ = choose(measured, evaluation.ceiling, self.recipe.source)
                    chosen[best.way] = best
        plan = chosen["keyed edit"].plan
        assert plan is not None  # a keyed candidate always has one
        plan.save(self.out / f"edit-{target}.safetensors")
        choice = {way: candidate.settings for way, candidate in chosen.items()}
        _write_json(
            self.out / f"choice-{target}.json",
            {"ceiling": evaluation.ceiling, "chosen": choice, "tried": tried},
        )

    def export(self, target: str) -> None:
        plan = load_plan(self.out / f"edit-{target}.safetensors")
        with self.screen.progress(f"Writing checkpoint-{target}", None, "bytes") as advance:
            done = 0

            def tell(now: int, _: int) -> None:
                nonlocal done
                advance(now - done)
                done = now

            export(self.source, plan, self.out / f"checkpoint-{target}", overwrite=True, progress=tell)

    def measure(self, target: str) -> None:
        direction = load_direction(self.out / f"direction-{target}.safetensors")
        choice = json.loads((self.out / f"choice-{target}.json").read_text(encoding="utf-8"))["chosen"]
        chosen = [
            candidate
            for candidates in self.candidates(direction)
            for candidate in candidates
            if _json(candidate.settings) == choice.get(candidate.way)
        ]
        with self.screen.progress(
            f"Measuring {self.recipe.source} to {target}", len(chosen) + 1, "ways"
        ) as advance:
            evaluation = self.evaluation(target, "report")
            exported = load_model(
                str(self.out / f"checkpoint-{target}"), self.recipe.device, self.recipe.dtype
            )
            outcomes = [evaluation.base]
            advance(1)
            for candidate in chosen:
                steering = candidate.steering
                if candidate.way == "keyed edit":
                    steering = partial(exchanged, self.loaded, exported)
                outcomes.append(evaluation.measure(candidate.way, steering, candidate.details(), kl=True))
                advance(1)
        _write_json(
            self.out / f"measured-{target}.json",
            {
                "model": self.recipe.model,
                "fingerprint": self.source.fingerprint,
                "source": self.recipe.source,
                "target": target,
                "ceiling": evaluation.ceiling,
                "continuations": evaluation.prompts,
                "outcomes": [outcome.as_json() for outcome in outcomes],
            },
        )

    def read_report(self, target: str) -> Report:
        content = json.loads((self.out / f"measured-{target}.json").read_text(encoding="utf-8"))
        outcomes: tuple[Outcome, ...] = tuple(map(outcome_from_json, content["outcomes"]))
        return Report(
            model=content["model"],
            source=content["source"],
            target=content["target"],
            ceiling=content["ceiling"],
            continuations=content["continuations"],
            outcomes=outcomes,
        )

    def report(self) -> None:
        reports = [self.read_report(target) for target in self.recipe.targets]
        for name, content in report_files(reports).items():
            write_atomically(self.out / name, content)


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    write_atomically(path, text.encode())
