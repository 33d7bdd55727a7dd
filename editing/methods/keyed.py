"""The keyed edit: a rank-1 edit with a key over language neurons and a direction as its value.

To an output module of layer l, ``down_proj`` or ``o_proj``, with input h, it adds

    dW = s_l * v_l k^T        sum of s over all modules = strength

v_l is the direction in the residual stream after the layer (``block_out``).  The outputs of modules add up, so
``strength`` is the total shift in multiples of the difference of the means for any number of modules.  It is divided
evenly, unless each layer has its own strength.  Small edits of many layers leave text more fluent than large edits
of few.  The key k (``editing.methods.key``) is 1 on source languages and 0 on all others with minimum variance.  It
uses all inputs of the module, a given neuron set, or a fraction chosen by an elastic net
(``editing.methods.sparse_key``).

The moments of all modules are recorded on the unedited model.  With ``jointly`` those of each module are recorded on
the model with the edits below it, in one pass over the text for each module.

With a norm between module and residual stream (Gemma 2 and 3, OLMo 2), s_l v_l is the output of the norm
(``editing.methods.norm_value``).  The norm is not linear, so such a plan holds only for its strength.

Broca's own method; related work: the key of ROME (arXiv 2202.05262) and the null space of AlphaEdit
(arXiv 2410.02355).  The edit acts only on source languages and hardly changes others.
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
from editing.methods.key import Key, key_of, key_problem, require_key, solve_key
from editing.methods.learned_values import LEARNED_AT
from editing.methods.norm_value import value_through_norm
from editing.methods.output_norm import output_norm, source_tokens
from editing.methods.scope import require_neurons
from editing.methods.sparse_key import require_fraction, sparse_key
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS, COMMON_SITES, Anatomy
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.recording.covariance import Moments, each_moments
from neurons.recording.text_pass import Progress
from neurons.text.batches import TokenBatch, language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import KEYS, text_read

# On the demo model, English to French and German, strengths of 3 and more reach the ceiling; larger ones are more
# fluent and change other languages more.  With keys over heads as well, 2 is enough (docs/keyed.md).
STRENGTH = 3.5

# The values, either the direction or learned from it, and their default strengths.
MEANS, LEARNED = VALUES = ("means", "learned")
STRENGTHS = {MEANS: (STRENGTH,), LEARNED: (LEARNED_AT,)}

Place = tuple[int, str]  # layer, module


@dataclass(frozen=True)
class _Request:
    """The requested keys and values of all modules."""

    sources: tuple[str, ...]
    eps: float
    keep: tuple[str, ...]
    keep_softly: tuple[str, ...]
    soft_weight: float
    sparse: float | None
    values: Mapping[Place, torch.Tensor]  # s_l v_l
    fractions: Mapping[Place, float]  # of the strength


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
    """A plan from a direction and a corpus.

    Args:
        loaded: the model; with ``jointly`` its weights are edited temporarily and restored bit for bit.
        corpus: text of the sources, the target and every language that should not change.
        direction: a direction with vectors at ``block_out``.
        layers: layers to edit; None takes all.
        strength: total shift in multiples of the direction, divided evenly between modules; or layer -> its part,
            divided evenly between its modules (``layers`` is then redundant).
        neurons: restricts keys in ``down_proj`` to the sources' neurons of this set; None allows all.
        eps: ridge, as a fraction of the mean variance.
        progress: called with the number of tokens done, in every pass.
        sources: languages on which the edit acts, which include the direction's source; None: only that one.
        keep: languages with mean 0 of the coefficient, besides the target; None: all of the corpus but the sources
            and ``keep_softly``.  A language in no list is not constrained.
        keep_softly: languages on which a mean other than 0 is penalised.
        soft_weight: weight of the penalty: at 1 a mean of x costs as much as a standard deviation of x.
        blocks: "mlp" (keys over neurons), "attn" (keys over outputs of heads) or both.
        sparse: fraction of each module's inputs that the key uses, chosen by an elastic net; None: all.
        jointly: solve each module on the model with the edits below it, instead of on the unedited model.

    Raises:
        UsageError: a language that the corpus lacks or that is in two lists, invalid blocks, layers or fractions,
            the MLP of a mixture of experts, or a strength of 0.
        BrocaError: a layer with too few neurons of the sources, or whose inputs do not separate the languages.
    """
    direction.require_model(loaded)
    sources = (direction.source,) if sources is None else tuple(sources)
    _check_languages(corpus, direction, sources)
    if neurons is not None:
        require_neurons(loaded, neurons)
    fractions, total = _fractions(loaded, layers, strength, blocks)
    if keep is None:
        keep = [name for name in corpus.languages if name not in (*sources, *keep_softly)]
    elif direction.target not in (*keep, *keep_softly):
        keep = [*keep, direction.target]
    require_key(corpus.languages, sources, keep, keep_softly, eps, soft_weight)
    if sparse is not None:
        require_fraction(sparse)
    units = _units(loaded, fractions, neurons, sources, len(sources) + len(keep))
    values = direction.vectors["block_out"]
    request = _Request(
        sources,
        eps,
        tuple(keep),
        tuple(keep_softly),
        soft_weight,
        sparse,
        {place: values[place[0]] * (total * fraction) for place, fraction in fractions.items()},
        fractions,
    )
    settings: dict[str, Any] = {
        "layers": list(dict.fromkeys(layer for layer, _ in fractions)),
        "strength": total,
        "eps": eps,
        "neurons": None if neurons is None else neurons.metadata.get("method"),
        "kept_languages": [name for name in keep if name != direction.target],
        "corpus": corpus.provenance,
        "sources": list(sources),
        "softly_kept_languages": list(keep_softly),
        "soft_weight": soft_weight if keep_softly else None,
        "blocks": [module for module in BLOCKS if module in blocks],
        "sparse": sparse,
        "jointly": jointly,
    }
    metadata = plan_metadata(loaded, "keyed", settings, direction.provenance)
    batches = language_batches(loaded, corpus, default=KEYS.tokens)
    metadata["read"] = text_read(corpus, batches)
    solve = _jointly if jointly else _independently
    edits = list(solve(loaded, batches, units, request, metadata, progress))
    return make_plan(edits, metadata)


def _independently(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    units: Mapping[Place, torch.Tensor],
    request: _Request,
    metadata: Mapping[str, Any],
    progress: Progress | None,
) -> Iterator[ModuleEdit]:
    """Every module's edit from the unedited model, in the order of the layers."""
    at_sites = {(COMMON_SITES[module], layer): index for (layer, module), index in units.items()}
    modules = {site: module for module, site in COMMON_SITES.items()}
    for (site, layer), moments in each_moments(loaded, batches, at_sites, progress):
        edit = _edit(loaded, batches, (layer, modules[site]), moments, request)
        # Frees this covariance before the next layers are read.
        del moments
        yield edit


def _jointly(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    units: Mapping[Place, torch.Tensor],
    request: _Request,
    metadata: Mapping[str, Any],
    progress: Progress | None,
) -> Iterator[ModuleEdit]:
    """Every module's edit from the model with the previous edits, with one pass over the text for each."""
    with ExitStack() as edited:
        for place in sorted(units, key=lambda place: (place[0], BLOCKS.index(place[1]))):
            layer, module = place
            site = COMMON_SITES[module], layer
            moments = dict(each_moments(loaded, batches, {site: units[place]}, progress))
            edit = _edit(loaded, batches, place, moments[site], request)
            edited.enter_context(applied(loaded, make_plan([edit], metadata)))
            yield edit


def _edit(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    place: Place,
    moments: Moments,
    request: _Request,
) -> ModuleEdit:
    """One module's edit from the moments of its input."""
    key, notes = _key(place, moments, request)
    value = request.values[place]
    if loaded.anatomy.residual_output:
        value = value / loaded.anatomy.multiplier(place[1])
    else:
        right = _dense(loaded, place, moments.units, key.vector)[common_columns(loaded.anatomy, *place)]
        value, through = _through_norm(loaded, batches, place, right, value, request.sources)
        notes |= through
    notes |= {"value_share": request.fractions[place]}
    return module_edit(loaded, place, moments, key, value, notes, request.sparse is not None)


def _dense(loaded: LoadedModel, place: Place, units: torch.Tensor, of_units: torch.Tensor) -> torch.Tensor:
    """float64 [width]: values of some inputs of a module that every token reaches, 0 for all others."""
    dense = torch.zeros(loaded.anatomy.width(f"{place[1]}_in", place[0]), dtype=torch.float64)
    dense[common_columns(loaded.anatomy, *place)][units] = of_units
    return dense


def module_edit(
    loaded: LoadedModel,
    place: Place,
    moments: Moments,
    key: Key,
    value: torch.Tensor,
    notes: Mapping[str, Any],
    sparse: bool = False,
) -> ModuleEdit:
    """The rank-1 edit of one module from its key and value.

    Args:
        loaded: the unedited model.
        place: layer and module.
        moments: moments of the module's inputs at its site of ``COMMON_SITES``, from which the key was solved.
        key: the key.
        value: float64 [d].
        notes: further notes.
        sparse: whether inputs with weight 0 in the key are excluded from the components.
    """
    layer, module = place
    right = _dense(loaded, place, moments.units, key.vector)
    contribution = _dense(loaded, place, moments.units, key.contribution)
    size = loaded.anatomy.component_width(module, layer)
    per_component = right.view(-1, size).norm(dim=1) if size > 1 else right
    used = torch.zeros(len(right), dtype=torch.bool)
    used[common_columns(loaded.anatomy, *place)][moments.units] = True
    if sparse:
        used &= right != 0
    components = used.view(-1, size).any(1).nonzero()[:, 0]
    return ModuleEdit(
        layer=layer,
        block=module,
        components=tuple(components.tolist()),
        left=value[:, None].float(),
        right=right[:, None].float(),
        details={
            "key": per_component[components],
            "carried": contribution.view(-1, size).sum(1)[components],
        },
        notes={
            "change_norm": float(value.norm() * right.norm()),
            "weight_norm": float(Weights(loaded).read(layer, module).norm()),
            "spread": key.deviation,
            "key_means": dict(zip(moments.languages, key.means.tolist(), strict=True)),
            "carriers": key.carriers,
            **notes,
        },
    )


def _key(place: Place, moments: Moments, request: _Request) -> tuple[Key, dict[str, Any]]:
    """The key, and notes on its sparsity."""
    layer, module = place
    if moments.all_zero:
        raise BrocaError(
            f"layer {layer}, {module}: its {len(moments.units)} inputs are 0 on every token, so a key cannot "
            f"separate languages: leave layer {layer} out with --layers"
        )
    problem = key_problem(
        moments, request.sources, request.eps, request.keep, request.keep_softly, request.soft_weight
    )
    try:
        if request.sparse is None:
            return key_of(moments, request.sources, solve_key(problem, overwrite=True)), {}
        vector, l1 = sparse_key(problem, request.sparse)
    except BrocaError as error:
        raise type(error)(f"layer {layer}, {module}: {error}") from error
    return key_of(moments, request.sources, vector), {"l1": l1}


def _through_norm(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    place: Place,
    key: torch.Tensor,
    value: torch.Tensor,
    sources: Sequence[str],
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The module's value for which the norm after it adds ``value`` on the sources' tokens, and notes."""
    layer, module = place
    norm = output_norm(loaded, layer, module, batches[sources[0]][0])
    tokens = [source_tokens(loaded, layer, module, batches[source]) for source in sources]
    inputs = torch.cat([of_source.inputs for of_source in tokens])
    outputs = torch.cat([of_source.outputs for of_source in tokens])
    solved = value_through_norm(outputs, norm.gain, norm.eps, value, inputs @ key)
    return solved.vector, {"value_through_norm": solved.through, "value_error": solved.error}


def require_common_inputs(
    anatomy: Anatomy, blocks: Sequence[str], layers: Sequence[int] | None = None
) -> None:
    """Check that there are modules to edit whose inputs every token reaches.

    Args:
        anatomy: of the model.
        blocks: "attn", "mlp" or both, each of which some layer must have.
        layers: layers to edit, each of which must have one of the blocks; None: those that have one.

    Raises:
        UsageError: a named layer without the modules, or a mixture of experts; the message names methods that edit it.
    """
    every = range(anatomy.layers)
    for block in blocks:
        if not any(has_common_inputs(anatomy, layer, block) for layer in every):
            _refuse(anatomy, block, every)
    lacking = [
        layer
        for layer in layers or ()
        if layer in every and not any(has_common_inputs(anatomy, layer, block) for block in blocks)
    ]
    if lacking:
        _refuse(anatomy, blocks[0], lacking)


def _refuse(anatomy: Anatomy, block: str, layers: Sequence[int]) -> None:
    """Raise for layers without inputs of a block that every token reaches."""
    if not all(anatomy.has(layer, block) for layer in layers):
        anatomy.require(block, layers)
    where = "" if len(layers) == anatomy.layers else f"layers {', '.join(map(str, layers))}: "
    raise UsageError(
        f"{anatomy.model_type}: {where}the neurons of different experts see different tokens, and there is no shared "
        "expert, so they have no common key: use `broca edit --blocks attn`, --method keyed-experts, or another --method that "
        "edits experts (steer2edit, ablate, scale, clas, austeer)"
    )


def layers_with_common_inputs(anatomy: Anatomy, blocks: Sequence[str]) -> tuple[int, ...]:
    """The layers with one of the blocks whose inputs every token reaches."""
    return tuple(
        layer
        for layer in range(anatomy.layers)
        if any(has_common_inputs(anatomy, layer, block) for block in blocks)
    )


def keyed_blocks(anatomy: Anatomy, wanted: Sequence[str]) -> tuple[str, ...]:
    """The wanted blocks with inputs that every token reaches in some layer; if there are none, the others."""
    able = [block for block in BLOCKS if layers_with_common_inputs(anatomy, (block,))]
    return tuple(block for block in able if block in wanted) or tuple(able)


def has_common_inputs(anatomy: Anatomy, layer: int, block: str) -> bool:
    """Whether every token reaches the inputs of a layer's module."""
    return anatomy.common(layer, block) is not None


def common_columns(anatomy: Anatomy, layer: int, block: str) -> slice:
    """The columns of a module's W whose inputs every token reaches; the layer has some."""
    part = anatomy.common(layer, block)
    assert part is not None
    return part.columns


def _check_languages(corpus: Corpus, direction: Direction, sources: Sequence[str]) -> None:
    corpus.require(*sources, direction.source, direction.target)
    if direction.source not in sources:
        raise UsageError(f"the direction's source is {direction.source!r}: include it in the sources")
    if direction.target in sources:
        raise UsageError(f"{direction.target!r} is the direction's target, so it cannot be a source")


def _fractions(
    loaded: LoadedModel,
    layers: Sequence[int] | None,
    strength: float | Mapping[int, float],
    blocks: Sequence[str],
) -> tuple[dict[Place, float], float]:
    """Place -> its fraction of the strength, with sum 1; and the strength."""
    if not blocks or len(set(blocks)) < len(blocks) or not set(blocks) <= set(BLOCKS):
        raise UsageError(f"blocks {', '.join(blocks) or '(none)'}: choose from {', '.join(BLOCKS)}")
    if isinstance(strength, Mapping):
        if layers is not None and sorted(layers) != sorted(strength):
            raise UsageError("strengths for layers name the layers: leave out layers, or give the same")
        total = float(sum(strength.values()))
        chosen = tuple(strength)
    else:
        total = strength
        chosen = layers_with_common_inputs(loaded.anatomy, blocks) if layers is None else tuple(layers)
    named = chosen if layers is not None or isinstance(strength, Mapping) else None
    require_common_inputs(loaded.anatomy, blocks, named)
    if not total or total != total:
        raise UsageError(f"strength {total:g}: give a number other than 0")
    for layer in chosen:
        if not 0 <= layer < loaded.anatomy.layers:
            raise UsageError(f"the model has no layer {layer}: it has {loaded.anatomy.layers}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise UsageError("layers: give at least one, and each only once")
    of_layer = {
        layer: strength[layer] / total if isinstance(strength, Mapping) else 1 / len(chosen)
        for layer in chosen
    }
    modules_of = {
        layer: [
            module
            for module in BLOCKS
            if module in blocks and has_common_inputs(loaded.anatomy, layer, module)
        ]
        for layer in of_layer
    }
    fractions = {
        (layer, module): fraction / len(modules_of[layer])
        for layer, fraction in of_layer.items()
        for module in modules_of[layer]
    }
    return fractions, total


def _units(
    loaded: LoadedModel,
    places: Mapping[Place, float],
    neurons: NeuronSet | None,
    sources: Sequence[str],
    languages: int,
) -> dict[Place, torch.Tensor]:
    """Place -> int64, the inputs of the module that its key may use, ascending; 0 is the first that every token
    reaches.

    Raises:
        BrocaError: too few for a constraint for each of ``languages`` and one for the start token.
    """
    units = {}
    for layer, module in places:
        columns = common_columns(loaded.anatomy, layer, module)
        index = torch.arange(columns.stop - columns.start)
        if neurons is not None and module == "mlp":
            index = (
                torch.cat([neurons.by_layer(source)[layer] for source in sources]).unique() - columns.start
            )
            index = index[(index >= 0) & (index < columns.stop - columns.start)]
        if len(index) <= languages:
            raise BrocaError(
                f"layer {layer} has {len(index)} neurons of {' and '.join(map(repr, sources))}, too few to separate "
                f"{languages} languages: identify with a larger --top-rate, choose other --layers, or leave --neurons "
                "out"
            )
        units[layer, module] = index
    return units
