"""The training loop: parameters that hooks bring into a model whose weights are frozen.

After every pass over the training data the objective is measured on held-out batches.  The result is the parameters of the
best pass, or those before training if no pass improves on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from neurons.errors import BrocaError
from neurons.models.source import LoadedModel
from neurons.recording.recomputation import recomputing
from neurons.recording.text_pass import Progress, expect

Batch = TypeVar("Batch")


class Objective(Protocol[Batch]):
    """A loss whose mean over tokens is minimised, computed in batches."""

    @property
    def held_out(self) -> Sequence[Batch]:
        """The batches on which the best pass is chosen."""

    def steps(self, generator: torch.Generator) -> Iterator[Sequence[Batch]]:
        """The batches of each step of a pass over the training data."""

    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss summed over the tokens of a batch, for the model with its current hooks."""

    def tokens(self, batch: Batch) -> int:
        """The number of tokens in the sum."""

    def recomputes(self, batch: Batch) -> bool:
        """Whether the backward pass recomputes the activations of a batch, to save memory."""


@dataclass(frozen=True)
class Minimised:
    """The result of a training.

    Attributes:
        best: the parameters of the best pass, on the CPU.
        trained: mean training loss (nats a token) during each pass.
        held_out: mean held-out loss (nats a token): before training, then after each pass.
        passes: the number of passes after which the parameters were best.
    """

    best: tuple[torch.Tensor, ...]
    trained: tuple[float, ...]
    held_out: tuple[float, ...]
    passes: int


def minimise(
    loaded: LoadedModel,
    objective: Objective[Batch],
    parameters: Sequence[torch.Tensor],
    edited: Callable[[Sequence[torch.Tensor]], AbstractContextManager[None]],
    optimizer: torch.optim.Optimizer,
    *,
    passes: int,
    units: Sequence[torch.Tensor] | None = None,
    clip: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Minimised:
    """Train parameters.

    Args:
        loaded: the unedited model; its weights do not change.
        objective: the loss to minimise.
        parameters: float32, changed in place.
        edited: context in which the model computes with (a copy of) the parameters, times their units.
        optimizer: of the parameters.
        passes: passes over the training data.
        units: a factor of each parameter; None: 1.
        clip: maximum norm of the gradient of all parameters together; None: no limit.
        seed: of the order of the training data.
        progress: called with the number of tokens of each step, and told that of all passes after the first (``expect``).

    Raises:
        BrocaError: a loss that is not finite.
    """
    generator = torch.Generator().manual_seed(seed)

    def scaled(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(tensors) if units is None else [t * unit for t, unit in zip(tensors, units, strict=True)]

    def copied() -> list[torch.Tensor]:
        return [parameter.detach().to("cpu", copy=True) for parameter in parameters]

    def loss_held_out() -> float:
        with torch.no_grad(), edited(scaled(parameters)):
            sums = [float(objective.loss(batch)) for batch in objective.held_out]
        return sum(sums) / sum(map(objective.tokens, objective.held_out))

    trained: list[float] = []
    held_out, best = [loss_held_out()], copied()
    _require_finite(loaded, held_out[0], "the values before training: lower their strength")
    for number in range(passes):
        total, count = 0.0, 0
        for batches in objective.steps(generator):
            tokens = sum(map(objective.tokens, batches))
            # Leaves: the backward pass of each recomputed layer ends here.
            leaves = [leaf.requires_grad_(True) for leaf in scaled([p.detach() for p in parameters])]
            for batch in batches:
                recomputed = recomputing(loaded.anatomy) if objective.recomputes(batch) else nullcontext()
                # Includes the backward pass, in which recomputed layers need their edits again.
                with torch.enable_grad(), recomputed, edited(leaves):
                    loss = objective.loss(batch)
                    (loss / tokens).backward()
                total += float(loss.detach())
            gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
            for parameter, gradient in zip(parameters, scaled(gradients), strict=True):
                parameter.grad = gradient
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            count += tokens
            if progress is not None:
                progress(tokens)
        if number == 0:
            expect(progress, passes * count)
        trained.append(total / count)
        held_out.append(loss_held_out())
        for mean in (trained[-1], held_out[-1]):
            _require_finite(loaded, mean, "learned values: learn at a lower rate")
        if held_out[-1] < min(held_out[:-1]):
            best = copied()
    return Minimised(tuple(best), tuple(trained), tuple(held_out), held_out.index(min(held_out)))


def _require_finite(loaded: LoadedModel, loss: float, values: str) -> None:
    if not loss < float("inf"):
        raise BrocaError(
            f"{loaded.name}: the loss is {loss} with {values}, or load the model in float32 (--dtype float32)"
        )
