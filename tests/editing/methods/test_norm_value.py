"""Values through a norm against a general minimiser, and the norm of a tiny Gemma 3."""

from dataclasses import replace

import models
import numpy
import pytest
import torch
from scipy.optimize import minimize

from editing.directions.direction import Direction
from editing.methods.keyed import keyed_plan
from editing.methods.norm_value import rms_norm, value_through_norm
from editing.methods.output_norm import output_norm, source_tokens
from editing.plans.applied import applied
from editing.plans.plan import make_plan
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.recording.text_pass import numbered, read_text
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus

EPS = 1e-5


def random_case(seed=0, tokens=9, width=6, length=0.5):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    outputs = draw(tokens, width) + 2 * draw(width)
    gain = 1 + 0.3 * draw(width)
    value = draw(width)
    return outputs, gain, length * value / value.norm(), 1 + 0.2 * draw(tokens)


def naive_norm(row, gain, eps):
    rms = (sum(x * x for x in row) / len(row) + eps) ** 0.5
    return [g * x / rms for g, x in zip(gain, row, strict=True)]


def objective(delta, outputs, gain, value, coefficients, scatter):
    """|mean e|^2 + scatter * mean |e - mean e|^2, by loops."""
    errors = []
    gain, value = gain.tolist(), value.tolist()
    for row, c in zip(outputs.tolist(), coefficients.tolist(), strict=True):
        before = naive_norm(row, gain, EPS)
        after = naive_norm([y + c * float(x) for y, x in zip(row, delta, strict=True)], gain, EPS)
        errors.append([a - b - v for a, b, v in zip(after, before, value, strict=True)])
    mean = [sum(column) / len(errors) for column in zip(*errors, strict=True)]
    scattered = sum((e - m) ** 2 for row in errors for e, m in zip(row, mean, strict=True)) / len(errors)
    return sum(m * m for m in mean) + scatter * scattered


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", [0.3, 1.0])
@pytest.mark.parametrize("scatter", [0.01, 0.3, 1.0])
def test_equals_a_general_minimiser(seed, length, scatter):
    outputs, gain, value, coefficients = random_case(seed, length=length)
    result = value_through_norm(outputs, gain, EPS, value, coefficients, scatter)
    arguments = (outputs, gain, value, coefficients, scatter)
    best = objective(result.vector.tolist(), *arguments)
    other = minimize(objective, numpy.zeros(6), arguments, method="BFGS", options={"gtol": 1e-9})
    assert best <= other.fun * (1 + 1e-6)
    # With a small scatter the objective is flat around its minimum.
    numpy.testing.assert_allclose(other.x, result.vector.numpy(), atol=0.01 * float(result.vector.norm()))
    assert best < 0.9 * objective([0.0] * 6, *arguments)
    squares = objective(result.vector.tolist(), *arguments[:-1], 1.0)
    assert result.error == pytest.approx((squares / float(value @ value)) ** 0.5)
    change = rms_norm(outputs + coefficients[:, None] * result.vector, gain, EPS) - rms_norm(
        outputs, gain, EPS
    )
    assert result.through == pytest.approx(float(change.mean(0) @ value) / float(value @ value))


def test_without_scatter_a_reachable_value_is_reached():
    outputs, gain, value, coefficients = random_case(5, length=0.3)
    exact = value_through_norm(outputs, gain, EPS, value, coefficients, scatter=0.0)
    change = rms_norm(outputs + coefficients[:, None] * exact.vector, gain, EPS) - rms_norm(
        outputs, gain, EPS
    )
    torch.testing.assert_close(change.mean(0), value, rtol=0, atol=1e-6)
    even = value_through_norm(outputs, gain, EPS, value, coefficients, scatter=1.0)
    assert even.through < exact.through and even.error < exact.error


def test_with_an_almost_linear_norm_the_value_is_reached():
    # eps so large that norm(y) = y / sqrt(eps): delta is v sqrt(eps), exactly.
    outputs, _, value, _ = random_case(1)
    result = value_through_norm(outputs * 1e-3, torch.ones(6).double(), 1e4, value * 1e-3)
    torch.testing.assert_close(result.vector, 100 * value * 1e-3, rtol=1e-4, atol=1e-7)
    assert result.through == pytest.approx(1, abs=1e-4)
    assert result.error < 1e-4


def test_a_value_for_equal_outputs_is_reached():
    # Equal tokens, and v to another point of the sphere: a single delta reaches it.
    y = torch.tensor([[3.0, 0.0, 0.0, 4.0]]).double().repeat(5, 1)
    gain = torch.ones(4).double()
    goal = rms_norm(torch.tensor([0.0, 3.0, 1.0, 4.0]).double(), gain, 0.0)
    result = value_through_norm(y, gain, 0.0, goal - rms_norm(y[0], gain, 0.0))
    change = rms_norm(y + result.vector, gain, 0.0)
    torch.testing.assert_close(change, goal.expand(5, -1), atol=1e-5, rtol=0)
    assert result.through == pytest.approx(1, abs=1e-5)


def test_a_value_beyond_the_bound_of_the_norm_is_reached_in_part():
    outputs, _, value, _ = random_case(2)
    result = value_through_norm(outputs, torch.ones(6).double(), EPS, 100 * value / value.norm())
    # norm(y) is at most sqrt(6) long, so its change at most 2 sqrt(6).
    assert 0 < result.through <= 2 * 6**0.5 / 100
    assert result.error > 0.9


def test_refuses_a_value_of_length_0_and_no_tokens():
    outputs, gain, value, _ = random_case()
    with pytest.raises(BrocaError, match="length 0"):
        value_through_norm(outputs, gain, EPS, value * 0)
    with pytest.raises(BrocaError, match="no tokens"):
        value_through_norm(outputs[:0], gain, EPS, value)
    for scatter in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="scatter"):
            value_through_norm(outputs, gain, EPS, value, scatter=scatter)


LANGUAGES = ("qac", "qaa", "qab")


@pytest.fixture(scope="module")
def corpus():
    texts = {language: tuple(models.sentences(language, 12, 11, (3, 9))) for language in LANGUAGES}
    return Corpus(texts, "digest", "all")


@pytest.fixture(scope="module", params=["gemma3_text", "gemma2", "olmo2"])
def normed(request, checkpoint_of):
    return load_model(str(checkpoint_of(request.param)), device="cpu")


NORMS = {"mlp": "post_feedforward_layernorm", "attn": "post_attention_layernorm"}


def norm_changes(loaded, batches, layer, block, plan):
    """[T, d]: change of the norm's output on every counted token."""
    kept = []
    module = getattr(loaded.model.model.layers[layer], NORMS[block])

    def keep(_, __, output):
        kept.append(output.double())

    handle = module.register_forward_hook(keep)
    result = []
    try:
        for edit in (None, plan):
            with applied(loaded, edit), torch.no_grad():
                for batch in batches:
                    loaded.model(input_ids=batch.ids, attention_mask=batch.attention.long())
            result.append(torch.cat([o[b.counted] for o, b in zip(kept, batches, strict=True)]))
            kept.clear()
    finally:
        handle.remove()
    return result[1] - result[0]


@pytest.mark.parametrize("block", ["mlp", "attn"])
def test_finds_the_norm_after_a_module(normed, corpus, block):
    batch = language_batches(normed, corpus)["qaa"][0]
    for layer in (0, 2):
        result = output_norm(normed, layer, block, batch)
        module = getattr(normed.model.model.layers[layer], NORMS[block])
        rows = torch.randn(5, 64)
        with torch.no_grad():
            torch.testing.assert_close(
                rms_norm(rows.double(), result.gain, result.eps), module(rows).double(), rtol=1e-4, atol=1e-5
            )


def test_source_tokens_are_the_counted_ones(normed, corpus):
    batches = language_batches(normed, corpus)["qaa"]
    result = source_tokens(normed, 1, "mlp", batches, max_tokens=30)
    assert result.inputs.shape == (30, 48) and result.outputs.shape == (30, 64)
    weight = normed.model.model.layers[1].mlp.down_proj.weight.double()
    torch.testing.assert_close(result.outputs, result.inputs @ weight.T, rtol=1e-4, atol=1e-4)
    everything = source_tokens(normed, 1, "mlp", batches)
    assert len(everything.inputs) == sum(int(batch.counted.sum()) for batch in batches)
    # Not only of the shortest rows, which come first.
    places = torch.cdist(result.outputs, everything.outputs).argmin(1)
    assert int(places.min()) < len(everything.outputs) / 4 and int(places.max()) > len(everything.outputs) / 2


@pytest.mark.parametrize("block", ["mlp", "attn"])
def test_the_norms_output_changes_by_the_value_on_the_source(normed, corpus, block):
    generator = torch.Generator().manual_seed(9)
    layer = 1
    batches = language_batches(normed, corpus)
    gain = output_norm(normed, layer, block, batches["qaa"][0]).gain
    # Short relative to the norm's output, whose length is about |g|, so it can be reached.
    vectors = (
        0.05
        * gain.norm()
        * torch.nn.functional.normalize(torch.randn(3, 64, generator=generator, dtype=torch.float64))
    )
    direction = Direction("qaa", "qab", {"block_out": vectors}, {}, {"method": "diffmean"})
    plan = keyed_plan(normed, corpus, direction, [layer], 1.0, blocks=(block,))
    (edit,) = plan.edits
    value = vectors[layer]
    for language, of_language in batches.items():
        change = norm_changes(normed, of_language, layer, block, plan).mean(0)
        along = float(change @ value / (value @ value))
        if language == "qaa":
            assert along == pytest.approx(edit.notes["value_through_norm"], abs=0.01)
            assert along == pytest.approx(1, abs=0.15)
            assert float(torch.cosine_similarity(change, value, dim=0)) > 0.95
        else:
            assert abs(along) < 0.2
    # With v itself as the value the change is not v.
    plain = replace(plan, edits=(replace(edit, left=value[:, None].float()),))
    change = norm_changes(normed, batches["qaa"], layer, block, plain).mean(0)
    assert not 0.8 < float(change @ value / (value @ value)) < 1.2


def of_gemma4(directory, **settings):
    """(model, direction of short vectors) of a model with scalars of its layers."""
    sizes = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 300, **settings}
    loaded = load_model(str(models.build_wrapper(directory, "gemma4_text", **sizes)), device="cpu")
    for layer in loaded.model.model.layers:
        layer.layer_scalar.fill_(0.25)
    vectors = 0.1 * torch.randn(4, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return loaded, Direction("qaa", "qab", {"block_out": vectors}, {}, {"method": "diffmean"})


def test_a_scalar_of_the_layer_after_the_norm_is_divided_out(tmp_path, corpus):
    loaded, direction = of_gemma4(tmp_path, hidden_size_per_layer_input=0)
    layer = 1
    (edit,) = keyed_plan(loaded, corpus, direction, [layer], 1.0).edits
    kept = []
    readers = {("block_out", layer): lambda values, _, at: kept.append(at.rows(values).double().mean(0))}
    (batch,) = language_batches(loaded, corpus)["qaa"]
    for plan in (None, make_plan([edit], {"fingerprint": loaded.fingerprint})):
        with applied(loaded, plan):
            read_text(loaded, numbered({"qaa": [batch]}), readers)
    value = direction.vectors["block_out"][layer]
    along = float((kept[1] - kept[0]) @ value / (value @ value))
    assert along == pytest.approx(edit.notes["value_through_norm"], abs=0.01)
    assert along == pytest.approx(1, abs=0.1)


MIXTURE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize("settings", [{}, {"hidden_size_per_layer_input": 0, **MIXTURE}])
def test_refuses_a_norm_whose_output_is_changed_afterwards(tmp_path, corpus, settings):
    """Gemma 4's inputs of each layer, and its norm of the sum of MLP and experts."""
    loaded, direction = of_gemma4(tmp_path, **settings)
    with pytest.raises(BrocaError, match=r"layer 1, mlp: .*post_feedforward_layernorm.* as it is"):
        keyed_plan(loaded, corpus, direction, [1], 1.0)


def test_refuses_other_norms_and_a_norm_that_cannot_be_identified(normed, llama, corpus):
    batch = language_batches(normed, corpus)["qaa"][0]
    layer = normed.model.model.layers[0]
    norm = layer.post_feedforward_layernorm
    layer.post_feedforward_layernorm = torch.nn.LayerNorm(64)
    try:
        with pytest.raises(BrocaError, match="not an RMSNorm"):
            output_norm(normed, 0, "mlp", batch)
    finally:
        layer.post_feedforward_layernorm = norm
    with pytest.raises(BrocaError, match="identified"):
        output_norm(llama, 0, "mlp", language_batches(llama, corpus)["qaa"][0])


def test_jointly_through_norms(normed, corpus):
    before = {name: tensor.clone() for name, tensor in normed.model.state_dict().items()}
    vectors = 0.02 * torch.randn(3, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    direction = Direction("qaa", "qab", {"block_out": vectors}, {}, {"method": "diffmean"})
    plan = keyed_plan(normed, corpus, direction, blocks=("attn", "mlp"), jointly=True)
    assert len(plan.edits) == 6
    for edit in plan.edits:
        assert edit.notes["value_through_norm"] == pytest.approx(1, abs=0.1)
        assert 0 < edit.notes["value_error"] < 1
    for name, tensor in normed.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    # The last module's norm changes by its fraction, in the model with all the edits below.
    rest = replace(plan, edits=plan.edits[:-1])
    value = vectors[2] * plan.metadata["settings"]["strength"] / 6
    batches = language_batches(normed, corpus)["qaa"]
    with applied(normed, rest):
        change = norm_changes(normed, batches, 2, "mlp", replace(plan, edits=plan.edits[-1:])).mean(0)
    assert float(change @ value / (value @ value)) == pytest.approx(
        plan.edits[-1].notes["value_through_norm"], abs=0.02
    )
