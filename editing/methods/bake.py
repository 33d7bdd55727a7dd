"""Baking a steering vector: weights that add a constant vector, for engines with no place for a new bias.

In the output module of one block of a layer, with input h,

    dW = strength * v k^T          so that the module writes (k^T h) strength v more than it did

The coefficient k^T h is to be 1 on every token and to waver as little as possible.  With mu the mean of h over
the text of all languages together, S its covariance about mu and mu_start its mean on the beginning-of-sequence
token (the first position, where the tokenizer adds none), to which a hook adds v as well,

    k = argmin k^T S_eps k   subject to   k^T mu = 1,  k^T mu_start = 1        S_eps = S + eps * mean(diag S) * I
      = S_eps^-1 M (M^T S_eps^-1 M)^-1 1                                       M = [mu, mu_start]

Without a start token that is k = S_eps^-1 mu / (mu^T S_eps^-1 mu), whose coefficient has standard deviation
1 / sqrt(mu^T S^-1 mu) at eps 0, the smallest that any k has; it is the shape of ROME's update
(arXiv 2202.05262).  The second constraint is not a nicety: every later token attends to the first one, whose
activations are unlike any other's, so that a free key may take any value there.

Ledoit and Wolf's shrinkage (Journal of Multivariate Analysis 88, 2004) replaces S by
(1 - rho) S + rho mean(diag S) I: up to a factor, which k does not see, it is the ridge eps = rho / (1 - rho).
So it is a choice of eps, made from T tokens x:

    rho = min(1, beta / delta)    delta = ||S - mean(diag S) I||_F^2
                                  beta  = (mean_t ||x_t - mu||^4 - ||S||_F^2) / T
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from editing.methods.reach import chosen_blocks, chosen_layers
from editing.plans.plan import ModuleEdit, Plan, make_plan
from editing.plans.weights import Weights
from neurons.architectures.sites import Routed
from neurons.errors import BrocaError, UsageError
from neurons.models.memory import covariance_bytes, room, solving_bytes
from neurons.models.source import LoadedModel, ModelSource
from neurons.recording.covariance import Moments, language_moments
from neurons.recording.text_pass import Position, PositionReader, Progress, read_text
from neurons.statistics.cholesky import NotPositiveDefiniteError, solve_positive_definite
from neurons.text.batches import TokenBatch, language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import KEYS

# Less lowers the spread a little and makes ||dW|| several times as large: this is the choice for the smaller change.
EPS = 1e-2
# In place of no ridge at all, which dead neurons would not bear; the first that rounding bears, of few tokens'
# covariance, whose products are in float32, a larger one.
_LEAST_EPS = (1e-10, 1e-8, 1e-6, 1e-4)


@dataclass(frozen=True)
class ConstantKey:
    """A coefficient k^T h that is nearly constant.

    Attributes:
        vector: float64 [n], k.
        spread: standard deviation of k^T h about its mean 1, on the text that the moments are of.
        least_spread: the smallest spread of any key under the same constraints, that of eps 0.
        means: float64 [K], mean of k^T h on each language.
        start: mean of k^T h on the start token; None where the moments have none.
        eps: of the ridge.
    """

    vector: torch.Tensor
    spread: float
    least_spread: float
    means: torch.Tensor
    start: float | None
    eps: float


def total_moments(moments: Moments, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mu, S): mean [n] and covariance [n, n] about it, float64, over the tokens of all languages together.

    Args:
        moments: means of the languages and covariance about these.
        tokens: [K], tokens of each language.
    """
    share = tokens.double() / tokens.sum()
    mean = moments.mean @ share
    apart = moments.mean - mean[:, None]
    return mean, moments.covariance + (apart * share) @ apart.T


def constant_key(
    moments: Moments, tokens: torch.Tensor, eps: float = EPS, constrain_start: bool = True
) -> ConstantKey:
    """The key of least spread that is 1 in the mean and on the start token.

    Args:
        moments: of the module's input, on all its n units.
        tokens: [K], tokens of each language.
        eps: ridge, as a share of the mean variance; not negative.
        constrain_start: False leaves the start token free.

    Raises:
        UsageError: a negative eps.
        BrocaError: an input that is 0 everywhere, or on which the start token cannot be told from the rest.
    """
    if not 0 <= eps < float("inf"):
        raise UsageError(f"eps is {eps}: it must be 0 or above")
    mean, covariance = total_moments(moments, tokens)
    held = moments.start is not None and constrain_start
    constraints = (
        torch.stack([mean, moments.start], 1) if held and moments.start is not None else mean[:, None]
    )
    vector = _first_solved(covariance, constraints, [eps] if eps else _LEAST_EPS)
    least = _first_solved(covariance, constraints, _LEAST_EPS)
    return ConstantKey(
        vector=vector,
        spread=_deviation(covariance, vector),
        least_spread=_deviation(covariance, least),
        means=moments.mean.T @ vector,
        start=None if moments.start is None else float(moments.start @ vector),
        eps=eps,
    )


def _first_solved(
    covariance: torch.Tensor, constraints: torch.Tensor, ridges: Sequence[float]
) -> torch.Tensor:
    for eps in ridges[:-1]:
        with suppress(BrocaError):
            return _least_spread(covariance, constraints, eps)
    return _least_spread(covariance, constraints, ridges[-1])


def _least_spread(covariance: torch.Tensor, constraints: torch.Tensor, eps: float) -> torch.Tensor:
    """argmin k^T S_eps k with k^T m = 1 for every column m of ``constraints`` [n, c]."""
    refused = BrocaError(
        "no coefficient of this module's input is 1 in the mean and on the start token: choose another layer or "
        "block, or more text"
    )
    ridged = covariance.clone()
    ridged.diagonal().add_(eps * float(covariance.diagonal().mean()))
    try:
        whitened = solve_positive_definite(ridged, constraints)
        gram = constraints.T @ whitened
        if int(torch.linalg.matrix_rank(gram)) < len(gram):
            raise refused
        return whitened @ solve_positive_definite(gram, torch.ones(len(gram), dtype=torch.float64))
    except NotPositiveDefiniteError as error:
        raise refused from error


def _deviation(covariance: torch.Tensor, vector: torch.Tensor) -> float:
    return float((vector @ covariance @ vector).clamp(min=0).sqrt())


def ledoit_wolf_eps(covariance: torch.Tensor, fourth: float, tokens: int) -> float:
    """The ridge that Ledoit and Wolf's shrinkage is, as a share of the mean variance.

    Args:
        covariance: S [n, n].
        fourth: mean over the tokens of ||x - mu||^4.
        tokens: T.

    Raises:
        BrocaError: so little text that nothing of the covariance is to be believed.
    """
    target = covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
    delta = float((covariance - target).square().sum())
    beta = (fourth - float(covariance.square().sum())) / tokens
    rho = min(1.0, beta / delta) if delta > 0 else 1.0
    if rho == 1:
        raise BrocaError(
            f"{tokens} tokens are too few to shrink a covariance of {len(covariance)} inputs: give more text, or "
            "an eps"
        )
    return max(rho, 0.0) / (1 - rho)


def fourth_moments(
    loaded: LoadedModel, batches: Sequence[TokenBatch], site: str, means: Mapping[int, torch.Tensor]
) -> dict[int, float]:
    """Mean over the tokens of ||x - mu||^4 at a site of each layer of ``means`` (layer -> mu [n])."""
    sums = dict.fromkeys(means, 0.0)

    def reader_of(layer: int, mean: torch.Tensor) -> PositionReader:
        def read(values: torch.Tensor, _: Routed | None, at: Position) -> None:
            apart = at.rows(values).double() - mean
            sums[layer] += float(apart.square().sum(1).square().sum())

        return read

    readers = {(site, layer): reader_of(layer, mean.to(loaded.device)) for layer, mean in means.items()}
    read_text(loaded, [(0, batch) for batch in batches], readers)
    tokens = sum(int(batch.counted.sum()) for batch in batches)
    return {layer: total / tokens for layer, total in sums.items()}


def constant_keys(
    loaded: LoadedModel,
    corpus: Corpus,
    layers: Sequence[int],
    eps: float = EPS,
    shrinkage: bool = False,
    block: str = "mlp",
    progress: Progress | None = None,
    constrain_start: bool = True,
) -> dict[int, ConstantKey]:
    """The constant key of the block's output module in each of these layers.

    Args:
        loaded: the model.
        corpus: neutral text; its languages are taken together, each by its tokens.
        layers: which layers.
        eps: ridge, as a share of the mean variance.
        shrinkage: choose eps by Ledoit and Wolf instead, in a second pass over the text: for modules that
            are wide beside the text.
        block: "mlp" (down_proj) or "attn" (o_proj).
        progress: called with the number of tokens done in the first pass.
        constrain_start: False leaves the start token free.

    Raises:
        BrocaError: the experts of a mixture, or as ``constant_key`` and ``ledoit_wolf_eps``, by layer.
    """
    site = f"{block}_in"
    if block == "mlp" and loaded.anatomy.mixed:
        raise BrocaError(
            f"{loaded.anatomy.model_type}: no neuron of a mixture of experts sees every token, so the MLP cannot "
            "write a constant: choose --blocks attn"
        )
    everything = torch.arange(loaded.anatomy.width(site))
    batches = language_batches(loaded, corpus, default=KEYS.tokens)
    tokens = torch.tensor([sum(int(batch.counted.sum()) for batch in some) for some in batches.values()])
    left = room(loaded) - solving_bytes(len(everything))
    at_once = max(1, left // covariance_bytes(len(everything)))
    found: dict[int, ConstantKey] = {}
    for first in range(0, len(layers), at_once):
        group = layers[first : first + at_once]
        moments = language_moments(loaded, batches, site, dict.fromkeys(group, everything), progress)
        ridges = dict.fromkeys(group, eps)
        if shrinkage:
            totals = {layer: total_moments(own, tokens) for layer, own in moments.items()}
            every_batch = [batch for some in batches.values() for batch in some]
            means = {layer: mean for layer, (mean, _) in totals.items()}
            for layer, fourth in fourth_moments(loaded, every_batch, site, means).items():
                with _in_layer(layer, block):
                    ridges[layer] = ledoit_wolf_eps(totals[layer][1], fourth, int(tokens.sum()))
        for layer, own in moments.items():
            with _in_layer(layer, block):
                if own.silent:
                    raise BrocaError(
                        f"its {len(own.units)} inputs are 0 on every token, so nothing can be written by them: choose "
                        "another layer"
                    )
                found[layer] = constant_key(own, tokens, ridges[layer], constrain_start)
    return found


@contextmanager
def _in_layer(layer: int, block: str) -> Iterator[None]:
    """Says in an error where it arose."""
    try:
        yield
    except UsageError:
        raise
    except BrocaError as error:
        raise BrocaError(f"layer {layer}, {block}: {error}") from error


def require_vectors(
    source: ModelSource, vectors: Mapping[int, torch.Tensor], strength: float, block: str
) -> None:
    """Refuse vectors that cannot be added at a block's output.

    Raises:
        UsageError: no vector, one of another length, of length 0 or not finite, a layer or block that there
            is not, or a strength of 0 or not finite.
        BrocaError: a norm stands between the block's output and the residual.
    """
    if strength == 0 or not math.isfinite(strength):
        raise UsageError(f"strength {strength}: give a finite strength other than 0")
    chosen_blocks([block])
    chosen_layers(source, list(vectors))
    for layer, vector in vectors.items():
        if vector.shape != (source.anatomy.residual,):
            raise UsageError(
                f"the vector for layer {layer} has shape {list(vector.shape)} where the model's residual has "
                f"{source.anatomy.residual} dimensions: it is of another model"
            )
        if not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
            raise UsageError(f"the vector for layer {layer} is zero or not finite: take it again")
    if not source.anatomy.residual_output:
        raise BrocaError(
            f"{source.anatomy.model_type}: a norm stands between its output modules and the residual, so a "
            "constant that they write does not arrive there as it is: use --method keyed, which solves for a "
            "value through the norm"
        )


def baked_metadata(
    source: ModelSource, method: str, settings: dict[str, Any], origin: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a plan from plain vectors says of itself; ``origin`` adds source, target and where they are from."""
    return {
        "model": source.label,
        "fingerprint": source.fingerprint,
        "method": method,
        "languages": [],
        "settings": settings,
        **(origin or {}),
    }


def bake_plan(
    loaded: LoadedModel,
    corpus: Corpus,
    vectors: Mapping[int, torch.Tensor],
    strength: float = 1.0,
    eps: float = EPS,
    shrinkage: bool = False,
    block: str = "mlp",
    progress: Progress | None = None,
    constrain_start: bool = True,
    origin: Mapping[str, Any] | None = None,
) -> Plan:
    """A plan that adds vectors at the outputs of layers.

    Args:
        loaded: the model.
        corpus: neutral text; ``read_corpus`` chooses its languages.
        vectors: layer -> [d], added after that layer ("mlp"), or after its attention ("attn").
        strength: multiplies every vector.
        eps: ridge, as a share of the mean variance.
        shrinkage: choose eps by Ledoit and Wolf instead.
        block: "mlp" or "attn".
        progress: called with the number of tokens done.
        constrain_start: whether the start token is given exactly the vector, as a hook gives it.
        origin: fields for the plan's metadata: source, target, languages, direction.

    Returns:
        A plan of one rank-1 edit a layer; notes "spread", "least_spread", "start_coefficient", "key_means" and
        "eps".

    Raises:
        UsageError, BrocaError: as ``require_vectors`` and ``constant_keys``.
    """
    require_vectors(loaded, vectors, strength, block)
    layers = sorted(vectors)
    keys = constant_keys(loaded, corpus, layers, eps, shrinkage, block, progress, constrain_start)
    edits = [
        baked_edit(loaded, layer, block, vectors[layer].double() * strength, keys[layer], corpus.languages)
        for layer in layers
    ]
    settings = {
        "layers": layers,
        "strength": strength,
        "block": block,
        "eps": eps,
        "shrinkage": shrinkage,
        "constrain_start": constrain_start,
        "corpus": {"digest": corpus.digest, "part": corpus.part},
    }
    return make_plan(edits, baked_metadata(loaded, "bake", settings, origin))


def baked_edit(
    source: ModelSource,
    layer: int,
    block: str,
    value: torch.Tensor,
    key: ConstantKey,
    languages: Sequence[str],
    column_scale: torch.Tensor | None = None,
) -> ModuleEdit:
    """One module that adds ``value`` [d]: W' = W diag(column_scale) + value k^T."""
    weight = Weights(source).read(layer, block)
    value, vector = value.double().cpu(), key.vector
    change = torch.outer(value, vector)
    if column_scale is not None:
        change = change + weight * (column_scale.double() - 1)
    return ModuleEdit(
        layer=layer,
        block=block,
        components=tuple(range(len(vector) // source.anatomy.component_width(block))),
        column_scale=None if column_scale is None else column_scale.float(),
        left=value[:, None].float(),
        right=vector[:, None].float(),
        notes={
            "change_norm": float(change.norm()),
            "weight_norm": float(weight.norm()),
            "spread": key.spread,
            "least_spread": key.least_spread,
            "start_coefficient": key.start,
            "key_means": dict(zip(languages, key.means.tolist(), strict=True)),
            "eps": key.eps,
        },
    )
