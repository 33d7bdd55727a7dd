"""BiPO: a steering vector that is learned from preferences (Cao et al., arXiv 2406.00045).

With p_u the model whose residual stream after layer l is h + u at every position, and d drawn from {-1, 1} in each step,

    r(y) = log p_dv(y | x) - log p_0(y | x)
    loss = mean over pairs of  -log sigmoid(d beta (r(chosen) - r(rejected)))

so that v raises the chosen answers and -v the rejected ones.  A log-probability is the sum over an answer's tokens.
AdamW (arXiv 1711.05101) starts at v = 0, with a linear warm-up and then a cosine, in steps of a few pairs.  Every layer's
vector is learned alone.

As in the released code (CaoYuanpu/BiPO): beta .1, rate 5e-4, 4 pairs a step, 100 steps of warm-up, and no weight decay
(its setting of .05 does not reach the optimizer).  Differences: one pair in ``HELD_OUT`` is held out, and of 20 passes the
one with the lowest loss on the held-out pairs, over both signs, gives v; the warm-up is at most a fifth of the steps; the
end of an answer is not one of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from editing.directions.method import Given, PreferenceMethod
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError, UsageError
from neurons.models.memory import batches_for
from neurons.models.source import LoadedModel
from neurons.recording.text_losses import row_losses
from neurons.recording.text_pass import Progress, forward
from neurons.recording.training import Minimised, minimise
from neurons.scorers.selection import parse_layers
from neurons.setting import COUNT, setting
from neurons.text.batches import TokenBatch, padded_batch
from neurons.text.preferences import CHOSEN, REJECTED
from neurons.text.token_rows import TokenRow

WARM_UP = 100  # steps
HELD_OUT = 5


def bipo_loss(steered: torch.Tensor, unsteered: torch.Tensor, sign: int, beta: float) -> torch.Tensor:
    """The loss of each pair.

    Args:
        steered: float64 [pairs, 2], log p_dv of the chosen and the rejected answers; differentiable.
        unsteered: float64 [pairs, 2], log p_0.
        sign: d.
        beta: above 0.

    Returns:
        float64 [pairs].
    """
    chosen, rejected = (steered - unsteered).unbind(1)
    return -torch.nn.functional.logsigmoid(sign * beta * (chosen - rejected))


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a step: rows 2 i and 2 i + 1 of the batch are the chosen and the rejected answer of a pair."""

    batch: TokenBatch
    unsteered: torch.Tensor  # float64 [pairs, 2]
    sign: int
    recomputes: bool


class _Objective:
    """The loss of a vector after a layer, as the objective of ``minimise``; its "tokens" are pairs."""

    def __init__(
        self, loaded: LoadedModel, rows: Mapping[str, Sequence[TokenRow]], layer: int, method: Bipo
    ) -> None:
        self.loaded, self.layer, self.method = loaded, layer, method
        self.pairs = list(zip(rows[CHOSEN], rows[REJECTED], strict=True))
        self.longest = max(len(row.ids) for pair in self.pairs for row in pair)
        at_once = self._at_once(False)[0]
        places = [range(i, min(i + at_once, len(self.pairs))) for i in range(0, len(self.pairs), at_once)]
        with torch.no_grad():
            self.unsteered = torch.cat([self._likelihoods(self._batch(of_batch)) for of_batch in places])
        held_out = [at for at in range(len(self.pairs)) if at % HELD_OUT == HELD_OUT - 1]
        self.training = [at for at in range(len(self.pairs)) if at % HELD_OUT != HELD_OUT - 1]
        self.held_out = [*self._made(held_out, 1), *self._made(held_out, -1)]
        self.sign = 1

    @contextmanager
    def steered(self, vectors: Sequence[torch.Tensor]) -> Iterator[None]:
        """A context in which the layer adds the sign of the current batch times the vector [d]."""
        (vector,) = vectors

        def add(values: torch.Tensor, _: object) -> torch.Tensor:
            return values + (self.sign * vector).to(values)

        with site_hooks(self.loaded.anatomy, {("block_out", self.layer): add}):
            yield

    def steps(self, generator: torch.Generator) -> Iterator[list[_Pairs]]:
        order = torch.randperm(len(self.training), generator=generator).tolist()
        for first in range(0, len(order), self.method.pairs):
            sign = 1 - 2 * int(torch.randint(2, (), generator=generator))
            yield self._made([self.training[at] for at in order[first : first + self.method.pairs]], sign)

    def loss(self, pairs: _Pairs) -> torch.Tensor:
        self.sign = pairs.sign
        steered = self._likelihoods(pairs.batch)
        return bipo_loss(steered, pairs.unsteered.to(steered.device), pairs.sign, self.method.beta).sum()

    def tokens(self, pairs: _Pairs) -> int:
        return len(pairs.unsteered)

    def recomputes(self, pairs: _Pairs) -> bool:
        return pairs.recomputes

    def _at_once(self, backward: bool) -> tuple[int, bool]:
        """Pairs in a batch, and whether their backward pass recomputes activations."""
        tokens, recomputes = batches_for(self.loaded, backward, Bipo.rows_together * self.longest)
        return max(1, tokens // (Bipo.rows_together * self.longest)), recomputes

    def _made(self, places: Sequence[int], sign: int) -> list[_Pairs]:
        at_once, recomputes = self._at_once(True)
        chunks = [places[i : i + at_once] for i in range(0, len(places), at_once)]
        return [_Pairs(self._batch(of), self.unsteered[list(of)], sign, recomputes) for of in chunks]

    def _batch(self, places: Sequence[int]) -> TokenBatch:
        rows = [row for at in places for row in self.pairs[at]]
        return padded_batch(rows, max(len(row.ids) for row in rows), 0).to(self.loaded.device)

    def _likelihoods(self, batch: TokenBatch) -> torch.Tensor:
        hidden = forward(self.loaded.model, batch)
        return -row_losses(self.loaded.model, hidden, batch.ids, batch.counted[:, :-1]).view(-1, 2)


@dataclass(frozen=True)
class Bipo(PreferenceMethod):
    """The registered method."""

    name = "bipo"
    line = "a vector learned so that it raises the chosen answers, and its opposite the rejected ones"
    source = "arXiv 2406.00045"
    rows_together = 2

    layers: str | None = setting(
        None, "layers to learn a vector for, as 15 or 3-5; by default the middle one"
    )
    beta: float = setting(0.1, "of the loss")
    rate: float = setting(5e-4, "AdamW's highest learning rate")
    pairs: int = setting(4, "pairs a step", kind=COUNT)
    passes: int = setting(20, "passes over the pairs", kind=COUNT)
    seed: int = setting(0, "of the order of pairs and the signs")

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.rate > 0:
            raise UsageError(f"bipo needs a beta and a rate above 0, not {self.beta} and {self.rate}")

    def given(
        self, loaded: LoadedModel, rows: Mapping[str, Sequence[TokenRow]], progress: Progress | None = None
    ) -> tuple[list[Given], dict[str, Any]]:
        """
        Raises:
            UsageError: fewer than ``HELD_OUT`` pairs, or a layer that the model does not have.
            BrocaError: a loss that is not finite, or that no pass lowers on the held-out pairs.
        """
        depth = loaded.anatomy.layers
        # The middle is the paper's choice for Llama 2 (layer 15 of 32).
        layers = [(depth - 1) // 2] if self.layers is None else parse_layers(self.layers)
        if beyond := [layer for layer in layers if layer >= depth]:
            raise UsageError(f"layer {beyond[0]}: the model has layers 0 to {depth - 1}")
        if len(rows[CHOSEN]) < HELD_OUT:
            raise UsageError(
                f"{len(rows[CHOSEN])} preferences are too few to learn from some and hold others out: give {HELD_OUT} or more"
            )
        given, learning = [], {}
        for layer in layers:
            learned = self._learned(loaded, rows, layer, progress)
            if not learned.passes:
                raise BrocaError(
                    f"bipo: no pass lowers the loss on held-out preferences after layer {layer} (at best "
                    f"{min(learned.held_out[1:]):.4f}, {learned.held_out[0]:.4f} without a vector): give more preferences, "
                    "another layer or another rate"
                )
            given.append(Given("block_out", layer, learned.best[0].double()))
            learning[str(layer)] = {
                "trained": learned.trained,
                "held_out": learned.held_out,
                "passes": learned.passes,
            }
        return given, {"learning": learning}

    def _learned(
        self,
        loaded: LoadedModel,
        rows: Mapping[str, Sequence[TokenRow]],
        layer: int,
        progress: Progress | None,
    ) -> Minimised:
        from transformers import get_cosine_schedule_with_warmup

        objective = _Objective(loaded, rows, layer, self)
        vector = torch.zeros(loaded.anatomy.residual, device=loaded.device, requires_grad=True)
        optimizer = torch.optim.AdamW([vector], lr=self.rate, weight_decay=0.0)
        steps = self.passes * -(-len(objective.training) // self.pairs)
        schedule = get_cosine_schedule_with_warmup(optimizer, min(WARM_UP, steps // 5), steps)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        return minimise(
            loaded,
            objective,
            [vector],
            objective.steered,
            optimizer,
            passes=self.passes,
            seed=self.seed,
            progress=progress,
            pass_tokens=len(objective.training),
        )
