"""Plans one after another, back again and on some components: properties over random edits, and real models."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editing.plans.algebra import after, compose, inverse, inverted, on_components, restricted
from editing.plans.applied import applied
from editing.plans.plan import FACTORS, PLACES, ModuleEdit, make_plan
from neurons.errors import BrocaError, NothingToChangeError, UsageError
from neurons.models.source import load_model

ROWS, COLUMNS, WIDTH = 4, 6, 2
GROUPS = [
    ("row_scale",),
    ("column_scale",),
    ("left", "right"),
    ("bias",),
    ("rows", "row_deltas"),
    ("columns", "column_deltas"),
]
WHOLE = tuple(itertools.chain.from_iterable(GROUPS))
DELTAS = ("rows", "row_deltas", "columns", "column_deltas")
wanted_factors = st.lists(st.sampled_from(GROUPS), min_size=1, max_size=4, unique=True).map(
    lambda groups: tuple(itertools.chain.from_iterable(groups))
)
seeds = st.integers(0, 10_000)
PRECISE = settings(max_examples=60, deadline=None)


def random_edit(seed, wanted=WHOLE, rank=2, width=1):
    generator = torch.Generator().manual_seed(seed)
    count = COLUMNS // width
    chosen = sorted(torch.randperm(count, generator=generator)[: 1 + seed % count].tolist())
    columns = torch.zeros(count, width)
    columns[chosen] = 1
    mask = columns.flatten().bool()
    factors = {
        "row_scale": torch.rand(ROWS, generator=generator) + 0.5,
        "column_scale": torch.where(mask, torch.rand(COLUMNS, generator=generator) + 0.5, 1.0),
        "left": torch.randn(ROWS, rank, generator=generator),
        "right": torch.randn(COLUMNS, rank, generator=generator) * mask[:, None],
        "bias": torch.randn(ROWS, generator=generator),
        "rows": torch.randperm(ROWS, generator=generator)[: 1 + seed % ROWS].sort().values,
        "row_deltas": torch.randn(1 + seed % ROWS, COLUMNS, generator=generator),
        "columns": mask.nonzero()[:, 0],
        "column_deltas": torch.randn(int(mask.sum()), ROWS, generator=generator),
    }
    return ModuleEdit(
        0,
        "mlp",
        tuple(chosen),
        details={"g": torch.arange(len(chosen), dtype=torch.float64)},
        **{name: factors[name] for name in wanted},
    )


def module(edit, weight, bias):
    """W' and b' number by number from the formula."""
    edited = weight.clone()
    for r in range(ROWS):
        for c in range(COLUMNS):
            value = float(weight[r, c])
            value *= 1.0 if edit.row_scale is None else float(edit.row_scale[r])
            value *= 1.0 if edit.column_scale is None else float(edit.column_scale[c])
            for i in range(edit.rank):
                value += float(edit.left[r, i]) * float(edit.right[c, i])
            if edit.rows is not None and r in edit.rows:
                value += float(edit.row_deltas[edit.rows.tolist().index(r), c])
            if edit.columns is not None and c in edit.columns:
                value += float(edit.column_deltas[edit.columns.tolist().index(c), r])
            edited[r, c] = value
    moved = torch.zeros(ROWS) if edit.bias is None else edit.bias
    return edited, bias + moved.double()


def weight_and_bias(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64),
        torch.randn(ROWS, generator=generator, dtype=torch.float64),
    )


def close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@PRECISE
@given(seeds, seeds, wanted_factors, wanted_factors)
def test_after_is_one_edit_and_then_the_other(one, other, first_factors, second_factors):
    first, second = random_edit(one, first_factors), random_edit(other, second_factors)
    both = after(first, second)
    close(module(both, *weight_and_bias()), module(second, *module(first, *weight_and_bias())))
    assert set(both.components) == {*first.components, *second.components}


@PRECISE
@given(seeds, seeds, seeds)
def test_composition_is_associative(a, b, c):
    a, b, c = (random_edit(seed) for seed in (a, b, c))
    close(
        module(after(after(a, b), c), *weight_and_bias()), module(after(a, after(b, c)), *weight_and_bias())
    )


@PRECISE
@given(seeds, wanted_factors)
def test_the_inverse_takes_back(seed, wanted):
    edit = random_edit(seed, wanted)
    close(module(inverse(edit), *module(edit, *weight_and_bias())), weight_and_bias())
    close(module(after(edit, inverse(edit)), *weight_and_bias()), weight_and_bias())


@PRECISE
@given(
    seeds,
    st.sampled_from([("left", "right"), ("column_scale", "left", "right"), ("row_scale", "bias"), DELTAS]),
    st.floats(-3, 3, width=32),
    st.floats(-3, 3, width=32),
)
def test_strengths_multiply(seed, wanted, one, other):
    edit = random_edit(seed, wanted)
    twice = module(edit.scaled(one).scaled(other), *weight_and_bias())
    close(twice, module(edit.scaled(one * other), *weight_and_bias()), 1e-4)
    weight, bias = weight_and_bias()
    whole = module(edit, weight, bias)
    expected = (weight + one * (whole[0] - weight), bias + one * (whole[1] - bias))
    close(module(edit.scaled(one), weight, bias), expected, 1e-4)


@PRECISE
@given(seeds, st.sets(st.integers(0, COLUMNS // WIDTH - 1)), st.sampled_from([1, WIDTH]))
def test_on_components_is_the_edit_there_and_nothing_elsewhere(seed, allowed, width):
    edit = random_edit(seed, ("column_scale", "left", "right", "columns", "column_deltas"), width=width)
    cut = on_components(edit, allowed, width)
    weight, bias = weight_and_bias()
    whole = module(edit, weight, bias)[0]
    expected = weight.clone()
    for component in set(edit.components) & allowed:
        own = slice(component * width, (component + 1) * width)
        expected[:, own] = whole[:, own]
    if cut is None:
        assert not set(edit.components) & allowed
        return
    close([module(cut, weight, bias)[0]], [expected])
    assert set(cut.components) == set(edit.components) & allowed
    assert cut.details["g"].tolist() == [edit.components.index(c) for c in cut.components]


def test_a_scale_of_zero_cannot_be_undone():
    scale = torch.ones(COLUMNS)
    scale[3] = 0
    with pytest.raises(BrocaError, match=r"layer 0, mlp: column 3 is scaled by 0"):
        inverse(ModuleEdit(0, "mlp", (3,), column_scale=scale))


@pytest.mark.parametrize("factors", [("row_scale",), ("bias",), ("rows", "row_deltas")])
def test_what_is_no_ones_component_cannot_be_restricted(factors):
    with pytest.raises(BrocaError, match="layer 0, mlp"):
        on_components(random_edit(0, (*factors, "left", "right")), range(COLUMNS), 1)


@pytest.fixture
def loaded(checkpoint_of):
    return load_model(str(checkpoint_of("llama")))


def plan_for(loaded, seed, rank=1):
    generator = torch.Generator().manual_seed(seed)
    d = loaded.anatomy.residual
    edits = []
    for layer, (block, n) in itertools.product(
        (0, 2), (("attn", loaded.anatomy.width("attn_in")), ("mlp", loaded.anatomy.neurons))
    ):
        width = loaded.anatomy.component_width(block, 0)
        edits.append(
            ModuleEdit(
                layer,
                block,
                tuple(range(n // width)),
                column_scale=torch.rand(n, generator=generator) + 0.5,
                left=torch.randn(d, rank, generator=generator) / d,
                right=torch.randn(n, rank, generator=generator),
                notes={"change_norm": 1.0, "weight_norm": 1.0},
            )
        )
    metadata = {"fingerprint": loaded.fingerprint, "model": loaded.label, "method": "made", "settings": {}}
    return make_plan(edits, {**metadata, "languages": [f"q{seed}"]})


def test_composed_plans_notes_are_those_of_the_weights(loaded):
    first, second = plan_for(loaded, 1), plan_for(loaded, 2)
    both = compose([first, second], loaded)
    assert [edit.rank for edit in both.edits] == [2] * 4
    blind = compose([first, second])
    assert blind.relative_change() is None and both.relative_change() > 0
    assert blind.edits[0].notes == {} and torch.equal(blind.edits[0].left, both.edits[0].left)
    assert both.metadata["languages"] == ["q1", "q2"]
    for edit in both.edits:
        base = loaded.anatomy.parts(edit.layer, edit.block)[0].weight.double().clone()
        with applied(loaded, both):
            live = loaded.anatomy.parts(edit.layer, edit.block)[0].weight.double().clone()
        assert edit.notes["change_norm"] == pytest.approx(float((live - base).norm()), rel=1e-4)
        assert edit.notes["weight_norm"] == pytest.approx(float(base.norm()))


def test_inverted_plan_gives_the_base_weights(loaded):
    plan = plan_for(loaded, 3)
    back = inverted(loaded, plan)
    for edit, other in zip(plan.edits, back.edits, strict=True):
        base = loaded.anatomy.parts(edit.layer, edit.block)[0].weight.double()
        torch.testing.assert_close(other.apply(edit.apply(base)), base, rtol=1e-5, atol=1e-5)
        assert other.notes["change_norm"] == pytest.approx(float((edit.apply(base) - base).norm()), rel=1e-4)


def test_restricted_to_layers_heads_and_neurons(loaded):
    plan = plan_for(loaded, 4)
    only = restricted(loaded, plan, layers=[2], components={"attn": [1], "mlp": [0, 5]})
    assert [(edit.layer, edit.block, edit.components) for edit in only.edits] == [
        (2, "attn", (1,)),
        (2, "mlp", (0, 5)),
    ]
    by_layer = restricted(loaded, plan, components={0: {"attn": (), "mlp": [7]}})
    assert [(edit.layer, edit.block, edit.components) for edit in by_layer.edits] == [(0, "mlp", (7,))]
    base = loaded.anatomy.parts(0, "mlp")[0].weight.double()
    change = by_layer.edits[0].apply(base) - base
    assert change[:, 7].norm() == pytest.approx(by_layer.edits[0].notes["change_norm"])
    assert math.isclose(float(change.norm()), float(change[:, 7].norm()))
    heads_whole = restricted(loaded, plan, components={"mlp": [0]})
    assert [edit.block for edit in heads_whole.edits] == ["attn", "mlp"] * 2


def test_refusals(loaded):
    plan = plan_for(loaded, 5)
    with pytest.raises(NothingToChangeError):
        restricted(loaded, plan, layers=[1])
    with pytest.raises(UsageError, match="at least one"):
        compose([])
    foreign = make_plan(list(plan.edits), {**plan.metadata, "fingerprint": "of another"})
    with pytest.raises(BrocaError, match="different models"):
        compose([plan, foreign])
    for refused in (
        lambda: compose([foreign], loaded),
        lambda: inverted(loaded, foreign),
        lambda: restricted(loaded, foreign),
    ):
        with pytest.raises(BrocaError, match="fingerprint"):
            refused()


def test_every_factor_is_covered():
    assert {name for group in GROUPS for name in group} == {*FACTORS, *PLACES}
