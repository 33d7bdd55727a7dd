"""The recipe of a language lock: the settings of ``broca steer`` as the table ``[steer]`` of a TOML file.

``broca steer`` writes it into the checkpoint, and ``broca run`` repeats the edit from it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from editing.evaluation.classifier import load_classifier
from editing.evaluation.questions import Questions
from editing.pipeline.lock_kinds import INSTRUCTION, TEACHERS, Lock, lock_of
from editing.pipeline.lock_prompts import steers_thoughts
from editing.pipeline.recipe import checked_fields, model_beside, read_toml
from editing.report.findings import STEER_TABLE
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel, ModelSource
from neurons.setting import DTYPES, setting
from neurons.text.corpus_files import language_label

ALL, DEFAULT_SOURCE = "all", "en"


@dataclass(frozen=True)
class SteerRecipe:
    """The settings of ``broca steer``.

    Attributes:
        model: hub id or directory; relative to the recipe's directory.
        target: language of the answers; None with ``stay``.
        stay: answer in the language of the question.
        source: language of the questions, or ``ALL``; None: ``DEFAULT_SOURCE``, or ``ALL`` with ``stay``.
        instruction, teacher: as in ``Lock``.
        keep: as in ``lock_of``.
        questions: file or directory, relative to the recipe's directory; None: the questions of Broca.
        judge: model that judges answers (``lock_figures``): hub id or directory, as ``model``; None: no judge.
        classifier: what tells the label of answers (``load_classifier``): a file, or a model as ``model``; None: language
            identification.
        thoughts: whether thoughts are steered; None: if the model's template cannot turn them off.
        seed: of the order of the examples.
        device, dtype: as for ``broca steer``.
        fingerprint: of the model that this must be; None: any.
        questions_digest: of the questions that these must be; None: any.
        classifier_digest: of the classifier that this must be; None: any.
    """

    model: str
    target: str | None = None
    stay: bool = False
    source: str | None = None
    instruction: str | None = None
    teacher: str = setting(INSTRUCTION, words=TEACHERS)
    keep: tuple[str, ...] | None = None
    questions: Path | None = None
    judge: str | None = None
    classifier: str | None = None
    thoughts: bool | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = setting(DTYPES[0], words=DTYPES)
    fingerprint: str | None = None
    questions_digest: str | None = None
    classifier_digest: str | None = None

    def lock(self, questions: Questions) -> Lock:
        """The lock on these questions.

        Raises:
            UsageError: both or neither of ``target`` and ``stay``, other questions or another classifier than those of
                the digests, or as ``load_classifier`` and ``lock_of``.
        """
        if (self.target is None) != self.stay:
            raise UsageError("give either --to, the language of the answers, or --stay")
        if self.questions_digest not in (None, questions.digest):
            raise UsageError(
                f"the questions have the digest {questions.digest}, but the recipe {self.questions_digest}: give its "
                "questions, or leave questions_digest out to make another edit"
            )
        classifier = load_classifier(self.classifier, device=self.device)
        if self.classifier_digest not in (None, classifier.digest):
            raise UsageError(
                f"{self.classifier} has the digest {classifier.digest}, but the recipe {self.classifier_digest}: give "
                "its classifier, or leave classifier_digest out to make another edit"
            )
        source = self.source or (ALL if self.stay else DEFAULT_SOURCE)
        return lock_of(
            questions,
            None if self.target is None else language_label(self.target),
            None if source == ALL else language_label(source),
            None if self.keep is None else tuple(map(language_label, self.keep)),
            instruction=self.instruction,
            teacher=self.teacher,
            classifier=classifier,
        )

    def fitted(self, lock: Lock, loaded: LoadedModel) -> Lock:
        """The lock with or without thoughts, as the model needs.

        Raises:
            UsageError: as ``steers_thoughts``.
        """
        return replace(lock, thoughts=steers_thoughts(loaded.name, loaded.tokenizer, self.thoughts))

    def require_model(self, source: ModelSource) -> None:
        """Check that a model is the recipe's.

        Raises:
            BrocaError: its fingerprint is another one.
        """
        if self.fingerprint not in (None, source.fingerprint):
            raise BrocaError(
                f"{source.name} has the fingerprint {source.fingerprint}, but the recipe {self.fingerprint}: give its "
                "model, or leave fingerprint out to edit another one"
            )

    def resolved(self, loaded: LoadedModel, questions: Questions, lock: Lock) -> SteerRecipe:
        """The recipe with all defaults written out, and absolute paths of local files."""
        every = self.stay or self.source == ALL
        return replace(
            self,
            model=_absolute(self.model),
            source=ALL if every else lock.sources[0],
            keep=None if every else lock.keep,
            questions=None if self.questions is None else self.questions.resolve(),
            judge=None if self.judge is None else _absolute(self.judge),
            classifier=None if self.classifier is None else _absolute(self.classifier),
            thoughts=lock.thoughts or None,
            device=str(loaded.device),
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            fingerprint=loaded.fingerprint,
            questions_digest=questions.digest,
            classifier_digest=lock.classifier.digest,
        )

    def to_toml(self) -> str:
        """The recipe as TOML; settings that are None or False are left out."""
        lines = [
            # JSON strings, numbers, true and lists are valid TOML.
            f"{name} = {json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)}"
            for name, value in asdict(self).items()
            if value is not None and value is not False
        ]
        return "\n".join(["# `broca run THIS --out DIR` repeats the edit.", f"[{STEER_TABLE}]", *lines, ""])


def is_steer_recipe(path: Path) -> bool:
    """Whether a recipe has the table ``[steer]``.

    Raises:
        UsageError: as ``read_toml``.
    """
    return STEER_TABLE in read_toml(path)


def read_steer_recipe(path: Path) -> SteerRecipe:
    """Read a recipe with the table ``[steer]``.

    Raises:
        UsageError: no such file, not TOML, an unknown or missing setting, or a value of the wrong kind.
    """
    content = read_toml(path)
    if unknown := sorted(set(content) - {STEER_TABLE}):
        raise UsageError(
            f"{path}: {', '.join(unknown)} is outside [{STEER_TABLE}]: move it there, or remove it"
        )
    table = content.get(STEER_TABLE)
    if not isinstance(table, dict):
        raise UsageError(f"{path}: has no table [{STEER_TABLE}]: write the settings under [{STEER_TABLE}]")
    values: dict[str, Any] = checked_fields(path, table, SteerRecipe, ("model",))
    for name in ("model", "judge", "classifier"):
        if name in values:
            values[name] = model_beside(path, values[name])
    if "questions" in values:
        values["questions"] = path.resolve().parent / Path(values["questions"]).expanduser()
    if "keep" in values:
        values["keep"] = tuple(values["keep"])
    return SteerRecipe(**values)


def _absolute(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model
