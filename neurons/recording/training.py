"""The training loop: parameters that hooks bring into a model whose weights are frozen.

After every pass over the training data the objective is measured on held-out batches.  The result is the parameters of the
best pass, or those before training if no pass improves on them.

Under a launcher (``neurons.models.processes``) every process has a copy of the parameters.  Each computes its own batches of a
step; losses, tokens and gradients are summed over the processes in order of rank, so that all take the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from neurons.errors import BrocaError
from neurons.models.processes import all_reduce
from neurons.models.source import LoadedModel
from neurons.recording.recomputation import recomputing
from neurons.recording.resume import Unfinished
from neurons.recording.text_pass import Progress, expect

Batch = TypeVar("Batch")


class Objective(Protocol[Batch]):
    """A loss whose mean over tokens is minimised, computed in batches: under a launcher, in those of this process."""

    @property
    def held_out(self) -> Sequence[Batch]:
        """The batches on which the best pass is chosen."""

    def steps(self, generator: torch.Generator) -> Iterator[Sequence[Batch]]:
        """The batches of each step of a pass over the training data; as many steps in every process."""

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
    pass_tokens: int | None = None,
    unfinished: Unfinished | None = None,
) -> Minimised:
    """Train parameters.

    Args:
        loaded: the unedited model; its weights do not change.
        parameters: float32, changed in place.
        edited: context in which the model computes with (a copy of) the parameters, times their units.
        units: a factor of each parameter; None: 1.
        clip: maximum norm of the gradient of all parameters together; None: no limit.
        seed: of the order of the training data.
        progress: called with the number of tokens of each step, and told that of all passes (``expect``).
        pass_tokens: number of tokens of a pass; None: it is told after the first.
        unfinished: keeps the state of the training, from which a stopped one resumes, until it is removed; not with a
            schedule of the learning rate.

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
            loss = sum(float(objective.loss(batch)) for batch in objective.held_out)
        return _of_all(loss) / _of_all(sum(map(objective.tokens, objective.held_out)))

    if pass_tokens is not None:
        expect(progress, passes * pass_tokens)
    course = None if unfinished is None else _Course.load(unfinished, parameters, optimizer)
    if course is None:
        course = _Course([], [loss_held_out()], copied(), generator.get_state())
        _require_finite(loaded, course.held_out[0], "the values before training: lower their strength")
    elif progress is not None:
        progress(course.seen)
    generator.set_state(course.order)
    for number in range(len(course.trained), passes):
        for at, batches in enumerate(objective.steps(generator)):
            if at < course.steps:
                continue
            tokens = int(_of_all(sum(map(objective.tokens, batches))))
            # Leaves: the backward pass of each recomputed layer ends here.
            leaves = [leaf.requires_grad_(True) for leaf in scaled([p.detach() for p in parameters])]
            for batch in batches:
                recomputed = recomputing(loaded.anatomy) if objective.recomputes(batch) else nullcontext()
                # Includes the backward pass, in which recomputed layers need their edits again.
                with torch.enable_grad(), recomputed, edited(leaves):
                    loss = objective.loss(batch)
                    (loss / tokens).backward()
                course.total += float(loss.detach())
            gradients = [
                all_reduce(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, torch.add)
                for leaf in leaves
            ]
            for parameter, gradient in zip(parameters, scaled(gradients), strict=True):
                parameter.grad = gradient
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            course.count += tokens
            course.seen += tokens
            course.steps += 1
            if progress is not None:
                progress(tokens)
            if unfinished is not None and _any(unfinished.is_due()):
                course.save(unfinished, parameters, optimizer)
        if number == 0 and pass_tokens is None:
            expect(progress, passes * course.count)
        course.end_pass(loss_held_out(), generator)
        means = course.trained[-1], course.held_out[-1]
        if unfinished is not None and not all(mean < float("inf") for mean in means):
            unfinished.remove()
        for mean in means:
            _require_finite(loaded, mean, "learned values: learn at a lower rate")
        if course.held_out[-1] < min(course.held_out[:-1]):
            course.best = copied()
        if unfinished is not None:
            course.save(unfinished, parameters, optimizer)
    held_out = course.held_out
    return Minimised(
        tuple(course.best), tuple(course.trained), tuple(held_out), held_out.index(min(held_out))
    )


@dataclass
class _Course:
    """The state of a training beside its parameters and optimizer.

    Attributes:
        trained, held_out, best: as of ``Minimised``, so far.
        order: state of the generator at the beginning of the pass.
        steps: number of steps done in the pass.
        total: sum of the loss of this process in the pass.
        count: tokens in the pass.
        seen: tokens in all passes.
    """

    trained: list[float]
    held_out: list[float]
    best: list[torch.Tensor]
    order: torch.Tensor
    steps: int = 0
    total: float = 0.0
    count: int = 0
    seen: int = 0

    def end_pass(self, held_out: float, generator: torch.Generator) -> None:
        self.trained.append(_of_all(self.total) / self.count)
        self.held_out.append(held_out)
        self.order, self.steps, self.total, self.count = generator.get_state(), 0, 0.0, 0

    def save(
        self, unfinished: Unfinished, parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        tensors = {
            "trained": torch.tensor(self.trained, dtype=torch.float64),
            "held out": torch.tensor(self.held_out, dtype=torch.float64),
            "order": self.order,
            "total": torch.tensor(self.total, dtype=torch.float64),
            "counts": torch.tensor([self.steps, self.count, self.seen]),
        }
        for i, (parameter, best) in enumerate(zip(parameters, self.best, strict=True)):
            tensors |= {f"parameter {i}": parameter.detach().cpu(), f"best {i}": best}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer {i} {name}": value.cpu() for name, value in state.items()}
        unfinished.save(self.seen, tensors)

    @classmethod
    def load(
        cls, unfinished: Unfinished, parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> _Course | None:
        """The state on disk, with parameters and optimizer set to it; None without one, or without the same in all processes."""
        tensors = unfinished.load()[1]
        reached = torch.tensor([-1, -1])
        if tensors:
            reached = torch.stack([torch.tensor(len(tensors["trained"])), tensors["counts"][0]])
        if not _all_equal(reached) or not tensors:
            return None
        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(" ")
            if kind == "parameter":
                parameters[int(rest)].copy_(value)
            elif kind == "optimizer":
                number, _, key = rest.partition(" ")
                states.setdefault(int(number), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        steps, count, seen = tensors["counts"].tolist()
        return cls(
            tensors["trained"].tolist(),
            tensors["held out"].tolist(),
            [tensors[f"best {i}"] for i in range(len(parameters))],
            tensors["order"],
            steps,
            float(tensors["total"]),
            count,
            seen,
        )


def _of_all(value: float) -> float:
    """The sum over the processes."""
    return float(all_reduce(torch.tensor(value, dtype=torch.float64), torch.add))


def _any(condition: bool) -> bool:
    """Whether it holds in one of the processes."""
    return bool(all_reduce(torch.tensor(int(condition)), torch.maximum))


def _all_equal(values: torch.Tensor) -> bool:
    """Whether all processes have the same values."""
    return not _any(not torch.equal(all_reduce(values, torch.maximum), values))


def _require_finite(loaded: LoadedModel, loss: float, values: str) -> None:
    if not loss < float("inf"):
        raise BrocaError(
            f"{loaded.name}: the loss is {loss} with {values}, or load the model in float32 (--dtype float32)"
        )
