"""Options of the keyed edit, tested on the edited model."""

import models
import pytest
import torch

from editing.directions.direction import Direction
from editing.methods.key import key_problem
from editing.methods.keyed import keyed_plan
from editing.methods.sparse_key import sparse_key
from editing.plans.applied import applied
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.neuron_sets.neuron_set import neuron_set
from neurons.recording.covariance import each_moments, language_moments
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus

LANGUAGES = ("qac", "qaa", "qab")


@pytest.fixture(scope="module")
def corpus():
    texts = {language: tuple(models.sentences(language, 6, 11, (1, 9))) for language in LANGUAGES}
    return Corpus(texts, "digest", "all")


@pytest.fixture(scope="module")
def direction():
    vectors = torch.randn(3, 64, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return Direction("qaa", "qab", {"block_out": vectors}, {}, {"method": "diffmean"})


NAMES = {"mlp": ("mlp", "down_proj"), "attn": ("self_attn", "o_proj")}


def output_module(loaded, layer, block):
    part, name = NAMES[block]
    return getattr(getattr(loaded.model.model.layers[layer], part), name)


def inputs_by_language(loaded, corpus, layer, block):
    """language -> [T, n], inputs of the output module on every token but the first of each text."""
    kept = []
    handle = output_module(loaded, layer, block).register_forward_pre_hook(
        lambda _, inputs: kept.append(inputs[0][0, 1:].double())
    )
    result = {}
    try:
        for language in corpus.languages:
            for text in corpus.texts[language]:
                ids = [0, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
                with torch.no_grad():
                    loaded.model(input_ids=torch.tensor([ids]))
            result[language] = torch.cat(kept)
            kept.clear()
    finally:
        handle.remove()
    return result


def key_means(loaded, corpus, edit):
    """Mean of k^T h on every language, from the tokens."""
    result = inputs_by_language(loaded, corpus, edit.layer, edit.block)
    return {language: float((rows @ edit.right[:, 0].double()).mean()) for language, rows in result.items()}


@pytest.mark.parametrize("block", ["mlp", "attn"])
def test_several_sources_and_a_block(llama, corpus, direction, block):
    plan = keyed_plan(llama, corpus, direction, [1], 2.0, sources=("qaa", "qac"), blocks=(block,))
    (edit,) = plan.edits
    assert (edit.layer, edit.block) == (1, block)
    assert key_means(llama, corpus, edit) == pytest.approx({"qac": 1, "qaa": 1, "qab": 0}, abs=1e-3)
    torch.testing.assert_close(edit.left[:, 0].double(), 2 * direction.vectors["block_out"][1])
    assert plan.metadata["settings"]["sources"] == ["qaa", "qac"]
    assert plan.metadata["settings"]["kept_languages"] == []


def test_attention_keys_are_noted_per_head(llama, corpus, direction):
    (edit,) = keyed_plan(llama, corpus, direction, [1], 2.0, blocks=("attn",)).edits
    k = edit.right[:, 0].double()
    assert edit.components == (0, 1) and len(k) == 64
    means = {
        language: rows.mean(0) for language, rows in inputs_by_language(llama, corpus, 1, "attn").items()
    }
    for head in range(2):
        channels = range(32 * head, 32 * head + 32)
        assert float(edit.details["key"][head]) == pytest.approx(
            sum(float(k[i]) ** 2 for i in channels) ** 0.5
        )
        contribution = sum(float(k[i] * means["qaa"][i]) for i in channels)
        assert float(edit.details["carried"][head]) == pytest.approx(contribution, abs=1e-3)
    weight = output_module(llama, 1, "attn").weight
    assert edit.notes["weight_norm"] == pytest.approx(float(weight.norm()), rel=1e-5)


def test_the_strength_is_divided_between_both_modules(llama, corpus, direction):
    plan = keyed_plan(llama, corpus, direction, [0, 2], 6.0, blocks=("mlp", "attn"))
    assert [(edit.layer, edit.block) for edit in plan.edits] == [
        (0, "attn"), (0, "mlp"), (2, "attn"), (2, "mlp")
    ]  # fmt: skip
    for edit in plan.edits:
        assert edit.notes["value_share"] == 0.25
        torch.testing.assert_close(edit.left[:, 0].double(), 1.5 * direction.vectors["block_out"][edit.layer])
        assert key_means(llama, corpus, edit)["qaa"] == pytest.approx(1, abs=1e-3)
    alone = keyed_plan(llama, corpus, direction, [0, 2], 3.0)
    for a, b in zip(alone.edits, plan.edits[1::2], strict=True):
        assert torch.equal(a.left, b.left)
        torch.testing.assert_close(a.right, b.right)


def test_every_layer_can_have_its_own_strength(llama, corpus, direction):
    plan = keyed_plan(llama, corpus, direction, strength={0: 1.0, 2: 3.0})
    assert plan.metadata["settings"]["strength"] == 4
    assert plan.metadata["settings"]["layers"] == [0, 2]
    for edit, strength in zip(plan.edits, (1.0, 3.0), strict=True):
        expected = strength * direction.vectors["block_out"][edit.layer]
        torch.testing.assert_close(edit.left[:, 0].double(), expected)
        assert edit.notes["value_share"] == strength / 4
    even = keyed_plan(llama, corpus, direction, [0, 2], 4.0)
    same = keyed_plan(llama, corpus, direction, strength={0: 2.0, 2: 2.0})
    for a, b in zip(even.edits, same.edits, strict=True):
        assert torch.equal(a.left, b.left) and torch.equal(a.right, b.right)


def test_soft_and_free_languages(llama, corpus, direction):
    def third(**settings):
        plan = keyed_plan(llama, corpus, direction, [1], **settings)
        means = key_means(llama, corpus, plan.edits[0])
        assert means["qaa"] == pytest.approx(1, abs=1e-3) and means["qab"] == pytest.approx(0, abs=1e-3)
        assert plan.edits[0].notes["key_means"] == pytest.approx(means, abs=1e-3)
        return abs(means["qac"]), plan.edits[0].notes["spread"]

    free, soft = third(keep=[]), third(keep_softly=["qac"], soft_weight=10.0)
    assert free[0] > soft[0] > 1e-3
    assert free[1] < soft[1] < third()[1]
    assert third(keep_softly=["qac"], soft_weight=0.0) == pytest.approx(free)


def test_the_target_may_be_kept_softly(llama, corpus, direction):
    plan = keyed_plan(llama, corpus, direction, [1], keep_softly=["qab"])
    assert plan.metadata["settings"]["kept_languages"] == ["qac"]
    assert plan.metadata["settings"]["softly_kept_languages"] == ["qab"]
    assert abs(plan.edits[0].notes["key_means"]["qab"]) > 1e-3


@pytest.mark.parametrize("block", ["mlp", "attn"])
def test_a_sparse_key_uses_the_fraction(llama, corpus, direction, block):
    plan = keyed_plan(llama, corpus, direction, [1], blocks=(block,), sparse=0.25)
    (edit,) = plan.edits
    k = edit.right[:, 0]
    assert int((k != 0).sum()) == round(0.25 * len(k))
    moments = dict(
        each_moments(llama, language_batches(llama, corpus), {(f"{block}_in", 1): torch.arange(len(k))})
    )[f"{block}_in", 1]
    expected, l1 = sparse_key(key_problem(moments, "qaa"), 0.25)
    torch.testing.assert_close(k.double(), expected, rtol=1e-5, atol=1e-6)
    assert edit.notes["l1"] == pytest.approx(l1)
    if block == "mlp":
        assert edit.components == tuple(expected.nonzero()[:, 0].tolist())
    assert key_means(llama, corpus, edit) == pytest.approx({"qac": 0, "qaa": 1, "qab": 0}, abs=1e-3)


def test_notes_list_the_contributions(llama, corpus, direction):
    (edit,) = keyed_plan(llama, corpus, direction, [1]).edits
    source = inputs_by_language(llama, corpus, 1, "mlp")["qaa"].mean(0)
    contributions = [abs(float(edit.right[i, 0]) * float(source[i])) for i in range(48)]
    ordered = sorted(contributions, reverse=True)
    assert edit.notes["carriers"] == next(n for n in range(49) if sum(ordered[:n]) >= 0.9 * sum(ordered))
    assert edit.details["carried"].abs().tolist() == pytest.approx(contributions, abs=1e-3)
    assert float(edit.details["carried"].sum()) == pytest.approx(1)


def test_the_key_may_use_neurons_of_all_sources(llama, corpus, direction):
    rows = {name: torch.tensor([[1, j] for j in range(first, first + 12)]) for name, first in
            (("qaa", 0), ("qac", 6), ("qab", 30))}  # fmt: skip
    neurons = neuron_set(rows, {name: torch.zeros(12) for name in rows}, 3, 48, {"method": "lape"})
    both = keyed_plan(llama, corpus, direction, [1], neurons=neurons, sources=("qaa", "qac"))
    assert both.edits[0].components == tuple(range(18))
    single = keyed_plan(llama, corpus, direction, [1], neurons=neurons, blocks=("attn", "mlp"))
    assert single.edits[1].components == tuple(range(12))
    assert single.edits[0].components == (0, 1)


@pytest.mark.parametrize("blocks", [("mlp",), ("attn", "mlp")])
def test_jointly_solved_keys_hold_on_the_edited_model(llama, corpus, direction, blocks):
    together = keyed_plan(llama, corpus, direction, strength=4.0, blocks=blocks, jointly=True)
    apart = keyed_plan(llama, corpus, direction, strength=4.0, blocks=blocks)
    assert len(together.edits) == 3 * len(blocks)
    expected = {"qac": 0, "qaa": 1, "qab": 0}
    with applied(llama, together):
        for edit in together.edits:
            assert key_means(llama, corpus, edit) == pytest.approx(expected, abs=2e-3)
    torch.testing.assert_close(together.edits[0].right, apart.edits[0].right)
    assert together.metadata["settings"]["jointly"] and not apart.metadata["settings"]["jointly"]
    with applied(llama, apart):
        worst = max(abs(key_means(llama, corpus, edit)["qaa"] - 1) for edit in apart.edits)
    assert worst > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jointly_restores_every_weight(checkpoint_of, corpus, direction, dtype):
    loaded = load_model(str(checkpoint_of(dtype=dtype)), device="cpu")
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    seen = []

    def assert_same():
        for name, tensor in loaded.model.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    def note(_):
        first = output_module(loaded, 0, "mlp").weight
        seen.append(torch.equal(first, before["model.layers.0.mlp.down_proj.weight"]))
        if len(seen) == stop:
            raise KeyboardInterrupt

    stop = 0
    keyed_plan(loaded, corpus, direction, jointly=True, progress=note)
    assert not all(seen) and seen[0]  # edited temporarily
    assert_same()
    stop, passes = len(seen), len(seen)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        keyed_plan(loaded, corpus, direction, jointly=True, progress=note)
    assert len(seen) == passes and not seen[-1]
    assert_same()


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"sources": ["qac"]}, "'qaa'"),
        ({"sources": ["qaa", "qab"]}, "target"),
        ({"sources": ["qaa", "xx"]}, "'xx'"),
        ({"keep": ["xx"]}, "no text of xx"),
        ({"keep_softly": ["qaa"]}, "qaa"),
        ({"blocks": ()}, "blocks"),
        ({"blocks": ("mlp", "mlp")}, "blocks"),
        ({"blocks": ("norm",)}, "blocks"),
        ({"layers": [0, 0]}, "layers"),
        ({"layers": []}, "at least one"),
        ({"layers": [3]}, "no layer 3"),
        ({"layers": [-1]}, "no layer -1"),
        ({"strength": 0}, "strength 0"),
        ({"strength": float("nan")}, "strength"),
        ({"strength": {0: 1.0, 1: -1.0}}, "strength 0"),
        ({"strength": {0: 1.0}, "layers": [1]}, "layers"),
        ({"sparse": 0.0}, "sparse 0.0"),
        ({"sparse": 2.0}, "sparse 2.0"),
        ({"sparse": 0.02}, "fewer than the 4 constraints"),
    ],
)
def test_refuses_by_name(llama, corpus, direction, settings, value):
    with pytest.raises(UsageError, match=value):
        keyed_plan(llama, corpus, direction, **settings)


def test_invalid_settings_are_refused_before_text_is_read(llama, corpus, direction, monkeypatch):
    monkeypatch.setattr("editing.methods.keyed.language_batches", None)
    for settings in ({"keep": ["xx"]}, {"keep_softly": ["qaa"]}, {"sparse": 2.0}, {"eps": -1.0}):
        with pytest.raises(UsageError):
            keyed_plan(llama, corpus, direction, **settings)


def test_moments_of_several_sites_are_those_of_each(llama, corpus):
    batches = language_batches(llama, corpus)
    units = {("attn_in", 0): torch.tensor([3, 60]), ("mlp_in", 2): torch.arange(48)}
    together = dict(each_moments(llama, batches, units))
    for (site, layer), index in units.items():
        alone = language_moments(llama, batches, site, {layer: index})[layer]
        for name in ("units", "mean", "covariance", "start"):
            assert torch.equal(getattr(together[site, layer], name), getattr(alone, name))
    rows = inputs_by_language(llama, corpus, 0, "attn")
    for i, unit in enumerate((3, 60)):
        for k, language in enumerate(LANGUAGES):
            expected = float(rows[language][:, unit].mean())
            assert float(together["attn_in", 0].mean[i, k]) == pytest.approx(expected, abs=1e-4)


def test_moments_that_are_not_finite_are_refused(checkpoint_of, corpus):
    loaded = load_model(str(checkpoint_of()), device="cpu")
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.up_proj.weight[5] = torch.inf
    with pytest.raises(BrocaError, match="mlp_in in layer 1"):
        language_moments(loaded, language_batches(loaded, corpus), "mlp_in", {1: torch.arange(48)})


def test_experts_are_refused(checkpoint_of, corpus, direction):
    mixture = load_model(str(checkpoint_of("mixtral")), device="cpu")
    with pytest.raises(BrocaError, match="experts"):
        keyed_plan(mixture, corpus, direction, [1])


def test_several_passes_give_the_result_of_one(llama, corpus, direction, monkeypatch):
    tokens = []
    once = keyed_plan(llama, corpus, direction, blocks=("mlp", "attn"), progress=tokens.append)
    one_pass = sum(tokens)
    monkeypatch.setattr("neurons.recording.covariance.covariance_room", lambda loaded: 0)  # a layer at a time
    monkeypatch.setattr("neurons.recording.covariance.MAX_PAUSED", 0)
    tokens.clear()
    thrice = keyed_plan(llama, corpus, direction, blocks=("mlp", "attn"), progress=tokens.append)
    assert sum(tokens) == one_pass
    for a, b in zip(once.edits, thrice.edits, strict=True):
        assert torch.equal(a.right, b.right) and a.notes == b.notes
