"""Values learned by gradient: the loop that learned and distilled values share.

The modules W_m' = W_m + V_m K_m^T of a plan keep their keys K_m [S, r] and get values V_m = r_m Z_m [d, r], where r_m is
a module's unit, so that one rate suits every model.  From the plan's own values Adam (arXiv 1412.6980) moves Z by the
gradient of an objective, with every edit in its place: a module above sees what those below write.  After every pass the
objective is taken on what is held out, and the Z of the best pass is the result; the plan's own values if no pass is
better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from editing.methods.added_values import adding, values_of, with_value
from editing.plans.plan import ModuleEdit, Plan
from neurons.errors import BrocaError
from neurons.models.source import LoadedModel
from neurons.recording.recomputation import recomputing
from neurons.recording.text_pass import Progress

Batch = TypeVar("Batch")


class Objective(Protocol[Batch]):
    """A mean over tokens, taken in batches."""

    @property
    def held_out(self) -> Sequence[Batch]:
        """The batches that the pass is chosen by."""

    def steps(self, generator: torch.Generator) -> Iterator[Sequence[Batch]]:
        """The batches of each step of a pass."""

    def loss(self, batch: Batch) -> torch.Tensor:
        """The sum over the tokens of a batch, by the model as it stands."""

    def tokens(self, batch: Batch) -> int:
        """How many tokens the sum is over."""

    def recomputes(self, batch: Batch) -> bool:
        """Whether the activations of a batch are computed again in its backward pass, for want of memory."""


@dataclass(frozen=True)
class Learned:
    """What was learned.

    Attributes:
        edits: with the learned values.
        trained: mean loss (nats a token) of what is learned from, during each pass.
        held_out: mean loss of what is held out: before, then after each pass.
        passes: number of passes behind the values.
    """

    edits: tuple[ModuleEdit, ...]
    trained: tuple[float, ...]
    held_out: tuple[float, ...]
    passes: int


def learn_values(
    loaded: LoadedModel,
    plan: Plan,
    objective: Objective[Batch],
    unit: torch.Tensor,
    *,
    passes: int,
    rate: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> Learned:
    """Move a plan's values.

    Args:
        loaded: the unedited model; its weights do not change.
        plan: every module's edit a left and a right factor of one rank and nothing else.
        objective: what is to become small.
        unit: float64 [modules], r_m.
        passes: over what is learned from.
        rate: Adam's, of Z: about how far a coordinate moves in a step, in parts of r_m.
        seed: of the order.
        progress: called with the number of tokens of each step.

    Raises:
        UsageError: a plan of another kind.
        BrocaError: a loss that is not finite.
    """
    units = unit[:, None, None]
    scale = units.float().to(loaded.device)
    z = (values_of(plan) / units).float().to(loaded.device).requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=rate)
    generator = torch.Generator().manual_seed(seed)

    def loss_held_out() -> float:
        with torch.no_grad(), adding(loaded, plan, z * scale):
            sums = [float(objective.loss(batch)) for batch in objective.held_out]
        return sum(sums) / sum(map(objective.tokens, objective.held_out))

    trained: list[float] = []
    held_out, best = [loss_held_out()], z.detach().clone()
    _require_finite(loaded, held_out[0], "the plan's own values: lower its strength")
    for _ in range(passes):
        total, read = 0.0, 0
        for batches in objective.steps(generator):
            tokens = sum(map(objective.tokens, batches))
            # A leaf, for the backward pass of a layer that is computed again ends there, once a layer.
            values = (z.detach() * scale).requires_grad_(True)
            for batch in batches:
                again = recomputing(loaded.anatomy) if objective.recomputes(batch) else nullcontext()
                # The backward pass inside too, where layers that are computed again are edited again.
                with torch.enable_grad(), again, adding(loaded, plan, values):
                    loss = objective.loss(batch)
                    (loss / tokens).backward()
                total += float(loss.detach())
            assert values.grad is not None
            z.grad = values.grad * scale
            optimizer.step()
            read += tokens
            if progress is not None:
                progress(tokens)
        trained.append(total / read)
        held_out.append(loss_held_out())
        for mean in (trained[-1], held_out[-1]):
            _require_finite(loaded, mean, "learned values: learn at a lower rate")
        if held_out[-1] < min(held_out[:-1]):
            best = z.detach().clone()
    values = best.cpu().double() * units
    edits = [with_value(edit, value) for edit, value in zip(plan.edits, values, strict=True)]
    return Learned(tuple(edits), tuple(trained), tuple(held_out), held_out.index(min(held_out)))


def _require_finite(loaded: LoadedModel, loss: float, values: str) -> None:
    if not loss < float("inf"):
        raise BrocaError(
            f"{loaded.name}: the loss is {loss} with {values}, or load the model in float32 (--dtype float32)"
        )
