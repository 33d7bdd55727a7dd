"""Language arithmetic in mixtures: the hook against loops over tokens, the edit against the hook and against loops."""

import models
import pytest
import torch
from test_families import saved
from tiny_models import VOCABULARY

from editing.hooks.language_arithmetic import LanguageArithmetic
from editing.methods.language_arithmetic import ArithmeticEdit, activation_means
from editing.methods.material import Material
from editing.plans.applied import applied
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError
from neurons.models.source import load_model
from neurons.neuron_sets.neuron_set import neuron_set
from neurons.text.batches import TokenBatch, language_batches
from neurons.text.corpus import Corpus

EXPERTS, WIDTH, LAYER = 4, 24, 1
SIZES = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "norm_topk_prob": False}
# Neurons of the layer, in experts 0, 2 and 3; neuron 50 is of both languages.
RAISED, SILENCED = (3, 9, 50, 80), (5, 50, 75)


def plan_of(loaded, corpus, neurons, target=None, deactivate=(), **settings):
    method = ArithmeticEdit(target=target, deactivate=deactivate, **settings)
    return method.plan_for(Material(loaded, corpus, neurons=neurons))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(
        str(models.build_checkpoint(tmp_path_factory.mktemp("arithmetic") / "m", "qwen3_moe", **SIZES))
    )


@pytest.fixture(scope="module")
def corpus():
    return Corpus({k: tuple(models.sentences(k, 12, 5, (2, 8))) for k in models.LANGUAGES}, "digest", "all")


@pytest.fixture(scope="module")
def neurons(loaded):
    rows = {
        "qaa": torch.tensor([[LAYER, j] for j in SILENCED]),
        "qab": torch.tensor([[LAYER, j] for j in RAISED]),
        "qac": torch.zeros(0, 2, dtype=torch.int64),
    }
    scores = {k: torch.zeros(len(v)) for k, v in rows.items()}
    metadata = {"method": "lape", "fingerprint": loaded.fingerprint}
    return neuron_set(rows, scores, 3, EXPERTS * WIDTH, metadata | {"experts": EXPERTS})


def masks(layers=3):
    on, off = (torch.zeros(layers, EXPERTS * WIDTH, dtype=torch.bool) for _ in range(2))
    on[LAYER, list(RAISED)], off[LAYER, list(SILENCED)] = True, True
    return on, off


def tokens_of(loaded, corpus, steering=None):
    """Language -> tokens, each (expert -> (gate, s, u, W_e h_e), mixture's output), from definitions in float64."""
    mixture, found = loaded.anatomy.mixtures[LAYER], {}
    router = mixture.gate.weight.detach().double()
    for language, batches in language_batches(loaded, corpus).items():
        found[language] = []
        for batch in batches:
            inputs, outputs = [], []
            handles = [
                mixture.register_forward_pre_hook(lambda _, given, kept=inputs: kept.append(given[0])),
                mixture.register_forward_hook(lambda _, __, out, kept=outputs: kept.append(out)),
            ]
            with torch.no_grad():
                loaded.model(input_ids=batch.ids, attention_mask=batch.attention.long())
            for handle in handles:
                handle.remove()
            pairs = zip(inputs[0].double()[batch.counted], outputs[0].double()[batch.counted], strict=True)
            for x, out in pairs:
                probabilities, experts = (router @ x).softmax(0), {}
                for expert in probabilities.argsort(descending=True)[:2].tolist():
                    both = mixture.experts.gate_up_proj[expert].detach().double() @ x
                    s, u = torch.nn.functional.silu(both[:WIDTH]), both[WIDTH:]
                    experts[expert] = probabilities[expert], s, u
                found[language].append((experts, out))
    return found


def means_of(tokens, language):
    """Mean of s over the language's tokens that reach each expert, [E * I]."""
    means = torch.zeros(EXPERTS * WIDTH).double()
    for expert in range(EXPERTS):
        rows = [experts[expert][1] for experts, _ in tokens[language] if expert in experts]
        if rows:
            means[expert * WIDTH : (expert + 1) * WIDTH] = torch.stack(rows).mean(0)
    return means


def test_means_are_over_the_tokens_that_reach_an_expert(loaded, corpus):
    tokens = tokens_of(loaded, corpus)
    found = activation_means(loaded, language_batches(loaded, corpus), [LAYER])[LAYER]
    for language in models.LANGUAGES:
        torch.testing.assert_close(found[language], means_of(tokens, language), rtol=1e-4, atol=1e-6)


def test_the_hook_is_the_intervention(loaded, corpus):
    on, off = masks()
    means = torch.randn(3, EXPERTS * WIDTH, generator=torch.Generator().manual_seed(3)).double()
    before = tokens_of(loaded, corpus)
    with LanguageArithmetic(loaded, means, means, on, off, "additive", 1.5, -0.2)():
        after = tokens_of(loaded, corpus)
    down = loaded.anatomy.mixtures[LAYER].experts.down_proj.detach().double()
    for (experts, _), (_, out) in zip(before["qab"], after["qab"], strict=True):
        expected = torch.zeros(64).double()
        for expert, (gate, s, u) in experts.items():
            own = slice(expert * WIDTH, (expert + 1) * WIDTH)
            changed = torch.where(off[LAYER, own], -0.2, s) + torch.where(
                on[LAYER, own], 1.5 * means[LAYER, own], 0.0
            )
            expected += gate * (down[expert] @ (changed * u))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_deactivation_in_the_weights_is_the_hook(loaded, corpus, neurons):
    plan = plan_of(loaded, corpus, neurons, None, ["qaa"])
    on, off = masks()
    nothing = torch.zeros_like(on)
    zeros = torch.zeros(3, EXPERTS * WIDTH).double()
    with applied(loaded, plan):
        by_plan = tokens_of(loaded, corpus)
    with LanguageArithmetic(loaded, zeros, zeros, nothing, off)():
        by_hook = tokens_of(loaded, corpus)
    for (_, one), (_, other) in zip(by_plan["qaa"], by_hook["qaa"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert plan.edits[0].components == SILENCED and plan.edits[0].rank == 0


def test_experts_with_another_product_of_gate_and_branch_are_only_silenced(tmp_path, corpus):
    """gpt-oss has h = (clamp(u) + 1) s, of which u times a constant is no part."""
    loaded = load_model(str(models.build_checkpoint(tmp_path, "gpt_oss")))
    rows = {"qaa": torch.tensor([[LAYER, 3], [LAYER, 9]]), "qab": torch.tensor([[LAYER, 5]])}
    scores = {k: torch.zeros(len(v)) for k, v in rows.items()}
    places = 3, loaded.anatomy.neurons, {"method": "lape", "fingerprint": loaded.fingerprint}
    found = neuron_set(rows, scores, *places)
    for target, fill in ((None, -0.2), ("qab", 0.0)):
        with pytest.raises(BrocaError, match="does not name the gate's activation"):
            plan_of(loaded, corpus, found, target, ["qaa"], fill=fill)
    (edit,) = plan_of(loaded, corpus, found, None, ["qaa"]).edits
    assert edit.components == (3, 9) and edit.rank == 0


def test_an_expert_adds_the_mean_of_the_intervention(loaded, corpus, neurons):
    """Over the tokens that reach it, before the router's weight; the scale is exact."""
    tokens = tokens_of(loaded, corpus)
    plan = plan_of(loaded, corpus, neurons, "qab", ["qaa"], strength=2.0)
    (edit,) = plan.edits
    assert edit.rank == edit.notes["edited_experts"] == 3
    offset = torch.zeros(EXPERTS * WIDTH).double()
    offset[list(RAISED)] = 2.0 * means_of(tokens, "qab")[list(RAISED)]
    down = loaded.anatomy.mixtures[LAYER].experts.down_proj.detach().double()
    energies = []
    for rank, expert in enumerate((0, 2, 3)):
        own = slice(expert * WIDTH, (expert + 1) * WIDTH)
        reaching = [experts[expert] for of in tokens.values() for experts, _ in of if expert in experts]
        added = torch.stack([down[expert] @ (offset[own] * u) for _, _, u in reaching])
        torch.testing.assert_close(edit.left[:, rank].double(), added.mean(0), rtol=1e-3, atol=1e-6)
        energies.append((len(added) * float(added.mean(0).square().sum()), float(added.square().sum())))
        others = torch.ones(EXPERTS * WIDTH, dtype=torch.bool)
        others[own] = False
        assert not edit.right[others, rank].any()
        coefficients = torch.stack([edit.right[own, rank].double() @ (s * u) for _, s, u in reaching])
        assert float(coefficients.mean()) == pytest.approx(1, abs=1e-4)
        assert float(coefficients.std()) < 1
    share = sum(constant for constant, _ in energies) / sum(total for _, total in energies)
    assert edit.notes["constant_share"] == pytest.approx(share, rel=1e-3)
    scaled = set((edit.column_scale == 0).nonzero()[:, 0].tolist())
    assert scaled == set(SILENCED)
    weight = down.permute(1, 0, 2).flatten(1)
    change = edit.apply(weight.float()) - weight
    assert edit.notes["change_norm"] == pytest.approx(float(change.norm()), rel=1e-5)


def test_shared_experts_and_dense_layers_are_groups(tmp_path):
    """Zeros in the weights are the hook's, and every group adds its constant to all tokens."""
    loaded = load_model(saved("deepseek_v3", tmp_path), device="cpu")
    anatomy = loaded.anatomy
    width, layers = anatomy.neurons, anatomy.layers
    assert anatomy.mixed_in(3) and not anatomy.mixed_in(0)
    off = torch.zeros(layers, width, dtype=torch.bool)
    off[0, [2, 70]], off[3, [7, width - 3]] = True, True
    on = off.roll(1, dims=1)
    on[:, 0] = False
    sets = {"aa": off.nonzero(), "bb": on.nonzero()}
    scores = {k: torch.zeros(len(v)) for k, v in sets.items()}
    metadata = {"fingerprint": loaded.fingerprint}
    chosen = neuron_set(sets, scores, layers, width, metadata | {"experts": anatomy.experts})
    generator = torch.Generator().manual_seed(0)
    rows = {k: torch.randint(2, VOCABULARY, (6, 20), generator=generator) for k in sets}
    seen = torch.ones(6, 20, dtype=torch.bool)
    batches = {k: [TokenBatch(ids, seen, seen, torch.arange(6))] for k, ids in rows.items()}
    with pytest.MonkeyPatch.context() as patch:
        for module in ("language_arithmetic",):
            patch.setattr(f"editing.methods.{module}.language_batches", lambda *_, **__: batches)
        corpus = Corpus(dict.fromkeys(sets, ("a", "b")), "digest", "all")
        zeroed = plan_of(loaded, corpus, chosen, None, ["aa"])
        raised = plan_of(loaded, corpus, chosen, "bb")
    idle = {("mlp_in", layer): lambda values, routed: None for layer in range(layers)}

    def logits():
        with torch.no_grad(), site_hooks(anatomy, idle):
            return loaded.model(input_ids=rows["aa"], use_cache=False).logits

    zeros = torch.zeros(layers, width).double()
    with applied(loaded, zeroed):
        by_plan = logits()
    with LanguageArithmetic(loaded, zeros, zeros, torch.zeros_like(on), off)():
        by_hook = logits()
    torch.testing.assert_close(by_plan, by_hook, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(by_plan, logits(), atol=1e-4)
    assert [edit.notes["edited_experts"] for edit in raised.edits] == [2, 2]
