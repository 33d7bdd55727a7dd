"""Distilled values: what keyed modules write, learned so that the model answers as it would if it were told to.

The teacher is the unedited model with an instruction ("Respond in French.") in its prompt, the student the edited
model without it.  The modules W_m' = W_m + v_m k_m^T keep their keys, and their values are v_m = r_m z_m, where r_m is
the root mean square of what module m writes at the answers' positions, so that one rate suits every model.  From z = 0
Adam (arXiv 1412.6980) moves

    minimise over z   mean over tokens of   KL(p(. | prompt with instruction, answer so far; unedited)
                                               || p'(. | prompt, answer so far; edited))

over whole distributions, at every position that predicts a token of the teacher's own answer, and at its end.  The
teacher answers the same question, so the language is all that has to be learned, and nothing but the instruction is
needed in the target language.  After every pass the divergence on examples kept out is taken; the z of the best pass
is the result.

The teacher's last hidden states are kept, not its distributions: one vector [d] a token instead of one [V].

Relatives: context distillation (arXiv 2112.00861, 2209.15189), which trains all weights; the keys make this an edit of
one language alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from editing.methods.added_values import adding, values_of
from editing.methods.value_learning import learn_values
from editing.plans.plan import ModuleEdit, Plan, make_plan
from neurons.errors import UsageError
from neurons.models.memory import batches_for
from neurons.models.next_token import token_divergences
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Position, PositionReader, Progress, forward, numbered, read_text
from neurons.text.batches import TokenBatch, row_batches

PASSES = 3
RATE = 0.05
EXAMPLES_A_STEP = 4


@dataclass(frozen=True)
class Example:
    """An answer and the two prompts that it follows, as tokens.

    Attributes:
        student: the prompt that the edited model gets.
        teacher: the prompt with the instruction.
        answer: what the unedited model answers to ``teacher``.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Distilled:
    """What was learned.

    Attributes:
        plan: with the learned values.
        learned_on: mean divergence (nats a token) of the examples learned from, during each pass.
        held_out: of those kept out: before, then after each pass.
        passes: how many the values have seen.
    """

    plan: Plan
    learned_on: tuple[float, ...]
    held_out: tuple[float, ...]
    passes: int


@dataclass(frozen=True)
class _Lesson:
    """Rows of students' prompts and answers, and the teacher's hidden states at the positions that are counted."""

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
) -> Distilled:
    """Learn a plan's values from a teacher's answers.

    Args:
        loaded: the unedited model; its weights do not change.
        plan: every module's edit of rank 1 and nothing else; its values are where learning begins.
        examples: to learn from.
        held_out: to choose the pass by.
        passes: over all examples.
        rate: Adam's, of z: about how far a coordinate moves in a step, in parts of r_m.
        seed: of the order.
        progress: called with the number of predicted tokens of each step.

    Raises:
        UsageError: no examples, none kept out, no pass, no rate, or a plan of another kind.
        BrocaError: a divergence that is not finite.
    """
    if not examples or not held_out or passes < 1 or not rate > 0:
        raise UsageError(
            f"{len(examples)} examples to learn from, {len(held_out)} kept out, {passes} passes and a rate of {rate} "
            "learn nothing: give one or more of each, and a positive rate"
        )
    learned = learn_values(
        loaded,
        plan,
        _Answers(loaded, examples, held_out),
        _output_sizes(loaded, plan.edits, examples),
        passes=passes,
        rate=rate,
        seed=seed,
        progress=progress,
    )
    learning = {
        "learned_on": list(learned.trained),
        "held_out": list(learned.held_out),
        "passes": learned.passes,
    }
    settings = {**plan.metadata["settings"], "distilled": {"passes": passes, "rate": rate, "seed": seed}}
    metadata = {**plan.metadata, "settings": settings, "learning": learning}
    return Distilled(make_plan(learned.edits, metadata), learned.trained, learned.held_out, learned.passes)


def mean_divergence(loaded: LoadedModel, examples: Sequence[Example], plan: Plan | None = None) -> float:
    """Nats a token from the teacher to the model that has a plan and no instruction; None: to the unedited one.

    Args:
        loaded: the unedited model.
        examples: prompts and answers.
        plan: as ``distilled_values`` returns it.
    """
    lessons = _lessons(loaded, examples, _teachers_states(loaded, examples), range(len(examples)), False)
    edited = nullcontext() if plan is None else adding(loaded, plan, values_of(plan).to(loaded.device))
    with torch.no_grad(), edited:
        return float(torch.cat([_divergences(loaded, lesson) for lesson in lessons]).mean())


class _Answers:
    """The divergence over a teacher's answers, as ``learn_values`` takes it."""

    def __init__(self, loaded: LoadedModel, examples: Sequence[Example], held_out: Sequence[Example]) -> None:
        self.loaded, self.examples = loaded, examples
        self.states = _teachers_states(loaded, examples)
        self.held_out = _lessons(
            loaded, held_out, _teachers_states(loaded, held_out), range(len(held_out)), False
        )

    def steps(self, generator: torch.Generator) -> Iterator[list[_Lesson]]:
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        for first in range(0, len(order), EXAMPLES_A_STEP):
            places = order[first : first + EXAMPLES_A_STEP]
            yield _lessons(self.loaded, self.examples, self.states, places, True)

    def loss(self, lesson: _Lesson) -> torch.Tensor:
        return _divergences(self.loaded, lesson).sum()

    def tokens(self, lesson: _Lesson) -> int:
        return len(lesson.hidden)

    def recomputes(self, lesson: _Lesson) -> bool:
        return lesson.recomputes


def _rows(
    loaded: LoadedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], backward: bool
) -> tuple[list[TokenBatch], bool]:
    """Prompts with their answers, where what predicts the answer, and what follows it, is counted.

    And whether activations are to be computed again in the backward pass.
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
    """Each example's last hidden states [n, d] of the teacher, on the CPU."""
    found: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for batch in _rows(loaded, [(one.teacher, one.answer) for one in examples], False)[0]:
            hidden = forward(loaded.model, batch.to(loaded.device)).cpu()
            for row, line in enumerate(batch.line_numbers.tolist()):
                found[line] = hidden[row][batch.counted[row]]
    return [found[place] for place in range(len(examples))]


def _lessons(
    loaded: LoadedModel,
    examples: Sequence[Example],
    states: Sequence[torch.Tensor],
    places: Sequence[int],
    backward: bool,
) -> list[_Lesson]:
    pairs = [(examples[place].student, examples[place].answer) for place in places]
    batches, recomputes = _rows(loaded, pairs, backward)
    return [
        _Lesson(batch, torch.cat([states[places[line]] for line in batch.line_numbers.tolist()]), recomputes)
        for batch in batches
    ]


def _divergences(loaded: LoadedModel, lesson: _Lesson) -> torch.Tensor:
    batch = lesson.batch.to(loaded.device)
    hidden = forward(loaded.model, batch)[batch.counted]
    return token_divergences(loaded.model, lesson.hidden.to(hidden.device), hidden)


def _output_sizes(
    loaded: LoadedModel, edits: Sequence[ModuleEdit], examples: Sequence[Example]
) -> torch.Tensor:
    """r, float64 [modules]: root mean square of the coordinates that each module writes at the counted positions."""
    sums = torch.zeros(len(edits), dtype=torch.float64)
    batches, _ = _rows(loaded, [(one.student, one.answer) for one in examples], False)

    def reader(number: int) -> PositionReader:
        def read(values: torch.Tensor, _: object, at: Position) -> None:
            sums[number] += float(at.rows(values).double().square().sum())

        return read

    readers = {(f"{edit.block}_out", edit.layer): reader(number) for number, edit in enumerate(edits)}
    read_text(loaded, numbered({"": batches}), readers)
    positions = sum(int(batch.counted.sum()) for batch in batches)
    sizes = (sums / (positions * loaded.anatomy.residual)).sqrt()
    return sizes.clamp(min=torch.finfo(torch.float32).tiny)
