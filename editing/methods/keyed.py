"""The keyed edit: language neurons are the key, a direction is the value.

In an output module of layer l, ``down_proj`` or ``o_proj``, whose input is h and whose output is added to the
residual stream, write

    dW = s_l * v_l k^T        sum of s over all modules = strength

v_l is the direction at the residual after that layer (``block_out``); what several modules write adds up, so
``strength`` is the whole shift in multiples of the difference of the means, however many modules share it:
evenly, unless each layer is given its own.  Many layers that write a little leave text more fluent than few
that write much.  The key k is the steadiest that is 1 where a source language is read and 0 where any other is
(``editing.methods.key``), on all inputs of the module, on a given neuron set, or on as many as an elastic net is
to leave (``editing.methods.sparse_key``).

The moments of all modules are recorded on the unedited model, or, with ``jointly``, each module's on the model
that has the edits below it: with one pass over the text for each module.

A norm between the module and the residual (Gemma 2 and 3, OLMo 2) is written through: s_l v_l is what comes
out of the norm (``editing.methods.norm_value``), which is not linear, so a plan for such a model is made at the
strength that it is used at.

Broca's own method; relatives are ROME's key (arXiv 2202.05262) and AlphaEdit's null space (arXiv 2410.02355).
The edit speaks when a source language is read and is silent otherwise, so other languages are hardly touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from editing.directions.direction import Direction
from editing.methods.key import EPS as EPS
from editing.methods.key import SOFT_WEIGHT as SOFT_WEIGHT
from editing.methods.key import Key, described, key_problem, least_spread, require_key
from editing.methods.learned_values import LEARNED_AT
from editing.methods.norm_value import value_through_norm
from editing.methods.output_norm import output_norm, source_tokens
from editing.methods.sparse_key import require_share, sparse_key
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS, Anatomy
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.recording.covariance import Moments, each_moments, site_moments
from neurons.recording.text_pass import Progress
from neurons.text.batches import TokenBatch, language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import KEYS, text_read

# Found on the demo model, English to French and German: from 3 on as far as the ceiling; more is more fluent
# and does more to other languages.  Keys over heads too reach as far from 2 on (docs/keyed.md).
STRENGTH = 3.5

# What the modules write: the direction, or what was learned from it; and the strengths that suit a model.
MEANS, LEARNED = VALUES = ("means", "learned")
STRENGTHS = {MEANS: (STRENGTH,), LEARNED: (LEARNED_AT,)}

Place = tuple[int, str]  # layer, block


@dataclass(frozen=True)
class _Wanted:
    """What every module's key and value are to be."""

    sources: tuple[str, ...]
    eps: float
    keep: tuple[str, ...]
    keep_softly: tuple[str, ...]
    soft_weight: float
    sparse: float | None
    values: Mapping[Place, torch.Tensor]  # s_l v_l
    shares: Mapping[Place, float]  # of the strength


def keyed_plan(
    loaded: LoadedModel,
    corpus: Corpus,
    direction: Direction,
    layers: Sequence[int] | None = None,
    strength: float | Mapping[int, float] = STRENGTH,
    neurons: NeuronSet | None = None,
    eps: float = EPS,
    progress: Progress | None = None,
    *,
    sources: Sequence[str] | None = None,
    keep: Sequence[str] | None = None,
    keep_softly: Sequence[str] = (),
    soft_weight: float = SOFT_WEIGHT,
    blocks: Sequence[str] = ("mlp",),
    sparse: float | None = None,
    jointly: bool = False,
) -> Plan:
    """A plan from a direction and a corpus of all the languages that matter.

    Args:
        loaded: the model; with ``jointly`` its weights are edited on the way and put back bit for bit.
        corpus: text of the sources, the target and every language that is to stay as it is.
        direction: with vectors at ``block_out``.
        layers: which layers; None takes all.
        strength: the whole shift, in multiples of the direction, shared evenly by the modules; or layer ->
            that layer's part of it, shared evenly by its modules (``layers`` then says no more than it).
        neurons: the key may use only the sources' neurons of this set in ``down_proj``; None allows all.
        eps: ridge, as a share of the mean variance.
        progress: called with the number of tokens done, in every pass.
        sources: languages where the edit speaks, the direction's own among them; None: that one alone.
        keep: languages where it is silent on average, besides the target; None: all of the corpus but the
            sources and ``keep_softly``.  A language of the corpus in no list is left free.
        keep_softly: languages where a mean of the coefficient costs instead of being forbidden.
        soft_weight: cost of such a mean: at 1 a mean of x costs as much as a standard deviation of x.
        blocks: "mlp" (keys over neurons), "attn" (keys over what heads return) or both.
        sparse: the share of each module's inputs that the key may use, chosen by an elastic net; None: all.
        jointly: solve each module on the model with the edits below it, instead of on the unedited one.

    Raises:
        UsageError: a language that the corpus lacks or that is in two lists, blocks, layers or shares that
            there are not, the MLP of a mixture of experts, or a strength of 0.
        BrocaError: a layer in which the set has too few neurons of the sources, or whose inputs cannot tell
            the languages apart.
    """
    direction.require_model(loaded)
    sources = (direction.source,) if sources is None else tuple(sources)
    _check_languages(corpus, direction, sources)
    if neurons is not None:
        neurons.require_model(loaded)
    shares, total = _shares(loaded, layers, strength, blocks)
    if keep is None:
        keep = [name for name in corpus.languages if name not in (*sources, *keep_softly)]
    elif direction.target not in (*keep, *keep_softly):
        keep = [*keep, direction.target]
    require_key(corpus.languages, sources, keep, keep_softly, eps, soft_weight)
    if sparse is not None:
        require_share(sparse)
    units = _units(loaded, shares, neurons, sources, len(sources) + len(keep))
    values = direction.vectors["block_out"]
    wanted = _Wanted(
        sources,
        eps,
        tuple(keep),
        tuple(keep_softly),
        soft_weight,
        sparse,
        {(layer, block): values[layer] * (total * share) for (layer, block), share in shares.items()},
        shares,
    )
    chosen_layers = list(dict.fromkeys(layer for layer, _ in shares))
    settings: dict[str, Any] = {
        "layers": chosen_layers,
        "strength": total,
        "eps": eps,
        "neurons": None if neurons is None else neurons.metadata.get("method"),
        "kept_languages": [name for name in wanted.keep if name != direction.target],
        "corpus": {"digest": corpus.digest, "part": corpus.part},
        "sources": list(sources),
        "softly_kept_languages": list(keep_softly),
        "soft_weight": soft_weight if keep_softly else None,
        "blocks": [block for block in BLOCKS if block in blocks],
        "sparse": sparse,
        "jointly": jointly,
    }
    metadata = plan_metadata(loaded, "keyed", direction, settings)
    batches = language_batches(loaded, corpus, default=KEYS.tokens)
    metadata["read"] = text_read(corpus, batches)
    found = _jointly if jointly else _independently
    edits = list(found(loaded, batches, units, wanted, metadata, progress))
    return make_plan(edits, metadata)


def _independently(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    units: Mapping[Place, torch.Tensor],
    wanted: _Wanted,
    metadata: Mapping[str, Any],
    progress: Progress | None,
) -> Iterator[ModuleEdit]:
    """Every module's edit from the unedited model, in the order of the layers."""
    at_sites = {(f"{block}_in", layer): index for (layer, block), index in units.items()}
    for (site, layer), moments in each_moments(loaded, batches, at_sites, progress):
        edit = _edit(loaded, batches, (layer, site.removesuffix("_in")), moments, wanted)
        # The next layers are read without this one's covariance beside theirs.
        del moments
        yield edit


def _jointly(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    units: Mapping[Place, torch.Tensor],
    wanted: _Wanted,
    metadata: Mapping[str, Any],
    progress: Progress | None,
) -> Iterator[ModuleEdit]:
    """Every module's edit from the model that has the edits before it, with a pass over the text for each."""
    with ExitStack() as edited:
        for place in sorted(units, key=lambda place: (place[0], BLOCKS.index(place[1]))):
            layer, block = place
            site = f"{block}_in", layer
            found = site_moments(loaded, batches, {site: units[place]}, progress)
            edit = _edit(loaded, batches, place, found[site], wanted)
            edited.enter_context(applied(loaded, make_plan([edit], metadata)))
            yield edit


def _edit(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    place: Place,
    moments: Moments,
    wanted: _Wanted,
) -> ModuleEdit:
    """One module's edit from the moments of its input."""
    own, notes = _key(place, moments, wanted)
    value = wanted.values[place]
    if not loaded.anatomy.residual_output:
        right = _whole(loaded, place, moments.units, own.vector)
        value, through = _through_norm(loaded, batches, place, right, value, wanted.sources)
        notes |= through
    notes |= {"value_share": wanted.shares[place]}
    return module_edit(loaded, place, moments, own, value, notes, wanted.sparse is not None)


def _whole(loaded: LoadedModel, place: Place, units: torch.Tensor, of_units: torch.Tensor) -> torch.Tensor:
    """float64 [width]: numbers of some inputs of a module, 0 for all others."""
    whole = torch.zeros(loaded.anatomy.width(f"{place[1]}_in"), dtype=torch.float64)
    whole[units] = of_units
    return whole


def module_edit(
    loaded: LoadedModel,
    place: Place,
    moments: Moments,
    own: Key,
    value: torch.Tensor,
    notes: Mapping[str, Any],
    sparse: bool = False,
) -> ModuleEdit:
    """The edit of one module: a value behind a key.

    Args:
        loaded: the unedited model.
        place: layer and block.
        moments: of the module's inputs, from which the key was solved.
        own: the key.
        value: float64 [d].
        notes: further ones.
        sparse: whether inputs whose weight in the key is 0 are no part of the edit.
    """
    layer, block = place
    right = _whole(loaded, place, moments.units, own.vector)
    carried = _whole(loaded, place, moments.units, own.carried)
    size = loaded.anatomy.component_width(block)
    per_component = right.view(-1, size).norm(dim=1) if size > 1 else right
    used = torch.zeros(len(right), dtype=torch.bool)
    used[moments.units] = True
    if sparse:
        used &= right != 0
    components = used.view(-1, size).any(1).nonzero()[:, 0]
    return ModuleEdit(
        layer=layer,
        block=block,
        components=tuple(components.tolist()),
        left=value[:, None].float(),
        right=right[:, None].float(),
        details={"key": per_component[components], "carried": carried.view(-1, size).sum(1)[components]},
        notes={
            "change_norm": float(value.norm() * right.norm()),
            "weight_norm": float(Weights(loaded).read(layer, block).norm()),
            "spread": own.spread,
            "key_means": dict(zip(moments.languages, own.means.tolist(), strict=True)),
            "carriers": own.carriers,
            **notes,
        },
    )


def _key(place: Place, moments: Moments, wanted: _Wanted) -> tuple[Key, dict[str, Any]]:
    """The key, and notes of how it was made sparse."""
    if moments.silent:
        raise BrocaError(
            f"layer {place[0]}, {place[1]}: its {len(moments.units)} inputs are 0 on every token, so no key can tell "
            f"languages by them: leave layer {place[0]} out with --layers"
        )
    problem = key_problem(
        moments, wanted.sources, wanted.eps, wanted.keep, wanted.keep_softly, wanted.soft_weight
    )
    try:
        if wanted.sparse is None:
            return described(moments, wanted.sources, least_spread(problem)), {}
        found = sparse_key(problem, wanted.sparse)
    except BrocaError as error:
        raise type(error)(f"layer {place[0]}, {place[1]}: {error}") from error
    return described(moments, wanted.sources, found.vector), {"l1": found.l1}


def _through_norm(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    place: Place,
    key: torch.Tensor,
    value: torch.Tensor,
    sources: Sequence[str],
) -> tuple[torch.Tensor, dict[str, Any]]:
    """What the module must write so that the norm after it returns ``value`` more on the sources' tokens."""
    layer, block = place
    norm = output_norm(loaded, layer, block, batches[sources[0]][0])
    tokens = [source_tokens(loaded, layer, block, batches[source]) for source in sources]
    inputs = torch.cat([some.inputs for some in tokens])
    outputs = torch.cat([some.outputs for some in tokens])
    solved = value_through_norm(outputs, norm.gain, norm.eps, value, inputs @ key)
    return solved.vector, {"value_through_norm": solved.through, "value_error": solved.error}


def require_common_inputs(anatomy: Anatomy, blocks: Sequence[str]) -> None:
    """Refuse modules whose inputs no token has in common.

    Raises:
        UsageError: the MLP of a mixture of experts, with the methods that edit it.
    """
    if "mlp" in blocks and anatomy.mixed:
        raise UsageError(
            f"{anatomy.model_type}: each expert's neurons see other tokens, so no key can be solved over them: take "
            "`broca edit --blocks attn`, or a --method that edits experts (steer2edit, ablate, scale, clas, austeer)"
        )


def _check_languages(corpus: Corpus, direction: Direction, sources: Sequence[str]) -> None:
    corpus.require(*sources, direction.source, direction.target)
    if direction.source not in sources:
        raise UsageError(f"the direction leads away from {direction.source!r}: name it among the sources")
    if direction.target in sources:
        raise UsageError(f"{direction.target!r} is the direction's target, so it cannot be a source")


def _shares(
    loaded: LoadedModel,
    layers: Sequence[int] | None,
    strength: float | Mapping[int, float],
    blocks: Sequence[str],
) -> tuple[dict[Place, float], float]:
    """(layer, block) -> its share of the strength, the shares' sum being 1; and the strength."""
    if not blocks or len(set(blocks)) < len(blocks) or any(block not in BLOCKS for block in blocks):
        raise UsageError(f"blocks {', '.join(blocks) or '(none)'}: choose from {', '.join(BLOCKS)}")
    require_common_inputs(loaded.anatomy, blocks)
    if isinstance(strength, Mapping):
        if layers is not None and sorted(layers) != sorted(strength):
            raise UsageError("a strength for each layer names the layers: leave layers out, or name the same")
        total = float(sum(strength.values()))
        chosen = tuple(strength)
    else:
        total = strength
        chosen = tuple(range(loaded.anatomy.layers) if layers is None else layers)
    if not total or total != total:
        raise UsageError(f"strength {total:g} changes nothing: give another")
    for layer in chosen:
        if not 0 <= layer < loaded.anatomy.layers:
            raise UsageError(f"there is no layer {layer}: the model has {loaded.anatomy.layers}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise UsageError("layers: name at least one, and each once")
    of_layer = {
        layer: strength[layer] / total if isinstance(strength, Mapping) else 1 / len(chosen)
        for layer in chosen
    }
    shares = {
        (layer, block): share / len(blocks)
        for layer, share in of_layer.items()
        for block in BLOCKS
        if block in blocks
    }
    return shares, total


def _units(
    loaded: LoadedModel,
    places: Mapping[Place, float],
    neurons: NeuronSet | None,
    sources: Sequence[str],
    languages: int,
) -> dict[Place, torch.Tensor]:
    """(layer, block) -> int64, the inputs of the module that its key may use, ascending.

    Raises:
        BrocaError: too few for one constraint for each of ``languages`` and one for the start token.
    """
    units = {}
    for layer, block in places:
        index = torch.arange(loaded.anatomy.width(f"{block}_in"))
        if neurons is not None and block == "mlp":
            index = torch.cat([neurons.by_layer(source)[layer] for source in sources]).unique()
        if len(index) <= languages:
            raise BrocaError(
                f"layer {layer} has {len(index)} neurons of {' and '.join(map(repr, sources))}, too few to "
                f"tell {languages} languages apart: identify with a larger --top-rate, choose other "
                "--layers, or leave --neurons out"
            )
        units[layer, block] = index
    return units
