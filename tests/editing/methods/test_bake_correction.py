"""Corrections of a baked vector: the key against a general solver, the plan against loops over tokens."""

import models
import pytest
import torch

from editing.methods.bake import bake_plan
from editing.methods.bake_correction import RemainderMoments, corrected_plan, correction_key
from editing.plans.applied import applied
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.text.corpus import Corpus

LANGUAGES = ("qaa", "qab", "qac")
VECTOR = torch.linspace(-1, 1, 64).double()


def small_corpus(count=6):
    return Corpus({k: tuple(models.sentences(k, count, 5, (2, 8))) for k in LANGUAGES}, "digest", "all")


def solve(rows, left, start, start_left, eps):
    """argmin mean (r - q.h)^2 + ridge |q|^2 with q.start = r_start, from the stationarity conditions."""
    size = rows.shape[1]
    square = sum(torch.outer(row, row) for row in rows) / len(rows)
    product = sum(r * row for r, row in zip(left, rows, strict=True)) / len(rows)
    ridged = square + eps * sum(float(square[i, i]) for i in range(size)) / size * torch.eye(size).double()
    system = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    system[:size, :size], system[:size, size], system[size, :size] = ridged, start, start
    return torch.linalg.solve(system, torch.cat([product, start_left.reshape(1)]))[:size]


def test_the_key_equals_a_general_solver():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 7, generator=generator).double()
    left, start = torch.randn(30, generator=generator).double(), torch.randn(7, generator=generator).double()
    moments = RemainderMoments(
        rows.T @ rows, left @ rows, float(left @ left), 30, start * 5, torch.tensor(0.4 * 5).item(), 5
    )
    key, rest = correction_key(moments, 0.1)
    expected = solve(rows, left, start, torch.tensor(0.4).double(), 0.1)
    torch.testing.assert_close(key, expected, rtol=1e-6, atol=1e-8)
    remaining = [float(r - row @ key) for r, row in zip(left, rows, strict=True)]
    assert rest == pytest.approx((sum(x * x for x in remaining) / 30) ** 0.5)


def test_inputs_that_are_all_zero_are_refused():
    moments = RemainderMoments(
        torch.zeros(7, 7).double(), torch.zeros(7).double(), 30.0, 30, torch.zeros(7).double()
    )
    with pytest.raises(BrocaError, match="30 tokens"):
        correction_key(moments, 0.1)


def tokens_of(loaded, corpus, sites):
    """Rows of each (layer) at mlp_in over the counted tokens, and of the start token, by loops."""
    rows, starts = {layer: [] for layer in sites}, {}
    for language in corpus.languages:
        for text in corpus.texts[language]:
            ids = [0, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
            _, layers = models.naive_llama(loaded.model, ids)
            for layer in sites:
                rows[layer] += list(layers[layer]["mlp_in"].detach()[1:])
                starts[layer] = layers[layer]["mlp_in"].detach()[0]
    return {layer: torch.stack(of_layer) for layer, of_layer in rows.items()}, starts


def test_the_plan_equals_the_formula_from_tokens_on(llama):
    corpus = small_corpus()
    plan = bake_plan(llama, corpus, {0: VECTOR}, 0.5, eps=0.1)
    corrected = corrected_plan(llama, corpus, plan, 2, eps=0.1)
    assert [edit.layer for edit in corrected.edits] == [0, 1, 2]
    assert torch.equal(corrected.edits[0].right, plan.edits[0].right)
    edits = list(corrected.edits)
    deviations = [edits[0].notes["spread"]]
    for count in (1, 2):
        before = type(plan)(tuple(edits[:count]), plan.metadata)
        with applied(llama, before):
            rows, starts = tokens_of(llama, corpus, range(count + 1))
        left, start_left = torch.ones(len(rows[0])).double(), torch.ones(()).double()
        for edit in edits[:count]:
            left = left - rows[edit.layer] @ edit.right[:, 0].double()
            start_left = start_left - starts[edit.layer] @ edit.right[:, 0].double()
        expected = solve(rows[count], left, starts[count], start_left, 0.1)
        result = edits[count].right[:, 0].double()
        torch.testing.assert_close(result, expected, rtol=2e-2, atol=5e-3 * float(expected.abs().max()))
        rest = left - rows[count] @ result
        assert edits[count].notes["spread"] == pytest.approx(float(rest.square().mean().sqrt()), rel=1e-2)
        deviations.append(edits[count].notes["spread"])
        assert torch.equal(edits[count].left, edits[0].left)
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[-1] < 0.95 * deviations[0]
    assert corrected.metadata["settings"]["corrections"] == 2


def test_corrections_end_with_the_last_layer(llama):
    corpus = small_corpus(3)
    plan = bake_plan(llama, corpus, {1: VECTOR})
    assert [edit.layer for edit in corrected_plan(llama, corpus, plan, 9).edits] == [1, 2]


def test_layers_without_a_dense_mlp_are_skipped(tmp_path):
    kinds = ["mlp", "moe", "mamba", "mlp"]
    made = models.build_wrapper(tmp_path, "nemotron_h", layers_block_type=kinds, mlp_hidden_act="silu")
    loaded, corpus = load_model(str(made), device="cpu"), small_corpus(60)
    plan = corrected_plan(loaded, corpus, bake_plan(loaded, corpus, {0: VECTOR}), 2)
    assert [(edit.layer, len(edit.components)) for edit in plan.edits] == [(0, 96), (3, 96)]
    assert plan.edits[1].notes["spread"] < plan.edits[0].notes["spread"]
    with pytest.raises(UsageError, match="earlier layer"):
        corrected_plan(loaded, corpus, bake_plan(loaded, corpus, {3: VECTOR}))


def test_refuses_what_cannot_be_corrected(llama):
    corpus = small_corpus(3)
    last = bake_plan(llama, corpus, {2: VECTOR})
    with pytest.raises(UsageError, match="earlier layer"):
        corrected_plan(llama, corpus, last)
    with pytest.raises(UsageError, match="at least one"):
        corrected_plan(llama, corpus, bake_plan(llama, corpus, {0: VECTOR}), 0)
    for other in ({0: VECTOR, 1: VECTOR},):
        with pytest.raises(UsageError, match="single vector"):
            corrected_plan(llama, corpus, bake_plan(llama, corpus, other))
    with pytest.raises(UsageError, match="single vector"):
        corrected_plan(llama, corpus, bake_plan(llama, corpus, {0: VECTOR}, block="attn"))
