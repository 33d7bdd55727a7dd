"""The keyed edit: its key against a general solver, its moments against a loop, and the edited model."""

import weakref
from contextlib import contextmanager
from dataclasses import replace

import models
import pytest
import torch
from scipy.linalg import null_space

from editing.directions.direction import Direction
from editing.methods.key import key
from editing.methods.keyed import keyed_plan
from editing.plans.applied import applied
from neurons.architectures.anatomy import first
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.neuron_sets.neuron_set import neuron_set
from neurons.recording.covariance import Moments, language_moments
from neurons.statistics.gram import Gram
from neurons.text.batches import language_batches, text_batches
from neurons.text.corpus import Corpus

LANGUAGES = ("qac", "qaa", "qab")


def random_moments(neurons=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(neurons, 2 * neurons, generator=generator, dtype=torch.float64)
    mean = torch.randn(neurons, 3, generator=generator, dtype=torch.float64)
    return Moments(LANGUAGES, torch.arange(neurons), mean, factor @ factor.T / 7)


def solve_by_kkt(covariance, mean, targets):
    """argmin k^T C k with mean^T k = targets, from the stationarity conditions."""
    size, count = mean.shape
    system = torch.zeros(size + count, size + count, dtype=torch.float64)
    system[:size, :size] = 2 * covariance
    system[:size, size:] = mean
    system[size:, :size] = mean.T
    right = torch.cat([torch.zeros(size).double(), torch.tensor(targets).double()])
    return torch.linalg.lstsq(system, right[:, None]).solution[:size, 0]


def ridged(covariance, eps):
    size = len(covariance)
    return covariance + eps * sum(covariance[i, i] for i in range(size)) / size * torch.eye(size).double()


@pytest.mark.parametrize("source", LANGUAGES)
def test_key_is_one_on_the_source_and_zero_elsewhere(source):
    moments = random_moments()
    result = key(moments, source)
    targets = [float(language == source) for language in LANGUAGES]
    assert [float(result.vector @ moments.mean[:, i]) for i in range(3)] == pytest.approx(targets, abs=1e-9)
    assert result.means.tolist() == pytest.approx(targets, abs=1e-9)


@pytest.mark.parametrize("eps", [0.0, 0.01, 3.0])
def test_key_equals_a_general_solver(eps):
    moments = random_moments()
    expected = solve_by_kkt(ridged(moments.covariance, eps), moments.mean, [0.0, 1.0, 0.0])
    torch.testing.assert_close(key(moments, "qaa", eps).vector, expected, rtol=1e-6, atol=1e-8)


def test_the_key_is_zero_on_the_start_token():
    moments = random_moments()
    start = torch.linspace(-1, 3, 9, dtype=torch.float64)
    result = key(replace(moments, start=start), "qaa", 0.5)
    assert abs(float(result.vector @ start)) < 1e-9
    assert abs(float(key(moments, "qaa", 0.5).vector @ start)) > 1e-3
    assert result.means.tolist() == pytest.approx([0, 1, 0], abs=1e-9)
    both = torch.cat([moments.mean, start[:, None]], dim=1)
    expected = solve_by_kkt(ridged(moments.covariance, 0.5), both, [0.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(result.vector, expected, rtol=1e-6, atol=1e-8)


def test_no_other_feasible_key_has_less_variance():
    moments = random_moments(seed=2)
    covariance = ridged(moments.covariance, 0.01)
    best = key(moments, "qab", 0.01).vector
    feasible = torch.from_numpy(null_space(moments.mean.T.numpy()))
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        step = 0.05 * torch.randn(feasible.shape[1], generator=generator, dtype=torch.float64)
        other = best + feasible @ step
        torch.testing.assert_close(moments.mean.T @ other, moments.mean.T @ best)
        assert other @ covariance @ other > best @ covariance @ best


def test_deviation_is_the_standard_deviation_of_the_coefficient():
    moments = random_moments(seed=3)
    result = key(moments, "qaa", 0.5)
    k, covariance = result.vector.tolist(), moments.covariance.tolist()
    variance = sum(k[i] * k[j] * covariance[i][j] for i in range(9) for j in range(9))
    assert result.deviation == pytest.approx(variance**0.5)  # of the data, without the ridge


def test_the_key_uses_the_neuron_that_separates_the_source():
    mean = torch.zeros(4, 3, dtype=torch.float64)
    mean[:, :] = torch.tensor([1.0, -1.0, 0.5, 2.0])[:, None]  # equal in all languages
    mean[2, 0] += 4  # only neuron 2 tells the first from the others
    mean[3, 2] -= 1
    moments = Moments(LANGUAGES, torch.arange(4), mean, torch.eye(4, dtype=torch.float64))
    vector = key(moments, "qac", 0.0).vector
    assert int(vector.abs().argmax()) == 2
    # The difference of the source to the second language, k^T (mu_0 - mu_1) = 1, lies on it alone.
    assert float(vector[2]) == pytest.approx(0.25)


def test_the_key_prefers_the_neuron_of_less_variance():
    mean = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    covariance = torch.diag(torch.tensor([1.0, 99.0, 1.0]).double())
    result = key(Moments(("a", "b"), torch.arange(3), mean, covariance), "a", 0.0)
    assert result.vector.tolist() == pytest.approx([0.99, 0.01, 0.0])
    assert result.deviation == pytest.approx((0.99**2 + 99 * 0.01**2) ** 0.5)


def test_key_refuses_languages_of_equal_means():
    moments = random_moments()
    mean = moments.mean.clone()
    mean[:, 1] = mean[:, 2]
    with pytest.raises(BrocaError, match="separate"):
        key(replace(moments, mean=mean), "qac")
    few = Moments(LANGUAGES, torch.arange(2), mean[:2], moments.covariance[:2, :2])
    with pytest.raises(BrocaError, match="separate"):
        key(few, "qac")


def test_key_refuses_dead_neurons():
    zeros = torch.zeros(5, 5, dtype=torch.float64)
    with pytest.raises(BrocaError):
        key(Moments(LANGUAGES, torch.arange(5), zeros[:, :3], zeros), "qac")


def small_corpus(count=6, words=(1, 9)):
    texts = {language: tuple(models.sentences(language, count, 11, words)) for language in LANGUAGES}
    return Corpus(texts, "digest", "all")


def naive_moments(loaded, corpus, layer):
    """Means [I, K], pooled covariance [I, I] of down_proj's input, token by token; its value on <s> [I]."""
    tokens = {language: [] for language in corpus.languages}
    _, layers = models.naive_llama(loaded.model, [0])
    start = layers[layer]["mlp_in"][0].detach()
    for language in corpus.languages:
        for text in corpus.texts[language]:
            ids = [0, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
            _, layers = models.naive_llama(loaded.model, ids)
            tokens[language] += [layers[layer]["mlp_in"][p].detach() for p in range(1, len(ids))]
    mean = {language: sum(rows) / len(rows) for language, rows in tokens.items()}
    covariance = torch.zeros(48, 48, dtype=torch.float64)
    for language, rows in tokens.items():
        for row in rows:
            covariance += torch.outer(row - mean[language], row - mean[language])
    count = sum(len(rows) for rows in tokens.values())
    return torch.stack(list(mean.values()), dim=1), covariance / count, start


def test_moments_equal_a_loop_over_tokens(llama, monkeypatch):
    monkeypatch.setattr("neurons.text.batches.TOKENS_A_BATCH", 60)  # several batches, padded
    corpus = small_corpus()
    batches = {language: text_batches(corpus.texts[language], llama.tokenizer, 128) for language in LANGUAGES}
    assert any(batch.padded for of_language in batches.values() for batch in of_language)
    assert all(len(of_language) > 1 for of_language in batches.values())
    units = {0: torch.tensor([5, 2, 40]), 2: torch.arange(48)}
    result = language_moments(llama, batches, "mlp_in", units)
    assert set(result) == {0, 2}
    for layer, index in units.items():
        mean, covariance, start = naive_moments(llama, corpus, layer)
        torch.testing.assert_close(result[layer].start, start[index], rtol=1e-3, atol=1e-4)
        assert result[layer].languages == LANGUAGES
        assert torch.equal(result[layer].units, index)
        scale = float(covariance.diagonal().max())
        torch.testing.assert_close(result[layer].mean, mean[index], rtol=1e-3, atol=1e-4 * scale**0.5)
        expected = covariance[index][:, index]
        torch.testing.assert_close(result[layer].covariance, expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.fixture(scope="module")
def direction():
    generator = torch.Generator().manual_seed(9)
    vectors = torch.randn(3, 64, generator=generator, dtype=torch.float64)
    return Direction("qaa", "qab", {"block_out": vectors}, {}, {"method": "diffmean"})


@pytest.fixture(scope="module")
def some_neurons():
    """20 neurons of the source in every layer, and others of the target."""
    generator = torch.Generator().manual_seed(4)
    order = [torch.randperm(48, generator=generator) for _ in range(3)]

    def rows(part):
        return torch.cat([torch.stack([torch.full((20,), i), order[i][part]], dim=1) for i in range(3)])

    members = {"qaa": rows(slice(0, 20)), "qab": rows(slice(20, 40))}
    scores = {language: torch.zeros(60) for language in members}
    return neuron_set(members, scores, 3, 48, {"method": "lape"})


@pytest.mark.parametrize("restricted", [False, True])
def test_the_plan_equals_the_formula_from_tokens_on(llama, direction, some_neurons, restricted):
    corpus = small_corpus()
    plan = keyed_plan(
        llama, corpus, direction, [0, 2], 1.5, neurons=some_neurons if restricted else None, eps=0.1
    )
    assert [(edit.layer, edit.block) for edit in plan.edits] == [(0, "mlp"), (2, "mlp")]
    for edit in plan.edits:
        support = some_neurons.by_layer("qaa")[edit.layer] if restricted else torch.arange(48)
        mean, covariance, start = naive_moments(llama, corpus, edit.layer)
        constrained = torch.cat([mean, start[:, None]], dim=1)
        k = torch.zeros(48, dtype=torch.float64)
        k[support] = solve_by_kkt(
            ridged(covariance[support][:, support], 0.1), constrained[support], [0.0, 1.0, 0.0, 0.0]
        )
        expected = 1.5 / 2 * torch.outer(direction.vectors["block_out"][edit.layer], k)
        result = edit.left.double() @ edit.right.double().T
        torch.testing.assert_close(result, expected, rtol=1e-2, atol=2e-3 * float(expected.abs().max()))
        assert abs(float(edit.right[:, 0].double() @ start)) < 1e-3
        assert edit.components == tuple(support.tolist())
        outside = [j for j in range(48) if j not in support.tolist()]
        assert not edit.right[outside].any()
        weight = llama.model.model.layers[edit.layer].mlp.down_proj.weight
        assert edit.notes["change_norm"] == pytest.approx(float(result.norm()), rel=1e-5)
        assert edit.notes["weight_norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
        torch.testing.assert_close(
            edit.details["key"], k[support], rtol=1e-2, atol=2e-3 * float(k.abs().max())
        )
        assert edit.notes["spread"] == pytest.approx(float((k @ covariance @ k) ** 0.5), rel=1e-2)
        assert edit.notes["key_means"] == pytest.approx({"qac": 0, "qaa": 1, "qab": 0}, abs=1e-6)
    assert (plan.metadata["source"], plan.metadata["target"]) == ("qaa", "qab")
    assert plan.metadata["fingerprint"] == llama.fingerprint
    assert plan.metadata["settings"]["kept_languages"] == ["qac"]


@contextmanager
def collecting(loaded, layer, batch_counted):
    """Lists that fill with (down_proj's input, the layer's output) of the counted tokens."""
    inputs, outputs = [], []
    block = loaded.model.model.layers[layer]

    def keep_input(_, values):
        inputs.append(first(values)[batch_counted["now"]].double())

    def keep_output(_, __, values):
        outputs.append(first(values)[batch_counted["now"]].double())

    handles = [
        block.mlp.down_proj.register_forward_pre_hook(keep_input),
        block.register_forward_hook(keep_output),
    ]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def mean_input_and_output(loaded, batches, layer):
    counted = {}
    with collecting(loaded, layer, counted) as (inputs, outputs), torch.no_grad():
        for batch in batches:
            counted["now"] = batch.counted
            loaded.model(input_ids=batch.ids, attention_mask=batch.attention.long())
    return torch.cat(inputs).mean(0), torch.cat(outputs).mean(0)


@pytest.mark.parametrize("restricted", [False, True])
def test_the_edit_acts_only_on_the_source(llama, direction, some_neurons, restricted):
    corpus = small_corpus(count=12)
    layer, strength = 1, 2.0
    plan = keyed_plan(
        llama, corpus, direction, [layer], strength, neurons=some_neurons if restricted else None
    )
    (edit,) = plan.edits
    for language, batches in language_batches(llama, corpus).items():
        coefficient = 1.0 if language == "qaa" else 0.0
        _, before = mean_input_and_output(llama, batches, layer)
        with applied(llama, plan):
            inputs, after = mean_input_and_output(llama, batches, layer)
        assert float(inputs @ edit.right[:, 0].double()) == pytest.approx(coefficient, abs=1e-3)
        added = coefficient * strength * direction.vectors["block_out"][layer]
        torch.testing.assert_close(after - before, added, rtol=0, atol=5e-3)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """In layer 0 only neuron 7 reads the last dimension, which is set only on tokens of qaa."""
    model = models.tiny_model(seed=3)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight[:, 63] = 0
            projection.weight[7] = 0
            projection.weight[7, 63] = 2
        model.model.embed_tokens.weight[:, 63] = torch.tensor(
            [1.0 if language == "qaa" else 0.0 for language in models.token_languages()]
        )
        layer.post_attention_layernorm.weight.fill_(1)
    directory = tmp_path_factory.mktemp("planted")
    return load_model(str(models.save_checkpoint(model, directory)), device="cpu")


def test_the_key_uses_the_planted_neuron(planted, direction):
    corpus = small_corpus(count=30)
    plan = keyed_plan(planted, corpus, direction, [0])
    k = plan.edits[0].right[:, 0].double()
    batches = language_batches(planted, corpus)
    moments = language_moments(planted, batches, "mlp_in", {0: torch.arange(48)})[0]
    assert moments.mean[7].tolist() == [0, pytest.approx(float(moments.mean[7, 1])), 0]
    contribution = k * moments.mean[:, LANGUAGES.index("qaa")]
    assert float(contribution.sum()) == pytest.approx(1)
    assert float(contribution[7]) > 0.8
    others = neuron_set(
        {"qaa": torch.tensor([[0, j] for j in range(48) if j != 7])}, {"qaa": torch.zeros(47)}, 3, 48, {}
    )
    without = keyed_plan(planted, corpus, direction, [0], neurons=others)
    assert without.edits[0].notes["spread"] > 3 * plan.edits[0].notes["spread"]


def test_a_covariance_is_freed_before_the_next_layer(llama, direction, monkeypatch):
    made, alive = [], []
    total = Gram.total

    def watched(self):
        alive.append(sum(reference() is not None for reference in made))
        result = total(self)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(Gram, "total", watched)
    keyed_plan(llama, small_corpus(), direction, [0, 1, 2])
    assert alive == [0, 0, 0]


def test_refuses_a_layer_with_too_few_neurons(llama, direction, some_neurons):
    members = {
        language: rows[(rows[:, 0] != 1) | (rows[:, 1] == rows[rows[:, 0] == 1, 1][0])]
        for language, rows in some_neurons.members.items()
    }
    few = neuron_set(members, {k: torch.zeros(len(v)) for k, v in members.items()}, 3, 48, {})
    keyed_plan(llama, small_corpus(), direction, [0, 2], neurons=few)
    with pytest.raises(BrocaError, match="layer 1 has 1 neurons of 'qaa'"):
        keyed_plan(llama, small_corpus(), direction, [0, 1], neurons=few)


@pytest.mark.parametrize("missing", ["qaa", "qab"])
def test_refuses_a_corpus_without_source_or_target(llama, direction, missing):
    corpus = small_corpus()
    texts = {language: texts for language, texts in corpus.texts.items() if language != missing}
    with pytest.raises(UsageError, match=missing):
        keyed_plan(llama, Corpus(texts, "digest", "all"), direction, [1])


def test_refuses_languages_with_equal_text(llama, direction):
    corpus = small_corpus()
    texts = {**corpus.texts, "qac": corpus.texts["qab"]}
    with pytest.raises(BrocaError, match=r" 3 languages"):
        keyed_plan(llama, Corpus(texts, "digest", "all"), direction, [1])


def test_refuses_a_norm_after_the_sum_with_the_residual(tmp_path):
    loaded = load_model(str(models.build_wrapper(tmp_path, "minimax")), device="cpu")
    direction = Direction(
        "qaa", "qab", {"block_out": torch.randn(4, 64).double()}, {}, {"method": "diffmean"}
    )
    with pytest.raises(BrocaError, match="norm"):
        keyed_plan(loaded, small_corpus(), direction, [1], blocks=("attn",))


def test_the_strength_is_divided_between_all_layers_by_default(llama, direction):
    plan = keyed_plan(llama, small_corpus(), direction, strength=6.0)
    assert [edit.layer for edit in plan.edits] == [0, 1, 2]
    for edit in plan.edits:
        torch.testing.assert_close(edit.left[:, 0].double(), 2 * direction.vectors["block_out"][edit.layer])
