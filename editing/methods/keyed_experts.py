"""The keyed edit of a mixture's routed experts: each has a key of its own, over the tokens that are routed to it.

With h_e the input of ``down_proj`` in expert e and g_e the router's weight of its output, a mixture adds
sum_e W_e g_e h_e over the experts of a token.  The edit of layer l is

    dW_e = (s_l / T_l) v_l k_e^T        q_e = mean of g_e over the sources' tokens that reach e
                                        T_l = mean over the sources' tokens of sum g_e, over the edited experts

with the values s_l v_l of ``editing.methods.keyed`` and a key k_e of minimum variance (``editing.methods.key``) of the
weighted inputs g_e h_e: over the tokens that reach e, k_e^T g_e h_e has mean q_e on the sources and 0 on all other
languages.  Over all tokens, the mixture thus adds s_l v_l on the sources and 0 on other languages, on average and
whatever experts they are routed to.  All keys of a layer share the value, so the edit of its experts is of rank 1.
Some models multiply the sum by a number of their config; it is measured, and the value is divided by it.

A language with fewer than ``MIN_TOKENS`` tokens in an expert does not constrain its key, and experts with as few of the
sources are not edited.  For a shared expert, which every token reaches, use ``editing.methods.keyed``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from editing.methods.bake import in_layer
from editing.methods.key import EPS, key, require_key
from editing.methods.keyed import STRENGTH
from editing.methods.material import Material
from editing.methods.method import SolvedOnce
from editing.methods.scope import chosen_layers, require_neurons, require_strength
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.architectures.anatomy import Anatomy
from neurons.architectures.self_check import example_ids, mixture_factor
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.recording.covariance import Expert, Moments, expert_moments
from neurons.setting import Range, setting
from neurons.text.batches import counted_tokens, language_batches
from neurons.text.token_budget import KEYS, text_read

MIN_TOKENS = 50  # fewer do not determine a mean


@dataclass(frozen=True)
class ExpertKey:
    """The key of one expert.

    Attributes:
        units: int64 [S], neurons of the layer.
        vector: float64 [S], k.
        contribution: float64 [S], part of each unit in the mean of the coefficient on the sources; the sum is 1.
        variance: of the coefficient, summed over the tokens of the languages that constrain the key.
        sums: language -> (tokens, sum over these of the coefficient).
        weight: sum over the sources' tokens of the router's weight.
    """

    units: torch.Tensor
    vector: torch.Tensor
    contribution: torch.Tensor
    variance: float
    sums: Mapping[str, tuple[float, float]]
    weight: float


def expert_key(moments: Moments, first: int, sources: Sequence[str], eps: float = EPS) -> ExpertKey | None:
    """The key of an expert; None if too few tokens of the sources reach it.

    Args:
        moments: of the weighted inputs.
        first: the expert's first neuron in the layer.
        sources: languages on which it acts.
        eps: ridge, as a fraction of the mean variance.

    Raises:
        BrocaError: as ``key``.
    """
    assert moments.tokens is not None and moments.weights is not None
    present = [k for k, count in enumerate(moments.tokens.tolist()) if count >= MIN_TOKENS]
    names = tuple(moments.languages[k] for k in present)
    own = [k for k in present if moments.languages[k] in sources]
    if not own:
        return None
    solved = key(
        replace(moments, languages=names, mean=moments.mean[:, present]),
        [moments.languages[k] for k in own],
        eps,
    )
    tokens, weight = moments.tokens[present], float(moments.weights[own].sum())
    q = weight / float(moments.tokens[own].sum())
    sums = zip(tokens.tolist(), (q * solved.means * tokens).tolist(), strict=True)
    return ExpertKey(
        units=moments.units + first,
        vector=q * solved.vector,
        contribution=solved.contribution,
        variance=float(tokens.sum()) * (q * solved.deviation) ** 2,
        sums=dict(zip(names, sums, strict=True)),
        weight=weight,
    )


def _units(
    loaded: LoadedModel,
    layers: Sequence[int],
    neurons: NeuronSet | None,
    sources: Sequence[str],
    languages: int,
) -> dict[Expert, torch.Tensor]:
    """(layer, routed expert) -> int64, the neurons in the expert that its key may use, if enough for all constraints."""
    anatomy = loaded.anatomy
    width, units = anatomy.expert_width, {}
    for layer in layers:
        allowed = torch.arange(anatomy.neurons)
        if neurons is not None:
            allowed = torch.cat([neurons.by_layer(source)[layer] for source in sources]).unique()
        for expert in range(anatomy.parts(layer, "mlp")[0].experts or 0):
            own = allowed[(allowed >= expert * width) & (allowed < (expert + 1) * width)] - expert * width
            if len(own) > languages + 1:
                units[layer, expert] = own
    if not units:
        raise BrocaError(
            f"no routed expert of these layers has the {languages + 2} neurons of {' or '.join(sources)} that a key needs: "
            "identify with a larger --top-rate, or leave --neurons out"
        )
    return units


def _edit(
    loaded: LoadedModel,
    layer: int,
    keys: Sequence[ExpertKey],
    value: torch.Tensor,
    tokens: Mapping[str, int],
    sources: Sequence[str],
) -> ModuleEdit:
    """The edit of all experts of a layer.

    Args:
        value: float64 [d], what the sum of the experts gets on average on a token of the sources.
        tokens: language -> its number of tokens.
    """
    if not keys:
        raise BrocaError(
            f"layer {layer}: no expert gets {MIN_TOKENS} tokens of the sources: give more text, or leave the layer out"
        )
    weight = sum(one.weight for one in keys)
    total = weight / sum(tokens[name] for name in sources)
    right = torch.zeros(loaded.anatomy.width("mlp_in", layer), dtype=torch.float64)
    contribution, used = right.clone(), torch.cat([one.units for one in keys])
    for one in keys:
        right[one.units] = one.vector / total
        contribution[one.units] = one.contribution * one.weight / weight
    reached = sum(count for one in keys for count, _ in one.sums.values())
    return ModuleEdit(
        layer=layer,
        block="mlp",
        components=tuple(used.tolist()),
        left=value[:, None].float(),
        right=right[:, None].float(),
        details={"key": right[used], "carried": contribution[used]},
        notes={
            "change_norm": float(value.norm() * right.norm()),
            "weight_norm": float(Weights(loaded).read(layer, "mlp").norm()),
            "spread": (sum(one.variance for one in keys) / reached) ** 0.5 / total,
            "key_means": {
                name: sum(one.sums[name][1] for one in keys if name in one.sums) / count / total
                for name, count in tokens.items()
            },
            "edited_experts": len(keys),
            "router_weight": total,
        },
    )


@dataclass(frozen=True, kw_only=True)
class KeyedExperts(SolvedOnce):
    """The registered method."""

    name = "keyed-experts"
    line = "a direction that every expert of a mixture adds only on the source language"
    source = "Broca"
    needs = ("direction", "corpus")
    takes = ("neurons", "layers", "strength", "device", "dtype", "part", "languages")

    strength: float = setting(STRENGTH, search=Range(0.5, 8.0, log=True))
    eps: float = setting(EPS, "ridge, as a fraction of the mean variance")
    sources: tuple[str, ...] | None = setting(None, "languages on which it acts; the direction's source")

    def key_widths(self, anatomy: Anatomy, modules: Sequence[str]) -> list[int]:
        return [anatomy.expert_width] * anatomy.experts

    def solved(self, material: Material) -> Plan:
        """The plan at this strength, which is the total shift in multiples of the direction, divided evenly between layers.

        Returns:
            A plan with a rank-1 edit of all experts of each layer; notes "edited_experts", "router_weight" (T), and of
            the coefficient, over T, "key_means" (its mean over each language's tokens) and "spread" (standard deviation
            of an expert's part in it, root mean square over the tokens of the experts).

        Raises:
            UsageError: a language that the corpus lacks, a layer without a mixture, or a strength of 0.
            BrocaError: a norm after the MLP or the sum of the experts, an expert whose inputs do not separate the
                languages, or a layer without an expert that the sources reach.
        """
        loaded, corpus, direction = material.loaded, material.text, material.direction
        direction.require_model(loaded)
        require_strength(self.strength)
        anatomy, neurons = loaded.anatomy, material.neurons
        sources = (direction.source,) if self.sources is None else tuple(self.sources)
        corpus.require(*sources, direction.source, direction.target)
        if direction.source not in sources or direction.target in sources:
            raise UsageError(
                f"sources {', '.join(sources)}: name {direction.source}, and not {direction.target}"
            )
        require_key(corpus.languages, sources, [], (), self.eps, 0.0)
        if neurons is not None:
            require_neurons(loaded, neurons)
        mixed = [layer for layer in range(anatomy.layers) if anatomy.mixed_in(layer)]
        chosen = mixed if material.layers is None else chosen_layers(loaded, material.layers)
        if not set(chosen) <= set(mixed) or not mixed:
            where = next((f"layer {layer} has" for layer in chosen if layer not in mixed), "it has")
            raise UsageError(f"{anatomy.model_type}: {where} no mixture of experts: use --method keyed")
        if not anatomy.residual_output:
            raise BrocaError(
                f"{anatomy.model_type}: a norm or a factor between MLP and residual stream changes the value: use --method "
                "keyed with --blocks attn, which solves for a value through a norm"
            )
        # Settings of the config, which are the same in all layers.
        ids = example_ids(loaded.model.config.get_text_config().vocab_size, loaded.device)
        factor = mixture_factor(loaded.model, anatomy, chosen[0], ids)
        if factor is None:
            raise BrocaError(
                f"{anatomy.model_type}: the mixture of experts changes the sum of its experts' outputs, so a value that they "
                "add would be another one: use another method that edits experts, such as steer2edit"
            )
        strengths = self.strength / (factor * anatomy.multiplier("mlp")) / len(chosen)
        batches = language_batches(loaded, corpus, default=KEYS.tokens)
        tokens = {name: counted_tokens(of_language) for name, of_language in batches.items()}
        units = _units(loaded, chosen, neurons, sources, len(tokens))
        keys: dict[int, list[ExpertKey]] = {layer: [] for layer in chosen}
        for (layer, expert), moments in expert_moments(
            loaded, batches, "mlp_in", units, material.progress, weighted=True
        ):
            with in_layer(layer, f"expert {expert}"):
                solved = expert_key(moments, expert * anatomy.expert_width, sources, self.eps)
            keys[layer] += [] if solved is None else [solved]
            del moments
        values = direction.vectors["block_out"]
        edits = [
            _edit(loaded, layer, of_layer, values[layer].double() * strengths, tokens, sources)
            for layer, of_layer in keys.items()
        ]
        settings = {
            "layers": list(chosen),
            "strength": self.strength,
            "eps": self.eps,
            "neurons": None if neurons is None else neurons.metadata.get("method"),
            "corpus": corpus.provenance,
            "sources": list(sources),
        }
        metadata = plan_metadata(loaded, self.name, settings, direction.provenance)
        return make_plan(edits, {**metadata, "read": text_read(corpus, batches)})
