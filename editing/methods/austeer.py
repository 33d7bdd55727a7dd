"""AUSteer in the weights: scales the channels that separate two languages most consistently (arXiv 2602.04428).

A channel is a dimension of the input of ``o_proj`` or of ``down_proj`` (there a neuron).  Over pairs of a text in
the target language and the same text in the source language, r+ is the fraction of pairs in which the target's
value is larger and r- the fraction in which the source's is (``neurons.scorers.momentum``):

    score_i = max(r+, r-)       gamma_i = +alpha r+  if r+ >= r-,  else -alpha r-

    x_i <- x_i (1 + gamma_i)    for the N channels of largest score over all layers

This is a scale of column i, without approximation.  Fractions have no scale, so layers and modules are comparable.
Of equal scores the larger mean |difference| comes first, then the earlier (layer, module, channel).

The released code steers one module at a time, with N up to 100 and alpha 8 to 100.  It compares the last token of
each text instead of its mean, and for the MLP it uses the dimensions of its output, which are not scaled here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from editing.directions.recorded import record_texts
from editing.methods.material import Material
from editing.methods.method import Method
from editing.methods.scale import column_scaling
from editing.methods.scope import chosen_layers, chosen_modules, require_strength
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from neurons.architectures.anatomy import BLOCKS
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel, ModelSource
from neurons.recording.corpus_recording import MAX_RESPONSE_BYTES
from neurons.recording.text_pass import Progress, numbered
from neurons.scorers.momentum import MomentumRates, momentum_rates
from neurons.setting import Range, setting
from neurons.statistics.statistics import Statistics
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import MEANS

# Alpha 1 doubles a channel that is larger for the target in every pair and zeroes one that is smaller.  The paper
# has 8 to 100, on models in which 100 channels are one in a thousand.  On the demo model they are one in a hundred,
# and 10 costs every language 3 to 5 nats a token.
CHANNELS, ALPHA = 100, 1.0


def austeer(
    rates: Mapping[str, MomentumRates],
    channels: int = CHANNELS,
    alpha: float = ALPHA,
    layers: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """The scales of the channels with the largest momentum.

    Args:
        rates: module -> [L, channels of its input], of target against source.
        channels: N, over all modules and layers.
        alpha: strength; a negative one steers from target to source.
        layers: layers of the channels; None takes all.

    Returns:
        module -> float64 [L, channels], 1 + gamma of the chosen channels and 1 of all others; modules without chosen
        channels are left out.

    Raises:
        UsageError: N below 1, alpha 0 or not finite, or no module.
        BrocaError: fewer than N channels differ in any pair.
    """
    require_strength(alpha)
    if channels < 1:
        raise UsageError(f"{channels} channels: give 1 or more")
    modules = chosen_modules([*rates])
    candidates: list[torch.Tensor] = []  # layer, index of the module, channel
    orders: list[torch.Tensor] = []  # score, tie, gamma
    for index, module in enumerate(modules):
        rate = rates[module]
        score = torch.maximum(rate.rate_up, rate.rate_down)
        allowed = score > 0
        if layers is not None:
            in_layers = torch.zeros(len(score), dtype=torch.bool)
            in_layers[list(layers)] = True
            allowed = allowed & in_layers[:, None]
        at = allowed.nonzero()
        candidates.append(torch.stack([at[:, 0], torch.full_like(at[:, 0], index), at[:, 1]], dim=1))
        gamma = alpha * torch.where(rate.rate_up >= rate.rate_down, rate.rate_up, -rate.rate_down)
        orders.append(torch.stack([score[allowed], rate.difference[allowed], gamma[allowed]], dim=1))
    places, order = torch.cat(candidates), torch.cat(orders)
    if len(places) < channels:
        raise BrocaError(
            f"only {len(places)} channels differ between the languages, fewer than {channels}: choose fewer channels, "
            "other layers or blocks, or give more text"
        )
    width = 1 + int(places[:, 2].max())
    ranked = torch.argsort((places[:, 0] * len(modules) + places[:, 1]) * width + places[:, 2], stable=True)
    for column in (1, 0):
        ranked = ranked[torch.argsort(order[ranked, column], descending=True, stable=True)]
    kept = ranked[:channels].sort().values
    scales = {}
    for index, module in enumerate(modules):
        of_module = kept[places[kept, 1] == index]
        if len(of_module):
            scales[module] = torch.ones_like(rates[module].rate_up, dtype=torch.float64)
            scales[module][places[of_module, 0], places[of_module, 2]] = 1 + order[of_module, 2]
    return scales


def neuron_rates(model: ModelSource, statistics: Statistics, source: str, target: str) -> MomentumRates:
    """Rates of MLP neurons from statistics with responses at ``mlp_in``.

    Args:
        model: the model of the statistics.
        statistics: a recording of parallel text.
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
            "the statistics hold no responses to single texts: record them with `broca record ... --for momentum`"
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
    """Rates of the modules' input channels, in one pass over the texts of two languages.

    Args:
        loaded: the model.
        corpus: parallel text: line i of the two languages is the same text.
        source: language name.
        target: language name.
        blocks: "attn", "mlp" or both.
        progress: called with the number of tokens of each batch that is done.

    Returns:
        module -> rates [L, channels].

    Raises:
        UsageError: an unknown language or module, the same language twice, no line in both, or too many texts to
            keep their means.
        BrocaError: a text's mean that is not finite.
    """
    _require_pair(corpus.languages, source, target)
    modules = chosen_modules(blocks)
    pair = corpus.only(source, target)
    responses, lines = text_responses(loaded, pair, [f"{module}_in" for module in modules], progress)
    return {
        module: _rates(
            {k: of_site[f"{module}_in"] for k, of_site in responses.items()}, lines, source, target
        )
        for module in modules
    }


def _require_pair(languages: Sequence[str], source: str, target: str) -> None:
    for language in (source, target):
        if language not in languages:
            raise UsageError(f"no language {language!r}: the languages are {', '.join(languages)}")
    if source == target:
        raise UsageError(f"source and target are both {source!r}")


def _rates(
    responses: Mapping[str, torch.Tensor], lines: Mapping[str, torch.Tensor], source: str, target: str
) -> MomentumRates:
    """Rates over the lines with text in both languages."""
    common = lines[source][torch.isin(lines[source], lines[target])]
    if not len(common):
        raise UsageError(
            f"no line has text in both {source!r} and {target!r}: give parallel text, line i of both the same text"
        )
    of_target, of_source = (responses[k][torch.isin(lines[k], common)] for k in (target, source))
    return momentum_rates(of_target, of_source)


def text_responses(
    loaded: LoadedModel,
    corpus: Corpus,
    sites: Sequence[str],
    progress: Progress | None,
    layers: Sequence[int] | None = None,
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The mean of every text at sites: (language -> site -> float32 [texts, L, width], language -> int64 [texts], lines).

    Raises:
        UsageError: a language without text, or too many texts to keep their means.
    """
    anatomy = loaded.anatomy
    batches = language_batches(loaded, corpus, default=MEANS.tokens)
    texts = sum(len(batch.ids) for _, batch in numbered(batches))
    text_bytes = 4 * anatomy.layers * sum(anatomy.width(site) for site in sites)
    if texts * text_bytes > MAX_RESPONSE_BYTES:
        raise UsageError(
            f"the means of {texts:,} texts would take {texts * text_bytes / 1e9:.1f} GB: give at most "
            f"{MAX_RESPONSE_BYTES // text_bytes // len(batches):,} lines in each language, or one of --blocks"
        )
    recorded = record_texts(loaded, batches, progress, sites, (), layers)
    return recorded.outputs, recorded.lines


def rates_of(material: Material) -> dict[str, MomentumRates]:
    """Module -> rates of a study's pair, or of the given languages.

    Raises:
        UsageError: no pair, or neither parallel text nor statistics.
    """
    pair = material.pair if material.studied else material.languages
    if pair is None or len(pair) != 2:
        raise UsageError("--method austeer needs --languages SOURCE,TARGET")
    if material.statistics is not None:
        if material.corpus is not None:
            raise UsageError("--corpus and --statistics exclude each other: give one")
        if material.blocks not in (None, ("mlp",)):
            raise UsageError(
                "--statistics hold only neurons: leave --blocks out, or give --corpus instead of --statistics"
            )
        return {"mlp": neuron_rates(material.opened, material.statistics, *pair)}
    if material.corpus is None:
        raise UsageError("--method austeer needs --corpus (parallel text), or its --statistics")
    rates: dict[str, MomentumRates] = material.once(
        "rates",
        lambda: corpus_rates(
            material.loaded, material.text, *pair, material.blocks or BLOCKS, material.progress
        ),
    )
    return rates


@dataclass(frozen=True, kw_only=True)
class AusteerEdit(Method):
    """The registered method."""

    name = "austeer"
    line = "scales the input channels that separate translations most consistently"
    source = "AUSteer"
    needs = ("languages",)
    takes = ("corpus", "statistics", "part", "layers", "blocks", "strength", "device", "dtype")

    channels: int = setting(CHANNELS, "number of channels")
    alpha: float = setting(
        ALPHA, "channels are scaled by 1 +- alpha x rate", search=Range(0.25, 8.0, log=True)
    )

    def prepare(self, material: Material) -> tuple[Material, dict[str, MomentumRates]]:
        return material, rates_of(material)

    def plan(self, prepared: tuple[Material, Mapping[str, MomentumRates]]) -> Plan:
        """
        Raises:
            UsageError: settings out of range, an unknown layer or module.
            BrocaError: rates of another model, or fewer than N channels that differ between the languages.
        """
        material, rates = prepared
        model, (source, target) = material.opened, material.pair
        chosen, alpha = chosen_layers(model, material.layers), self.alpha * self.strength
        for module in chosen_modules([*rates]):
            shape = (model.anatomy.layers, model.anatomy.width(f"{module}_in"))
            if tuple(rates[module].rate_up.shape) != shape:
                raise BrocaError(
                    f"the rates of {module} have {list(rates[module].rate_up.shape)} channels, but the model has "
                    f"{list(shape)}: record them from this model"
                )
        edits: list[ModuleEdit] = []
        counts = {}
        for module, scale in austeer(rates, self.channels, alpha, chosen).items():
            edits += column_scaling(model, module, scale)
            counts[module] = int((scale != 1).sum())
        languages = {"source": source, "target": target, "languages": [source, target]}
        settings = {"layers": list(chosen), "channels": counts, "alpha": alpha, "strength": 1.0}
        return make_plan(edits, plan_metadata(model, self.name, settings, languages))
