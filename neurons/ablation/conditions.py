"""The loss of texts under ablation conditions; layers below the ablated ones are computed once for all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from neurons.ablation.replacement import Replacement, ablation_hooks
from neurons.architectures.sites import Routed, SiteHook, site_hooks
from neurons.errors import BrocaError
from neurons.models.not_finite import not_finite
from neurons.models.source import LoadedModel
from neurons.recording.partial_forward import Kept, forward_from, forward_keeping, supports_partial_forward
from neurons.recording.text_losses import predicted, text_losses
from neurons.text.batches import TokenBatch

# (model, final hidden states [rows, length, d], the batch on the model's device) -> float64 [rows, ...] on the CPU
Reading = Callable[[Any, torch.Tensor, TokenBatch], torch.Tensor]
# Fraction of GPU memory for kept hidden states; more are kept in main memory.
_KEPT_FRACTION = 0.1


@dataclass(frozen=True)
class Condition:
    """Values that are ablated together.

    Attributes:
        rows: int64 [n, 2], (layer, column of the site), sorted; empty for the unchanged model.
        site: "mlp_in", where columns are neurons, or "attn_in", where they are channels of heads.
    """

    rows: torch.Tensor
    replacement: Replacement = field(default_factory=Replacement)
    site: str = "mlp_in"

    @property
    def first_layer(self) -> int | None:
        """The first layer with an ablated value; None without any."""
        return int(self.rows[:, 0].min()) if len(self.rows) else None

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that identify the condition."""
        by = self.replacement
        digest = hashlib.sha256(self.rows.contiguous().numpy().tobytes())
        if len(self.rows):
            site = "" if self.site == "mlp_in" else f" {self.site}"
            digest.update(f"{by.kind} {by.seed if by.kind == 'resample' else ''}{site}".encode())
            if by.kind == "mean" and by.means is not None:
                means = by.means[self.rows[:, 0], self.rows[:, 1]]
                digest.update(means.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


UNTOUCHED = Condition(torch.zeros(0, 2, dtype=torch.int64))


class InMemory:
    """A store of finished losses by (language, index of the batch, digest of the condition)."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int, str], torch.Tensor] = {}

    def get(self, language: str, turn: int, digest: str) -> torch.Tensor | None:
        return self._held.get((language, turn, digest))

    def put(self, language: str, turn: int, digest: str, losses: torch.Tensor) -> None:
        self._held[language, turn, digest] = losses


@dataclass(frozen=True)
class TextLosses:
    """The loss of each text under each condition.

    Attributes:
        tokens: language -> int64 [texts], number of predicted tokens.
        sums: language -> float64 [texts, conditions], negative log-likelihoods, nats.
    """

    tokens: dict[str, torch.Tensor]
    sums: dict[str, torch.Tensor]


def condition_losses(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    conditions: Sequence[Condition],
    ledger: InMemory | None = None,
    progress: Callable[[int], None] | None = None,
    whole: bool = False,
    read: Reading = text_losses,
) -> TextLosses:
    """The loss of every text under every condition; the model is unchanged afterwards.

    For each batch, one full pass keeps the input of every layer that is the first of a condition, and each
    condition runs from there.  Equal conditions run once.

    Args:
        batches: language -> its batches, one text a row.
        conditions: in the order of the result's columns.
        ledger: the store of finished losses; None keeps them in memory.
        progress: called with the number of tokens of each batch, for each distinct condition.
        whole: run every condition from the first layer, as for a model whose layers share more than hidden
            states; by default this depends on ``supports_partial_forward``.
        read: what is measured of each row; the values of other than losses are in ``sums`` too, with their further
            dimensions last.

    Raises:
        BrocaError: a neuron or channel that the model does not have, or a loss that is not finite.
    """
    anatomy = loaded.anatomy
    for condition in conditions:
        _require_inside(condition.rows, anatomy.layers, anatomy.width(condition.site))
    distinct = {condition.digest: condition for condition in conditions}
    book = InMemory() if ledger is None else ledger
    from_below = not whole and supports_partial_forward(loaded.model, anatomy)
    tokens, sums = {}, {}
    for language, of_language in batches.items():
        for turn, batch in enumerate(of_language):
            size = int(batch.counted.sum())
            missing = [c for d, c in distinct.items() if book.get(language, turn, d) is None]
            if progress is not None and len(missing) < len(distinct):
                progress(size * (len(distinct) - len(missing)))
            for condition, losses in batch_losses(
                loaded, batch, missing, f"{language} {turn}", from_below, read
            ):
                if not bool(torch.isfinite(losses).all()):
                    raise not_finite(loaded, f"the loss of a text of language {language!r}")
                book.put(language, turn, condition.digest, losses)
                if progress is not None:
                    progress(size)
        tokens[language] = torch.cat([predicted(batch).sum(1) for batch in of_language])
        columns = {
            digest: torch.cat([_held(book, language, turn, digest) for turn in range(len(of_language))])
            for digest in distinct
        }
        sums[language] = torch.stack([columns[c.digest] for c in conditions], dim=1)
    return TextLosses(tokens, sums)


def batch_losses(
    loaded: LoadedModel,
    batch: TokenBatch,
    conditions: Sequence[Condition],
    turn: str,
    from_below: bool,
    read: Reading = text_losses,
) -> Iterator[tuple[Condition, torch.Tensor]]:
    """Each condition with the loss of each text of the batch (nats, float64 [rows], on the CPU).

    Args:
        turn: name of the batch, which seeds random draws.
        from_below: start conditions at their first ablated layer.
        read: as in ``condition_losses``.
    """
    if not conditions:
        return
    anatomy, model = loaded.anatomy, loaded.model
    on_device = batch.to(loaded.device)
    starts = {c.first_layer if from_below else 0 for c in conditions} - {None, 0}
    layers = sorted(layer for layer in starts if layer is not None)
    kept: Kept | None = None
    untouched = [c for c in conditions if c.first_layer is None]
    with torch.no_grad():
        if layers or untouched:
            with site_hooks(anatomy, _no_op_hooks(loaded)):
                keep_on = _kept_on(loaded, batch, len(layers))
                hidden, kept = forward_keeping(model, anatomy, on_device, layers, keep_on)
            for condition in untouched:
                yield condition, read(model, hidden, on_device)
            del hidden
        for condition in conditions:
            if condition.first_layer is None:
                continue
            hooks = ablation_hooks(
                anatomy, condition.rows, condition.replacement, on_device.counted, turn, condition.site
            )
            with site_hooks(anatomy, {**_no_op_hooks(loaded), **hooks}):
                start = condition.first_layer if from_below else 0
                hidden = forward_from(model, anatomy, on_device, start, kept)
            yield condition, read(model, hidden, on_device)


def _no_op_hooks(loaded: LoadedModel) -> dict[tuple[str, int], SiteHook]:
    """Hooks that change nothing, at every mixture of experts.

    A hooked mixture computes its experts one by one; so must those of the other layers and of the unchanged
    model, or rounding would differ between them.
    """

    def no_op(values: torch.Tensor, routed: Routed | None) -> None:
        return None

    anatomy = loaded.anatomy
    return {("mlp_in", layer): no_op for layer in range(anatomy.layers) if anatomy.mixed_in(layer)}


def _kept_on(loaded: LoadedModel, batch: TokenBatch, layers: int) -> torch.device | None:
    """The device that keeps hidden states; None is the model's device."""
    if loaded.device.type != "cuda":
        return None
    needed = layers * batch.ids.numel() * loaded.anatomy.residual * loaded.model.dtype.itemsize
    total = torch.cuda.get_device_properties(loaded.device).total_memory
    return torch.device("cpu") if needed > _KEPT_FRACTION * total else None


def _held(book: InMemory, language: str, turn: int, digest: str) -> torch.Tensor:
    losses = book.get(language, turn, digest)
    assert losses is not None
    return losses


def _require_inside(rows: torch.Tensor, layers: int, width: int) -> None:
    if len(rows) and not (
        bool((rows >= 0).all()) and int(rows[:, 0].max()) < layers and int(rows[:, 1].max()) < width
    ):
        raise BrocaError(f"a neuron to ablate is outside the model's {layers} x {width}")
