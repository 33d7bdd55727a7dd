"""Attribution of answers: how much the answer's probability depends on each neuron, summed over prompts.

A neuron of an expert is 0 at tokens that are not routed to its expert, and so is its attribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from neurons.architectures.anatomy import Anatomy
from neurons.architectures.sites import Routed, SiteHook, expert_units, site_hooks
from neurons.errors import UsageError
from neurons.models.embedded import require_embedded
from neurons.models.memory import batches_for
from neurons.models.next_token import token_losses
from neurons.models.not_finite import not_finite
from neurons.models.source import LoadedModel
from neurons.recording.recomputation import recomputing
from neurons.recording.text_pass import Progress, expect, forward
from neurons.scorers.culnig import answer_scores
from neurons.scorers.integrated_gradients import integrate
from neurons.statistics.statistics import Statistics
from neurons.text.batches import TokenBatch, context_length, row_batches
from neurons.text.prompts import Prompts, answer_tokens

STEPS = 20  # arXiv 2104.08696
CULNIG_SITE = "mlp_act"  # before the nonlinearity
INTEGRATED_SITE = "mlp_in"


def record_answers(
    loaded: LoadedModel,
    prompts: Prompts,
    moment: str,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> Statistics:
    """Sum a moment over the prompts of each language.

    Args:
        prompts: prompts with answers; only the first token of an answer is used.
        moment: ``answer`` or ``answer_recognition`` (CULNIG's s at the output of the gate),
            ``answer_control`` (the same, negative scores as 0) or ``integrated`` (the integrated gradient
            at the input of ``down_proj``, at the prompt's last token).
        steps: number of steps of the integral.
        progress: called with the number of prompts of each batch that is done.

    Returns:
        Statistics with ``mlp_act:answer...`` or ``mlp_in:integrated`` [L, I, K], and the counts in ``prompts``.

    Raises:
        UsageError: a prompt longer than the model's context, or a token without an embedding.
        BrocaError: a sum that is not finite; names the layer.
    """
    anatomy, languages = loaded.anatomy, tuple(prompts.of)
    site = INTEGRATED_SITE if moment == "integrated" else CULNIG_SITE
    total = torch.zeros(anatomy.layers, anatomy.neurons, len(languages), dtype=torch.float64)
    tokens = [prompt_tokens(loaded, prompts, language) for language in languages]
    expect(progress, sum(map(len, prompts.of.values())))
    for k, (rows, whole_answers) in enumerate(tokens):
        answers = torch.tensor([answer[0] for answer in whole_answers])
        # Every step of the integral is a row, and every expert has a place for every token.
        fitting, recomputes = batches_for(loaded, True, max(map(len, rows)))
        at_once = fitting // (steps if moment == "integrated" else 1) // anatomy.experts
        for batch in row_batches(rows, uncounted=0, tokens_a_batch=at_once):
            on_device = batch.to(loaded.device)
            targets = answers[batch.line_numbers].to(loaded.device)
            with recomputing(anatomy) if recomputes else nullcontext():
                if moment == "integrated":
                    values = _integrated(loaded, on_device, targets, steps)
                else:
                    values = _scores(loaded, on_device, targets)
            if moment == "answer_control":
                values = values.clamp(min=0)
            total[..., k] += values.sum(1)
            if progress is not None:
                progress(len(batch.ids))
    return sums_over_prompts(loaded, f"{site}:{moment}", total, prompts.of)


def sums_over_prompts(
    loaded: LoadedModel, name: str, total: torch.Tensor, prompts: Mapping[str, Sequence[object]]
) -> Statistics:
    """Statistics of a moment's sums [L, I, K] over the prompts of each language.

    Raises:
        BrocaError: a sum that is not finite; names the layer.
    """
    if not bool(torch.isfinite(total).all()):
        layer = int((~torch.isfinite(total)).nonzero()[0, 0])
        raise not_finite(loaded, f"{name} in layer {layer}")
    none = torch.zeros(len(prompts), dtype=torch.int64)
    return Statistics(
        languages=tuple(prompts),
        tokens=none,
        texts=none.clone(),
        moments={name: total},
        fingerprint=loaded.fingerprint,
        prompts={name.partition(":")[2]: torch.tensor([len(some) for some in prompts.values()])},
    )


def prompt_tokens(
    loaded: LoadedModel, prompts: Prompts, language: str, whole: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of each prompt of a language, and of its answer: the first, or with ``whole`` all.

    Raises:
        UsageError: a prompt longer than the model's context, or a token without an embedding.
    """
    rows, answers = [], []
    longest = context_length(loaded.model)
    for prompt in prompts.of[language]:
        row, answer = answer_tokens(loaded.tokenizer, prompt)
        answer = answer if whole else answer[:1]
        # The last token of the answer is only predicted.
        if longest is not None and (length := len(row) + len(answer) - 1) > longest:
            raise UsageError(
                f"language {language!r}: a prompt has {length} tokens, but the model reads {longest}: shorten it"
            )
        require_embedded(loaded.name, loaded.tokenizer, max(*row, *answer), loaded.embedding_rows)
        rows.append(row)
        answers.append(answer)
    return rows, answers


def _probability(loaded: LoadedModel, batch: TokenBatch, answers: torch.Tensor) -> torch.Tensor:
    """[rows]: the probability of each row's answer after its last token."""
    last = batch.attention.sum(1) - 1
    hidden = forward(loaded.model, batch)[torch.arange(len(last), device=last.device), last]
    return token_losses(loaded.model, hidden, answers).neg().exp()


def _scores(loaded: LoadedModel, batch: TokenBatch, answers: torch.Tensor) -> torch.Tensor:
    """CULNIG's s, float64 [L, rows, I] on the CPU."""
    anatomy = loaded.anatomy
    scores = torch.zeros(anatomy.layers, len(batch.ids), anatomy.neurons, dtype=torch.float64)

    def score(layer: int, activations: torch.Tensor, routed: Routed | None, gradients: torch.Tensor) -> None:
        own = slice(None)
        if routed is not None:
            own = expert_units(anatomy, routed)
            activations, gradients = (
                values.new_zeros(batch.ids.numel(), values.shape[1])
                .index_copy(0, routed.tokens, values)
                .view(*batch.ids.shape, -1)
                for values in (activations, gradients)
            )
        p = probability.detach().to(activations.device)
        scores[layer, :, own] = answer_scores(activations, gradients, p, batch.attention).cpu()

    def hook_of(layer: int) -> SiteHook:
        def read(values: torch.Tensor, routed: Routed | None) -> None:
            if not torch.is_grad_enabled():
                return  # the first of two passes through a layer that is recomputed
            if not values.requires_grad:
                values.requires_grad_(True)
            # Each is used as its gradient arrives: recomputed, the layers are never all in memory.
            values.register_hook(partial(score, layer, values.detach().clone(), routed))

        return read

    hooks = {(CULNIG_SITE, layer): hook_of(layer) for layer in range(anatomy.layers)}
    with site_hooks(anatomy, hooks), torch.enable_grad():
        probability = _probability(loaded, batch, answers)
        # Rows are independent, so the gradient of the sum holds each row's gradient.
        probability.sum().backward()
    return scores


def _integrated(loaded: LoadedModel, batch: TokenBatch, answers: torch.Tensor, steps: int) -> torch.Tensor:
    """The integrated gradient of each layer alone, float64 [L, rows, I] on the CPU."""
    last = batch.attention.sum(1) - 1
    activations: dict[int, torch.Tensor] = {}
    hooks: dict[tuple[str, int], SiteHook] = {
        (INTEGRATED_SITE, layer): keep_last(loaded.anatomy, activations, layer, last, batch.ids.shape[1])
        for layer in range(loaded.anatomy.layers)
    }
    with site_hooks(loaded.anatomy, hooks), torch.no_grad():
        forward(loaded.model, batch)
    repeated = TokenBatch(
        batch.ids.repeat(steps, 1), batch.attention.repeat(steps, 1), batch.counted.repeat(steps, 1)
    )
    fractions = torch.arange(1, steps + 1, device=batch.ids.device) / steps
    without = torch.zeros(len(batch.ids), loaded.anatomy.neurons, dtype=torch.float64)
    integrals = [without] * loaded.anatomy.layers
    for layer, activation in activations.items():
        scaled = (fractions.to(activation)[:, None, None] * activation).flatten(0, 1).requires_grad_(True)
        replaced = _replace(loaded.anatomy, scaled, last.repeat(steps), batch.ids.shape[1])
        with site_hooks(loaded.anatomy, {(INTEGRATED_SITE, layer): replaced}), torch.enable_grad():
            _probability(loaded, repeated, answers.repeat(steps)).sum().backward()
        assert scaled.grad is not None
        integrals[layer] = integrate(activation, scaled.grad.view(steps, *activation.shape)).cpu()
    return torch.stack(integrals)


def keep_last(
    anatomy: Anatomy, kept: dict[int, torch.Tensor], layer: int, last: torch.Tensor, length: int
) -> SiteHook:
    """A hook that keeps the values at each row's last token, [rows, I]."""

    def read(values: torch.Tensor, routed: Routed | None) -> None:
        at = last.to(values.device)
        if routed is None:
            kept[layer] = values[torch.arange(len(at), device=values.device), at].clone()
            return
        if layer not in kept:
            kept[layer] = values.new_zeros(len(at), anatomy.neurons)
        row, place = _at_last(routed, at, length)
        kept[layer][row, expert_units(anatomy, routed)] = values[place]

    return read


def _replace(anatomy: Anatomy, scaled: torch.Tensor, last: torch.Tensor, length: int) -> SiteHook:
    """A hook that replaces the values at each row's last token by ``scaled`` [rows, I]."""

    def replace(values: torch.Tensor, routed: Routed | None) -> torch.Tensor:
        at = last.to(values.device)
        if routed is None:
            return values.index_put((torch.arange(len(at), device=values.device), at), scaled)
        row, place = _at_last(routed, at, length)
        return values.index_put((place,), scaled[row, expert_units(anatomy, routed)])

    return replace


def _at_last(routed: Routed, last: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose last token is routed to the expert, and the places of these tokens among the expert's."""
    row = routed.tokens // length
    place = (routed.tokens % length == last[row]).nonzero()[:, 0]
    return row[place], place


def merge_moments(recorded: Sequence[Statistics]) -> Statistics:
    """Statistics with the moments of all, which must have the same languages.

    Raises:
        UsageError: different languages.
    """
    first = recorded[0]
    for other in recorded[1:]:
        if other.languages != first.languages:
            raise UsageError(
                f"the prompts have different languages, {', '.join(first.languages)} and "
                f"{', '.join(other.languages)}: use the same in all"
            )
    return Statistics(
        languages=first.languages,
        tokens=first.tokens,
        texts=first.texts,
        moments={name: value for statistics in recorded for name, value in statistics.moments.items()},
        fingerprint=first.fingerprint,
        prompts={name: value for statistics in recorded for name, value in statistics.prompts.items()},
    )
