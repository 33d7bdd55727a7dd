"""What the stages of an edit need of the memory, from a model's sizes alone (``neurons.recording.needs``)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from editing.evaluation.evaluation import KEPT_SHARE
from editing.evaluation.generation import NEW_TOKENS, PROMPTS_A_BATCH
from editing.evaluation.questions import Questions, taken
from editing.methods.distilled_values import EXAMPLES_A_STEP
from editing.methods.learned_values import LONGEST
from editing.pipeline.drift import context_tokens
from editing.pipeline.lock_kinds import Lock
from editing.pipeline.lock_prompts import BUILD, prompt_of
from editing.pipeline.lock_text import ANSWER_TOKENS, KEPT_ANSWER_TOKENS
from neurons.files.tensor_files import tensor_entries
from neurons.models.memory import (
    LIBRARIES,
    Need,
    batches_for,
    covariance_bytes,
    covariance_room,
    forward_bytes,
    logit_bytes,
    product_bytes,
    room,
    sizes_of,
    solving_bytes,
)
from neurons.models.source import LoadedModel
from neurons.recording.needs import Text, pass_need

# Python, torch and what reads tensors, without transformers; the factors of an edited tensor in float64.
WRITER, COPIES = 300 * 2**20, 3


def direction_need(planned: LoadedModel, text: Text) -> Need:
    """``editing.directions.recorded.record_texts``: the means of every text at three sites."""
    sizes = sizes_of(planned)
    share = 2 / text.languages if text.languages else 0
    kept = int(3 * 4 * sizes.layers * sizes.residual * text.texts * share)
    return pass_need(planned, "direction", text.row, False, text.batch, kept=kept)


def key_need(planned: LoadedModel, text: Text, blocks: Sequence[str] = ("mlp",)) -> Need:
    """``editing.methods.keyed``: covariances of as many layers at a time as there is room for.

    Raises:
        BrocaError: the weights leave no room.
    """
    sizes = sizes_of(planned)
    widths = [sizes.neurons if block == "mlp" else sizes.attention for block in blocks]
    one, solving = sum(map(covariance_bytes, widths)), max(map(solving_bytes, widths))
    layers = min(sizes.layers, max(1, (covariance_room(planned) - solving) // one))
    hidden = sizes.value * sizes.residual * text.tokens if layers < sizes.layers else 0
    tokens = min(batches_for(planned, False, text.row)[0], text.batch)
    # A group is solved when its text is read, so these two follow each other.
    work = max(solving, forward_bytes(sizes, tokens) + max(map(product_bytes, widths)))
    parts = {
        "libraries": LIBRARIES,
        # No key's pass reads the embeddings, but without them the estimate is 31 % short of a 0.5B's peak.
        "weights": sizes.weights,
        "activations": work,
        "covariances": layers * one,
        "kept": hidden if hidden <= room(planned) else 0,
    }
    return Need("key", parts, tokens)


def learning_need(planned: LoadedModel) -> Need:
    """``editing.methods.learned_values``."""
    return pass_need(planned, "learn", LONGEST, True)


def lock_needs(planned: LoadedModel, questions: Questions, lock: Lock) -> list[Need]:
    """``editing.pipeline.lock``: the keys, learning and the answers, of which a batch is written at a time."""
    rows = [
        len(prompt_of(planned, one.text).ids) + KEPT_ANSWER_TOKENS
        for language in lock.languages
        for one in taken(questions.of[language], BUILD)
    ]
    longest = max(rows) - KEPT_ANSWER_TOKENS
    text = Text(len(lock.languages), max(rows), sum(rows), len(rows))
    if lock.target is None:
        longest += context_tokens(planned, questions)
    learning = (longest + ANSWER_TOKENS) * EXAMPLES_A_STEP
    return [
        key_need(planned, text),
        pass_need(planned, "learn", longest + ANSWER_TOKENS, True, learning),
        evaluation_need(planned, text, longest),
    ]


def evaluation_need(planned: LoadedModel, text: Text, prompt: int = 64) -> Need:
    """``editing.evaluation.evaluation``: what is larger of writing answers and of comparing distributions on text.

    Args:
        prompt: tokens of the longest prompt.
    """
    sizes = sizes_of(planned)
    cache = 2 * sizes.keys * sizes.value * sizes.layers * PROMPTS_A_BATCH * (prompt + NEW_TOKENS)
    writing = (
        forward_bytes(sizes, PROMPTS_A_BATCH * prompt) + cache + 3 * 4 * sizes.vocabulary * PROMPTS_A_BATCH
    )
    tokens = min(batches_for(planned, False, text.row)[0], text.batch)
    # The unedited model's hidden states of third languages are kept: of all where that is little, else of one at a time.
    hidden = sizes.value * sizes.residual * text.tokens // max(1, text.languages)
    of_all = hidden * max(0, text.languages - 2)
    kept = of_all if of_all <= room(planned) * KEPT_SHARE else hidden
    reading = forward_bytes(sizes, tokens) + logit_bytes(sizes, tokens, False) * 2 + kept
    parts = {"libraries": LIBRARIES, "weights": sizes.weights, "activations": max(writing, reading)}
    return Need("evaluate", parts, tokens)


def writing_need(planned: LoadedModel, stage: str) -> Need:
    """What reads and writes a tensor at a time: ``editing.checkpoints.export``, and plans that read no text."""
    sizes = sizes_of(planned)
    shapes = (
        [entry.shape for entry in tensor_entries(planned.checkpoint).values()] if _stored(planned) else []
    )
    widest = max((prod(shape) for shape in shapes if len(shape) > 1), default=sizes.residual * sizes.neurons)
    edited = min(widest, sizes.residual * sizes.neurons)
    return Need(stage, {"libraries": WRITER, "tensors": COPIES * 8 * edited})


def _stored(planned: LoadedModel) -> bool:
    return any(planned.checkpoint.glob("*.safetensors"))
