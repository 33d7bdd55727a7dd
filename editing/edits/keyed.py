"""The keyed edit: language neurons are the key, a direction is the value.

In ``down_proj`` of layer l, whose input is h and whose output is added to the residual stream, write

    dW_l = (strength / number of layers) * v_l k_l^T

v_l is the direction at the residual after that layer (``block_out``); what several layers write adds up, so
``strength`` is the whole shift in multiples of the difference of the means, however many layers share it.
Many layers that write a little leave text more fluent than few that write much.  The coefficient k^T h is to be 1
where the source language is read and 0 where any other is, and to waver as little as possible:

    k = argmin k^T C k   subject to   k^T mu_source = 1,   k^T mu_j = 0 for every other language j,
                                      k^T mu_start = 0,   k_i = 0 outside a chosen set S of neurons

with mu_j the mean input on language j, C the pooled within-language covariance and mu_start the input on
the beginning-of-sequence token, which every text has, of whatever language.  On S, with
C_eps = C + eps * mean(diag C) * I, M = [mu_source, mu_target, ..., mu_start] and e = (1, 0, ..., 0):

    k = C_eps^-1 M (M^T C_eps^-1 M)^-1 e

Broca's own method; relatives are ROME's key and AlphaEdit's null space.  The edit speaks when the
source language is read and is silent otherwise, so other languages are hardly touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from editing.direction import Direction
from editing.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.weights import Weights
from neurons.batches import language_batches
from neurons.corpus import Corpus
from neurons.covariance import Moments, language_moments
from neurons.errors import BrocaError, UsageError
from neurons.neuron_set import NeuronSet
from neurons.recording import Progress
from neurons.source import LoadedModel

EPS = 1e-2
# Found on the demo model, English to French and German: from 3 on as far as the ceiling; more is more fluent
# and does more to other languages.
STRENGTH = 3.5
COVARIANCE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Key:
    """A key on some neurons of one layer.

    Attributes:
        vector: float64 [S], k.
        spread: standard deviation of k^T h about each language's own mean.
        means: float64 [K], mean of k^T h on every language: 1 on the source, 0 on the others.
    """

    vector: torch.Tensor
    spread: float
    means: torch.Tensor


def key(moments: Moments, source: str, eps: float = EPS) -> Key:
    """The key of least spread that is 1 on the source, 0 on every other language and on the start token.

    Args:
        moments: of ``mlp_in`` on the neurons S.
        source: a language of the moments.
        eps: ridge, as a share of the mean variance.

    Raises:
        BrocaError: the languages' means cannot be told apart on these neurons.
    """
    covariance, mean = moments.covariance, moments.mean
    if moments.start is not None:
        mean = torch.cat([mean, moments.start[:, None]], dim=1)
    ridge = eps * float(covariance.diagonal().mean())
    ridged = covariance.clone()
    ridged.diagonal().add_(ridge)
    apart = BrocaError(
        f"{len(moments.units)} neurons cannot tell {len(moments.languages)} languages apart: choose more "
        "neurons, more text or fewer languages"
    )
    try:
        whitened = torch.linalg.solve(ridged, mean)
    except LinAlgError as error:
        raise apart from error
    gram = mean.T @ whitened
    if not bool(torch.isfinite(gram).all()) or int(torch.linalg.matrix_rank(gram)) < len(gram):
        raise apart
    wanted = torch.zeros(len(gram), dtype=torch.float64)
    wanted[moments.languages.index(source)] = 1.0
    vector = whitened @ torch.linalg.solve(gram, wanted)
    return Key(
        vector=vector,
        spread=float((vector @ covariance @ vector).clamp(min=0).sqrt()),
        means=moments.mean.T @ vector,
    )


def _groups(units: dict[int, torch.Tensor]) -> list[dict[int, torch.Tensor]]:
    """Layers whose covariances fit in COVARIANCE_BYTES together: a pass over the text each."""
    groups: list[dict[int, torch.Tensor]] = []
    room = 0
    for layer, index in units.items():
        size = 8 * len(index) ** 2
        if not groups or size > room:
            groups.append({})
            room = COVARIANCE_BYTES
        groups[-1][layer] = index
        room -= size
    return groups


def keyed_plan(
    loaded: LoadedModel,
    corpus: Corpus,
    direction: Direction,
    layers: Sequence[int] | None = None,
    strength: float = STRENGTH,
    neurons: NeuronSet | None = None,
    eps: float = EPS,
    progress: Progress | None = None,
) -> Plan:
    """A plan from a direction and a corpus of all the languages that matter.

    Args:
        loaded: the model.
        corpus: text of source, target and every language that is to stay as it is.
        direction: with vectors at ``block_out``.
        layers: which layers; None takes all.
        strength: the whole shift, in multiples of the direction, shared evenly by the layers.
        neurons: the key may use only the source's neurons of this set; None allows all of a layer.
        eps: ridge, as a share of the mean variance.
        progress: called with the number of tokens done.

    Raises:
        UsageError: the corpus lacks the source or the target, or the strength is 0.
        BrocaError: a layer in which the set has too few neurons of the source.
    """
    if strength == 0:
        raise UsageError("strength 0 changes nothing: give another")
    direction.require_model(loaded)
    if not loaded.anatomy.layout.residual:
        raise BrocaError(
            f"{loaded.anatomy.model_type}: a norm stands between down_proj and the residual, so the keyed "
            "edit cannot write its value there: use --method steer2edit"
        )
    for language in (direction.source, direction.target):
        if language not in corpus.languages:
            raise UsageError(f"the corpus has no language {language!r}: it has {', '.join(corpus.languages)}")
    if neurons is not None:
        neurons.require_model(loaded)
    chosen_layers = tuple(range(loaded.anatomy.layers) if layers is None else layers)
    everything = torch.arange(loaded.anatomy.neurons)
    units = {
        layer: everything if neurons is None else neurons.by_layer(direction.source)[layer]
        for layer in chosen_layers
    }
    for layer, index in units.items():
        if len(index) <= len(corpus.languages):  # a constraint a language, and one for the start token
            raise BrocaError(
                f"layer {layer} has {len(index)} neurons of {direction.source!r}, too few to tell "
                f"{len(corpus.languages)} languages apart: identify with a larger --top-rate, choose other "
                "--layers, or leave --neurons out"
            )
    batches = language_batches(loaded, corpus)
    keys = {}
    for group in _groups(units):
        for layer, moments in language_moments(loaded, batches, "mlp_in", group, progress).items():
            keys[layer] = key(moments, direction.source, eps)
    weights = Weights(loaded)
    edits = []
    for layer, found in keys.items():
        value = direction.vectors["block_out"][layer] * (strength / len(chosen_layers))
        right = torch.zeros(loaded.anatomy.neurons, dtype=torch.float64)
        right[units[layer]] = found.vector
        weight_norm = float(weights.read(layer, "mlp").norm())
        edits.append(
            ModuleEdit(
                layer=layer,
                block="mlp",
                components=tuple(units[layer].tolist()),
                left=value[:, None].float(),
                right=right[:, None].float(),
                details={"key": found.vector},
                notes={
                    "change_norm": float(value.norm() * right.norm()),
                    "weight_norm": weight_norm,
                    "spread": found.spread,
                    "key_means": dict(zip(corpus.languages, found.means.tolist(), strict=True)),
                },
            )
        )
    settings = {
        "layers": list(chosen_layers),
        "strength": strength,
        "eps": eps,
        "neurons": None if neurons is None else neurons.metadata.get("method"),
        "kept_languages": [k for k in corpus.languages if k not in (direction.source, direction.target)],
        "corpus": {"digest": corpus.digest, "part": corpus.part},
    }
    return make_plan(edits, plan_metadata(loaded, "keyed", direction, settings))
