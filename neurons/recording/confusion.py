"""Rises of a wrong token's log-probability by single neurons, at the points where answers change their language.

``neurons.scorers.language_confusion`` has the formula.  With the norm's scale fixed, a neuron changes the logits by
u = h U N c, so log E_p[exp u] >= E_p[u] (Jensen) gives an upper bound of its rise,

    rise <= u_w - E_p[u] = h c . d log p(w | x) / dx

whose gradients, one of each layer, are the only work for most neurons.  The exact rise is computed for the neurons of
highest bound, until no other can be among the ``top``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from neurons.architectures.sites import logits, site_hooks
from neurons.errors import BrocaError
from neurons.models.memory import batches_for
from neurons.models.next_token import positions_at_once, token_losses
from neurons.models.source import LoadedModel
from neurons.recording.answers import keep_last, prompt_tokens, sums_over_prompts
from neurons.recording.partial_forward import ending
from neurons.recording.text_pass import Progress, expect, forward
from neurons.scorers.language_confusion import rises
from neurons.statistics.statistics import Statistics
from neurons.text.batches import TokenBatch, row_batches
from neurons.text.prompts import Prompts

SITES = ("mlp_in", "mlp_out", "block_out")
# Gradients in bfloat16 are not exact: neurons are also read if their bound is a little below the smallest rise.
SLACK = 0.1
PROBE = 16.0  # large beside the eps of a norm
TOLERANCE = 2e-2


@dataclass(frozen=True)
class ConfusionPoint:
    """A point where an answer changes its language.

    Attributes:
        ids: tokens of the prompt and of the answer up to the point.
        wrong: the token that follows.
    """

    ids: Sequence[int]
    wrong: int


def points_of_prompts(loaded: LoadedModel, prompts: Prompts) -> dict[str, list[ConfusionPoint]]:
    """The points at the ends of prompts whose answers are in a wrong language.

    Raises:
        UsageError: as ``prompt_tokens``.
    """
    return {
        language: [
            ConfusionPoint(ids, answer[0])
            for ids, answer in zip(*prompt_tokens(loaded, prompts, language), strict=True)
        ]
        for language in prompts.of
    }


def record_confusion(
    loaded: LoadedModel,
    points: Mapping[str, Sequence[ConfusionPoint]],
    top: int,
    moment: str = "confusion",
    progress: Progress | None = None,
) -> Statistics:
    """Sum the ``top`` largest rises of each point over the points of each language.

    Args:
        points: language that the answers should be in -> points.
        top: number of rises that a point counts.
        moment: "confusion" or "confusion_sibling".
        progress: called with the number of points of each batch.

    Returns:
        Statistics with ``mlp_in:<moment>`` [L, I, K], and the counts in ``prompts``.

    Raises:
        BrocaError: an architecture whose neurons do not write to the residual stream unchanged, or whose logits are not
            linear after the final norm; or a sum that is not finite.
    """
    _require_linear(loaded)
    anatomy = loaded.anatomy
    total = torch.zeros(anatomy.layers, anatomy.neurons, len(points), dtype=torch.float64)
    expect(progress, sum(map(len, points.values())))
    for k, of_language in enumerate(points.values()):
        at_once = batches_for(loaded, False, max(len(point.ids) for point in of_language))[0]
        for batch in row_batches([point.ids for point in of_language], 0, at_once):
            wrong = torch.tensor([of_language[line].wrong for line in batch.line_numbers.tolist()])
            read = _Read(loaded, batch.to(loaded.device), wrong)
            for row in range(len(wrong)):
                neurons, values = read.largest(row, top)
                total[neurons[:, 0], neurons[:, 1], k] += values
            if progress is not None:
                progress(len(batch.ids))
    return sums_over_prompts(loaded, f"mlp_in:{moment}", total, points)


def _require_linear(loaded: LoadedModel) -> None:
    anatomy, config = loaded.anatomy, loaded.model.config.get_text_config()
    capped = anatomy.layout.softcap is not None and getattr(config, anatomy.layout.softcap, None) is not None
    direct = anatomy.residual_output and anatomy.multiplier("mlp") == 1
    if anatomy.mixed or not direct or capped or anatomy.layout.head_transform is not None:
        what = (
            "a mixture of experts, which weighs its neurons"
            if anatomy.mixed
            else "a norm or a factor between its MLPs and the residual stream"
            if not direct
            else "logits that are not linear after the final norm"
        )
        raise BrocaError(
            f"{loaded.name}: {anatomy.model_type} has {what}, so the rise of a neuron is not defined: use another method, "
            "such as integrated-gradients"
        )


def _last_states(loaded: LoadedModel, batch: TokenBatch) -> dict[str, torch.Tensor]:
    """Site -> float32 [L, rows, width] at each row's last token."""
    last = batch.attention.sum(1) - 1
    anatomy, length = loaded.anatomy, batch.ids.shape[1]
    kept: dict[str, dict[int, torch.Tensor]] = {site: {} for site in SITES}
    hooks = {
        (site, layer): keep_last(anatomy, kept[site], layer, last, length)
        for site in SITES
        for layer in range(anatomy.layers)
    }
    with site_hooks(anatomy, hooks), torch.no_grad():
        forward(loaded.model, batch)
    states = {}
    for site, of_layer in kept.items():
        absent = torch.zeros(len(last), anatomy.width(site), device=loaded.device)
        states[site] = torch.stack(
            [of_layer.get(layer, absent).to(absent) for layer in range(anatomy.layers)]
        )
    return states


class _FixedNorm:
    """The final norm as the linear map that it is at the scales of some states.

    It is read from its outputs: N(x) = gain * (x - mean(x) if it centres) * scale + bias.

    Args:
        ends: [rows, d], outputs of the last layer.

    Raises:
        BrocaError: a norm of another form.
    """

    def __init__(self, loaded: LoadedModel, ends: torch.Tensor) -> None:
        width = ends.shape[1]
        # The signs alternate, so their mean is 0 and a norm that centres changes them like one that does not.
        signs = 1.0 - 2.0 * (torch.arange(width, device=ends.device) % 2)
        probes = PROBE * torch.stack([torch.zeros_like(signs), signs, torch.ones_like(signs)])
        read = ending(loaded.model, loaded.anatomy, 3 + len(ends))(torch.cat([probes, ends.float()])).float()
        if read.shape[1] != width:
            raise self._other(loaded)
        self.bias, self.gain = read[0], (read[1] - read[0]) * signs
        self.centres = bool((read[2] - read[0]).norm() < (read[1] - read[0]).norm() / 2)
        along = self.gain * self._centred(ends.float())
        wanted = read[3:] - self.bias
        self.scale = (along * wanted).sum(1, keepdim=True) / along.square().sum(1, keepdim=True)
        if not bool(((along * self.scale - wanted).norm(dim=1) <= TOLERANCE * read[3:].norm(dim=1)).all()):
            raise self._other(loaded)

    def linear(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors [..., d] that are added to x, before the scale."""
        return self.gain * self._centred(vectors)

    def back(self, gradients: torch.Tensor) -> torch.Tensor:
        """The gradients with respect to x of gradients [..., rows, d] with respect to N(x)."""
        return self._centred(self.gain * gradients) * self.scale

    def _centred(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors - vectors.mean(-1, keepdim=True) if self.centres else vectors

    def _other(self, loaded: LoadedModel) -> BrocaError:
        return BrocaError(
            f"{loaded.name}: the final norm is not of a known form, so the rise of a neuron is not defined: use another "
            "method, such as integrated-gradients"
        )


class _Read:
    """A batch of points that the model has read.

    Args:
        batch: the points, on the model's device.
        wrong: int64 [rows], the token that follows each.
    """

    def __init__(self, loaded: LoadedModel, batch: TokenBatch, wrong: torch.Tensor) -> None:
        self.loaded, self.wrong = loaded, wrong
        states = _last_states(loaded, batch)
        self.activations = states["mlp_in"]
        self.norm = _FixedNorm(loaded, states["block_out"][-1])
        before = self.norm.linear(states["block_out"] - states["mlp_out"]) * self.norm.scale + self.norm.bias
        # [L, rows, d], inputs of the output embeddings without a layer's MLP.
        self.before = before.to(loaded.model.dtype)
        self.bounds = self._bounds()
        self.zero = logits(loaded.model, torch.zeros_like(self.before[0, :1])).float()

    @torch.enable_grad()
    def _bounds(self) -> torch.Tensor:
        """The upper bound of every rise, float32 [L, rows, I]."""
        anatomy = self.loaded.anatomy
        hidden = self.before.flatten(0, 1).requires_grad_(True)
        token_losses(self.loaded.model, hidden, self.wrong.repeat(anatomy.layers)).sum().backward()
        assert hidden.grad is not None
        gradients = self.norm.back(-hidden.grad.view(self.before.shape).float())
        bounds = torch.zeros_like(self.activations)
        for layer in anatomy.layers_with("mlp"):
            along = gradients[layer] @ anatomy.weight_values(layer, "mlp").to(gradients)
            width = along.shape[1]
            bounds[layer, :, :width] = self.activations[layer, :, :width] * along
        return bounds

    def largest(self, row: int, top: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The neurons (layer, neuron), int64 [n, 2], of largest rise at a point, and their rises, float64 [n]."""
        bounds = self.bounds[:, row]
        places = _ordered(bounds, self.loaded.anatomy.unit_counts("neuron"))
        at_once = min(positions_at_once(self.loaded.model), top)
        found = torch.zeros(0, dtype=torch.float64)
        log_probabilities: dict[int, torch.Tensor] = {}
        for first in range(0, len(places), at_once):
            if len(found) >= top:
                smallest = float(found.topk(top).values[-1])
                if float(bounds[tuple(places[first])]) <= smallest - SLACK * abs(smallest):
                    break
            chunk = places[first : first + at_once]
            found = torch.cat([found, self._rises(row, chunk, log_probabilities)])
        order = found.argsort(descending=True, stable=True)[:top]
        return places[order], found[order]

    @torch.no_grad()
    def _rises(
        self, row: int, neurons: torch.Tensor, log_probabilities: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        """The rises of neurons [n, 2], float64 [n]; keeps each layer's log-probabilities [vocabulary]."""
        model, anatomy = self.loaded.model, self.loaded.anatomy
        found = torch.empty(len(neurons), dtype=torch.float64)
        for layer in neurons[:, 0].unique().tolist():
            own = (neurons[:, 0] == layer).nonzero()[:, 0]
            columns = neurons[own, 1]
            if layer not in log_probabilities:
                log_probabilities[layer] = (
                    logits(model, self.before[layer, row, None])[0].float().log_softmax(-1)
                )
            values = anatomy.weight_values(layer, "mlp")[:, columns].T.to(self.activations)
            activations = self.activations[layer, row, columns.to(self.activations.device), None]
            written = self.norm.linear(activations * values)
            changes = logits(model, (written * self.norm.scale[row]).to(model.dtype)).float() - self.zero
            found[own] = rises(changes, log_probabilities[layer], int(self.wrong[row])).cpu()
        return found


def _ordered(bounds: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """The neurons (layer, neuron) by descending bound, int64 [n, 2]."""
    there = (
        torch.arange(bounds.shape[1], device=bounds.device)
        < torch.tensor(widths, device=bounds.device)[:, None]
    )
    neurons = there.nonzero()
    order = bounds[there].argsort(descending=True, stable=True)
    return neurons[order].cpu()
