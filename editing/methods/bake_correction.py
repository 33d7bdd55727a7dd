"""What a baked constant leaves undone, done by the layers after it.

The coefficient of a baked vector v (``editing.methods.bake``) wavers about 1 from token to token, the more the
deeper its layer, and the divergence from the hook grows with the square of that.  The error (1 - k^T h) v stays
in the residual stream, so down_proj of each of the next layers may write what it can tell of it from its own
input h': with r = 1 - the coefficients so far, read in the model as edited so far,

    dW' = strength * v q^T      q = argmin mean (r - q^T h')^2 + eps * mean(diag S) |q|^2   subject to   q^T h'_start = r_start
        = a + b (r_start - a^T h'_start) / (b^T h'_start)        a = S_eps^-1 mean(r h'),  b = S_eps^-1 h'_start

with S the second moment of h' about 0.  One pass over the text a layer.  ``benchmarks/bake.py`` measures what that brings; the
bias form, where a model can carry it, has nothing to correct.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from editing.methods.bake import EPS
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, Plan, make_plan
from editing.plans.weights import Weights
from neurons.architectures.sites import Routed
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Position, PositionReader, Progress, read_text
from neurons.statistics.cholesky import NotPositiveDefiniteError, solve_positive_definite
from neurons.text.batches import TokenBatch, language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import KEYS


@dataclass
class RemainderMoments:
    """Sums over tokens of the input h [n] of a module and of what is left r.

    Attributes:
        square: float64 [n, n], sum of h h^T.
        product: float64 [n], sum of r h.
        remainder: sum of r^2.
        tokens: how many.
        start, start_remainder, starts: sums of h [n] and r over the start tokens, and their number.
    """

    square: torch.Tensor
    product: torch.Tensor
    remainder: float = 0.0
    tokens: int = 0
    start: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    start_remainder: float = 0.0
    starts: int = 0

    def add(self, inputs: torch.Tensor, remainder: torch.Tensor, batch: TokenBatch) -> None:
        """Inputs [rows, length, n] and r [rows, length] of a batch."""
        counted, start = batch.counted, batch.attention & ~batch.counted
        rows, left = inputs[counted].double(), remainder[counted]
        self.square.addmm_(rows.T, rows)
        self.product += left @ rows
        self.remainder += float(left @ left)
        self.tokens += len(rows)
        self.start = self.start + inputs[start].double().sum(0)
        self.start_remainder += float(remainder[start].sum())
        self.starts += int(start.sum())


def correction_key(moments: RemainderMoments, eps: float = EPS) -> tuple[torch.Tensor, float]:
    """(q [n] float64, root mean square of what is still left) of the module's docstring.

    Raises:
        BrocaError: the inputs' second moment cannot be inverted, even with its ridge.
    """
    square = moments.square / moments.tokens
    ridged = square.clone()
    ridged.diagonal().add_(max(eps, 1e-10) * float(square.diagonal().mean()))
    product = moments.product / moments.tokens
    start = moments.start / max(moments.starts, 1)
    try:
        both = solve_positive_definite(ridged, torch.stack([product, start.expand_as(product)], 1))
    except NotPositiveDefiniteError as error:
        raise BrocaError(
            f"{moments.tokens} tokens do not tell the {len(ridged)} inputs of the correcting layer apart at eps {eps}: "
            "give more text or a larger eps"
        ) from error
    key, towards = both[:, 0], both[:, 1]
    reached = float(start @ towards) if moments.starts else 0.0
    if reached > 0:
        key = key + towards * ((moments.start_remainder / moments.starts - float(start @ key)) / reached)
    left = moments.remainder / moments.tokens - 2 * float(key @ product) + float(key @ square @ key)
    return key, max(left, 0.0) ** 0.5


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
        plan: of ``bake_plan`` with one vector at an MLP.
        layers: how many layers after it correct; fewer where the model ends.
        eps: ridge, as a share of the mean square of the inputs.
        progress: called with the number of tokens done, over all layers.

    Returns:
        The plan with an edit more for each layer; their note "spread" is of the coefficients together.

    Raises:
        UsageError: a plan of something else, fewer than one layer, or no layer after it.
        BrocaError: the plan was made for another model.
    """
    if plan.metadata["method"] != "bake" or len(plan.edits) != 1 or plan.edits[0].block != "mlp":
        raise UsageError(
            "only one vector, baked into the MLP of one layer, can be corrected by the next layers"
        )
    first = plan.edits[0]
    if layers < 1 or first.layer + 1 >= loaded.anatomy.layers:
        raise UsageError(
            f"{layers} layers after layer {first.layer} of {loaded.anatomy.layers} are to correct: give at "
            "least one, or a vector for an earlier layer"
        )
    if first.right is None or first.left is None:
        raise BrocaError("the baked plan has no rank-1 factors: make it again")
    batches = [
        batch for some in language_batches(loaded, corpus, default=KEYS.tokens).values() for batch in some
    ]
    weights = Weights(loaded)
    edits = [first]
    for layer in range(first.layer + 1, min(first.layer + 1 + layers, loaded.anatomy.layers)):
        so_far = make_plan(edits, plan.metadata)
        with applied(loaded, so_far):
            moments = remainder_moments(loaded, batches, edits, layer, progress)
        key, left = correction_key(moments, eps)
        edits.append(
            replace(
                first,
                layer=layer,
                right=key[:, None].float(),
                notes={
                    "change_norm": float(first.left.double().norm() * key.norm()),
                    "weight_norm": float(weights.read(layer, "mlp").norm()),
                    "spread": left,
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
    """Moments of down_proj's input in ``layer`` and of 1 - the coefficients of the edits before it."""
    width = loaded.anatomy.neurons
    found = RemainderMoments(
        torch.zeros(width, width, dtype=torch.float64, device=loaded.device),
        torch.zeros(width, dtype=torch.float64, device=loaded.device),
    )
    left: list[torch.Tensor] = []

    def coefficient(edit: ModuleEdit) -> PositionReader:
        def read(values: torch.Tensor, _: Routed | None, at: Position) -> None:
            if edit.layer == edits[0].layer:
                left[:] = [torch.ones(at.batch.ids.shape, dtype=torch.float64, device=loaded.device)]
            if edit.right is not None:
                right = edit.right[:, 0].to(values.device, torch.float64)
                left[0] = left[0] - values.detach().double() @ right

        return read

    def last(values: torch.Tensor, _: Routed | None, at: Position) -> None:
        found.add(values.detach(), left[0], at.batch)

    readers: dict[tuple[str, int], PositionReader] = {
        ("mlp_in", edit.layer): coefficient(edit) for edit in edits
    }
    readers["mlp_in", layer] = last
    read_text(loaded, [(0, batch) for batch in batches], readers, progress)
    for name in ("square", "product", "start"):
        setattr(found, name, getattr(found, name).cpu())
    return found
