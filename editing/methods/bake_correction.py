"""Correction of a baked vector's error by the next layers.

The coefficient of a baked vector v (``editing.methods.bake``) varies about 1 between tokens, more in deeper layers,
and the divergence from the hook grows with the square of the error.  The error (1 - k^T h) v stays in the residual
stream, so down_proj of each of the next layers can add what it can predict of it from its input h'.  With r = 1 minus
the coefficients so far, read in the model with the edits so far,

    dW' = strength * v q^T      q = argmin mean (r - q^T h')^2 + eps * mean(diag S) |q|^2   subject to   q^T h'_start = r_start
        = a + b (r_start - a^T h'_start) / (b^T h'_start)        a = S_eps^-1 mean(r h'),  b = S_eps^-1 h'_start

with S the second moment of h' about 0.  Each layer takes one pass over the text.  ``benchmarks/bake.py`` measures the
effect.  A vector baked as a bias is exact and needs no correction.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch

from editing.methods.bake import EPS
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, Plan, make_plan
from editing.plans.weights import Weights
from neurons.architectures.anatomy import COMMON
from neurons.architectures.sites import Routed
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Position, PositionReader, Progress, numbered, read_text
from neurons.statistics.cholesky import NotPositiveDefiniteError, solve_positive_definite
from neurons.text.batches import TokenBatch, language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import KEYS


@dataclass
class RemainderMoments:
    """Sums over tokens of the input h [n] of a module and of the remainder r.

    Attributes:
        square: float64 [n, n], sum of h h^T.
        product: float64 [n], sum of r h.
        remainder: sum of r^2.
        tokens: number of tokens.
        start, start_remainder, starts: sums of h [n] and of r over the start tokens, and their number.
    """

    square: torch.Tensor
    product: torch.Tensor
    remainder: float = 0.0
    tokens: int = 0
    start: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    start_remainder: float = 0.0
    starts: int = 0

    def add(self, inputs: torch.Tensor, remainder: torch.Tensor, batch: TokenBatch) -> None:
        """Add the inputs [rows, length, n] and r [rows, length] of a batch."""
        counted, start = batch.counted, batch.at_start
        rows, of_rows = inputs[counted].double(), remainder[counted]
        self.square.addmm_(rows.T, rows)
        self.product += of_rows @ rows
        self.remainder += float(of_rows @ of_rows)
        self.tokens += len(rows)
        self.start = self.start + inputs[start].double().sum(0)
        self.start_remainder += float(remainder[start].sum())
        self.starts += int(start.sum())


def correction_key(moments: RemainderMoments, eps: float = EPS) -> tuple[torch.Tensor, float]:
    """(q [n] float64 of the module's docstring, root mean square of the new remainder).

    Raises:
        BrocaError: the second moment of the inputs is singular even with its ridge.
    """
    square = moments.square / moments.tokens
    ridged = square.clone()
    ridged.diagonal().add_(max(eps, 1e-10) * float(square.diagonal().mean()))
    product = moments.product / moments.tokens
    start = moments.start / max(moments.starts, 1)
    try:
        right = torch.stack([product, start.expand_as(product)], 1)
        solved = solve_positive_definite(ridged, right, overwrite=True)
    except NotPositiveDefiniteError as error:
        raise BrocaError(
            f"{moments.tokens} tokens are too few for the {len(ridged)} inputs of the correcting layer at eps {eps}: "
            "give more text or a larger eps"
        ) from error
    key, step = solved[:, 0], solved[:, 1]
    at_start = float(start @ step) if moments.starts else 0.0
    if at_start > 0:
        key = key + step * ((moments.start_remainder / moments.starts - float(start @ key)) / at_start)
    square_error = moments.remainder / moments.tokens - 2 * float(key @ product) + float(key @ square @ key)
    return key, max(square_error, 0.0) ** 0.5


def corrected_plan(
    loaded: LoadedModel,
    corpus: Corpus,
    plan: Plan,
    layers: int = 1,
    eps: float = EPS,
    progress: Progress | None = None,
) -> Plan:
    """The plan with corrections in down_proj of the next layers.

    Args:
        loaded: the model.
        corpus: neutral text, that of ``bake_plan``.
        plan: result of ``bake_plan`` with one vector at an MLP.
        layers: number of correcting layers, the next ones with an MLP that is no mixture; fewer if the model has no more.
        eps: ridge, as a fraction of the mean square of the inputs.
        progress: called with the number of tokens done, over all layers.

    Returns:
        The plan with one more edit for each layer, whose note "spread" is the root mean square of the remainder.

    Raises:
        UsageError: another kind of plan, fewer than one layer, or no layer after it.
        BrocaError: the plan belongs to another model.
    """
    if plan.metadata["method"] != "bake" or len(plan.edits) != 1 or plan.edits[0].block != "mlp":
        raise UsageError("only a single vector baked into the MLP of one layer can be corrected")
    first = plan.edits[0]
    anatomy = loaded.anatomy
    able = [at for at in anatomy.layers_with("mlp") if at > first.layer and not anatomy.mixed_in(at)]
    if layers < 1 or not able:
        raise UsageError(
            f"{layers} correcting layers of the {len(able)} after layer {first.layer} of {anatomy.layers} that have a "
            "dense MLP: give at least one, or a vector for an earlier layer"
        )
    if first.right is None or first.left is None:
        raise BrocaError("the baked plan has no rank-1 factors: compute it again")
    batches = [batch for _, batch in numbered(language_batches(loaded, corpus, default=KEYS.tokens))]
    weights = Weights(loaded)
    edits = [first]
    for layer in able[:layers]:
        with applied(loaded, make_plan(edits, plan.metadata)):
            moments = remainder_moments(loaded, batches, edits, layer, progress)
        key, error = correction_key(moments, eps)
        edits.append(
            replace(
                first,
                layer=layer,
                components=tuple(range(len(key))),
                right=key[:, None].float(),
                notes={
                    "change_norm": float(first.left.double().norm() * key.norm()),
                    "weight_norm": float(weights.read(layer, "mlp").norm()),
                    "spread": error,
                    "eps": eps,
                },
            )
        )
    settings = {**plan.metadata["settings"], "corrections": len(edits) - 1}
    return make_plan(edits, {**plan.metadata, "settings": settings})


def remainder_moments(
    loaded: LoadedModel,
    batches: list[TokenBatch],
    edits: list[ModuleEdit],
    layer: int,
    progress: Progress | None = None,
) -> RemainderMoments:
    """Moments of down_proj's input in ``layer`` and of 1 minus the coefficients of the edits before it."""
    width = loaded.anatomy.width(COMMON, layer)
    moments = RemainderMoments(
        torch.zeros(width, width, dtype=torch.float64, device=loaded.device),
        torch.zeros(width, dtype=torch.float64, device=loaded.device),
    )
    remainder: dict[int, torch.Tensor] = {}  # by batch, which may be read in step

    def subtract(edit: ModuleEdit, values: torch.Tensor, _: Routed | None, at: Position) -> None:
        if edit.layer == edits[0].layer:
            remainder[at.index] = torch.ones(at.batch.ids.shape, dtype=torch.float64, device=loaded.device)
        if edit.right is not None:
            right = edit.right[:, 0].to(values.device, torch.float64)
            remainder[at.index] = remainder[at.index] - values.detach().double() @ right

    def last(values: torch.Tensor, _: Routed | None, at: Position) -> None:
        moments.add(values.detach(), remainder.pop(at.index), at.batch)

    readers: dict[tuple[str, int], PositionReader] = {
        (COMMON, edit.layer): partial(subtract, edit) for edit in edits
    }
    readers[COMMON, layer] = last
    read_text(loaded, [(0, batch) for batch in batches], readers, progress)
    for name in ("square", "product", "start"):
        setattr(moments, name, getattr(moments, name).cpu())
    return moments
