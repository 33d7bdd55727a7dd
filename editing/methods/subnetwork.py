"""Sparse subnetwork enhancement (arXiv 2510.13580): only the weights of a language's neurons are trained on its text.

Of the neurons S of the languages in each layer, the rows S of ``gate_proj`` and ``up_proj`` and the columns S of
``down_proj`` change by D.  AdamW (arXiv 1711.05101) solves, from D = 0,

    minimise over D   mean over tokens of   -log p'(token | tokens before it in its block)

on blocks of text.  After every pass the loss on held-out text is measured; the result is the D of the best pass.  D is
trained in float32 as a factor of its own, so gradients and the optimizer's state have its size, 3 |S| d numbers in a
layer, and the model's weights do not change.  The result is exact and not of low rank.

Differences from the paper: weight decay is towards the unedited weights, not towards 0, and the best pass is chosen.  Its
100 million tokens are a matter of ``--tokens``.

Controls, which change the same modules:

    random    as many other neurons in each layer, drawn at random
    all       all neurons of every layer, without those of routed experts
    lora      U K^T (arXiv 2106.09685) of the rank for which the layer has about as many numbers as D; U = 0 and K uniform
              at first, as in PEFT, and scale 1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from editing.methods.scope import require_neurons
from editing.methods.trained_factors import computing_with, factors_of, with_factors
from editing.plans.algebra import with_norms
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from neurons.errors import BrocaError, UsageError
from neurons.models.memory import batches_for
from neurons.models.next_token import token_losses
from neurons.models.processes import world
from neurons.models.source import LoadedModel, ModelSource
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.recording.corpus_recording import recording_key
from neurons.recording.resume import Unfinished
from neurons.recording.text_pass import Progress, forward
from neurons.recording.training import minimise
from neurons.scorers.random_control import random_like
from neurons.text.batches import TokenBatch, block_length, packed_corpus
from neurons.text.corpus import Corpus
from neurons.text.token_budget import GRADIENTS, LOSSES, text_read

METHOD = "subnetwork"
SET, RANDOM, ALL, LORA = "set", "random", "all", "lora"
CONTROLS = (RANDOM, ALL, LORA)
# Of the paper.
RATE, WEIGHT_DECAY, CLIP = 1e-4, 0.01, 1.0
BLOCK, BLOCKS_A_STEP = 512, 2
PASSES = 1


@dataclass(frozen=True)
class Training:
    """Settings of a training.

    Attributes:
        passes: over the training text.
        rate: AdamW's learning rate.
        block: tokens of a block; None: ``BLOCK``, or the model's context if that is shorter.
        tokens: maximum tokens of each language to train on; None: as the corpus says, else ``GRADIENTS.tokens``.
        seed: of the order of the blocks, the random neurons and LoRA's K.
    """

    passes: int = PASSES
    rate: float = RATE
    block: int | None = None
    tokens: int | None = None
    seed: int = 0


def chosen_neurons(neurons: NeuronSet, languages: Sequence[str]) -> torch.Tensor:
    """int64 [n, 2], (layer, neuron) of the neurons of any of the languages, in order.

    Raises:
        UsageError: a language that the set does not have, or none of them has a neuron.
    """
    rows: torch.Tensor = torch.cat([neurons.of(language) for language in languages]).unique(dim=0)
    if not len(rows):
        raise UsageError(f"the neuron set has no neuron for {', '.join(languages)}: choose others")
    return rows


def control_neurons(source: ModelSource, rows: torch.Tensor, control: str, seed: int) -> torch.Tensor:
    """The neurons of a control, in the form of ``chosen_neurons``; those given for ``SET`` and ``LORA``.

    Raises:
        UsageError: as ``random_like``.
        BrocaError: neurons of routed experts.
    """
    anatomy = source.anatomy
    places = torch.zeros(anatomy.layers, anatomy.neurons, dtype=torch.bool)
    for layer in range(anatomy.layers):
        for part in anatomy.parts(layer, "mlp"):
            places[layer, part.columns] = part.experts is None
        # Refuses the neurons of routed experts.
        anatomy.input_rows(layer, rows[rows[:, 0] == layer, 1].tolist())
    if control == RANDOM:
        return random_like(rows, anatomy.layers, anatomy.neurons, seed, places)
    return places.nonzero() if control == ALL else rows


def untrained(source: ModelSource, rows: torch.Tensor) -> list[ModuleEdit]:
    """The edits of these neurons, with deltas of 0: for each layer its output module, gate and linear branch.

    Args:
        source: the model.
        rows: int64 [n, 2], (layer, neuron), in order.

    Raises:
        BrocaError: neurons of routed experts.
    """
    anatomy = source.anatomy
    edits = []
    for layer in rows[:, 0].unique().tolist():
        neurons = rows[rows[:, 0] == layer, 1]
        components = tuple(neurons.tolist())
        zeros = torch.zeros(len(neurons), anatomy.residual)
        edits.append(ModuleEdit(layer, "mlp", components, columns=neurons, column_deltas=zeros))
        for path, of_module in anatomy.input_rows(layer, components).items():
            width = anatomy.parts(layer, path)[0].width
            deltas = torch.zeros(len(of_module), width)
            edits.append(ModuleEdit(layer, path, components, rows=of_module, row_deltas=deltas))
    return edits


def as_lora(source: ModelSource, edits: Sequence[ModuleEdit], seed: int) -> list[ModuleEdit]:
    """Edits of low rank of the same modules, with about as many numbers in each layer."""
    anatomy = source.anatomy
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        (edit.layer, edit.block): (
            anatomy.rows(edit.layer, edit.block),
            anatomy.parts(edit.layer, edit.block)[-1].columns.stop,
        )
        for edit in edits
    }
    replaced = []
    for edit in edits:
        numbers = sum(
            factor.numel() for factor in factors_of([one for one in edits if one.layer == edit.layer])
        )
        each = sum(sum(shape) for (layer, _), shape in shapes.items() if layer == edit.layer)
        rank = max(1, round(numbers / each))
        outputs, inputs = shapes[edit.layer, edit.block]
        right = (2 * torch.rand(inputs, rank, generator=generator) - 1) / inputs**0.5
        replaced.append(ModuleEdit(edit.layer, edit.block, (), left=torch.zeros(outputs, rank), right=right))
    return replaced


def subnetwork_plan(
    loaded: LoadedModel,
    neurons: NeuronSet,
    languages: Sequence[str],
    text: Corpus,
    held_out: Corpus,
    training: Training = Training(),
    control: str = SET,
    progress: Progress | None = None,
    out: Path | None = None,
) -> Plan:
    """Train the neurons of languages, or those of a control, on text of the languages.

    Args:
        loaded: the unedited model; its weights do not change.
        neurons: of this model.
        languages: of the neuron set, with text in both corpora.
        text: plain text to train on.
        held_out: plain text on which the best pass is chosen.
        training: settings.
        control: ``SET``, or one of ``CONTROLS``.
        progress: called with the number of tokens of each step.
        out: output file; the state of the training is kept beside it (``neurons.recording.resume``), also when it has ended.

    Returns:
        The plan; ``metadata["learning"]`` holds the losses of ``Minimised``.

    Raises:
        UsageError: no passes or a rate that is not positive, less than a block of text, conversations, a set of heads,
            or as ``chosen_neurons`` and ``control_neurons``.
        BrocaError: quantised weights, neurons of another model or of routed experts, a loss that is not finite, or, of the set, one
            that no pass lowers on the held-out text.
    """
    if training.passes < 1 or not training.rate > 0:
        raise UsageError(
            f"{training.passes} passes at a rate of {training.rate} train nothing: give one pass or more, and a positive rate"
        )
    loaded.require_exact("an edit")
    require_neurons(loaded, neurons)
    rows = chosen_neurons(neurons, languages)
    edits = untrained(loaded, control_neurons(loaded, rows, control, training.seed))
    if control == LORA:
        edits = as_lora(loaded, edits, training.seed)
    objective = NextTokens(loaded, text.only(*languages), held_out.only(*languages), training)
    factors = [factor.to(loaded.device) for factor in factors_of(edits)]
    unfinished = None
    if out is not None:
        given = [METHOD, control, str(training), str(rows.tolist()), f"held out: {held_out.digest}"]
        unfinished = Unfinished(out, recording_key(loaded, {"text": objective.blocks}, given))
    made = minimise(
        loaded,
        objective,
        factors,
        lambda given: computing_with(loaded, with_factors(edits, given)),
        torch.optim.AdamW(factors, lr=training.rate, weight_decay=WEIGHT_DECAY),
        passes=training.passes,
        clip=CLIP,
        seed=training.seed,
        progress=progress,
        pass_tokens=sum(int(block.counted[:, 1:].sum()) for block in objective.blocks),
        unfinished=unfinished,
    )
    if made.passes == 0 and control == SET:
        if unfinished is not None:
            unfinished.remove()
        raise BrocaError(
            f"no pass lowers the loss on held-out text ({made.held_out[0]:.4f} nats a token before, "
            f"{min(made.held_out[1:]):.4f} after): train at a lower rate, or on more text"
        )
    settings: dict[str, Any] = {
        "neurons": neurons.metadata.get("method"),
        "control": control,
        "passes": training.passes,
        "rate": training.rate,
        "weight_decay": WEIGHT_DECAY,
        "clip": CLIP,
        "block": objective.length,
        "blocks_a_step": BLOCKS_A_STEP,
        "seed": training.seed,
        "corpus": text.only(*languages).provenance,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }
    metadata = {
        **plan_metadata(loaded, METHOD, settings, {"languages": list(languages)}),
        "read": objective.read,
        "learning": {
            "learned_on": list(made.trained),
            "held_out": list(made.held_out),
            "passes": made.passes,
        },
    }
    return make_plan(with_norms(loaded, with_factors(edits, made.best)), metadata)


@dataclass(frozen=True)
class _Blocks:
    """Blocks of tokens, and whether their backward pass recomputes activations."""

    tokens: TokenBatch
    recomputes: bool


class NextTokens:
    """The loss of the next token in blocks of text, as the objective of ``minimise``.

    Under a launcher the processes share the blocks of each step, and the held-out ones.
    """

    def __init__(self, loaded: LoadedModel, text: Corpus, held_out: Corpus, training: Training) -> None:
        for corpus in (text, held_out):
            corpus.require_plain(*corpus.languages, remedy="train on plain text")
        self.length = training.block or min(BLOCK, block_length(loaded.model))
        packed = partial(packed_corpus, loaded, block=self.length, tokens_a_batch=self.length)
        of_text = packed(text, tokens=training.tokens, default=GRADIENTS.tokens)
        few = min(training.tokens or LOSSES.tokens, LOSSES.tokens)
        of_held_out = packed(held_out, tokens=few)
        self.read = text_read(text, of_text)
        self._loaded = loaded
        self.blocks = [batch for batches in of_text.values() for batch in batches]
        self.held_out = self._joined([batch for batches in of_held_out.values() for batch in batches], False)

    def steps(self, generator: torch.Generator) -> Iterator[list[_Blocks]]:
        order = torch.randperm(len(self.blocks), generator=generator).tolist()
        for first in range(0, len(order), BLOCKS_A_STEP):
            yield self._joined([self.blocks[i] for i in order[first : first + BLOCKS_A_STEP]], True)

    def loss(self, batch: _Blocks) -> torch.Tensor:
        tokens = batch.tokens.to(self._loaded.device)
        counted = tokens.counted[:, 1:]
        hidden = forward(self._loaded.model, tokens)[:, :-1][counted]
        return token_losses(self._loaded.model, hidden, tokens.ids[:, 1:][counted]).sum()

    def tokens(self, batch: _Blocks) -> int:
        return int(batch.tokens.counted[:, 1:].sum())

    def recomputes(self, batch: _Blocks) -> bool:
        return batch.recomputes

    def _joined(self, blocks: Sequence[TokenBatch], backward: bool) -> list[_Blocks]:
        """The blocks of this process in order, as many at a time as fit into memory."""
        number, processes = world()
        blocks = blocks[number::processes]
        tokens, recomputes = batches_for(self._loaded, backward, self.length)
        at_once = max(1, tokens // self.length)
        return [
            _Blocks(_stacked(blocks[first : first + at_once]), recomputes)
            for first in range(0, len(blocks), at_once)
        ]


def _stacked(blocks: Sequence[TokenBatch]) -> TokenBatch:
    ids, attention, counted = (
        torch.cat([getattr(block, name) for block in blocks]) for name in ("ids", "attention", "counted")
    )
    return replace(blocks[0], ids=ids, attention=attention, counted=counted)
