"""Learned values: what the modules of a rank-1 plan write, moved until the target's text follows the source's.

A plan W_m' = W_m + v_m k_m^T of modules m keeps its keys k_m and gets other values v_m = r_m z_m, where r_m is the
root mean square of the coordinates of v_m as the plan had it.  From there Adam (arXiv 1412.6980) moves z by

    minimise over z   mean over tokens u of the rest of  -log p'(u | opening in the source, rest so far)

p' being the edited model's, every edit in its place, so that the modules share the work as they do when the
plan is used: a module above sees what those below wrote.  Openings and rests are lines of text in the source
and in the target, joined anew in every pass, so text needs no parallel.  One line in ``HELD_OUT`` of each is
not learned from: the z of the pass that makes their joints likeliest is taken, the plan's own values if no
pass betters them.  However much text there is, the first ``MOST_LINES`` lines and ``LONGEST`` tokens of a
joint are read: the work does not grow with the corpus.

Why: a difference of means says where the target's tokens lie on average.  Text has to be joined at one
point, behind the opening's last token, where the average token does not stand: the first words then are
halves of words.  The keys are not touched, so other languages are as safe as with the plan's own values.

Relatives: vectors made by gradient for a text (arXiv 2205.05124) or a behaviour (arXiv 2406.00045), and
ROME's value (arXiv 2202.05262), found by gradient for one fact behind a key in closed form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from editing.methods.added_values import values_of
from editing.methods.crossings import Crossing, crossing_batch, crossings, openings_and_rests
from editing.methods.value_learning import learn_values
from editing.plans.plan import Plan, make_plan
from neurons.errors import UsageError
from neurons.models.memory import batches_for
from neurons.models.next_token import token_losses
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress, forward
from neurons.text.batches import TokenBatch, block_length

# The strength at which keys over heads and neurons do best with the means (docs/keyed.md): where several
# strengths are tried, values are learned at this one and scaled.
LEARNED_AT = 2.0
PASSES = 15
RATE = 0.03  # found on the demo model, English to Arabic, with PASSES (docs/keyed.md)
ROWS_A_STEP = 32
MOST_LINES = 512
LONGEST = 256
HELD_OUT = 5
HELD_OUT_TURNS = 4  # rests that each opening kept out is tried with


@dataclass(frozen=True)
class LearnedValues:
    """What was learned.

    Attributes:
        plan: with the learned values.
        held_out: mean negative log-likelihood (nats a token) of the joints kept out: before, then after each pass.
        passes: how many the values have seen.
    """

    plan: Plan
    held_out: tuple[float, ...]
    passes: int


def enough_text(sources: Sequence[str], targets: Sequence[str]) -> bool:
    """Whether there is something to learn from and something to keep out."""
    return _enough(*_read(sources, targets))


def learned_values(
    loaded: LoadedModel,
    plan: Plan,
    sources: Sequence[str],
    targets: Sequence[str],
    *,
    passes: int = PASSES,
    rate: float = RATE,
    seed: int = 0,
    progress: Progress | None = None,
) -> LearnedValues:
    """Learn a plan's values from text.

    Args:
        loaded: the unedited model; its weights do not change.
        plan: every module's edit a left and a right factor of rank 1 and nothing else, as ``keyed_plan`` has it.
        sources: texts in a language where the keys speak; of several languages, mixed.
        targets: texts in the language that is to follow.
        passes: over all openings.
        rate: Adam's, of z: about how far a coordinate moves in a step, in parts of r_m.
        seed: of the order and of the joints.
        progress: called with the number of tokens of each step.

    Returns:
        The plan at its own strength; it can be scaled as the given one can.  ``metadata["learning"]`` holds
        what is beside the plan here.

    Raises:
        UsageError: too few texts to learn from some and keep others out, openings that fill the model's context,
            no pass or no rate, or a plan of another kind.
        BrocaError: a loss that is not finite, with the plan's own values or with learned ones.
    """
    openings, rests = _read(sources, targets)
    if not _enough(openings, rests):
        raise UsageError(
            f"{len(openings)} openings and {len(rests)} texts to follow them are too few to learn from: give "
            f"{2 * HELD_OUT} lines or more of each language, longer than an opening of six words"
        )
    if passes < 1 or not rate > 0:
        raise UsageError(
            f"{passes} passes at a rate of {rate} learn nothing: give 1 or more and a positive rate"
        )
    size = values_of(plan).square().mean((1, 2)).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    learned = learn_values(
        loaded,
        plan,
        _Joints(loaded, openings, rests),
        size,
        passes=passes,
        rate=rate,
        seed=seed,
        progress=progress,
    )
    settings = {**plan.metadata["settings"], "learned": {"passes": passes, "rate": rate, "seed": seed}}
    learning = {"held_out": list(learned.held_out), "passes": learned.passes}
    made = make_plan(learned.edits, {**plan.metadata, "settings": settings, "learning": learning})
    return LearnedValues(made, learned.held_out, learned.passes)


class _Joints:
    """The negative log-likelihood of rests behind openings, as ``learn_values`` takes it."""

    def __init__(self, loaded: LoadedModel, openings: Sequence[str], rests: Sequence[str]) -> None:
        self.loaded = loaded
        self.joined, kept_out = ((_parted(openings, out), _parted(rests, out)) for out in (False, True))
        turns = range(HELD_OUT_TURNS)
        self.held_out = _batches(
            loaded, [row for turn in turns for row in crossings(loaded.tokenizer, *kept_out, turn)]
        )

    def steps(self, generator: torch.Generator) -> Iterator[list[_Joint]]:
        turn = int(torch.randint(len(self.joined[1]), (), generator=generator))
        rows = crossings(self.loaded.tokenizer, *self.joined, turn)
        order = torch.randperm(len(rows), generator=generator).tolist()
        for first in range(0, len(rows), ROWS_A_STEP):
            yield _batches(self.loaded, [rows[i] for i in order[first : first + ROWS_A_STEP]])

    def loss(self, joint: _Joint) -> torch.Tensor:
        return _loss(self.loaded, joint.batch)

    def tokens(self, joint: _Joint) -> int:
        return int(joint.batch.counted[:, 1:].sum())

    def recomputes(self, joint: _Joint) -> bool:
        return joint.recomputes


@dataclass(frozen=True)
class _Joint:
    """Rows of openings with rests."""

    batch: TokenBatch
    recomputes: bool


def _read(sources: Sequence[str], targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """The openings of the ones and the rests of the others."""
    return openings_and_rests(sources)[0][:MOST_LINES], openings_and_rests(targets)[1][:MOST_LINES]


def _enough(openings: Sequence[str], rests: Sequence[str]) -> bool:
    return min(len(openings), len(rests)) >= 2 * HELD_OUT


def _parted(texts: Sequence[str], out: bool) -> list[str]:
    return [text for i, text in enumerate(texts) if (i % HELD_OUT == HELD_OUT - 1) == out]


def _batches(loaded: LoadedModel, rows: Sequence[Crossing]) -> list[_Joint]:
    """Rows in order, as many at a time as the memory holds with their gradients.

    Raises:
        UsageError: openings that leave no room for what follows.
    """
    context = min(LONGEST, block_length(loaded.model))
    longest = min(context, max(len(row.ids) for row in rows))
    tokens, recomputes = batches_for(loaded, True, longest)
    at_once = max(1, tokens // longest)
    batches = [crossing_batch(rows[i : i + at_once], context) for i in range(0, len(rows), at_once)]
    if not any(bool(batch.counted[:, 1:].any()) for batch in batches):
        raise UsageError(
            f"nothing follows the openings within {batches[0].ids.shape[1]} tokens: give text of shorter words, or a "
            "model of more context"
        )
    return [_Joint(batch, recomputes) for batch in batches]


def _loss(loaded: LoadedModel, batch: TokenBatch) -> torch.Tensor:
    """Sum of the negative log-likelihoods (nats) of what follows the openings."""
    batch = batch.to(loaded.device)
    wanted = batch.counted[:, 1:]
    hidden = forward(loaded.model, batch)[:, :-1][wanted]
    return token_losses(loaded.model, hidden, batch.ids[:, 1:][wanted]).sum()
