"""Router steering: a mixture's routers prefer the experts of chosen languages, in the weights.

With share[l, e, k] of ``neurons.statistics.routing``, the published intervention adds to the scores r of the routers in
middle layers (arXiv 2510.04694; formula and constants of github.com/conctsai/Multilingualism-in-Mixture-of-Experts-LLMs)

    r_e <- r_e + lambda s_e |r_e|      s_e = sum over targets k of share[l, e, k], 0 if that is below ``threshold``

The released steering script is run with 20 experts for 8 a token, threshold .7 and lambda .022 or .034, and with an option
that raises, by the first target's share, the experts of which no target has a share above the threshold; README and
interventions have 15 and .4, the defaults here.

|r_e| varies between tokens and is not a linear function of a router's input x.  The edit has its mean over the text,

    r_e <- r_e + lambda s_e E|r_e|

If the router has a bias (gpt-oss, DeepSeek-V3, GLM-4.5), this is exact: b'_e = b_e + lambda s_e E|r_e|.  A bias of
DeepSeek's kind is added to the sigmoids of the logits and only chooses experts, so there r are those sigmoids.  Else

    W' = W + lambda (s * E|r|) k^T      k of ``editing.methods.bake``: k^T x has mean 1 and minimum variance

so r_e gets a coefficient that is nearly constant.  In both forms experts of the targets are chosen more often by every
token, whatever its language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from editing.methods.bake import EPS, ConstantKey, constant_key, in_layer
from editing.methods.material import Material
from editing.methods.method import SolvedOnce
from editing.methods.scope import chosen_layers, require_strength
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.architectures.anatomy import ROUTER_IN, Anatomy
from neurons.errors import UsageError
from neurons.models.source import LoadedModel, ModelSource
from neurons.recording.corpus_recording import record_corpus
from neurons.recording.covariance import each_moments
from neurons.recording.text_pass import Progress
from neurons.scorers.method import TEXTS
from neurons.setting import COUNT, Range, setting
from neurons.statistics.routing import ROUTING, routed_fraction, routing_shares
from neurons.statistics.statistics import Statistics
from neurons.text.batches import counted_tokens, language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import KEYS

THRESHOLD = 0.4  # of the released code
# Layers 10 to 39 of 48 in the released code.
MIDDLE = (10 / 48, 40 / 48)


def middle_layers(source: ModelSource) -> tuple[int, ...]:
    """The layers with a router in the middle of the model.

    Raises:
        UsageError: no router there.
    """
    anatomy = source.anatomy
    begin, end = (round(anatomy.layers * fraction) for fraction in MIDDLE)
    layers = tuple(layer for layer in range(begin, end) if anatomy.router(layer) is not None)
    if not layers:
        raise UsageError(
            f"{anatomy.model_type}: layers {begin} to {end - 1} have no router, which only a mixture of experts has: "
            "use another --method, or name --layers that have one"
        )
    return layers


def expert_scores(
    statistics: Statistics, targets: Sequence[str], top: int | None = None, threshold: float = THRESHOLD
) -> torch.Tensor:
    """s, float64 [L, E].

    Args:
        statistics: with the routing of two or more languages.
        targets: languages whose experts are raised.
        top: experts kept in each layer of each language; None: ``neurons.statistics.routing.default_top``.
        threshold: of the share; below it s is 0.

    Raises:
        UsageError: no target, one without text, all languages as targets, or a threshold outside [0, 1].
    """
    languages = statistics.languages
    if unknown := [name for name in targets if name not in languages]:
        raise UsageError(f"no text of {unknown[0]!r}: the languages are {', '.join(languages)}")
    if not targets or set(targets) == set(languages):
        raise UsageError(
            f"name the languages whose experts are raised, not all of {', '.join(languages)}: --set targets=fr"
        )
    if not 0 <= threshold <= 1:
        raise UsageError(f"threshold {threshold}: give a share from 0 to 1")
    shares = routing_shares(routed_fraction(statistics), top)
    scores = shares[..., [languages.index(name) for name in dict.fromkeys(targets)]].sum(-1)
    return torch.where(scores < threshold, 0.0, scores)


def _keys(
    loaded: LoadedModel, corpus: Corpus, layers: Sequence[int], eps: float, progress: Progress | None
) -> dict[int, ConstantKey]:
    """The constant key of each layer's router."""
    if not layers:
        return {}
    batches = language_batches(loaded, corpus, default=KEYS.tokens)
    tokens = torch.tensor([counted_tokens(of_language) for of_language in batches.values()])
    units = {(ROUTER_IN, layer): torch.arange(loaded.anatomy.residual) for layer in layers}
    keys = {}
    for (_, layer), moments in each_moments(loaded, batches, units, progress):
        with in_layer(layer, "router"):
            keys[layer] = constant_key(moments, tokens, eps)
    return keys


def _edit(
    loaded: LoadedModel,
    layer: int,
    path: str,
    added: torch.Tensor,
    scores: torch.Tensor,
    key: ConstantKey | None,
) -> ModuleEdit:
    """The edit of one router: a bias, or, with a key, a rank-1 change of its weight."""
    norm = float(Weights(loaded).read(layer, path).norm())
    notes: dict[str, object] = {
        "experts": {str(expert): float(scores[expert]) for expert in added.nonzero()[:, 0].tolist()},
        "weight_norm": norm,
    }
    if key is None:
        notes |= {"change_norm": 0.0, "bias_norm": float(added.norm())}
        return ModuleEdit(layer, path, (), bias=added.float(), notes=notes)
    notes |= {
        "change_norm": float(added.norm() * key.vector.norm()),
        "spread": key.deviation,
        "least_spread": key.min_deviation,
        "start_coefficient": key.start,
        "eps": key.eps,
    }
    left, right = added[:, None].float(), key.vector[:, None].float()
    return ModuleEdit(layer, path, (), left=left, right=right, notes=notes)


def mean_scores(statistics: Statistics) -> torch.Tensor:
    """E|r|, float64 [L, E], over the tokens of all languages."""
    return statistics.moment(ROUTING).sum(-1) / statistics.tokens.sum()


@dataclass(frozen=True, kw_only=True)
class RouterSteering(SolvedOnce):
    """The registered method."""

    name = "steer-router"
    line = "routes every token to the experts of chosen languages, in a mixture of experts"
    source = "arXiv 2510.04694"
    needs = ("corpus",)
    takes = ("statistics", "layers", "strength", "part", "languages", "device", "dtype")

    targets: tuple[str, ...] = setting((), "languages whose experts are raised")
    top: int | None = setting(
        None, "experts of each layer that count as a language's; 15/8 of a token's", kind=COUNT
    )
    threshold: float = setting(THRESHOLD, "smallest share of an expert that is raised")
    eps: float = setting(EPS, "ridge of the key, as a fraction of the mean variance")
    strength: float = setting(1.0, "lambda", search=Range(0.1, 10.0, log=True))

    def prepare(self, material: Material) -> Plan:
        require_strength(self.strength)
        return super().prepare(material)

    def key_widths(self, anatomy: Anatomy, modules: Sequence[str]) -> list[int]:
        return [anatomy.residual]

    def solved(self, material: Material) -> Plan:
        loaded, statistics = material.loaded, material.statistics
        layers = middle_layers(loaded) if material.layers is None else material.layers
        if statistics is None:
            statistics = record_corpus(loaded, material.text, [ROUTING], TEXTS, progress=material.progress)
        elif statistics.fingerprint:
            loaded.require_fingerprint({"fingerprint": statistics.fingerprint}, "the statistics")
        scores = expert_scores(statistics, self._targets(material), self.top, self.threshold)
        return self.raised(material, layers, scores, mean_scores(statistics))

    def raised(
        self, material: Material, layers: Sequence[int], scores: torch.Tensor, means: torch.Tensor
    ) -> Plan:
        """The plan that raises experts in the routers.

        Args:
            material: the model, and text for the keys, which routers without a bias need.
            layers: layers whose routers change.
            scores: [L, E], s.
            means: [L, E], E|r|.

        Returns:
            A plan with a bias or a rank-1 edit for each router, with the note "experts" (expert -> s), and "bias_norm" or
            "spread" (standard deviation of the key's coefficient).

        Raises:
            UsageError: layers without a router, or a strength of 0.
            BrocaError: as ``constant_key``; no expert with a score in these layers.
        """
        require_strength(self.strength)
        loaded, anatomy = material.loaded, material.loaded.anatomy
        chosen = chosen_layers(loaded, layers)
        routers = {layer: router.path for layer in chosen if (router := anatomy.router(layer)) is not None}
        if without := [layer for layer in chosen if layer not in routers]:
            raise UsageError(
                f"{anatomy.model_type}: layer {without[0]} has no router: leave it out of --layers"
            )
        added = self.strength * scores.double() * means.double()
        changed = {layer: path for layer, path in routers.items() if bool(added[layer].any())}
        keyed = [layer for layer, path in changed.items() if anatomy.bias_place(layer, path) is None]
        keys = _keys(loaded, material.text, keyed, self.eps, material.progress)
        edits = [
            _edit(loaded, layer, path, added[layer], scores[layer], keys.get(layer))
            for layer, path in changed.items()
        ]
        targets = list(self._targets(material))
        settings = {
            "targets": targets,
            "top": self.top,
            "threshold": self.threshold,
            "layers": list(routers),
            "strength": self.strength,
            "eps": self.eps if keys else None,
            "corpus": material.text.provenance,
        }
        return make_plan(edits, plan_metadata(loaded, self.name, settings, {"languages": targets}))

    def _targets(self, material: Material) -> tuple[str, ...]:
        return self.targets or (() if material.target is None else (material.target,))
