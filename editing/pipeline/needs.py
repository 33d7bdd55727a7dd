"""Memory needs of the stages of an edit, estimated from a model's sizes (``neurons.recording.needs``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from operator import attrgetter

import torch

from editing.directions.autoencoder import Autoencoder
from editing.directions.method import DirectionMethod, PreferenceMethod
from editing.directions.sae_training import BATCH as SAE_BATCH
from editing.evaluation.evaluation import KEPT_FRACTION
from editing.evaluation.generation import NEW_TOKENS, prompts_at_once, writing_bytes
from editing.evaluation.questions import Questions, questions_of_part
from editing.methods.distilled_values import EXAMPLES_A_STEP
from editing.methods.keyed import keyed_blocks
from editing.methods.learned_values import MAX_ROW_TOKENS
from editing.methods.method import Method
from editing.methods.subnetwork import BLOCK, BLOCKS_A_STEP
from editing.pipeline.drift import context_tokens
from editing.pipeline.lock_kinds import Lock
from editing.pipeline.lock_prompts import BUILD, prompt_of
from editing.pipeline.lock_text import ANSWER_TOKENS, KEPT_ANSWER_TOKENS, MAX_CONVERSATIONS
from editing.plans.plan import ModuleEdit
from neurons.architectures.anatomy import COMMON_SITES
from neurons.files.tensor_files import tensor_entries
from neurons.models.memory import (
    LIBRARIES,
    Need,
    batches_for,
    covariance_bytes,
    covariance_room,
    forward_bytes,
    logit_bytes,
    paused_bytes,
    paused_room,
    product_bytes,
    room,
    sizes_of,
    solving_bytes,
)
from neurons.models.source import LoadedModel
from neurons.recording.needs import Text, pass_need
from neurons.text.batches import block_length
from neurons.text.preferences import Preferences, preference_rows

WRITER = 300 * 2**20  # bytes of Python, torch and safetensors, without transformers
COPIES = 3  # of an edited tensor, in float64


def direction_need(
    planned: LoadedModel,
    text: Text,
    autoencoders: Sequence[Autoencoder] = (),
    keeps: bool = False,
    all_languages: bool = False,
) -> Need:
    """Need of a direction.

    Args:
        planned: the model.
        text: what is read.
        autoencoders: that are read too.
        keeps: the means of every text at three sites (``editing.directions.recorded.record_texts``), not only sums, as
            plain DiffMean.
        all_languages: whether the means of all languages are kept, or those of two.
    """
    sizes = sizes_of(planned)
    fraction = 1 if all_languages else 2 / text.languages if text.languages else 0
    kept = int(3 * 4 * sizes.layers * sizes.residual * text.texts * fraction) if keeps else 0
    read = {"autoencoders": sum(map(autoencoder_bytes, autoencoders))} if autoencoders else {}
    return pass_need(planned, "direction", text.row, False, text.batch, kept=kept, **read)


def autoencoder_bytes(autoencoder: Autoencoder) -> int:
    """Bytes of an autoencoder's two matrices."""
    return autoencoder.encoder.nbytes + autoencoder.decoder.nbytes


def preference_needs(
    planned: LoadedModel, preferences: Preferences, method: type[DirectionMethod]
) -> list[Need]:
    """Needs of ``editing.directions.estimation.direction_of_preferences``.

    Args:
        planned: the model.
        preferences: what is read.
        method: the direction method.
    """
    rows = (
        [block_length(planned.model)] * 2 * len(preferences.of)
        if planned.tokenizer is None
        else [len(row.ids) for of_kind in preference_rows(planned, preferences).values() for row in of_kind]
    )
    # Half of the rows are of each of two languages.
    recorded = direction_need(planned, Text(2, max(rows), sum(rows), len(rows)), keeps=True)
    if not issubclass(method, PreferenceMethod):
        return [recorded]
    return [pass_need(planned, "preferences", method.rows_together * max(rows), True), recorded]


def sae_need(planned: LoadedModel, text: Text, layers: int, states: int, features: int) -> Need:
    """Need of ``editing.directions.sae_training``: the states of all layers, and the training of one.

    Args:
        planned: the model.
        text: what is read.
        layers: number of autoencoders.
        states: number of states.
        features: number of features.
    """
    residual = sizes_of(planned).residual
    # Weights, gradients, Adam's two moments and a product; a batch's codes; the states of a layer twice.
    training = 5 * features * residual + 4 * features * SAE_BATCH + 2 * states * residual
    more = {"states": 4 * layers * states * residual, "training": 4 * training}
    return pass_need(planned, "sae", text.row, False, text.batch, **more)


def key_need(planned: LoadedModel, text: Text, widths: Sequence[int] | None = None, kept: int = 0) -> Need:
    """Need of ``editing.methods.keyed``: the covariances of all layers if they fit, else of one at a time.

    Args:
        planned: the model.
        text: what is read.
        widths: of the covariances of a layer (``Method.key_widths``); None: of keys over the MLP.
        kept: bytes that the method keeps beside them (``Method.kept_bytes``).

    Raises:
        BrocaError: the weights leave no room.
    """
    sizes = sizes_of(planned)
    widths = [planned.anatomy.width(COMMON_SITES["mlp"])] if widths is None else widths
    per_layer, solving = sum(map(covariance_bytes, widths)), max(map(solving_bytes, widths))
    layers = sizes.layers if sizes.layers * per_layer + solving <= covariance_room(planned) else 1
    paused = paused_bytes(planned, text.tokens) if layers < sizes.layers else 0
    tokens = min(batches_for(planned, False, text.row)[0], text.batch)
    # The keys of a layer are solved after its text is read.
    work = max(solving, forward_bytes(sizes, tokens) + max(map(product_bytes, widths)))
    parts = {
        "libraries": LIBRARIES,
        # The pass does not read the embeddings, but without them the estimate is 31 % below a 0.5B model's peak.
        "weights": sizes.weights,
        "activations": work,
        "covariances": layers * per_layer,
        "kept": kept + (paused if paused <= paused_room(planned, layers * per_layer + solving) else 0),
    }
    return Need("key", parts, tokens)


def learning_need(planned: LoadedModel) -> Need:
    """Need of ``editing.methods.learned_values``."""
    return pass_need(planned, "learn", MAX_ROW_TOKENS, True)


def solving_needs(
    planned: LoadedModel,
    text: Text,
    method: Method,
    modules: Sequence[str] | None = None,
    layers: int | None = None,
) -> list[Need]:
    """Needs of a method that solves keys on text: of the keys, and of learning if it learns values.

    Args:
        planned: the model.
        text: what is read.
        method: the method.
        modules: of "attn" and "mlp"; None: those of the method.
        layers: number of edited layers; None: all.
    """
    modules = modules or getattr(method, "blocks", None) or method.key_modules
    kept = method.kept_bytes(planned.anatomy, layers or planned.anatomy.layers, modules)
    keys = key_need(planned, text, method.key_widths(planned.anatomy, modules), kept)
    return [keys, learning_need(planned)] if getattr(method, "learn", False) else [keys]


def study_needs(planned: LoadedModel, text: Text, methods: Iterable[type[Method]]) -> list[Need]:
    """Needs of the methods of a study that solve keys on text, of each stage the largest."""
    needs = [
        need
        for method in methods
        if method.solves_keys
        for need in solving_needs(planned, text, method.largest(planned.anatomy))
    ]
    largest = {need.stage: need for need in sorted(needs, key=attrgetter("total"))}
    return [largest[stage] for stage in dict.fromkeys(need.stage for need in needs)]


def subnetwork_need(planned: LoadedModel, control: str, neurons: int, block: int | None = None) -> Need:
    """Need of ``editing.methods.subnetwork``.

    Args:
        planned: the model.
        control: of ``editing.methods.subnetwork.CONTROLS``, or ``SET``.
        neurons: number of trained neurons.
        block: tokens of a block; None: the default.
    """
    row = block_length(planned.model, block or min(BLOCK, block_length(planned.model)))
    matrices = 3 if planned.anatomy.gated else 2
    # The deltas, their gradients, both moments of AdamW and the best pass.
    deltas = 5 * 4 * matrices * neurons * planned.anatomy.residual
    return pass_need(planned, control, row, True, row * BLOCKS_A_STEP, deltas=deltas)


def lock_needs(planned: LoadedModel, questions: Questions, lock: Lock) -> list[Need]:
    """Needs of ``editing.pipeline.lock``: keys, learning, and answers, which are written a batch at a time."""
    # A reply may be a thought and an answer, each of as many tokens.
    parts = 2 if lock.thoughts else 1
    written, kept = parts * ANSWER_TOKENS, parts * KEPT_ANSWER_TOKENS
    rows = [
        len(prompt_of(planned, question.text, thinks=lock.thoughts).ids) + kept
        for language in lock.languages
        for question in questions_of_part(questions.of[language], BUILD)[
            : MAX_CONVERSATIONS // len(lock.languages)
        ]
    ]
    longest = max(rows) - kept
    text = Text(len(lock.languages), max(rows), sum(rows), len(rows))
    if lock.target is None:
        longest += context_tokens(planned, questions)
    learning = (longest + written) * EXAMPLES_A_STEP
    return [
        key_need(planned, text),
        pass_need(planned, "learn", longest + written, True, learning),
        evaluation_need(planned, text, longest, written),
    ]


def edited_bytes(planned: LoadedModel, edits: Sequence[ModuleEdit] | None = None) -> int:
    """Bytes of the weights that ``editing.plans.applied`` keeps to take an edit back; of experts, of those that change.

    Args:
        planned: the model.
        edits: of a plan; None: of keyed edits of the MLPs of all layers.
    """
    anatomy, copied = planned.anatomy, 0
    if edits is None:
        blocks = keyed_blocks(anatomy, ("mlp",))
        parts = (anatomy.common(layer, block) for layer in range(anatomy.layers) for block in blocks)
        copied = sum(part.weight.nbytes for part in parts if part is not None)
    for edit in edits or ():
        for part in anatomy.parts(edit.layer, edit.block):
            count = part.experts or 1
            width = part.width // count
            columns = (slice(at, at + width) for at in range(part.first, part.columns.stop, width))
            copied += part.weight.nbytes // count * sum(map(edit.changes, columns))
    # Of an offloaded weight the edited one is in a file.
    in_all = int(sum(weight.nbytes for weight in planned.model.parameters()))
    return copied * sizes_of(planned).weights // in_all


def measuring_need(planned: LoadedModel, trained: Iterable[torch.Tensor]) -> Need:
    """Need of ``editing.evaluation.likelihood.language_losses`` with one plan of trained neurons after the other.

    Args:
        planned: the model.
        trained: of each plan int64 [n, 2], (layer, neuron).
    """
    sizes, row = sizes_of(planned), block_length(planned.model)
    neurons = max(
        sum(planned.anatomy.width("mlp_in", layer) for layer in rows[:, 0].unique().tolist())
        for rows in trained
    )
    matrices = 3 if planned.anatomy.gated else 2
    edited = sizes.value * matrices * sizes.residual * neurons
    logits = logit_bytes(sizes, batches_for(planned, False, row)[0], False)
    return pass_need(planned, "measure", row, False, logits=logits, edited=edited)


def evaluation_need(
    planned: LoadedModel,
    text: Text,
    prompt: int = 64,
    new_tokens: int = NEW_TOKENS,
    edits: Sequence[ModuleEdit] | None = None,
) -> Need:
    """Need of ``editing.evaluation.evaluation``: the larger of writing answers and reading text for KL.

    Args:
        planned: the model.
        text: what is read.
        prompt: tokens of the longest prompt.
        new_tokens: maximum tokens of an answer.
        edits: as in ``edited_bytes``.
    """
    sizes = sizes_of(planned)
    writing = writing_bytes(sizes, prompts_at_once(planned, prompt, new_tokens), prompt, new_tokens)
    tokens = min(batches_for(planned, False, text.row)[0], text.batch)
    # The unedited model's hidden states are kept for all third languages if they fit, else for one at a time.
    hidden = sizes.value * sizes.residual * text.tokens // max(1, text.languages)
    third = hidden * max(0, text.languages - 2)
    kept = third if third <= room(planned) * KEPT_FRACTION else hidden
    reading = forward_bytes(sizes, tokens) + logit_bytes(sizes, tokens, False) * 2 + kept
    parts = {
        "libraries": LIBRARIES,
        "weights": sizes.weights,
        "activations": max(writing, reading),
        "edited": edited_bytes(planned, edits),
    }
    return Need("evaluate", parts, tokens)


def writing_need(planned: LoadedModel, stage: str) -> Need:
    """Need of a stage that works on one tensor at a time: ``editing.checkpoints.export``, or a plan without text."""
    sizes = sizes_of(planned)
    stored = any(planned.checkpoint.glob("*.safetensors"))
    shapes = [entry.shape for entry in tensor_entries(planned.checkpoint).values()] if stored else []
    widest = max((prod(shape) for shape in shapes if len(shape) > 1), default=sizes.residual * sizes.neurons)
    edited = min(widest, sizes.residual * sizes.neurons)
    return Need(stage, {"libraries": WRITER, "tensors": COPIES * 8 * edited})
