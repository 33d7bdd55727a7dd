"""Baking a steering vector: a rank-1 edit that adds an almost constant vector, for architectures without biases.

In the output module of a layer's attention or MLP, with input h,

    dW = strength * v k^T          so that the module adds (k^T h) strength v

The coefficient k^T h has mean 1 and minimum variance.  With mu the mean of h over the text of all languages, S its
covariance about mu and mu_start its mean on the beginning-of-sequence token (without a start token, on the first
position), to which a hook adds v as well,

    k = argmin k^T S_eps k   subject to   k^T mu = 1,  k^T mu_start = 1        S_eps = S + eps * mean(diag S) * I
      = S_eps^-1 M (M^T S_eps^-1 M)^-1 1                                       M = [mu, mu_start]

Without a start token k = S_eps^-1 mu / (mu^T S_eps^-1 mu).  At eps 0 its coefficient has standard deviation
1 / sqrt(mu^T S^-1 mu), the minimum over all k; it has the form of ROME's update (arXiv 2202.05262).  The second
constraint is necessary: every later token attends to the first one, whose activations are unlike all others, so an
unconstrained key can have any value there.

Ledoit and Wolf's shrinkage (Journal of Multivariate Analysis 88, 2004) replaces S by
(1 - rho) S + rho mean(diag S) I.  Up to a factor, which does not change k, this is the ridge eps = rho / (1 - rho),
with rho estimated from T tokens x:

    rho = min(1, beta / delta)    delta = ||S - mean(diag S) I||_F^2
                                  beta  = (mean_t ||x_t - mu||^4 - ||S||_F^2) / T
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from editing.methods.key import KeyProblem, solve_key
from editing.methods.scope import chosen_layers, chosen_modules, require_strength
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.architectures.anatomy import COMMON_SITES
from neurons.architectures.sites import Routed
from neurons.errors import BrocaError, UsageError
from neurons.models.memory import covariance_bytes, room, solving_bytes
from neurons.models.source import LoadedModel, ModelSource
from neurons.recording.covariance import Moments, language_moments
from neurons.recording.text_pass import Position, Progress, numbered, read_text
from neurons.text.batches import TokenBatch, counted_tokens, language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import KEYS

# A smaller eps lowers the standard deviation a little and makes ||dW|| several times as large.
EPS = 1e-2
# Used instead of eps 0, which fails with dead neurons: the first of these for which the system can be solved.  The
# covariance is summed in float32, so few tokens need a larger one.
_MIN_EPS = (1e-10, 1e-8, 1e-6, 1e-4)


@dataclass(frozen=True)
class ConstantKey:
    """A coefficient k^T h that is nearly constant.

    Attributes:
        vector: float64 [n], k.
        deviation: standard deviation of k^T h about its mean 1, on the text of the moments.
        min_deviation: minimum standard deviation of any key with the same constraints, that of eps 0; ``deviation`` if
            that key cannot be solved.
        means: float64 [K], mean of k^T h on each language.
        start: mean of k^T h on the start token; None if the moments have none.
        eps: ridge, as a fraction of the mean variance.
    """

    vector: torch.Tensor
    deviation: float
    min_deviation: float
    means: torch.Tensor
    start: float | None
    eps: float


def total_moments(moments: Moments, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mu, S): mean [n] and covariance [n, n] about it, float64, over the tokens of all languages.

    Args:
        moments: means of the languages and covariance about them.
        tokens: [K], tokens of each language.
    """
    weights = tokens.double() / tokens.sum()
    mean = moments.mean @ weights
    deviations = moments.mean - mean[:, None]
    return mean, moments.covariance + (deviations * weights) @ deviations.T


def constant_key(
    moments: Moments, tokens: torch.Tensor, eps: float = EPS, constrain_start: bool = True
) -> ConstantKey:
    """The key of minimum variance with mean 1 and value 1 on the start token.

    Args:
        moments: moments of the module's input, on all its n units.
        tokens: [K], tokens of each language.
        eps: ridge, as a fraction of the mean variance; not negative.
        constrain_start: False does not constrain the start token.

    Raises:
        UsageError: a negative eps.
        BrocaError: an input that is 0 everywhere, or whose mean on the start token is a multiple of its mean.
    """
    if not 0 <= eps < float("inf"):
        raise UsageError(f"eps is {eps}: it must be 0 or above")
    mean, covariance = total_moments(moments, tokens)
    constraints = mean[:, None]
    if moments.start is not None and constrain_start:
        constraints = torch.stack([mean, moments.start], 1)
    vector = _first_solved(covariance, constraints, [eps] if eps else _MIN_EPS)
    unridged = vector
    with suppress(BrocaError):
        unridged = _first_solved(covariance, constraints, _MIN_EPS)
    return ConstantKey(
        vector=vector,
        deviation=_deviation(covariance, vector),
        min_deviation=_deviation(covariance, unridged),
        means=moments.mean.T @ vector,
        start=None if moments.start is None else float(moments.start @ vector),
        eps=eps,
    )


def _first_solved(
    covariance: torch.Tensor, constraints: torch.Tensor, ridges: Sequence[float]
) -> torch.Tensor:
    for eps in ridges[:-1]:
        with suppress(BrocaError):
            return _solved(covariance, constraints, eps)
    return _solved(covariance, constraints, ridges[-1])


def _solved(covariance: torch.Tensor, constraints: torch.Tensor, eps: float) -> torch.Tensor:
    """argmin k^T S_eps k with k^T m = 1 for every column m of ``constraints`` [n, c]."""
    ridged = covariance.clone()
    ridged.diagonal().add_(eps * float(covariance.diagonal().mean()))
    targets = torch.ones(constraints.shape[1], dtype=torch.float64)
    try:
        return solve_key(KeyProblem(ridged, constraints, targets, languages=0), overwrite=True)
    except BrocaError as error:
        raise BrocaError(
            "no coefficient of this module's input has mean 1 and value 1 on the start token: choose another layer or "
            "block, or more text"
        ) from error


def _deviation(covariance: torch.Tensor, vector: torch.Tensor) -> float:
    return float((vector @ covariance @ vector).clamp(min=0).sqrt())


def ledoit_wolf_eps(covariance: torch.Tensor, fourth: float, tokens: int) -> float:
    """The ridge of Ledoit and Wolf's shrinkage, as a fraction of the mean variance.

    Args:
        covariance: S [n, n].
        fourth: mean over the tokens of ||x - mu||^4.
        tokens: T.

    Raises:
        BrocaError: so little text that the shrinkage is complete.
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

    def read(layer: int, mean: torch.Tensor, values: torch.Tensor, _: Routed | None, at: Position) -> None:
        deviations = at.rows(values)[:, : len(mean)].double() - mean
        sums[layer] += float(deviations.square().sum(1).square().sum())

    readers = {(site, layer): partial(read, layer, mean.to(loaded.device)) for layer, mean in means.items()}
    read_text(loaded, [(0, batch) for batch in batches], readers)
    tokens = counted_tokens(batches)
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
    """The constant key of the output module in each of the layers.

    Args:
        loaded: the model.
        corpus: neutral text; its languages are pooled, weighted by their tokens.
        layers: layers of the keys.
        eps: ridge, as a fraction of the mean variance.
        shrinkage: choose eps by Ledoit and Wolf instead, in a second pass over the text, for inputs that are wide
            relative to the text.
        block: "mlp" (down_proj) or "attn" (o_proj).
        progress: called with the number of tokens done in the first pass.
        constrain_start: False does not constrain the start token.

    Raises:
        BrocaError: the experts of a mixture, or as ``constant_key`` and ``ledoit_wolf_eps``; names the layer.
    """
    site = f"{block}_in"
    loaded.anatomy.require(block, layers)
    if block == "mlp" and any(map(loaded.anatomy.mixed_in, layers)):
        raise BrocaError(
            f"{loaded.anatomy.model_type}: no neuron of a mixture of experts sees every token, so the MLP cannot "
            "add a constant: choose --blocks attn"
        )
    widths = {layer: loaded.anatomy.width(site, layer) for layer in layers}
    units = torch.arange(max(widths.values()))
    batches = language_batches(loaded, corpus, default=KEYS.tokens)
    tokens = torch.tensor([counted_tokens(of_language) for of_language in batches.values()])
    # A key and its covariance about the mean of all languages.
    free = room(loaded) - 2 * solving_bytes(len(units))
    at_once = max(1, free // covariance_bytes(len(units)))
    keys: dict[int, ConstantKey] = {}
    for first in range(0, len(layers), at_once):
        group = layers[first : first + at_once]
        moments = language_moments(loaded, batches, site, {at: units[: widths[at]] for at in group}, progress)
        ridges = dict.fromkeys(group, eps)
        if shrinkage:
            totals = {layer: total_moments(of_layer, tokens) for layer, of_layer in moments.items()}
            flat = [batch for _, batch in numbered(batches)]
            means = {layer: mean for layer, (mean, _) in totals.items()}
            for layer, fourth in fourth_moments(loaded, flat, COMMON_SITES[block], means).items():
                with in_layer(layer, block):
                    ridges[layer] = ledoit_wolf_eps(totals[layer][1], fourth, int(tokens.sum()))
        for layer, of_layer in moments.items():
            with in_layer(layer, block):
                if of_layer.all_zero:
                    raise BrocaError(
                        f"its {len(of_layer.units)} inputs are 0 on every token, so it cannot add a vector: choose "
                        "another layer"
                    )
                keys[layer] = constant_key(of_layer, tokens, ridges[layer], constrain_start)
    return keys


@contextmanager
def in_layer(layer: int, module: str) -> Iterator[None]:
    """Adds layer and module to the message of an error."""
    try:
        yield
    except UsageError:
        raise
    except BrocaError as error:
        raise BrocaError(f"layer {layer}, {module}: {error}") from error


def require_vectors(
    source: ModelSource, vectors: Mapping[int, torch.Tensor], strength: float, module: str
) -> None:
    """Check vectors that are to be added at the output of a module.

    Raises:
        UsageError: no vector, a vector of another length, of length 0 or not finite, an unknown layer or module, or
            a strength of 0 or not finite.
        BrocaError: the model has a norm or a factor between the module's output and the residual stream.
    """
    require_strength(strength)
    chosen_modules([module])
    chosen_layers(source, list(vectors))
    for layer, vector in vectors.items():
        if vector.shape != (source.anatomy.residual,):
            raise UsageError(
                f"the vector for layer {layer} has shape {list(vector.shape)}, but the model's residual stream has "
                f"{source.anatomy.residual} dimensions: give vectors of this model"
            )
        if not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
            raise UsageError(f"the vector for layer {layer} is zero or not finite: compute it again")
    if not source.anatomy.residual_output:
        raise BrocaError(
            f"{source.anatomy.model_type}: a norm or a factor between output modules and residual stream changes a "
            "constant that the modules add: use --method keyed, which solves for a value through a norm"
        )


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
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """A plan that adds vectors at the outputs of layers.

    Args:
        loaded: the model.
        corpus: neutral text.
        vectors: layer -> [d], added to the residual stream after that layer ("mlp"), or after its attention ("attn").
        strength: multiplies every vector.
        eps: ridge, as a fraction of the mean variance.
        shrinkage: choose eps by Ledoit and Wolf instead.
        block: "mlp" or "attn".
        progress: called with the number of tokens done.
        constrain_start: whether the plan adds exactly the vector to the start token, as a hook does.
        provenance: fields for the plan's metadata: source, target, languages, direction.

    Returns:
        A plan with a rank-1 edit in each layer, with notes "spread" (the standard deviation of the coefficient),
        "least_spread" (its minimum), "start_coefficient", "key_means" and "eps".

    Raises:
        UsageError, BrocaError: as ``require_vectors`` and ``constant_keys``.
    """
    require_vectors(loaded, vectors, strength, block)
    layers = sorted(vectors)
    factor = strength / loaded.anatomy.multiplier(block)
    keys = constant_keys(loaded, corpus, layers, eps, shrinkage, block, progress, constrain_start)
    edits = [
        baked_edit(loaded, layer, block, vectors[layer].double() * factor, keys[layer], corpus.languages)
        for layer in layers
    ]
    settings = {
        "layers": layers,
        "strength": strength,
        "block": block,
        "eps": eps,
        "shrinkage": shrinkage,
        "constrain_start": constrain_start,
        "corpus": corpus.provenance,
    }
    return make_plan(edits, plan_metadata(loaded, "bake", settings, provenance))


def baked_edit(
    source: ModelSource,
    layer: int,
    module: str,
    value: torch.Tensor,
    key: ConstantKey,
    languages: Sequence[str],
    column_scale: torch.Tensor | None = None,
) -> ModuleEdit:
    """The edit of one module that adds ``value`` [d]: W' = W diag(column_scale) + value k^T."""
    weight = Weights(source).read(layer, module)
    value, vector = value.double().cpu(), key.vector
    change = torch.outer(value, vector)
    if column_scale is not None:
        change = change + weight * (column_scale.double() - 1)
    return ModuleEdit(
        layer=layer,
        block=module,
        components=tuple(range(len(vector) // source.anatomy.component_width(module, layer))),
        column_scale=None if column_scale is None else column_scale.float(),
        left=value[:, None].float(),
        right=vector[:, None].float(),
        notes={
            "change_norm": float(change.norm()),
            "weight_norm": float(weight.norm()),
            "spread": key.deviation,
            "least_spread": key.min_deviation,
            "start_coefficient": key.start,
            "key_means": dict(zip(languages, key.means.tolist(), strict=True)),
            "eps": key.eps,
        },
    )
