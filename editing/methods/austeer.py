"""AUSteer as an exact fold: the channels that tell two languages apart most often, scaled (arXiv 2602.04428).

A channel is a dimension of the input of ``o_proj`` or of ``down_proj`` (there: a neuron).  Over pairs of a
text in the target and the same text in the source language, with r+ the share of pairs in which the
target's is larger and r- the share in which the source's is (``neurons.scorers.momentum``):

    score_i = max(r+, r-)       gamma_i = +alpha r+  where r+ >= r-,  -alpha r-  otherwise

    x_i <- x_i (1 + gamma_i)    for the N channels of the largest score, over all layers together

which is a scale of column i, without approximation.  Shares have no scale, so layers and blocks compare; of
equal scores the larger mean |difference| goes first, then the earlier (layer, block, channel).

The released code steers one block at a time, with N up to 100 and alpha 8 to 100, compares the last token of
each text where this compares its mean, and takes for the MLP the dimensions of its output; those are not
scaled here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from editing.methods.material import Material
from editing.methods.method import Method
from editing.methods.reach import chosen_blocks, chosen_layers, require_strength
from editing.methods.scale import column_scaling
from editing.plans.plan import ModuleEdit, Plan, make_plan
from neurons.architectures.anatomy import BLOCKS
from neurons.architectures.sites import Routed
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel, ModelSource
from neurons.recording.collectors import TextSums
from neurons.recording.corpus_recording import RESPONSE_BYTES
from neurons.recording.text_pass import Position, PositionReader, Progress, line_numbers, numbered, read_text
from neurons.scorers.momentum import MomentumRates, momentum_rates
from neurons.scorers.setting import Range, setting
from neurons.statistics.statistics import Statistics
from neurons.statistics.totals import Totals
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import MEANS

# At alpha 1 a channel that goes the target's way in every pair is doubled and one that goes the other way is
# silenced.  Published are 8 to 100, on models in which 100 channels are one in a thousand: on the demo model,
# where they are one in a hundred, 10 costs every language 3 to 5 nats a token.
CHANNELS, ALPHA = 100, 1.0


@dataclass(frozen=True)
class Steered:
    """The channels of one block that are scaled.

    Attributes:
        places: int64 [n, 2], rows (layer, channel), in that order.
        gamma: float64 [n].
        score: float64 [n], max(r+, r-).
    """

    places: torch.Tensor
    gamma: torch.Tensor
    score: torch.Tensor


def austeer(
    rates: Mapping[str, MomentumRates],
    channels: int = CHANNELS,
    alpha: float = ALPHA,
    layers: Sequence[int] | None = None,
) -> dict[str, Steered]:
    """The channels with the largest momentum and what they are scaled with.

    Args:
        rates: block -> [L, channels of its input], of target against source.
        channels: N, over all blocks and layers together.
        alpha: a negative one steers from target to source.
        layers: only channels of these; None takes all.

    Returns:
        block -> its channels; a block without one is left out.

    Raises:
        UsageError: N below 1, alpha 0 or not finite, or no block.
        BrocaError: fewer than N channels that differ in any pair.
    """
    require_strength(alpha)
    if channels < 1:
        raise UsageError(f"{channels} channels: give 1 or more")
    named = chosen_blocks([*rates])
    found: list[torch.Tensor] = []  # layer, number of the block, channel
    orders: list[torch.Tensor] = []  # score, tie, gamma
    for number, block in enumerate(named):
        own = rates[block]
        score = torch.maximum(own.rate_up, own.rate_down)
        allowed = score > 0
        if layers is not None:
            inside = torch.zeros(len(score), dtype=torch.bool)
            inside[list(layers)] = True
            allowed = allowed & inside[:, None]
        at = allowed.nonzero()
        found.append(torch.stack([at[:, 0], torch.full_like(at[:, 0], number), at[:, 1]], dim=1))
        gamma = alpha * torch.where(own.rate_up >= own.rate_down, own.rate_up, -own.rate_down)
        orders.append(torch.stack([score[allowed], own.difference[allowed], gamma[allowed]], dim=1))
    places, order = torch.cat(found), torch.cat(orders)
    if len(places) < channels:
        raise BrocaError(
            f"{channels} channels are asked for, but only {len(places)} differ between the languages: ask for "
            "fewer, or give other layers, blocks or more text"
        )
    widest = 1 + int(places[:, 2].max())
    ranked = torch.argsort((places[:, 0] * len(named) + places[:, 1]) * widest + places[:, 2], stable=True)
    for column in (1, 0):
        ranked = ranked[torch.argsort(order[ranked, column], descending=True, stable=True)]
    kept = ranked[:channels].sort().values
    steered = {}
    for number, block in enumerate(named):
        own_kept = kept[places[kept, 1] == number]
        if len(own_kept):
            steered[block] = Steered(places[own_kept][:, [0, 2]], order[own_kept, 2], order[own_kept, 0])
    return steered


def neuron_rates(model: ModelSource, statistics: Statistics, source: str, target: str) -> MomentumRates:
    """Rates of MLP neurons from statistics that hold responses at ``mlp_in``.

    Args:
        model: that the statistics are of.
        statistics: of parallel text.
        source: language name.
        target: language name.

    Raises:
        UsageError: an unknown language, the same twice, no responses, or no line in both languages.
        BrocaError: statistics of another model.
    """
    if statistics.fingerprint:
        model.require_fingerprint({"fingerprint": statistics.fingerprint}, "the statistics")
    _require_pair(statistics.languages, source, target)
    if not statistics.responses:
        raise UsageError(
            "the statistics hold no responses of single texts: record them with `broca record ... --for momentum`"
        )
    return _rates(
        {k: statistics.responses[k] for k in (source, target)},
        {k: statistics.lines[k] for k in (source, target)},
        source,
        target,
    )


def corpus_rates(
    loaded: LoadedModel,
    corpus: Corpus,
    source: str,
    target: str,
    blocks: Sequence[str] = BLOCKS,
    progress: Progress | None = None,
) -> dict[str, MomentumRates]:
    """Rates of the blocks' input channels, in one pass over two languages' texts.

    Args:
        loaded: the model.
        corpus: line i of the two languages is the same text.
        source: language name.
        target: language name.
        blocks: of "attn" and "mlp".
        progress: called with the number of tokens of each batch that is done.

    Returns:
        block -> rates [L, channels].

    Raises:
        UsageError: an unknown language or block, the same language twice, no line in both, or more texts
            than there is room for their means.
        BrocaError: a text's mean that is not finite.
    """
    _require_pair(corpus.languages, source, target)
    named = chosen_blocks(blocks)
    both = corpus.only(source, target)
    responses, lines = _responses(loaded, both, [f"{block}_in" for block in named], progress)
    return {block: _rates(responses[f"{block}_in"], lines, source, target) for block in named}


def austeer_plan(
    source: ModelSource,
    rates: Mapping[str, MomentumRates],
    languages: tuple[str, str],
    channels: int = CHANNELS,
    alpha: float = ALPHA,
    layers: Sequence[int] | None = None,
) -> Plan:
    """Scale the channels of largest momentum; no forward pass.

    Args:
        source: the model.
        rates: block -> its rates (``corpus_rates``, or ``neuron_rates`` for "mlp").
        languages: (source, target) of the rates.
        channels: N, over all blocks and layers together.
        alpha: how much; a negative one steers from target to source.
        layers: only these; None takes all.

    Raises:
        UsageError: settings out of range, an unknown layer or block.
        BrocaError: rates of another model, or fewer than N channels that differ between the languages.
    """
    anatomy = source.anatomy
    chosen = chosen_layers(source, layers)
    for block in chosen_blocks([*rates]):
        shape = (anatomy.layers, anatomy.width(f"{block}_in"))
        if tuple(rates[block].rate_up.shape) != shape:
            raise BrocaError(
                f"the rates of {block} are of {list(rates[block].rate_up.shape)} channels where the model has "
                f"{list(shape)}: record them from this model"
            )
    edits: list[ModuleEdit] = []
    counts = {}
    for block, found in austeer(rates, channels, alpha, chosen).items():
        scale = torch.ones(anatomy.layers, anatomy.width(f"{block}_in"), dtype=torch.float64)
        scale[found.places[:, 0], found.places[:, 1]] = 1 + found.gamma
        edits += column_scaling(source, block, scale)
        counts[block] = len(found.places)
    metadata = {
        "model": source.label,
        "fingerprint": source.fingerprint,
        "method": "austeer",
        "source": languages[0],
        "target": languages[1],
        "languages": list(languages),
        "settings": {
            "layers": list(chosen),
            "channels": counts,
            "alpha": alpha,
            "strength": 1.0,
        },
    }
    return make_plan(edits, metadata)


def _require_pair(languages: Sequence[str], source: str, target: str) -> None:
    for language in (source, target):
        if language not in languages:
            raise UsageError(f"no language {language!r}: there is {', '.join(languages)}")
    if source == target:
        raise UsageError(f"source and target are both {source!r}")


def _rates(
    responses: Mapping[str, torch.Tensor], lines: Mapping[str, torch.Tensor], source: str, target: str
) -> MomentumRates:
    """Rates over the lines that both languages have."""
    common = lines[source][torch.isin(lines[source], lines[target])]
    if not len(common):
        raise UsageError(
            f"no line has a text in {source!r} and in {target!r}: parallel text is needed, line by line the same"
        )
    of_target, of_source = (responses[k][torch.isin(lines[k], common)] for k in (target, source))
    return momentum_rates(of_target, of_source)


def _responses(
    loaded: LoadedModel, corpus: Corpus, sites: Sequence[str], progress: Progress | None
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """(site -> language -> float32 [texts, L, width], language -> int64 [texts], its lines)."""
    anatomy, languages = loaded.anatomy, tuple(corpus.languages)
    batches = language_batches(loaded, corpus, default=MEANS.tokens)
    for language, some in batches.items():
        if not some:
            raise UsageError(f"language {language!r} has no text of more than one token: give more text")
    texts = sum(len(batch.ids) for some in batches.values() for batch in some)
    one = 4 * anatomy.layers * sum(anatomy.width(site) for site in sites)
    if texts * one > RESPONSE_BYTES:
        raise UsageError(
            f"the means of {texts:,} texts would take {texts * one / 1e9:.1f} GB: give at most "
            f"{RESPONSE_BYTES // one // len(languages):,} lines a language, or one block"
        )
    lines = line_numbers(batches)
    kept = {
        site: {k: torch.zeros(len(own), anatomy.layers, anatomy.width(site)) for k, own in lines.items()}
        for site in sites
    }
    totals = Totals(len(languages), anatomy.layers, {}, {})
    collectors = {
        site: TextSums(site, (), anatomy, totals, [of[k] for k in languages]) for site, of in kept.items()
    }

    def reader_of(site: str, layer: int) -> PositionReader:
        def read(values: torch.Tensor, routed: Routed | None, at: Position) -> None:
            if site in collectors:
                collectors[site].add(layer, values, routed, at)
            else:
                # The experts hand over their neurons one after the other; now all have.
                collectors["mlp_in"].finish(layer, at)

        return read

    ends = ["mlp_out"] if anatomy.mixed and "mlp_in" in collectors else []
    readers = {(s, layer): reader_of(s, layer) for s in [*sites, *ends] for layer in range(anatomy.layers)}
    read_text(loaded, numbered(batches), readers, progress, lines=list(lines.values()))
    return kept, lines


def rates_of(material: Material) -> dict[str, MomentumRates]:
    """Block -> rates of a study's pair, or of the languages that were given.

    Raises:
        UsageError: no pair, or neither parallel text nor statistics of one.
    """
    pair = material.pair if material.studied else material.languages
    if pair is None or len(pair) != 2:
        raise UsageError("--method austeer needs --languages SOURCE,TARGET")
    if material.statistics is not None:
        if material.blocks not in (None, ("mlp",)):
            raise UsageError(
                "--statistics know neurons only: leave --blocks out, or give --corpus in place of --statistics"
            )
        return {"mlp": neuron_rates(material.opened, material.statistics, *pair)}
    if material.corpus is None:
        raise UsageError("--method austeer needs --corpus (parallel text), or --statistics of one")
    found: dict[str, MomentumRates] = material.once(
        "rates",
        lambda: corpus_rates(
            material.loaded, material.text, *pair, material.blocks or BLOCKS, material.progress
        ),
    )
    return found


@dataclass(frozen=True, kw_only=True)
class AusteerEdit(Method):
    """AUSteer in the weights."""

    name = "austeer"
    line = "the input channels that tell translations apart most often, scaled"
    source = "AUSteer"
    needs = ("languages",)
    takes = ("corpus", "statistics", "part", "layers", "blocks", "strength", "device", "dtype")

    channels: int = setting(CHANNELS, "how many")
    alpha: float = setting(ALPHA, "times the rate, added to 1", search=Range(0.25, 8.0, log=True))

    def prepare(self, material: Material) -> Callable[..., Plan]:
        rates, pair = rates_of(material), material.pair if material.studied else material.languages
        assert pair is not None
        return partial(austeer_plan, material.opened, rates, (pair[0], pair[1]), layers=material.layers)

    def plan(self, prepared: Callable[..., Plan]) -> Plan:
        return prepared(channels=self.channels, alpha=self.alpha * self.strength)
