"""Directions of preferences: rows, BiPO's loss and GrAInS's scores against float64 loops, and planted vectors."""

import copy
import json
import math
import random

import models
import numpy
import pytest
import torch

from editing.directions import grains
from editing.directions.bipo import HELD_OUT, Bipo, _Objective, bipo_loss
from editing.directions.estimation import direction_of, direction_of_preferences
from editing.directions.grains import effect, replaced, token_scores
from editing.hooks.residual import residual_steering
from neurons.errors import BrocaError, UsageError
from neurons.files.artifact import artifact_bytes
from neurons.models.source import load_model
from neurons.text.preferences import (
    CHOSEN,
    REJECTED,
    Preference,
    Preferences,
    numbered_together,
    preference_rows,
    read_preferences,
)
from neurons.text.token_rows import TokenRow


def preferences(count=12, seed=0):
    """Prompts of any language, chosen answers of qab, rejected answers of qaa, of different lengths."""
    chooser = random.Random(seed)

    def some(language, longest):
        return " ".join(chooser.choices(models.WORDS[language], k=chooser.randint(1, longest)))

    rows = [
        Preference(some(chooser.choice(models.LANGUAGES), 5), " " + some("qab", 4), " " + some("qaa", 4))
        for _ in range(count)
    ]
    return Preferences(tuple(rows), "digest")


def naive_tokens(tokenizer, preference, kind):
    """(all ids, number of the prompt's) of a plain prompt with its answer."""
    ids = [0, *tokenizer(preference.prompt, add_special_tokens=False)["input_ids"]]
    return ids + tokenizer(getattr(preference, kind), add_special_tokens=False)["input_ids"], len(ids)


def naive_likelihood(model, ids, prompt, add=None):
    """Log-likelihood of an answer, token by token, with a vector added after a layer: (layer, [d])."""
    handle = None
    if add is not None:
        layer, vector = add
        handle = model.model.layers[layer].register_forward_hook(lambda _, __, output: output + vector)
    try:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
    finally:
        if handle is not None:
            handle.remove()
    total = 0.0
    for position in range(prompt, len(ids)):
        row = logits[position - 1].tolist()
        total += row[ids[position]] - math.log(sum(map(math.exp, row)))
    return total


@pytest.fixture(scope="module")
def in_float64(llama):
    return copy.deepcopy(llama.model).double()


def test_rows_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n\n', encoding="utf-8")
    assert read_preferences(path).of == (Preference("a", " b", " c"),)
    for text, reason in (
        ("", "holds no preference"),
        ('{"prompt": "a", "chosen": " b"}', "line 1"),
        ('{"prompt": "a", "chosen": "", "rejected": "c"}', "not empty"),
        ("[1]", "line 1"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=reason):
            read_preferences(path)


def test_rows_without_and_with_a_template(llama, chatting):
    preference = Preference("bead cafe", " him ilk", " dab")
    rows = preference_rows(llama, Preferences((preference,), ""))
    for kind in (CHOSEN, REJECTED):
        ids, prompt = naive_tokens(llama.tokenizer, preference, kind)
        (row,) = rows[kind]
        assert row.ids == ids and list(row.counted) == list(range(prompt - 1, len(ids) - 1))
    (row,) = preference_rows(chatting, Preferences((preference,), ""))[CHOSEN]
    text = chatting.tokenizer.decode(row.ids)
    assert text.endswith("him ilk") and "bead cafe" in text and text != "bead cafe him ilk"
    answer = [row.ids[position + 1] for position in row.counted]
    assert chatting.tokenizer.decode(answer).strip() == "him ilk"
    long = Preference("bead " * 200, " him", " dab")
    with pytest.raises(UsageError, match="preference 1"):
        preference_rows(llama, Preferences((long,), ""))


@pytest.mark.parametrize(("sign", "beta"), [(1, 0.1), (-1, 0.1), (-1, 2.0)])
def test_bipos_loss_equals_the_formula(llama, in_float64, sign, beta):
    given = preferences(7)
    vector = torch.randn(64, generator=torch.Generator().manual_seed(1)) * 0.3
    expected = 0.0
    for preference in given.of:
        ratio = {}
        for kind in (CHOSEN, REJECTED):
            tokens = naive_tokens(llama.tokenizer, preference, kind)
            steered = naive_likelihood(in_float64, *tokens, (1, sign * vector.double()))
            ratio[kind] = steered - naive_likelihood(in_float64, *tokens)
        expected += math.log1p(math.exp(-sign * beta * (ratio[CHOSEN] - ratio[REJECTED])))
    objective = _Objective(llama, preference_rows(llama, given), 1, Bipo(beta=beta))
    with torch.no_grad(), objective.steered([vector]):
        found = sum(float(objective.loss(pairs)) for pairs in objective._made(range(7), sign))
    assert found == pytest.approx(expected, rel=1e-5)


def test_bipos_gradient_equals_that_of_the_formula(llama, in_float64):
    given = preferences(3, seed=4)
    objective = _Objective(llama, preference_rows(llama, given), 1, Bipo())
    vector = torch.zeros(64).requires_grad_(True)
    with objective.steered([vector]):
        for pairs in objective._made(range(3), -1):
            objective.loss(pairs).backward()
    exact = torch.zeros(64, dtype=torch.float64).requires_grad_(True)
    handle = in_float64.model.layers[1].register_forward_hook(lambda _, __, output: output - exact)
    for preference in given.of:
        likelihood = {}
        for kind in (CHOSEN, REJECTED):
            ids, prompt = naive_tokens(llama.tokenizer, preference, kind)
            logits = in_float64(torch.tensor([ids])).logits[0]
            likelihood[kind] = sum(
                logits[at - 1, ids[at]] - logits[at - 1].exp().sum().log() for at in range(prompt, len(ids))
            )
        # At v = 0 the ratios are 0, and the slope of log(1 + exp(.1 r)) is .05.
        (0.05 * (likelihood[CHOSEN] - likelihood[REJECTED])).backward()
    handle.remove()
    torch.testing.assert_close(vector.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_the_loss_of_both_signs_at_zero_is_log_two():
    likelihoods = torch.randn(5, 2, dtype=torch.float64)
    for sign in (1, -1):
        found = bipo_loss(likelihoods, likelihoods, sign, 0.1)
        torch.testing.assert_close(found, torch.full((5,), math.log(2), dtype=torch.float64))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A llama that writes qab where the residual stream has dimension 5, and qaa where it has its opposite.

    Uniform attention of layer 1 copies dimension 4, which only " nut" has, to dimension 5.  That of layer 0 copies
    dimension 0, which all tokens have, to dimension 6: without it a token's norm would hide the scale of its embedding.
    """
    model = models.tiny_model("llama", seed=3)
    owners = models.token_languages()
    nut = models.tiny_tokenizer()(" nut", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[:, :8] = 0
        embedding[:, 0] = 2
        embedding[nut, 4] = 6
        head.zero_()
        head[:, 5] = torch.tensor([{"qab": 1.0, "qaa": -1.0}.get(owner, 0.0) for owner in owners])
        for block in model.model.layers:
            block.mlp.down_proj.weight.zero_()
            attention = block.self_attn
            for projection in (attention.q_proj, attention.v_proj, attention.o_proj):
                projection.weight.zero_()
        for layer, (read, write, gain) in enumerate([(0, 6, 1.0), (4, 5, 8.0)]):
            attention = model.model.layers[layer].self_attn
            attention.v_proj.weight[0, read] = 1
            attention.o_proj.weight[write, 0] = gain
    directory = models.save_checkpoint(model, tmp_path_factory.mktemp("planted"))
    return load_model(str(directory), device="cpu"), nut


def test_bipo_finds_the_planted_vector(planted):
    loaded, _ = planted
    given = preferences(40, seed=2)
    found = direction_of_preferences(
        loaded, given, "bipo", "qaa", "qab", settings={"layers": "1", "passes": 10, "rate": 0.02}
    )
    vector = found.vectors["block_out"][1]
    # Less of what all tokens have leaves more to dimension 5 after the final norm.
    assert float(vector[5] / vector.norm()) > 0.8
    assert int(vector.abs().argmax()) == 5
    learning = found.metadata["learning"]["1"]
    assert learning["held_out"][0] == pytest.approx(math.log(2))
    assert min(learning["held_out"]) < 0.6
    fresh = preferences(10, seed=9)
    rows = preference_rows(loaded, fresh)
    objective = _Objective(loaded, rows, 1, Bipo())
    before = objective.unsteered
    with residual_steering(loaded, vector, 1):
        after = _Objective(loaded, rows, 1, Bipo()).unsteered
    assert ((after - before)[:, 0] > (after - before)[:, 1]).all()


def test_bipo_is_the_same_for_the_same_seed(llama):
    given = preferences(10)
    settings = {"passes": 3, "rate": 0.02}

    def content(**more):
        found = direction_of_preferences(llama, given, "bipo", settings={**settings, **more})
        return artifact_bytes("direction", found.vectors, found.metadata)

    assert content() == content()
    assert content() != content(seed=1)


def test_bipo_refuses(llama):
    with pytest.raises(UsageError, match="too few"):
        direction_of_preferences(llama, preferences(HELD_OUT - 1), "bipo")
    with pytest.raises(UsageError, match="layer 3"):
        direction_of_preferences(llama, preferences(), "bipo", settings={"layers": "3"})
    with pytest.raises(UsageError, match="above 0"):
        direction_of_preferences(llama, preferences(), "bipo", settings={"rate": 0.0})
    same = tuple(Preference(one.prompt, one.chosen, one.chosen) for one in preferences().of)
    with pytest.raises(BrocaError, match="no pass lowers"):
        direction_of_preferences(llama, Preferences(same, ""), "bipo", settings={"passes": 1})


def naive_scores(model, ids, prompt, nodes):
    """e_i . the mean gradient along the line from 0, by plain autograd in float64, one node after the other."""
    embedded = model.model.embed_tokens(torch.tensor([ids])).detach()
    total = torch.zeros(len(ids), dtype=torch.float64)
    for node, weight in nodes:
        scaled = (node * embedded).requires_grad_(True)
        predicted = model(inputs_embeds=scaled).logits[0].log_softmax(-1)
        sum(predicted[at - 1, ids[at]] for at in range(prompt, len(ids))).backward()
        for i in range(len(ids)):
            total[i] += weight * float(embedded[0, i] @ scaled.grad[0, i])
    return total


def test_scores_equal_integrals_of_one_row_at_a_time(llama, in_float64):
    given = preferences(3, seed=6)
    found = token_scores(llama, numbered_together(preference_rows(llama, given)))
    # Roots of Legendre's polynomial of degree 20, from [-1, 1] to [0, 1].
    roots, weights = numpy.polynomial.legendre.leggauss(20)
    nodes = [((1 + root) / 2, weight / 2) for root, weight in zip(roots, weights, strict=True)]
    pairs = [(preference, kind) for kind in (CHOSEN, REJECTED) for preference in given.of]
    for (preference, kind), scores in zip(pairs, found, strict=True):
        ids, prompt = naive_tokens(llama.tokenizer, preference, kind)
        expected = naive_scores(in_float64, ids, prompt, nodes)
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        assert scores[-1] == 0  # nothing follows the last token


def test_processes_cut_rows_by_the_least_memory(llama, monkeypatch):
    """Another process has room for 64 tokens."""
    monkeypatch.setattr("neurons.models.memory.all_reduce", lambda own, _: own.clamp(max=64))
    cut = []
    monkeypatch.setattr(grains, "token_row_batches", lambda *given: cut.append(given[2]) or [])
    token_scores(llama, numbered_together(preference_rows(llama, preferences(3))))
    assert cut == [64]


def test_the_highest_scores_above_zero_are_replaced():
    row = TokenRow(0, [10, 11, 12, 13, 14], range(5))
    scores = torch.tensor([0.5, -1.0, 2.0, 0.5, 0.0])
    assert replaced(row, scores, 2, 1).ids == [1, 11, 1, 13, 14]
    assert replaced(row, -scores, 3, 1).ids == [10, 1, 12, 13, 14]
    assert replaced(row, torch.zeros(5), 3, 1).ids == [10, 11, 12, 13, 14]


def test_the_effect_is_the_mean_or_the_line_of_most_variance():
    differences = torch.tensor([[1.0, 3.0], [1.0, 5.0], [1.0, -2.0]]).double()
    assert effect(differences, "mean").tolist() == [1, 2]
    torch.testing.assert_close(effect(differences, "pca"), torch.tensor([0.0, 2.0]).double())
    assert effect(differences[:1], "pca").tolist() == [1, 3]


def test_grains_finds_the_planted_token_and_its_effect(planted):
    loaded, nut = planted
    plain = preferences(12, seed=5)
    # The prompt's "nut" makes qab more likely.
    rows = tuple(Preference(f"bead nut {one.prompt}", one.chosen, one.rejected) for one in plain.of)
    together = numbered_together(preference_rows(loaded, Preferences(rows, "")))
    for row, scores in zip(together[:12], token_scores(loaded, together)[:12], strict=True):
        assert row.ids[int(scores.argmax())] == nut
    found = direction_of_preferences(loaded, Preferences(rows, ""), "grains", settings={"tokens": 1})
    for layer in (1, 2):
        vector = found.vectors["block_out"][layer]
        assert float(vector[5] / vector.norm()) > 0.9
    assert not found.vectors["mlp_out"].any()
    assert torch.equal(
        found.vectors["block_out"],
        direction_of_preferences(loaded, Preferences(rows, ""), "grains", settings={"tokens": 1}).vectors[
            "block_out"
        ],
    )


def test_methods_that_read_text_read_the_answers(llama, corpus):
    given = preferences()
    found = direction_of_preferences(llama, given, "diffmean", "qaa", "qab")
    expected = {}
    for kind in (CHOSEN, REJECTED):
        means = []
        for preference in given.of:
            ids, prompt = naive_tokens(llama.tokenizer, preference, kind)
            _, layers = models.naive_llama(llama.model, ids)
            means.append(torch.stack([of["block_out"][prompt - 1 : -1].detach().mean(0) for of in layers]))
        expected[kind] = sum(means) / len(means)
    torch.testing.assert_close(
        found.vectors["block_out"], expected[CHOSEN] - expected[REJECTED], rtol=1e-4, atol=1e-5
    )
    assert (found.source, found.target, found.metadata["texts"]) == ("qaa", "qab", {"qaa": 12, "qab": 12})
    with pytest.raises(UsageError, match="--preferences"):
        direction_of(llama, corpus, "qaa", "qab", "bipo")
    with pytest.raises(UsageError, match="--corpus"):
        direction_of_preferences(llama, given, "sae")
    with pytest.raises(UsageError, match="both"):
        direction_of_preferences(llama, given, "grains", "qaa", "qaa")


def written(path):
    rows = [
        {"prompt": one.prompt, "chosen": one.chosen, "rejected": one.rejected} for one in preferences().of
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def test_the_command(broca, llama, tmp_path):
    rows, out = written(tmp_path / "rows.jsonl"), tmp_path / "direction.safetensors"
    arguments = ("direction", llama.name, "--preferences", rows, "--method", "grains", "--out", out, "--json")
    status, printed, err = broca(*arguments)
    assert status == 0, err
    shown = json.loads(printed)
    assert (shown["source"], shown["target"], shown["method"]) == ("rejected", "chosen", "grains")
    status, printed, _ = broca(*arguments, "--dry-run")
    assert status == 0 and {*json.loads(printed)["stages"]} == {"preferences", "direction"}
    for words, reason in (
        (["--corpus", tmp_path], "--corpus is not supported by --preferences"),
        (["--tokens", "5"], "--tokens"),
        (["--sae", rows], "--sae"),
        (["--method", "sae"], "--corpus"),
    ):
        status, _, err = broca(*arguments[:-1], *words)
        assert status == 2 and reason in err
