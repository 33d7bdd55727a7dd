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

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from editing.methods.added_values import adding, values_of, with_value
from editing.plans.plan import ModuleEdit, Plan, make_plan
from neurons.errors import BrocaError, UsageError
from neurons.models.memory import batches_for
from neurons.models.next_token import token_divergences
from neurons.models.source import LoadedModel
from neurons.recording.recomputation import recomputing
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
    values = values_of(plan)
    answers = _teachers_states(loaded, examples)
    kept_out = _lessons(loaded, held_out, _teachers_states(loaded, held_out), range(len(held_out)), False)
    unit = _output_sizes(loaded, plan.edits, examples)
    z = (values / unit).float().to(loaded.device).requires_grad_(True)
    scale = unit.float().to(loaded.device)
    optimizer = torch.optim.Adam([z], lr=rate)
    generator = torch.Generator().manual_seed(seed)

    def divergence() -> float:
        with torch.no_grad():
            sums = [float(_divergences(loaded, plan, lesson, z * scale).sum()) for lesson in kept_out]
        return sum(sums) / sum(len(lesson.hidden) for lesson in kept_out)

    learned_on, found, best = [], [_finite(loaded, divergence())], z.detach().clone()
    for _ in range(passes):
        order = torch.randperm(len(examples), generator=generator).tolist()
        total, tokens = 0.0, 0
        for first in range(0, len(order), EXAMPLES_A_STEP):
            lessons = _lessons(loaded, examples, answers, order[first : first + EXAMPLES_A_STEP], True)
            count = sum(len(lesson.hidden) for lesson in lessons)
            # A leaf, for the backward pass of a layer that is computed again ends there, once a layer.
            written = (z.detach() * scale).requires_grad_(True)
            for lesson in lessons:
                again = recomputing(loaded.anatomy) if lesson.recomputes else nullcontext()
                # The backward pass inside too, where layers that are computed again are edited again.
                with torch.enable_grad(), again, adding(loaded, plan, written):
                    sums = _plain_divergences(loaded, lesson).sum()
                    (sums / count).backward()
                total += float(sums.detach())
            assert written.grad is not None
            z.grad = written.grad * scale
            optimizer.step()
            tokens += count
            if progress is not None:
                progress(count)
        learned_on.append(_finite(loaded, total / tokens))
        found.append(_finite(loaded, divergence()))
        if found[-1] < min(found[:-1]):
            best = z.detach().clone()
    seen = found.index(min(found))
    edits = [
        with_value(edit, value) for edit, value in zip(plan.edits, best.cpu().double() * unit, strict=True)
    ]
    learning = {"learned_on": learned_on, "held_out": found, "passes": seen}
    settings = {**plan.metadata["settings"], "distilled": {"passes": passes, "rate": rate, "seed": seed}}
    made = make_plan(edits, {**plan.metadata, "settings": settings, "learning": learning})
    return Distilled(made, tuple(learned_on), tuple(found), seen)


def mean_divergence(loaded: LoadedModel, examples: Sequence[Example], plan: Plan | None = None) -> float:
    """Nats a token from the teacher to the model that has a plan and no instruction; None: to the unedited one.

    Args:
        loaded: the unedited model.
        examples: prompts and answers.
        plan: as ``distilled_values`` returns it.
    """
    lessons = _lessons(loaded, examples, _teachers_states(loaded, examples), range(len(examples)), False)
    with torch.no_grad():
        found = [
            _plain_divergences(loaded, lesson)
            if plan is None
            else _divergences(loaded, plan, lesson, values_of(plan).to(loaded.device))
            for lesson in lessons
        ]
    return float(torch.cat(found).mean())


def _finite(loaded: LoadedModel, value: float) -> float:
    if not value < float("inf"):
        raise BrocaError(
            f"{loaded.name}: the divergence is {value}: learn at a lower rate, or load the model in float32 "
            "(--dtype float32)"
        )
    return value


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


def _divergences(loaded: LoadedModel, plan: Plan, lesson: _Lesson, values: torch.Tensor) -> torch.Tensor:
    with adding(loaded, plan, values):
        return _plain_divergences(loaded, lesson)


def _plain_divergences(loaded: LoadedModel, lesson: _Lesson) -> torch.Tensor:
    batch = lesson.batch.to(loaded.device)
    hidden = forward(loaded.model, batch)[batch.counted]
    return token_divergences(loaded.model, lesson.hidden.to(hidden.device), hidden)


def _output_sizes(
    loaded: LoadedModel, edits: Sequence[ModuleEdit], examples: Sequence[Example]
) -> torch.Tensor:
    """r, float64 [modules, 1]: root mean square of the coordinates that each module writes at the counted positions."""
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
    return sizes.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
