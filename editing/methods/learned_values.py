"""Learned values: values of a rank-1 plan, trained so that the model continues source text in the target language.

A plan W_m' = W_m + v_m k_m^T keeps its keys k_m and gets new values v_m = r_m z_m, where r_m is the root mean square of
the coordinates of v_m in the given plan.  From the plan's values, Adam (arXiv 1412.6980) solves

    minimise over z   mean over tokens u of the rest of  -log p'(u | opening in the source, rest so far)

with p' of the edited model.  All edits are applied during training, as they are when the plan is used: a module reads
what the modules below it write.  A crossing is the opening of a line in the source with the rest of a line in the
target.  They are paired anew in every pass, so the text need not be parallel.  One line in ``HELD_OUT`` of each language
is held out: the result is the z of the pass with the lowest loss on the held-out crossings, or the plan's values if no
pass improves on them.  Of any corpus only the first ``MAX_LINES`` lines are read, and ``MAX_ROW_TOKENS`` tokens of a
crossing, so the work does not grow with the corpus.

Reason: a difference of means points to the average of the target's tokens.  The token after an opening is not an average
token, so with means the first words are often fragments.  The keys do not change, so other languages are as safe as with
the given values.

Related work: vectors trained for a text (arXiv 2205.05124) or a behaviour (arXiv 2406.00045), and ROME's value (arXiv
2202.05262), trained for one fact with a key in closed form.
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

# The best strength of keys on heads and neurons with values from means (docs/keyed.md).  A search over strengths learns
# values at this one and scales them.
LEARNED_AT = 2.0
PASSES = 15
RATE = 0.03  # chosen on the demo model, English to Arabic, with PASSES (docs/keyed.md)
ROWS_A_STEP = 32
MAX_LINES = 512
MAX_ROW_TOKENS = 256
HELD_OUT = 5
HELD_OUT_TURNS = 4  # rests for each held-out opening


def enough_text(sources: Sequence[str], targets: Sequence[str]) -> bool:
    """Whether there are enough texts to learn from some and hold others out."""
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
) -> Plan:
    """Learn a plan's values from text.

    Args:
        loaded: the unedited model; its weights do not change.
        plan: edits with left and right factors of rank 1 and nothing else, as from ``keyed_plan``.
        sources: texts in the key's source languages, mixed if there are several.
        targets: texts in the target language.
        passes: passes over all openings.
        rate: Adam's learning rate for z: about the change of a coordinate in a step, in units of r_m.
        seed: of the order and the pairing of openings and rests.
        progress: called with the number of tokens of each step.

    Returns:
        The plan at the strength of the given one; it can be scaled like the given one.  ``metadata["learning"]`` holds
        ``held_out``, the mean negative log-likelihood (nats a token) on the held-out crossings before training and after
        each pass, and ``passes``, the number of passes after which the values were best.

    Raises:
        UsageError: too few texts to learn from some and hold others out, openings that fill the model's context, no
            passes, a rate that is not positive, or a plan with other edits.
        BrocaError: a loss that is not finite, with the plan's own values or with learned values.
    """
    openings, rests = _read(sources, targets)
    if not _enough(openings, rests):
        raise UsageError(
            f"{len(openings)} openings and {len(rests)} rests of texts are too few to learn from: give "
            f"{2 * HELD_OUT} lines or more in each language, longer than an opening of six words"
        )
    if passes < 1 or not rate > 0:
        raise UsageError(
            f"{passes} passes at a rate of {rate} learn nothing: give one pass or more, and a positive rate"
        )
    unit = values_of(plan).square().mean((1, 2)).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    edits, made = learn_values(
        loaded,
        plan,
        _Crossings(loaded, openings, rests),
        unit,
        passes=passes,
        rate=rate,
        seed=seed,
        progress=progress,
    )
    settings = {**plan.metadata["settings"], "learned": {"passes": passes, "rate": rate, "seed": seed}}
    learning = {"held_out": list(made.held_out), "passes": made.passes}
    return make_plan(edits, {**plan.metadata, "settings": settings, "learning": learning})


class _Crossings:
    """The negative log-likelihood of rests after openings, as the objective of ``learn_values``."""

    def __init__(self, loaded: LoadedModel, openings: Sequence[str], rests: Sequence[str]) -> None:
        self.loaded = loaded
        self.training = _subset(openings, False), _subset(rests, False)
        held_out = _subset(openings, True), _subset(rests, True)
        turns = range(HELD_OUT_TURNS)
        self.held_out = _batches(
            loaded, [row for turn in turns for row in crossings(loaded.tokenizer, *held_out, turn)]
        )

    def steps(self, generator: torch.Generator) -> Iterator[list[_CrossingBatch]]:
        turn = int(torch.randint(len(self.training[1]), (), generator=generator))
        rows = crossings(self.loaded.tokenizer, *self.training, turn)
        order = torch.randperm(len(rows), generator=generator).tolist()
        for first in range(0, len(rows), ROWS_A_STEP):
            yield _batches(self.loaded, [rows[i] for i in order[first : first + ROWS_A_STEP]])

    def loss(self, batch: _CrossingBatch) -> torch.Tensor:
        return _loss(self.loaded, batch.tokens)

    def tokens(self, batch: _CrossingBatch) -> int:
        return int(batch.tokens.counted[:, 1:].sum())

    def recomputes(self, batch: _CrossingBatch) -> bool:
        return batch.recomputes


@dataclass(frozen=True)
class _CrossingBatch:
    """Crossings, and whether their backward pass recomputes activations."""

    tokens: TokenBatch
    recomputes: bool


def _read(sources: Sequence[str], targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Openings of the sources and rests of the targets."""
    return openings_and_rests(sources)[0][:MAX_LINES], openings_and_rests(targets)[1][:MAX_LINES]


def _enough(openings: Sequence[str], rests: Sequence[str]) -> bool:
    return min(len(openings), len(rests)) >= 2 * HELD_OUT


def _subset(texts: Sequence[str], held_out: bool) -> list[str]:
    return [text for i, text in enumerate(texts) if (i % HELD_OUT == HELD_OUT - 1) == held_out]


def _batches(loaded: LoadedModel, rows: Sequence[Crossing]) -> list[_CrossingBatch]:
    """Rows in order, as many at a time as fit into memory with their gradients.

    Raises:
        UsageError: openings that fill the context.
    """
    context = min(MAX_ROW_TOKENS, block_length(loaded.model))
    longest = min(context, max(len(row.ids) for row in rows))
    tokens, recomputes = batches_for(loaded, True, longest)
    at_once = max(1, tokens // longest)
    batches = [crossing_batch(rows[i : i + at_once], context) for i in range(0, len(rows), at_once)]
    if not any(bool(batch.counted[:, 1:].any()) for batch in batches):
        raise UsageError(
            f"nothing follows the openings within {batches[0].ids.shape[1]} tokens: give text with shorter words, or a "
            "model with a longer context"
        )
    return [_CrossingBatch(batch, recomputes) for batch in batches]


def _loss(loaded: LoadedModel, batch: TokenBatch) -> torch.Tensor:
    """Sum of the negative log-likelihoods (nats) of the tokens after the openings."""
    batch = batch.to(loaded.device)
    counted = batch.counted[:, 1:]
    hidden = forward(loaded.model, batch)[:, :-1][counted]
    return token_losses(loaded.model, hidden, batch.ids[:, 1:][counted]).sum()
