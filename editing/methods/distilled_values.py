"""Distilled values: values of keyed modules, trained so that the model answers as if its prompt had an instruction.

The teacher is the unedited model with an instruction ("Respond in French.") in its prompt; the student is the edited
model without it.  The modules W_m' = W_m + v_m k_m^T keep their keys.  Their values are v_m = r_m z_m, where r_m is the
root mean square of the output of module m at the answers' positions, so that the same learning rate suits every model.
From the plan's values, Adam (arXiv 1412.6980) solves

    minimise over z   mean over tokens of   KL(p(. | prompt with instruction, answer so far; unedited)
                                               || p'(. | prompt, answer so far; edited))

over whole distributions, at every position that predicts a token of the teacher's answer, and at its end.  The teacher
answers the same question, so only the language has to be learned, and the target language needs no data except the
instruction.  After every pass the divergence on held-out examples is measured.  The result is the z of the best pass.

Kept from the teacher are its last hidden states, one vector [d] a token, instead of its distributions [V].

Related work: context distillation (arXiv 2112.00861, 2209.15189) trains all weights; here the keys restrict the edit to
some languages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from editing.methods.value_learning import learn_values
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, Plan, make_plan
from neurons.errors import UsageError
from neurons.models.memory import batches_for
from neurons.models.next_token import token_divergences
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Position, Progress, forward, numbered, read_text
from neurons.text.batches import TokenBatch, row_batches

PASSES = 3
RATE = 0.05
EXAMPLES_A_STEP = 4


@dataclass(frozen=True)
class Example:
    """An answer and two prompts, as tokens.

    Attributes:
        student: the edited model's prompt.
        teacher: the teacher's prompt, with the instruction.
        answer: the unedited model's answer to ``teacher``.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class _Lesson:
    """Student prompts with answers, and the teacher's last hidden states at the n counted positions."""

    batch: TokenBatch
    hidden: torch.Tensor  # [n, d]
    recomputes: bool = False


def distilled_values(
    loaded: LoadedModel,
    plan: Plan,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    *,
    passes: int = PASSES,
    rate: float = RATE,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Learn a plan's values from a teacher's answers.

    Args:
        loaded: the unedited model; its weights do not change.
        plan: edits with left and right factors of the same rank and nothing else; training starts at its values.
        examples: training examples.
        held_out: examples on which the best pass is chosen.
        passes: passes over the training examples.
        rate: Adam's learning rate for z: about the change of a coordinate in a step, in units of r_m.
        seed: of the order of the examples.
        progress: called with the number of predicted tokens of each step.

    Returns:
        The plan with the learned values.  ``metadata["learning"]`` holds mean divergences (nats a token): ``learned_on``,
        on the training examples during each pass, ``held_out``, on the held-out examples before training and after each
        pass; and ``passes``, the number of passes after which the values were best.

    Raises:
        UsageError: no training examples, no held-out examples, no passes, a rate that is not positive, or a plan with
            other edits.
        BrocaError: a divergence that is not finite.
    """
    if not examples or not held_out or passes < 1 or not rate > 0:
        raise UsageError(
            f"{len(examples)} training examples, {len(held_out)} held-out examples, {passes} passes and a rate of {rate}: "
            "give one or more of each, and a positive rate"
        )
    edits, made = learn_values(
        loaded,
        plan,
        TeacherAnswers(loaded, examples, held_out),
        _output_sizes(loaded, plan.edits, examples),
        passes=passes,
        rate=rate,
        seed=seed,
        progress=progress,
    )
    learning = {"learned_on": list(made.trained), "held_out": list(made.held_out), "passes": made.passes}
    settings = {**plan.metadata["settings"], "distilled": {"passes": passes, "rate": rate, "seed": seed}}
    return make_plan(edits, {**plan.metadata, "settings": settings, "learning": learning})


def mean_divergence(loaded: LoadedModel, examples: Sequence[Example], plan: Plan | None = None) -> float:
    """``mean_divergences`` of one student on one set of examples."""
    ((divergence,),) = mean_divergences(loaded, [examples], [plan])
    return divergence


def mean_divergences(
    loaded: LoadedModel, sets: Sequence[Sequence[Example]], plans: Sequence[Plan | None]
) -> list[list[float]]:
    """Mean KL (nats a token) from the teacher, which reads the examples once, to each student.

    Args:
        loaded: the unedited model.
        sets: sets of prompts and answers, none empty.
        plans: the students' edits, with weights as in an exported checkpoint; None: the unedited model.

    Returns:
        For each plan, the mean over the tokens of each set.
    """
    lessons = [
        _lessons(loaded, examples, _teachers_states(loaded, examples), range(len(examples)), False)
        for examples in sets
    ]
    means = []
    for plan in plans:
        with torch.no_grad(), applied(loaded, plan):
            of_sets = [torch.cat([_divergences(loaded, one) for one in of_set]) for of_set in lessons]
        means.append([float(divergences.mean()) for divergences in of_sets])
    return means


class TeacherAnswers:
    """The divergence on a teacher's answers, as the objective of ``learn_values``.

    The teacher's states are those of the model at construction.
    """

    def __init__(self, loaded: LoadedModel, examples: Sequence[Example], held_out: Sequence[Example]) -> None:
        self.loaded, self.examples = loaded, examples
        self.states = _teachers_states(loaded, examples)
        self.held_out = _lessons(
            loaded, held_out, _teachers_states(loaded, held_out), range(len(held_out)), False
        )

    def steps(self, generator: torch.Generator) -> Iterator[list[_Lesson]]:
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        for first in range(0, len(order), EXAMPLES_A_STEP):
            indices = order[first : first + EXAMPLES_A_STEP]
            yield _lessons(self.loaded, self.examples, self.states, indices, True)

    def loss(self, lesson: _Lesson) -> torch.Tensor:
        return _divergences(self.loaded, lesson).sum()

    def tokens(self, lesson: _Lesson) -> int:
        return len(lesson.hidden)

    def recomputes(self, lesson: _Lesson) -> bool:
        return lesson.recomputes


def _rows(
    loaded: LoadedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], backward: bool
) -> tuple[list[TokenBatch], bool]:
    """Batches of prompts with answers, and whether their backward pass recomputes activations.

    Counted are the positions that predict a token of the answer, and the answer's last position.
    """
    rows = [[*prompt, *answer] for prompt, answer in pairs]
    at_once, recomputes = batches_for(loaded, backward, max(map(len, rows)))
    batches = []
    for batch in row_batches(rows, 0, tokens_a_batch=at_once):
        counted = torch.zeros_like(batch.counted)
        for row, line in enumerate(batch.line_numbers.tolist()):
            prompt, answer = pairs[line]
            counted[row, len(prompt) - 1 : len(prompt) + len(answer)] = True
        batches.append(replace(batch, counted=counted))
    return batches, recomputes


def _teachers_states(loaded: LoadedModel, examples: Sequence[Example]) -> list[torch.Tensor]:
    """The teacher's last hidden states [n, d] for each example, on the CPU."""
    states: dict[int, torch.Tensor] = {}
    batches, _ = _rows(loaded, [(example.teacher, example.answer) for example in examples], False)
    with torch.no_grad():
        for batch in batches:
            hidden = forward(loaded.model, batch.to(loaded.device)).cpu()
            for row, line in enumerate(batch.line_numbers.tolist()):
                states[line] = hidden[row][batch.counted[row]]
    return [states[index] for index in range(len(examples))]


def _lessons(
    loaded: LoadedModel,
    examples: Sequence[Example],
    states: Sequence[torch.Tensor],
    indices: Sequence[int],
    backward: bool,
) -> list[_Lesson]:
    pairs = [(examples[index].student, examples[index].answer) for index in indices]
    batches, recomputes = _rows(loaded, pairs, backward)
    return [
        _Lesson(batch, torch.cat([states[indices[line]] for line in batch.line_numbers.tolist()]), recomputes)
        for batch in batches
    ]


def _divergences(loaded: LoadedModel, lesson: _Lesson) -> torch.Tensor:
    batch = lesson.batch.to(loaded.device)
    hidden = forward(loaded.model, batch)[batch.counted]
    return token_divergences(loaded.model, lesson.hidden.to(hidden.device), hidden)


def _output_sizes(
    loaded: LoadedModel, edits: Sequence[ModuleEdit], examples: Sequence[Example]
) -> torch.Tensor:
    """r, float64 [modules]: root mean square of each module's output coordinates at the counted positions."""
    sums = torch.zeros(len(edits), dtype=torch.float64)
    batches, _ = _rows(loaded, [(example.student, example.answer) for example in examples], False)

    def read(number: int, values: torch.Tensor, _: object, at: Position) -> None:
        sums[number] += float(at.rows(values).double().square().sum())

    readers = {(f"{edit.block}_out", edit.layer): partial(read, number) for number, edit in enumerate(edits)}
    read_text(loaded, numbered({"": batches}), readers)
    positions = sum(int(batch.counted.sum()) for batch in batches)
    sizes = (sums / (positions * loaded.anatomy.residual)).sqrt()
    return sizes.clamp(min=torch.finfo(torch.float32).tiny)
