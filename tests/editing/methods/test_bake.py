"""Baked vectors: key against a general solver, moments against loops, edited model against a hook."""

import math
from dataclasses import replace
from functools import partial

import models
import pytest
import torch

from editing.hooks.residual import residual_steering
from editing.methods.bake import (
    bake_plan,
    constant_key,
    constant_keys,
    fourth_moments,
    ledoit_wolf_eps,
    total_moments,
)
from editing.plans.applied import applied
from editing.plans.plan import load_plan
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.recording.covariance import Moments, language_moments
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus

LANGUAGES = ("qac", "qaa", "qab")
TOKENS = torch.tensor([10, 30, 60])


def random_moments(units=9, seed=0, start=True):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    factor = draw(units, 2 * units)
    start_mean = draw(units) if start else None
    return Moments(LANGUAGES, torch.arange(units), draw(units, 3) + 1, factor @ factor.T / 7, start_mean)


def naive_total(moments):
    """Mean and covariance over all tokens, entry by entry, by the law of total covariance."""
    weights = [n / sum(TOKENS.tolist()) for n in TOKENS.tolist()]
    size, means = len(moments.mean), moments.mean.tolist()
    mean = [sum(weights[k] * means[i][k] for k in range(3)) for i in range(size)]
    covariance = [
        [
            float(moments.covariance[i, j])
            + sum(weights[k] * (means[i][k] - mean[i]) * (means[j][k] - mean[j]) for k in range(3))
            for j in range(size)
        ]
        for i in range(size)
    ]
    return torch.tensor(mean).double(), torch.tensor(covariance, dtype=torch.float64)


def solve_by_kkt(covariance, constraints):
    """argmin k^T S k with k^T m = 1 for every column, from the stationarity conditions."""
    size, count = constraints.shape
    system = torch.zeros(size + count, size + count, dtype=torch.float64)
    system[:size, :size] = 2 * covariance
    system[:size, size:] = constraints
    system[size:, :size] = constraints.T
    right = torch.cat([torch.zeros(size), torch.ones(count)]).double()
    return torch.linalg.solve(system, right)[:size]


def test_total_moments_equal_a_loop():
    moments = random_moments()
    for result, expected in zip(total_moments(moments, TOKENS), naive_total(moments), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("eps", [0.0, 0.01, 3.0])
def test_key_equals_a_general_solver(eps, held):
    moments = random_moments()
    mean, covariance = total_moments(moments, TOKENS)
    ridge = eps * sum(float(covariance[i, i]) for i in range(9)) / 9
    constraints = torch.stack([mean, moments.start], 1) if held else mean[:, None]
    expected = solve_by_kkt(covariance + ridge * torch.eye(9).double(), constraints)
    result = constant_key(moments, TOKENS, eps, constrain_start=held)
    torch.testing.assert_close(result.vector, expected, rtol=1e-6, atol=1e-8)
    assert float(result.vector @ mean) == pytest.approx(1)
    assert result.start == pytest.approx(float(moments.start @ result.vector))
    assert (abs(result.start - 1) < 1e-9) == held
    assert result.means.tolist() == pytest.approx([float(result.vector @ m) for m in moments.mean.T])
    variance = sum(result.vector[i] * result.vector[j] * covariance[i, j] for i in range(9) for j in range(9))
    assert result.deviation == pytest.approx(math.sqrt(variance))  # of the data, without the ridge
    assert result.eps == eps


def test_minimum_variance_without_a_start_token_is_the_closed_form():
    moments = random_moments(start=False)
    mean, covariance = total_moments(moments, TOKENS)
    expected = 1 / math.sqrt(float(mean @ torch.linalg.inv(covariance) @ mean))
    assert constant_key(moments, TOKENS, 0.0).deviation == pytest.approx(expected)
    ridged = constant_key(moments, TOKENS, 1.0)
    assert ridged.min_deviation == pytest.approx(expected)
    assert ridged.deviation > expected * 1.001
    assert ridged.start is None


def test_no_other_feasible_key_has_less_variance():
    moments = random_moments(seed=3)
    mean, covariance = total_moments(moments, TOKENS)
    best = constant_key(moments, TOKENS, 0.0)
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.stack([mean, moments.start], 1), mode="complete").Q[:, 2:]
    for _ in range(20):
        other = best.vector + 0.05 * basis @ torch.randn(7, generator=generator).double()
        assert float(other @ mean) == pytest.approx(1)
        assert math.sqrt(float(other @ covariance @ other)) > best.deviation


def test_the_key_uses_the_constant_input():
    mean = torch.ones(4, 3, dtype=torch.float64)
    covariance = torch.diag(torch.tensor([4.0, 1e-4, 4.0, 4.0]).double())
    result = constant_key(Moments(LANGUAGES, torch.arange(4), mean, covariance), TOKENS, 0.0)
    assert float(result.vector[1]) > 0.99
    assert result.deviation < 0.0101


def test_the_key_allows_dead_neurons():
    moments = random_moments()
    dead = torch.tensor([2, 5])
    for values in (moments.mean, moments.covariance, moments.covariance.T):
        values[dead] = 0
    moments.start[dead] = 0
    result = constant_key(moments, TOKENS, 0.0)
    assert result.vector[dead].tolist() == [0, 0]
    assert math.isfinite(result.min_deviation)


def test_a_key_that_only_its_ridge_makes_solvable():
    # Sums in float32 can leave a covariance with an eigenvalue below 0.
    moments = random_moments(start=False)
    covariance = torch.eye(9, dtype=torch.float64)
    covariance[0, 0] = -1e-3
    moments = replace(moments, mean=moments.mean[:, :1], languages=("qaa",), covariance=covariance)
    key = constant_key(moments, torch.tensor([5]), 1e-2)
    assert key.min_deviation == key.deviation
    assert float(moments.mean[:, 0] @ key.vector) == pytest.approx(1)
    with pytest.raises(BrocaError, match="no coefficient"):
        constant_key(moments, torch.tensor([5]), 0.0)


def test_refuses_inputs_without_a_constant_key():
    moments = random_moments()
    all_zero = replace(moments, mean=torch.zeros(9, 3).double(), start=None)
    with pytest.raises(BrocaError, match="no coefficient"):
        constant_key(all_zero, TOKENS)
    mean, _ = total_moments(moments, TOKENS)
    with pytest.raises(BrocaError, match="start token"):
        constant_key(replace(moments, start=2 * mean), TOKENS)
    with pytest.raises(UsageError, match="eps"):
        constant_key(moments, TOKENS, -0.1)


def test_ledoit_wolf_equals_scikit_learn():
    from sklearn.covariance import ledoit_wolf

    generator = torch.Generator().manual_seed(2)
    rows = (
        torch.randn(40, 12, generator=generator).double() @ torch.randn(12, 12, generator=generator).double()
    )
    apart = rows - rows.mean(0)
    covariance = apart.T @ apart / 40
    fourth = sum(sum(x * x for x in row) ** 2 for row in apart.tolist()) / 40
    shrunk, rho = ledoit_wolf(rows.numpy())
    eps = ledoit_wolf_eps(covariance, fourth, 40)
    assert 0.01 < rho < 0.9
    assert eps == pytest.approx(rho / (1 - rho))
    ridged = covariance + eps * covariance.diagonal().mean() * torch.eye(12).double()
    torch.testing.assert_close((1 - rho) * ridged, torch.from_numpy(shrunk))


def test_ledoit_wolf_refuses_too_little_text():
    with pytest.raises(BrocaError, match="3 tokens are too few"):
        ledoit_wolf_eps(torch.diag(torch.tensor([1.0, 1.1]).double()), 50.0, 3)


def small_corpus(count=8):
    texts = {k: tuple(models.sentences(k, count, 11, (1, 9))) for k in LANGUAGES}
    return Corpus(texts, "digest", "all")


def naive_inputs(loaded, corpus, layer, site):
    """The inputs [T, n] of all counted tokens, and of the start token [n]."""
    rows = []
    for language in corpus.languages:
        for text in corpus.texts[language]:
            ids = [0, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
            _, layers = models.naive_llama(loaded.model, ids)
            rows += layers[layer][site].detach()[1:]
    _, layers = models.naive_llama(loaded.model, [0])
    return torch.stack(rows), layers[layer][site][0].detach()


@pytest.mark.parametrize("block", ["mlp", "attn"])
def test_the_plan_equals_the_formula_from_tokens_on(llama, block):
    corpus = small_corpus()
    generator = torch.Generator().manual_seed(5)
    vectors = {layer: torch.randn(64, generator=generator).double() for layer in (2, 0)}
    plan = bake_plan(llama, corpus, vectors, -1.5, eps=0.1, block=block)
    assert [(edit.layer, edit.block) for edit in plan.edits] == [(0, block), (2, block)]
    for edit in plan.edits:
        rows, start = naive_inputs(llama, corpus, edit.layer, f"{block}_in")
        mean = rows.mean(0)
        covariance = (rows - mean).T @ (rows - mean) / len(rows)
        size = len(mean)
        ridged = covariance + 0.1 * covariance.diagonal().mean() * torch.eye(size).double()
        key = solve_by_kkt(ridged, torch.stack([mean, start], 1))
        expected = -1.5 * torch.outer(vectors[edit.layer], key)
        result = edit.left.double() @ edit.right.double().T
        torch.testing.assert_close(result, expected, rtol=1e-2, atol=2e-3 * float(expected.abs().max()))
        coefficients = rows @ edit.right[:, 0].double()
        assert float(coefficients.mean()) == pytest.approx(1, abs=1e-4)
        assert edit.notes["spread"] == pytest.approx(float(coefficients.std(correction=0)), rel=1e-3)
        assert edit.notes["start_coefficient"] == pytest.approx(1, abs=1e-6)
        assert edit.notes["change_norm"] == pytest.approx(float(result.norm()), rel=1e-5)
        weight = llama.anatomy.parts(edit.layer, block)[0].weight
        assert edit.notes["weight_norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
        assert edit.components == tuple(range(2 if block == "attn" else 48))
    assert plan.metadata["method"] == "bake"
    assert plan.metadata["fingerprint"] == llama.fingerprint


def test_fourth_moments_equal_a_loop(llama):
    corpus = small_corpus(3)
    batches = [batch for of_language in language_batches(llama, corpus).values() for batch in of_language]
    rows, _ = naive_inputs(llama, corpus, 1, "mlp_in")
    result = fourth_moments(llama, batches, "mlp_in", {1: rows.mean(0)})
    apart = rows - rows.mean(0)
    expected = sum(sum(x * x for x in row) ** 2 for row in apart.tolist()) / len(rows)
    assert result == {1: pytest.approx(expected, rel=1e-3)}


def test_shrinkage_in_the_dense_layer_of_a_mixture(tmp_path):
    loaded, corpus = (
        load_model(str(models.build_wrapper(tmp_path, "deepseek_v3")), device="cpu"),
        small_corpus(60),
    )
    (key,) = constant_keys(loaded, corpus, [0], shrinkage=True).values()
    rows = []
    down = loaded.model.model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][0, 1:].double()))
    for language in corpus.languages:
        for text in corpus.texts[language]:
            with torch.no_grad():
                loaded.model(torch.tensor([loaded.tokenizer(text)["input_ids"]]))
    handle.remove()
    rows = torch.cat(rows)
    deviations = rows - rows.mean(0)
    fourth = float(deviations.square().sum(1).square().mean())
    covariance = deviations.T @ deviations / len(rows)
    assert key.eps == pytest.approx(ledoit_wolf_eps(covariance, fourth, len(rows)), rel=1e-3)


def test_shrinkage_chooses_the_ridge(llama):
    corpus = small_corpus()
    vectors = {1: torch.ones(64)}
    (edit,) = bake_plan(llama, corpus, vectors, shrinkage=True).edits
    rows, _ = naive_inputs(llama, corpus, 1, "mlp_in")
    from sklearn.covariance import ledoit_wolf_shrinkage

    rho = ledoit_wolf_shrinkage(rows.numpy())
    assert edit.notes["eps"] == pytest.approx(rho / (1 - rho), rel=1e-2)
    (again,) = bake_plan(llama, corpus, vectors, eps=edit.notes["eps"]).edits
    torch.testing.assert_close(again.right, edit.right)


def outputs(loaded, ids, layer):
    """The output of a layer [t, d], and the logits [t, vocabulary]."""
    with torch.no_grad():
        out = loaded.model(torch.tensor([ids]), output_hidden_states=True)
    return out.hidden_states[layer + 1][0].double(), out.logits[0].double()


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """In layer 1 neuron 7 computes the same number on every token, so a constant is exactly a rank-1 edit."""
    model = models.tiny_model(seed=4)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 63] = 6
        layers = model.model.layers
        # The norm divides by the length of a token, so all tokens have equal inputs.
        for layer in layers[:2]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        rows = model.model.embed_tokens.weight[:, :63]
        rows /= rows.norm(dim=1, keepdim=True)
        layers[1].post_attention_layernorm.weight.fill_(1)
        for projection in (layers[1].mlp.gate_proj, layers[1].mlp.up_proj):
            projection.weight[7] = 0
            projection.weight[7, 63] = 0.3
    return load_model(str(models.save_checkpoint(model, tmp_path_factory.mktemp("steady"))), device="cpu")


def test_with_a_constant_neuron_the_edit_is_exact(steady):
    vector = torch.linspace(-1, 2, 64).double()
    plan = bake_plan(steady, small_corpus(), {1: vector}, 0.7, eps=1e-6)
    (edit,) = plan.edits
    assert edit.notes["spread"] < 1e-3
    ids = [0, 40, 90, 17, 200]
    with residual_steering(steady, vector, 1, 0.7):
        _, expected = outputs(steady, ids, 1)
    _, unsteered = outputs(steady, ids, 1)
    with applied(steady, plan):
        _, result = outputs(steady, ids, 1)
    assert float((expected - unsteered).abs().max()) > 0.5
    torch.testing.assert_close(result, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("block", ["mlp", "attn"])
def test_a_multiplier_after_the_module_is_divided_out(tmp_path, block):
    multipliers = {"attention_out_multiplier": 0.5, "mlp_multipliers": [0.7, 0.25]}
    loaded = load_model(str(models.build_wrapper(tmp_path, "falcon_h1", **multipliers)), device="cpu")
    vector = torch.linspace(-1, 1, 64).double()
    (edit,) = bake_plan(loaded, small_corpus(), {1: vector}, 0.7, block=block).edits
    torch.testing.assert_close(edit.left[:, 0].double(), 0.7 * vector / (0.5 if block == "attn" else 0.25))


def test_the_mean_shift_and_the_start_token_are_the_hooks(llama):
    corpus = small_corpus()
    vector = torch.linspace(-1, 1, 64).double()
    plan = bake_plan(llama, corpus, {1: vector})
    free = bake_plan(llama, corpus, {1: vector}, constrain_start=False)
    shifts = {"held": [], "free": []}
    starts = {}
    for language in LANGUAGES:
        for text in corpus.texts[language]:
            ids = [0, *llama.tokenizer(text, add_special_tokens=False)["input_ids"]]
            before, _ = outputs(llama, ids, 1)
            for name, edited in (("held", plan), ("free", free)):
                with applied(llama, edited):
                    after, _ = outputs(llama, ids, 1)
                shifts[name].append((after - before)[1:])
                starts[name] = (after - before)[0]
    for name in shifts:
        torch.testing.assert_close(torch.cat(shifts[name]).mean(0), vector, rtol=0, atol=1e-3)
    torch.testing.assert_close(starts["held"], vector, rtol=0, atol=1e-3)
    assert float((starts["free"] - vector).norm()) > 0.01


def test_only_the_languages_of_the_corpus_count(llama):
    corpus = Corpus({"qaa": small_corpus().texts["qaa"]}, "digest", "all")
    (edit,) = bake_plan(llama, corpus, {0: torch.ones(64)}).edits
    assert edit.notes["key_means"] == {"qaa": pytest.approx(1)}
    batches = language_batches(llama, corpus)
    moments = language_moments(llama, batches, "mlp_in", {0: torch.arange(48)})[0]
    expected = constant_key(moments, torch.tensor([sum(int(b.counted.sum()) for b in batches["qaa"])]))
    torch.testing.assert_close(edit.right[:, 0].double(), expected.vector, rtol=1e-5, atol=1e-6)


def test_a_plan_survives_saving_and_loading(llama, tmp_path):
    provenance = {"source": "qaa", "target": "qab", "languages": ["qaa", "qab"]}
    plan = bake_plan(llama, small_corpus(), {1: torch.ones(64)}, provenance=provenance)
    plan.save(tmp_path / "plan.safetensors")
    again = load_plan(tmp_path / "plan.safetensors")
    assert torch.equal(again.edits[0].right, plan.edits[0].right)
    assert again.metadata["target"] == "qab"
    assert again.edits[0].notes == plan.edits[0].notes


@pytest.mark.parametrize(
    ("vectors", "options", "match"),
    [
        ({}, {}, "at least one layer"),
        ({3: torch.ones(64)}, {}, "layer 3"),
        ({0: torch.ones(63)}, {}, r"shape \[63\].* 64 dimensions"),
        ({0: torch.zeros(64)}, {}, "zero or not finite"),
        ({0: torch.full((64,), math.nan)}, {}, "zero or not finite"),
        ({0: torch.ones(64)}, {"strength": 0.0}, "strength 0"),
        ({0: torch.ones(64)}, {"strength": math.inf}, "strength inf"),
        ({0: torch.ones(64)}, {"block": "gate"}, "gate"),
        ({0: torch.ones(64)}, {"eps": -1.0}, "eps"),
    ],
)
def test_refuses_bad_input(llama, vectors, options, match):
    with pytest.raises(UsageError, match=match):
        bake_plan(llama, small_corpus(2), vectors, **options)


def test_refuses_a_norm_between_the_module_and_the_residual(checkpoint_of):
    loaded = load_model(str(checkpoint_of("gemma2")), device="cpu")
    with pytest.raises(BrocaError, match=r"norm .* --method keyed"):
        bake_plan(loaded, small_corpus(2), {0: torch.ones(64)})


def test_a_mixture_is_only_baked_in_attention(checkpoint_of):
    loaded = load_model(str(checkpoint_of("qwen3_moe")), device="cpu")
    with pytest.raises(BrocaError, match="--blocks attn"):
        bake_plan(loaded, small_corpus(2), {0: torch.ones(64)})
    (edit,) = bake_plan(loaded, small_corpus(2), {0: torch.ones(64)}, block="attn").edits
    assert edit.right.shape == (96, 1)
