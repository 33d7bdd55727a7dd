"""Selection against a naive one that sorts in Python, and by cases whose answer is known."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neurons.errors import UsageError
from neurons.scorers.scores import Scores, fractions
from neurons.scorers.selection import ENDS, KINDS, SCOPES, Selection, eligible, kind_of, select


def naive_select(scores, selection):
    """Per language [(layer, neuron, score, kind)], by loops and Python's sort."""
    layers, width, languages = scores.values.shape
    inside = range(layers) if selection.layers is None else sorted(set(selection.layers))
    values, member = scores.values.tolist(), scores.member.tolist()

    def allowed(i, j, k):
        return (
            math.isfinite(values[i][j][k])
            and (selection.threshold is None or values[i][j][k] >= selection.threshold)
            and (
                selection.min_exclusivity is None
                or float(scores.exclusivity[i, j, k]) >= selection.min_exclusivity
            )
        )

    def tie(i, j, k):
        return 0.0 if scores.tie is None else float(scores.tie[i, j, k])

    def ends(of):
        """``of``: (layer, neuron) -> its eligible languages."""
        most = round(selection.top_rate * len(inside) * width)

        def down(place):
            best = max(values[place[0]][place[1]][k] for k in of[place])
            return (
                -best,
                -max(tie(*place, k) for k in of[place] if values[place[0]][place[1]][k] == best),
                place,
            )

        def up(place):
            least = min(values[place[0]][place[1]][k] for k in of[place])
            return (
                least,
                -max(tie(*place, k) for k in of[place] if values[place[0]][place[1]][k] == least),
                place,
            )

        top, bottom = sorted(of, key=down)[:most], sorted(of, key=up)[:most]
        return {"top": top, "bottom": bottom, "both": top + [p for p in bottom if p not in top]}[
            selection.ends
        ]

    def eligible_places(ks):
        found = {(i, j): [k for k in ks if allowed(i, j, k)] for i in inside for j in range(width)}
        return {place: of for place, of in found.items() if of}

    if selection.scope == "global":
        kept = ends(eligible_places(range(languages)))
        chosen = [[(i, j) for i, j in kept if member[i][j][k] and allowed(i, j, k)] for k in range(languages)]
    else:
        chosen = [
            ends({(i, j): of for (i, j), of in eligible_places([k]).items() if member[i][j][k]})
            for k in range(languages)
        ]
    found = []
    for k, places in enumerate(chosen):
        rows = []
        for i, j in places:
            owners = sum((i, j) in other for other in chosen)
            kind = "specific" if owners == 1 else "general" if owners == languages else "related"
            if selection.kinds is None or kind in selection.kinds:
                rows.append((i, j, values[i][j][k], kind))
        found.append(rows)
    return found


def as_rows(selected):
    return [
        [
            (*row, score, KINDS[kind])
            for row, score, kind in zip(s.rows.tolist(), s.scores.tolist(), s.kinds.tolist(), strict=True)
        ]
        for s in selected
    ]


def assert_same(scores, selection):
    found = select(scores, selection)
    assert as_rows(found) == naive_select(scores, selection)
    for language in found:
        assert language.rows.dtype == language.kinds.dtype == torch.int64
        assert language.rows.shape == (len(language.scores), 2)
        assert language.scores.dtype == torch.float64


def random_scores(seed, shape=(3, 8, 4), levels=0, tie_levels=0):
    """``levels`` values, so that ties are common, or all different; some neurons are out."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if levels:
        values = torch.randint(levels, shape, generator=generator).double()
    values[torch.rand(shape, generator=generator) < 0.1] = -math.inf
    values[torch.rand(shape, generator=generator) < 0.05] = math.inf
    return Scores(
        values=values,
        member=torch.rand(shape, generator=generator) < 0.6,
        exclusivity=fractions(torch.rand(shape, generator=generator) ** 3),
        tie=torch.randint(tie_levels, shape, generator=generator).double() if tie_levels else None,
    )


def scores_of(values, member=None, **others):
    values = torch.tensor(values, dtype=torch.float64)
    member = torch.ones_like(values, dtype=torch.bool) if member is None else torch.tensor(member)
    return Scores(values=values, member=member, **others)


def rows_of(selected):
    return [language.rows.tolist() for language in selected]


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("levels", [0, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_equals_sorting(seed, levels, scope, ends):
    for tie_levels in (0, 2, 50):
        scores = random_scores(seed, levels=levels, tie_levels=tie_levels)
        for rate in (0.02, 0.2, 0.5, 1.0):
            plain = Selection(scope, rate, ends)
            for selection in (
                plain,
                plain.changed(threshold=0.5),
                plain.changed(min_exclusivity=0.3),
                plain.changed(layers=(2, 0)),
                plain.changed(kinds=("specific",)),
                plain.changed(kinds=("related", "general"), threshold=-0.2),
            ):
                assert_same(scores, selection)


@st.composite
def cases(draw):
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    scores = random_scores(
        draw(st.integers(0, 10**6)), shape, draw(st.sampled_from([0, 1, 2, 4])), draw(st.sampled_from([0, 2]))
    )
    some_layers = st.lists(st.integers(0, shape[0] - 1), min_size=1).map(tuple)
    some_kinds = st.lists(st.sampled_from(KINDS), min_size=1).map(tuple)
    return scores, Selection(
        scope=draw(st.sampled_from(SCOPES)),
        top_rate=draw(st.floats(0.001, 1)),
        ends=draw(st.sampled_from(ENDS)),
        threshold=draw(st.none() | st.floats(-2, 3) | st.just(1.0)),
        min_exclusivity=draw(st.none() | st.floats(0, 1)),
        layers=draw(st.none() | some_layers),
        kinds=draw(st.none() | some_kinds),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases())
def test_equals_sorting_in_any_case(case):
    assert_same(*case)


def test_each_language_has_the_best_of_its_own():
    scores = scores_of(
        [[[5, 1], [4, 9], [3, 2], [9, 8]]], [[[True, True], [True, False], [True, True], [False, True]]]
    )
    found = select(scores, Selection(top_rate=0.5))
    assert rows_of(found) == [[[0, 0], [0, 1]], [[0, 3], [0, 2]]]
    assert [language.scores.tolist() for language in found] == [[5, 4], [8, 2]]


def test_the_best_of_all_belong_to_every_language_whose_member_they_are():
    member = [[[True, True], [False, True], [True, True], [False, False]]]
    scores = scores_of([[[5, 1], [4, 9], [3, 2], [10, 8]]], member)
    found = select(scores, Selection(scope="global", top_rate=0.75))
    # Neuron 3 is the best and takes a place, but belongs to no language; neuron 2 is beyond the rate.
    assert rows_of(found) == [[[0, 0]], [[0, 1], [0, 0]]]
    assert [language.scores.tolist() for language in found] == [[5], [9, 1]]
    assert [language.kinds.tolist() for language in found] == [[2], [0, 2]]


def test_ties_are_ordered_by_layer_then_neuron():
    scores = scores_of(torch.ones(3, 40, 2).tolist())
    for scope in SCOPES:
        for ends in ENDS:
            for rows in rows_of(select(scores, Selection(scope, 50 / 120, ends))):
                assert rows == [[0, neuron] for neuron in range(40)] + [[1, neuron] for neuron in range(10)]


def test_the_tie_goes_before_the_place_and_after_the_score():
    scores = scores_of([[[1.0], [1.0], [2.0], [1.0]]], tie=torch.tensor([[[0.1], [0.3], [0.0], [0.3]]]))
    assert rows_of(select(scores, Selection(top_rate=1.0))) == [[[0, 2], [0, 1], [0, 3], [0, 0]]]
    assert rows_of(select(scores, Selection(top_rate=1.0, ends="bottom"))) == [
        [[0, 1], [0, 3], [0, 0], [0, 2]]
    ]


def test_a_tie_of_a_language_that_is_not_the_best_decides_nothing():
    scores = scores_of([[[1.0, 0.5], [1.0, 0.5]]], tie=torch.tensor([[[0.1, 9.0], [0.2, 0.0]]]))
    assert rows_of(select(scores, Selection("global", 0.5)))[0] == [[0, 1]]
    assert rows_of(select(scores, Selection("global", 0.5, "bottom")))[0] == [[0, 0]]


def test_both_ends_have_as_many_each_and_no_neuron_twice():
    scores = scores_of([[[float(j)] for j in range(10)]])
    both = rows_of(select(scores, Selection(top_rate=0.2, ends="both")))[0]
    assert both == [[0, 9], [0, 8], [0, 0], [0, 1]]
    everything = rows_of(select(scores, Selection(top_rate=0.7, ends="both")))[0]
    assert everything == [[0, j] for j in (9, 8, 7, 6, 5, 4, 3, 0, 1, 2)]


def test_the_threshold_is_inclusive_and_takes_no_more_than_the_rate():
    scores = scores_of([[[0.1], [0.3], [0.2], [0.4]]])
    assert rows_of(select(scores, Selection(top_rate=1.0, threshold=0.2))) == [[[0, 3], [0, 1], [0, 2]]]
    assert rows_of(select(scores, Selection(top_rate=0.25, threshold=0.2))) == [[[0, 3]]]
    assert rows_of(select(scores, Selection(top_rate=0.25, ends="bottom", threshold=0.2))) == [[[0, 2]]]
    assert rows_of(select(scores, Selection(top_rate=1.0, threshold=0.5))) == [[]]


def test_the_rate_is_of_the_chosen_layers():
    scores = random_scores(0, (5, 10, 1))
    scores = Scores(
        values=scores.values.nan_to_num(posinf=0, neginf=0), member=torch.ones(5, 10, 1, dtype=torch.bool)
    )
    for layers, expected in ((None, 10), ((1, 3), 4), ((1, 3, 3, 1), 4), ((4,), 2)):
        rows = select(scores, Selection(top_rate=0.2, layers=layers))[0].rows
        assert len(rows) == expected
        assert layers is None or set(rows[:, 0].tolist()) <= set(layers)


def test_exclusivity_is_inclusive_and_of_the_language():
    share = torch.tensor([[[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]], dtype=torch.float64)
    scores = scores_of([[[1, 1], [2, 2], [3, 3]]], exclusivity=share)
    assert rows_of(select(scores, Selection(top_rate=1.0, min_exclusivity=0.5))) == [
        [[0, 1], [0, 0]],
        [[0, 2], [0, 1]],
    ]


def test_neurons_without_a_finite_score_are_never_chosen():
    scores = scores_of([[[math.inf], [1.0], [-math.inf], [0.0]]])
    for scope in SCOPES:
        for ends in ENDS:
            rows = rows_of(select(scores, Selection(scope, 1.0, ends)))[0]
            assert sorted(rows) == [[0, 1], [0, 3]]


def test_kinds_count_the_languages_that_a_neuron_is_selected_for():
    # Every neuron may belong to every language here; what counts is whose best it is.
    values = [[[9, 9, 9], [8, 8, 0], [0, 0, 8], [1, 1, 1]]]
    found = select(scores_of(values), Selection(top_rate=0.5))
    named = [
        [(row[1], KINDS[kind]) for row, kind in zip(s.rows.tolist(), s.kinds.tolist(), strict=True)]
        for s in found
    ]
    assert named == [
        [(0, "general"), (1, "related")],
        [(0, "general"), (1, "related")],
        [(0, "general"), (2, "specific")],
    ]
    only = select(scores_of(values), Selection(top_rate=0.5, kinds=("specific", "related")))
    assert rows_of(only) == [[[0, 1]], [[0, 1]], [[0, 2]]]
    assert rows_of(select(scores_of(values), Selection(top_rate=0.5, kinds=()))) == [[], [], []]


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0, 0]), (2, [0, 0, 2]), (3, [0, 0, 1, 2]), (5, [0, 0, 1, 1, 1, 2])]
)
def test_kind_of(count, expected):
    assert kind_of(torch.arange(count + 1), count).tolist() == expected


def test_eligible_is_what_passes_all_but_membership():
    scores = random_scores(1)
    assert torch.equal(eligible(scores, Selection(top_rate=0.01)), torch.isfinite(scores.values))
    layer = eligible(scores, Selection(layers=(1,)))
    assert not layer[[0, 2]].any()
    assert torch.equal(layer[1], torch.isfinite(scores.values[1]))
    assert not eligible(scores, Selection(layers=())).any()


def test_a_rate_that_is_less_than_half_a_neuron_selects_none():
    assert rows_of(select(scores_of(torch.rand(2, 10, 2).tolist()), Selection(top_rate=0.02))) == [[], []]


def test_selecting_changes_no_scores():
    scores = random_scores(3, levels=3, tie_levels=3)
    before = [tensor.clone() for tensor in (scores.values, scores.member, scores.exclusivity, scores.tie)]
    select(scores, Selection("global", 0.5, "both", 0.0, 0.2, (0, 1), ("related",)))
    for tensor, old in zip(
        (scores.values, scores.member, scores.exclusivity, scores.tie), before, strict=True
    ):
        assert torch.equal(tensor, old)


def test_repeated_scores_need_no_memory_of_their_own():
    """A score that is the same for all languages comes expanded, not copied."""
    one = torch.rand(2, 9, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    member = torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    assert_same(Scores(values=one.expand(2, 9, 3), member=member), Selection("global", 0.4))


def test_changed_keeps_what_is_none():
    selection = Selection(scope="global", top_rate=0.05, layers=(1, 2))
    assert selection.changed(top_rate=None, threshold=0.0, ends=None) == dataclasses.replace(
        selection, threshold=0.0
    )
    assert selection.changed() == selection
    with pytest.raises(UsageError, match="rate"):
        selection.changed(top_rate=2)


def test_as_json():
    selection = Selection(layers=(1, 2), kinds=("related",))
    assert json.loads(json.dumps(selection.as_json())) == {
        "scope": "language",
        "top_rate": 0.01,
        "ends": "top",
        "threshold": None,
        "min_exclusivity": None,
        "layers": [1, 2],
        "kinds": ["related"],
    }


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, math.nan, math.inf])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(UsageError, match="top rate"):
        Selection(top_rate=rate)


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_an_exclusivity_out_of_range_is_refused(value):
    with pytest.raises(UsageError, match="exclusivity"):
        Selection(min_exclusivity=value)


def test_a_threshold_that_is_not_a_number_is_refused():
    with pytest.raises(UsageError, match="threshold"):
        Selection(threshold=math.nan)


@pytest.mark.parametrize(
    ("setting", "known"),
    [
        ({"scope": "galaxy"}, "'galaxy' is unknown: choose from language, global"),
        ({"ends": "middle"}, "'middle' is unknown: choose from top, bottom, both"),
        ({"kinds": ("related", "odd")}, "'odd' is unknown: choose from specific, related, general"),
    ],
)
def test_an_unknown_word_is_named(setting, known):
    with pytest.raises(UsageError, match=known):
        Selection(**setting)


@pytest.mark.parametrize("layer", [-1, 3, 99])
def test_a_layer_that_is_not_there_is_named(layer):
    with pytest.raises(UsageError, match=f"layer {layer} .* 0-2"):
        select(random_scores(0), Selection(layers=(0, layer)))


def test_exclusivity_without_shares_is_refused():
    with pytest.raises(UsageError, match="exclusivity"):
        select(scores_of([[[1.0]]]), Selection(min_exclusivity=0.5))
