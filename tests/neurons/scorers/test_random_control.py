"""Random controls: their counts, what they keep clear of, and what they are matched in."""

import pytest
import torch
from scipy import stats

from neurons.errors import BrocaError, UsageError
from neurons.scorers.random_control import random_like, random_matched, random_scores

LAYERS, WIDTH = 4, 12


def places(rows):
    return {tuple(row) for row in rows.tolist()}


def drawn_rows(seed, counts, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    rows = [
        [layer, int(neuron)]
        for layer, count in enumerate(counts)
        for neuron in torch.randperm(width, generator=generator)[:count]
    ]
    return torch.tensor(rows)[torch.randperm(len(rows), generator=generator)]


def assert_is_a_control(control, rows, layers=LAYERS, width=WIDTH):
    assert control.dtype == torch.int64
    assert control.shape == rows.shape
    assert len(places(control)) == len(rows)
    assert not places(control) & places(rows)
    for layer in range(layers):
        assert int((control[:, 0] == layer).sum()) == int((rows[:, 0] == layer).sum())
    assert all(0 <= neuron < width for _, neuron in places(control))


@pytest.mark.parametrize("seed", range(10))
def test_as_many_in_each_layer_and_none_of_the_rows(seed):
    rows = drawn_rows(seed, (6, 0, 1, 4))
    control = random_like(rows, LAYERS, WIDTH, seed)
    assert_is_a_control(control, rows)
    assert control.tolist() == sorted(control.tolist())
    assert torch.equal(control, random_like(rows.flip(0), LAYERS, WIDTH, seed))


def test_the_seeds_of_the_first_release():
    """What Broca 0.1 drew for these rows, so that published controls can be drawn again."""
    rows = torch.tensor([[0, 3], [0, 11], [2, 0], [2, 1]])
    drawn = {}
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        drawn[seed] = []
        for layer in range(LAYERS):
            own = [neuron for at, neuron in rows.tolist() if at == layer]
            others = [neuron for neuron in range(WIDTH) if neuron not in own]
            order = torch.randperm(len(others), generator=generator).tolist()
            drawn[seed] += [[layer, neuron] for neuron in sorted(others[i] for i in order[: len(own)])]
        assert random_like(rows, LAYERS, WIDTH, seed).tolist() == drawn[seed]
    assert drawn[0] != drawn[1]


def test_seeds_reach_every_neuron():
    rows = torch.tensor([[0, 3], [0, 11], [2, 0], [2, 1]])
    reached = set().union(*(places(random_like(rows, LAYERS, WIDTH, seed)) for seed in range(200)))
    assert reached == {(layer, neuron) for layer in (0, 2) for neuron in range(WIDTH)} - places(rows)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("nearest", [1, 3, 10, 1000])
def test_matched_is_a_control(seed, nearest):
    rows = drawn_rows(seed, (6, 0, 1, 4))
    activity = torch.rand(LAYERS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    control = random_matched(rows, activity, seed, nearest)
    assert_is_a_control(control, rows)
    assert torch.equal(control[:, 0], rows[:, 0])
    assert torch.equal(control, random_matched(rows, activity, seed, nearest))


def test_a_single_row_takes_one_of_the_nearest():
    generator = torch.Generator().manual_seed(2)
    activity = torch.rand(2, 40, generator=generator, dtype=torch.float64)
    for neuron in range(40):
        order = sorted(range(40), key=lambda j: float(activity[1, j]))
        rank = order.index(neuron)
        others = sorted((abs(order.index(j) - rank), order.index(j), j) for j in range(40) if j != neuron)
        nearest = {j for _, _, j in others[:5]}
        found = {
            int(random_matched(torch.tensor([[1, neuron]]), activity, seed, 5)[0, 1]) for seed in range(60)
        }
        assert found == nearest


@pytest.mark.parametrize("seed", range(20))
def test_each_row_takes_the_nearest_that_no_row_before_it_took(seed):
    """With one to choose from, what the rows take must be what they take in some order of choosing."""
    rows = drawn_rows(seed, (3,), 9)
    activity = torch.rand(1, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = activity[0].argsort().tolist()
    possible = []
    for sequence in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        taken, used = {}, set(rows[:, 1].tolist())
        for i in sequence:
            rank = order.index(int(rows[i, 1]))
            taken[i] = min(
                (j for j in range(9) if j not in used),
                key=lambda j: (abs(order.index(j) - rank), order.index(j)),
            )
            used.add(taken[i])
        possible.append([taken[i] for i in range(3)])
    assert random_matched(rows, activity, seed, nearest=1)[:, 1].tolist() in possible


@pytest.mark.parametrize("seed", range(3))
def test_matched_controls_are_as_active_as_the_set_and_others_are_not(seed):
    generator = torch.Generator().manual_seed(seed)
    activity = torch.rand(3, 2000, generator=generator, dtype=torch.float64) ** 3
    busy = activity.argsort(dim=1, descending=True)[:, :400]
    rows = torch.cat(
        [
            torch.stack(
                [torch.full((60,), layer), busy[layer, torch.randperm(400, generator=generator)[:60]]], 1
            )
            for layer in range(3)
        ]
    )
    own = activity[rows[:, 0], rows[:, 1]]
    matched = random_matched(rows, activity, seed)
    unmatched = random_like(rows, 3, 2000, seed)
    distances = [
        stats.ks_2samp(own, activity[control[:, 0], control[:, 1]]).statistic
        for control in (matched, unmatched)
    ]
    assert distances[0] < 0.06
    assert distances[1] > 0.5
    assert float((activity[matched[:, 0], matched[:, 1]] - own).abs().max()) < 0.05


def test_neurons_of_equal_activity_are_matched_too():
    rows = drawn_rows(0, (6, 6, 0, 6))
    assert_is_a_control(random_matched(rows, torch.zeros(LAYERS, WIDTH), 0), rows)


def test_the_control_of_nothing_is_nothing():
    empty = torch.zeros(0, 2, dtype=torch.int64)
    assert random_like(empty, LAYERS, WIDTH, 0).shape == (0, 2)
    assert random_matched(empty, torch.zeros(LAYERS, WIDTH), 0).shape == (0, 2)


def test_no_control_is_left_above_half_a_layer():
    half = torch.tensor([[1, neuron] for neuron in range(6)])
    assert (
        len(random_like(half, LAYERS, WIDTH, 0))
        == len(random_matched(half, torch.rand(LAYERS, WIDTH), 0))
        == 6
    )
    more = torch.tensor([[1, neuron] for neuron in range(7)])
    with pytest.raises(UsageError, match="more than half of layer 1"):
        random_like(more, LAYERS, WIDTH, 0)
    with pytest.raises(UsageError, match="more than half of layer 1"):
        random_matched(more, torch.zeros(LAYERS, WIDTH), 0)


@pytest.mark.parametrize("row", [[4, 0], [0, 12], [-1, 0], [0, -1]])
def test_a_neuron_that_the_model_does_not_have_is_refused(row):
    rows = torch.tensor([[0, 0], row])
    with pytest.raises(BrocaError, match="4 x 12"):
        random_like(rows, LAYERS, WIDTH, 0)
    with pytest.raises(BrocaError, match="4 x 12"):
        random_matched(rows, torch.zeros(LAYERS, WIDTH), 0)


def test_other_bad_input_is_refused():
    twice = torch.tensor([[1, 2], [1, 2]])
    with pytest.raises(BrocaError, match="twice"):
        random_like(twice, LAYERS, WIDTH, 0)
    with pytest.raises(BrocaError, match="twice"):
        random_matched(twice, torch.zeros(LAYERS, WIDTH), 0)
    with pytest.raises(UsageError, match="nearest"):
        random_matched(twice[:1], torch.zeros(LAYERS, WIDTH), 0, nearest=0)
    activity = torch.zeros(LAYERS, WIDTH)
    activity[2, 7] = torch.nan
    with pytest.raises(BrocaError, match="neuron 7 in layer 2"):
        random_matched(twice[:1], activity, 0)


def test_random_scores_are_uniform_and_independent():
    scores = random_scores(4, 5000, 3, seed=1)
    assert scores.values.shape == scores.member.shape == (4, 5000, 3)
    assert scores.values.dtype == torch.float64
    assert bool(scores.member.all())
    assert (scores.exclusivity, scores.tie, scores.notes) == (None, None, {"seed": 1})
    for k in range(3):
        assert stats.kstest(scores.values[..., k].flatten().numpy(), "uniform").statistic < 0.02
    correlation = torch.corrcoef(scores.values.flatten(0, 1).T)
    assert float((correlation - torch.eye(3)).abs().max()) < 0.03
    assert torch.equal(scores.values, random_scores(4, 5000, 3, seed=1).values)
    assert not torch.equal(scores.values, random_scores(4, 5000, 3, seed=2).values)
