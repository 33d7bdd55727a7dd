"""The job of a recipe: neurons; a direction, an edit, a checkpoint and measurements for each target; a report.

The corpus is split by line number: one half to estimate from, a quarter to choose settings on, a quarter to report.
The reported outcome of the edit is measured on the exported checkpoint, loaded from disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from editing.checkpoints.export import export
from editing.checkpoints.weight_exchange import Exchange
from editing.directions.diffmean import diffmean_direction
from editing.directions.direction import load_direction
from editing.evaluation.classifier import load_classifier
from editing.evaluation.evaluation import Evaluation
from editing.evaluation.outcome import Outcome, Refused
from editing.hooks.residual import DiffMean
from editing.methods.keyed import LEARNED, keyed_blocks, require_common_inputs
from editing.methods.keyed_edit import Keyed
from editing.methods.material import Material
from editing.methods.steer2edit import Steer2Edit
from editing.pipeline.needs import direction_need, evaluation_need, solving_needs, writing_need
from editing.pipeline.recipe import Recipe, check_recipe
from editing.pipeline.stages import RUNS, UNCHANGED, Stages
from editing.plans.plan import load_plan
from editing.report.run_report import markdown, report_figure
from editing.study.candidates import Candidate, candidate, candidates_of
from editing.study.comparison import best_of, measure_candidate
from editing.study.provenance import measured_by, processor, text_measured, texts_read
from editing.study.results import Choice, Report, load_choice, load_reports
from editing.study.search_scoring import MIN_CEILING
from neurons.architectures.anatomy import BLOCKS
from neurons.errors import UsageError
from neurons.files.artifact import json_bytes, text_bytes, write_atomically
from neurons.files.digest import digest
from neurons.files.json_file import document
from neurons.files.locked import locked
from neurons.models.fingerprint import PLAN_IN_CHECKPOINT
from neurons.models.memory import Need
from neurons.models.source import LoadedModel, ModelSource, load_model, open_model, pick_device
from neurons.neuron_sets.identify import identify
from neurons.neuron_sets.neuron_set import load_neuron_set
from neurons.neuron_sets.pictures import FORMATS, save_figure
from neurons.recording.needs import Text, recording_need, text_of
from neurons.scorers.registry import method_of
from neurons.scorers.selection import parse_layers
from neurons.text.corpus import Corpus, read_corpus
from neurons.text.token_budget import KEYS, LOSSES, Budget, budget_of

# Settings are chosen on less than is reported: one sample of each prompt, and few tokens of each language.
CHOOSING_PROMPTS, CHOOSING_TOKENS = 64, 2_000


class Screen(Protocol):
    """Shows the progress of a run."""

    def stage(self, name: str, state: str) -> None:
        """A stage begins or is skipped (``editing.pipeline.stages``)."""

    def progress(self, title: str, total: int | None, unit: str) -> Any:
        """A context with a function to call with the amount of work done since the last call."""

    def copying(self, title: str) -> Any:
        """A context with a function to call with (bytes done, total bytes)."""

    def warn(self, text: str) -> None:
        """A warning about the result."""


@dataclass(frozen=True)
class Result:
    """The results of a run.

    Attributes:
        out: directory of the results.
        reports: one for each target, in the recipe's order.
        neurons: language -> number of neurons.
        read: the text that neurons were identified on, and the text of the reported likelihoods
            (``neurons.text.token_budget.text_read``); empty if a replaced file does not record it.
    """

    out: Path
    reports: tuple[Report, ...]
    neurons: dict[str, int]
    read: tuple[dict[str, Any], dict[str, Any]]


def run(recipe: Recipe, screen: Screen, about: Mapping[str, Any] | None = None) -> Result:
    """Run the recipe's job; stages that are done and unchanged are skipped.

    Args:
        recipe: the job.
        screen: shows progress.
        about: further JSON values for the provenance in result files: the command, the recipe's text, its
            file and digest.

    Raises:
        UsageError: a recipe that names missing languages or files, or an invalid setting.
        BrocaError: a stage cannot be run.
    """
    job = _Run(recipe, screen, about or {})
    recipe.out.mkdir(parents=True, exist_ok=True)
    with locked(recipe.out, f"{recipe.out}: another run is writing this directory"):
        return job.all()


def needs(recipe: Recipe, planned: LoadedModel) -> list[Need]:
    """The memory needs of a recipe's stages; nothing is run.

    Raises:
        BrocaError: the weights, or a row of text, do not fit.
    """

    def text(part: str, budget: Budget) -> Text:
        corpus = read_corpus(recipe.corpus, recipe.languages, part)
        return text_of(planned, corpus, recipe.tokens, budget.tokens)

    method = method_of(recipe.method)
    keyed = Keyed(blocks=_blocks(recipe, planned), learn=recipe.values == LEARNED)
    recorded = text("estimate", budget_of(method.moments, method.reads))
    keys = text("estimate", KEYS)
    return [
        recording_need(planned, recorded, method.moments, method.reads),
        direction_need(planned, keys),
        *solving_needs(planned, keys, keyed),
        writing_need(planned, "export"),
        evaluation_need(planned, text("report", LOSSES)),
    ]


def _blocks(recipe: Recipe, source: ModelSource) -> tuple[str, ...]:
    """The modules of the keyed edit: heads, where no neurons have inputs that every token reaches."""
    blocks = keyed_blocks(source.anatomy, BLOCKS if recipe.values == LEARNED else ("mlp",))
    require_common_inputs(source.anatomy, blocks or ("mlp",))
    return blocks


class _Run:
    """One run; ``identify``, ``direction``, ``edit``, ``export``, ``measure`` and ``report`` are its stages."""

    def __init__(self, recipe: Recipe, screen: Screen, about: Mapping[str, Any]) -> None:
        self.recipe, self.screen, self.about = recipe, screen, about
        self.changed_by_hand: list[str] = []
        self.source: ModelSource = open_model(recipe.model)
        self.corpora: dict[str, Corpus] = {
            part: replace(read_corpus(recipe.corpus, recipe.languages, part), tokens=recipe.tokens)
            for part in ("estimate", "choose", "report")
        }
        for language in (recipe.source, *recipe.targets):
            if language not in self.corpora["report"].languages:
                raise UsageError(
                    f"{recipe.corpus}: no text in {language} (languages: "
                    f"{', '.join(self.corpora['report'].languages)})"
                )
        for corpus in self.corpora.values():
            corpus.require_plain(recipe.source, *recipe.targets)
        self.classifier = load_classifier(recipe.classifier, device=recipe.device)
        self.classifier.require(self.corpora["report"].languages)
        self.blocks = _blocks(recipe, self.source)
        check_recipe(recipe)
        if not 0 < recipe.top_rate <= 1:
            raise UsageError(f"top_rate is {recipe.top_rate}: give a rate above 0 and at most 1")
        pick_device(recipe.device)
        self.layers = (
            None if recipe.layers is None else parse_layers(recipe.layers, self.source.anatomy.layers)
        )
        self.out = recipe.out
        self.stages = Stages(recipe.out, self.stage)

    @cached_property
    def loaded(self) -> LoadedModel:
        loaded = load_model(self.recipe.model, self.recipe.device, self.recipe.dtype)
        if loaded.offload_note is not None:
            self.screen.stage("model", loaded.offload_note)
        return loaded

    def stage(self, name: str, state: str) -> None:
        if state not in (RUNS, UNCHANGED):
            self.changed_by_hand.append(f"{name}: {state}")
        self.screen.stage(name, state)

    def provenance(self, *parts: str) -> dict[str, Any]:
        """The provenance of results from these parts of the text."""
        recorded_elsewhere = ("model", "corpus", "out", "source", "targets")
        return {
            "model": self.source.label,
            "fingerprint": self.source.fingerprint,
            "corpora": texts_read(self.corpora[part] for part in parts),
            "packages": measured_by(),
            "processor": processor(self.loaded.device),
            "settings": {
                **{key: value for key, value in asdict(self.recipe).items() if key not in recorded_elsewhere},
                "classifier": self.classifier.provenance,
                "device": str(self.loaded.device),
                "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            },
            **self.about,
        }

    def all(self) -> Result:
        recipe = self.recipe
        common = {
            "fingerprint": self.source.fingerprint,
            "files": self.source.files_digest,
            "device": pick_device(recipe.device).type,
            "dtype": recipe.dtype,
        }
        text = {
            part: corpus.digest if corpus.tokens is None else f"{corpus.digest} {corpus.tokens}"
            for part, corpus in self.corpora.items()
        }
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
            "values": recipe.values,
            "strengths": recipe.keyed_strengths,
            "prompts": recipe.prompts,
            "samples": recipe.samples,
            "seed": recipe.seed,
            "classifier": self.classifier.provenance,
            "packages": measured_by(),
        }
        if recipe.key_neurons == "identified":
            steering["neurons"] = digest(self.out / "neurons.safetensors")
        of_all = self.changed_by_hand
        for target in recipe.targets:
            self.changed_by_hand = [*of_all]
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
        neurons, reports = load_neuron_set(self.out / "neurons.safetensors"), self.reports()
        return Result(
            self.out,
            reports,
            {language: len(neurons.of(language)) for language in neurons.languages},
            (
                next((entry["read"] for entry in neurons.metadata.get("corpora", []) if "read" in entry), {}),
                reports[0].about.get("read", {}),
            ),
        )

    def identify(self) -> None:
        corpus = self.corpora["estimate"]
        with self.screen.progress("Recording activations", None, "tokens") as advance:
            neurons = identify(
                self.loaded, corpus, self.recipe.method, self.recipe.top_rate, progress=advance
            )
        neurons.save(self.out / "neurons.safetensors")

    def direction(self, target: str) -> None:
        with self.screen.progress("Recording the direction", None, "tokens") as advance:
            direction = diffmean_direction(
                self.loaded, self.corpora["estimate"], self.recipe.source, target, advance
            )
        direction.save(self.out / f"direction-{target}.safetensors")

    def material(self, target: str) -> Material:
        direction = load_direction(self.out / f"direction-{target}.safetensors")
        return Material(
            self.loaded, self.corpora["estimate"], self.recipe.source, target, directions=(direction,)
        )

    def keyed(self, material: Material) -> Iterator[Candidate]:
        """The keyed edit at the recipe's strengths."""
        learn = self.recipe.values == LEARNED
        if self.recipe.key_neurons == "identified":
            material = replace(material, neurons=load_neuron_set(self.out / "neurons.safetensors"))
        material = replace(material, layers=self.layers)
        for strength in self.recipe.keyed_strengths:
            settings = {"strength": strength, "learn": learn, "blocks": self.blocks}
            keyed = candidate(Keyed, material, settings)
            assert keyed.plan is not None  # a keyed candidate always has one
            yield replace(keyed, settings=keyed.plan.metadata["settings"])

    def evaluation(self, target: str, part: str) -> Evaluation:
        recipe, corpus = self.recipe, self.corpora[part]
        choosing = part == "choose"
        if choosing and corpus.tokens is None:
            corpus = replace(corpus, tokens=CHOOSING_TOKENS)
        return Evaluation(
            self.loaded,
            corpus,
            recipe.source,
            target,
            samples=1 if choosing else recipe.samples,
            max_prompts=min(recipe.prompts, CHOOSING_PROMPTS) if choosing else recipe.prompts,
            seed=recipe.seed,
            classifier=self.classifier,
        )

    def edit(self, target: str) -> None:
        material = self.material(target)
        hooks, _ = candidates_of(DiffMean, material)
        steer2edit, refused = candidates_of(Steer2Edit, material)
        tried: list[Outcome | Refused] = [*refused]
        methods = [hooks, steer2edit, list(self.keyed(material))]
        chosen: dict[str, Candidate] = {}
        with self.screen.progress(
            f"Choosing settings, {self.recipe.source} to {target}", sum(map(len, methods)), "settings"
        ) as advance:
            evaluation = self.evaluation(target, "choose")
            for candidates in methods:
                best, results = best_of(evaluation, candidates, advance)
                tried += results
                if best is not None:
                    chosen[best.title] = best
        plan = chosen[Keyed.title].plan
        assert plan is not None
        plan.save(self.out / f"edit-{target}.safetensors")
        choice = Choice(
            source=self.recipe.source,
            target=target,
            ceiling=evaluation.ceiling,
            chosen={title: candidate.settings for title, candidate in chosen.items()},
            tried=tuple(tried),
            about={**self.provenance("estimate", "choose"), "corpus": text_measured(self.corpora["choose"])},
        )
        write_atomically(self.out / f"choice-{target}.json", json_bytes(document(choice)))

    def export(self, target: str) -> None:
        plan = load_plan(self.out / f"edit-{target}.safetensors")
        with self.screen.copying(f"Writing checkpoint-{target}") as progress:
            exported = export(
                self.source, plan, self.out / f"checkpoint-{target}", overwrite=True, progress=progress
            )
        for warning in exported.warnings:
            self.screen.warn(warning)

    def measure(self, target: str) -> None:
        material = self.material(target)
        chosen = load_choice(self.out / f"choice-{target}.json").chosen
        plan = load_plan(self.out / f"checkpoint-{target}" / PLAN_IN_CHECKPOINT)
        # The weights stay on disk: only one model is in memory.
        exported = load_model(str(self.out / f"checkpoint-{target}"), dtype=self.recipe.dtype, max_memory=0)
        candidates = [candidate(DiffMean, material, chosen[DiffMean.title])]
        notes = []
        if Steer2Edit.title in chosen:
            candidates.append(candidate(Steer2Edit, material, chosen[Steer2Edit.title]))
        else:
            notes.append("Steer2Edit: none of the published settings changes anything in this model.")
        candidates.append(
            Candidate(Keyed.title, plan.metadata["settings"], plan, Exchange(self.loaded, exported))
        )
        with self.screen.progress(
            f"Measuring {self.recipe.source} to {target}", len(candidates) + 1, "methods"
        ) as advance:
            evaluation = self.evaluation(target, "report")
            outcomes = [evaluation.base]
            advance(1)
            for one in candidates:
                outcomes.append(measure_candidate(evaluation, one, kl=True))
                advance(1)
        if evaluation.ceiling < MIN_CEILING:
            notes.append(
                f"The unedited model hardly writes {target} on {target} prompts (ceiling "
                f"{evaluation.ceiling:.2f}): shares say little here."
            )
        if self.changed_by_hand:
            files = "; ".join(self.changed_by_hand)
            notes.append(
                f"The command alone does not repeat these figures: {files}; put these files there too."
            )
        report = Report(
            source=self.recipe.source,
            target=target,
            ceiling=evaluation.ceiling,
            continuations=evaluation.continuations,
            outcomes=tuple(outcomes),
            notes=tuple(notes),
            about={
                **self.provenance("estimate", "choose", "report"),
                "corpus": text_measured(self.corpora["report"]),
                "read": evaluation.read,
            },
        )
        write_atomically(self.out / f"measured-{target}.json", json_bytes(document(report)))

    def reports(self) -> tuple[Report, ...]:
        """The reports in the measured-*.json, in the recipe's order."""
        files = (self.out / f"measured-{target}.json" for target in self.recipe.targets)
        return tuple(report for file in files for report in load_reports(file))

    def report(self) -> None:
        reports = self.reports()
        write_atomically(self.out / "report.json", json_bytes(list(map(document, reports))))
        write_atomically(self.out / "report.md", text_bytes(markdown(reports)))
        figure = report_figure(reports)
        for kind in FORMATS:
            save_figure(figure, self.out / f"report.{kind}")
