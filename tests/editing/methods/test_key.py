"""Keys against a general solver: several sources, soft languages, and the statistics of keys."""

from dataclasses import replace

import pytest
import torch

from editing.methods.key import count_carriers, key, key_problem
from neurons.errors import BrocaError, UsageError
from neurons.recording.covariance import Moments

LANGUAGES = ("qac", "qaa", "qab", "qad")


def random_moments(neurons=11, seed=0, start=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factor = draw(neurons, 2 * neurons)
    return Moments(
        LANGUAGES,
        torch.arange(neurons),
        draw(neurons, len(LANGUAGES)),
        factor @ factor.T / 7,
        draw(neurons) if start else None,
    )


def solve_by_kkt(form, constraints, targets):
    """argmin k^T form k with constraints^T k = targets, from the stationarity conditions."""
    size, count = constraints.shape
    system = torch.zeros(size + count, size + count, dtype=torch.float64)
    system[:size, :size] = 2 * form
    system[:size, size:] = constraints
    system[size:, :size] = constraints.T
    right = torch.cat([torch.zeros(size).double(), torch.tensor(targets).double()])
    return torch.linalg.lstsq(system, right[:, None]).solution[:size, 0]


def naive_form(moments, eps, soft=(), weight=0.0):
    """F, by loops."""
    size = len(moments.covariance)
    average = sum(float(moments.covariance[i, i]) for i in range(size)) / size
    form = moments.covariance.clone()
    for i in range(size):
        form[i, i] += eps * average
        for j in range(size):
            for language in soft:
                mean = moments.mean[:, LANGUAGES.index(language)]
                form[i, j] += weight * mean[i] * mean[j]
    return form


def test_the_mean_is_one_on_all_sources():
    moments = random_moments()
    result = key(moments, ("qab", "qac"), 0.1)
    both = torch.cat([moments.mean, moments.start[:, None]], dim=1)
    expected = solve_by_kkt(naive_form(moments, 0.1), both, [1.0, 0.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(result.vector, expected, rtol=1e-8, atol=1e-10)
    assert result.means.tolist() == pytest.approx([1, 0, 1, 0], abs=1e-10)
    assert abs(float(result.vector @ moments.start)) < 1e-10


def test_the_key_of_two_sources_is_the_sum_of_their_keys():
    moments = random_moments(seed=1)
    alone = [key(moments, source, 0.1).vector for source in ("qab", "qac")]
    torch.testing.assert_close(key(moments, ("qab", "qac"), 0.1).vector, alone[0] + alone[1])


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_soft_languages_cost_the_square_of_their_mean(weight):
    moments = random_moments(seed=2, start=False)
    result = key(moments, "qaa", 0.1, keep_softly=("qac", "qad"), soft_weight=weight)
    expected = solve_by_kkt(
        naive_form(moments, 0.1, ("qac", "qad"), weight), moments.mean[:, [1, 2]], [1.0, 0.0]
    )
    torch.testing.assert_close(result.vector, expected, rtol=1e-8, atol=1e-10)
    assert result.means[1:3].tolist() == pytest.approx([1, 0], abs=1e-10)


def test_a_soft_weight_is_between_no_constraint_and_a_constraint():
    moments = random_moments(seed=3)
    free = key(moments, "qaa", keep=["qab", "qad"])
    means, deviations = [], []
    for weight in (0.0, 1.0, 100.0, 1e9):
        result = key(moments, "qaa", keep_softly=["qac"], soft_weight=weight)
        means.append(abs(float(result.means[0])))
        deviations.append(result.deviation)
    hard = key(moments, "qaa")
    assert means == sorted(means, reverse=True) and means[0] > 0.01 and means[-1] < 1e-6
    assert means[0] == pytest.approx(abs(float(free.means[0])))
    assert deviations == sorted(deviations)
    assert deviations[0] == pytest.approx(free.deviation) and deviations[-1] == pytest.approx(
        hard.deviation, rel=1e-6
    )


def test_at_weight_one_a_mean_costs_what_a_standard_deviation_costs():
    # A neuron with standard deviation s and one with mean s on the soft language have equal weights.
    covariance = torch.diag(torch.tensor([4.0, 0.0, 1.0]).double())
    mean = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]).double()
    moments = Moments(("a", "b", "c"), torch.arange(3), mean, covariance)
    result = key(moments, "a", 0.0, keep_softly=["b"], soft_weight=1.0)
    assert result.vector.tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_a_language_in_no_list_is_not_constrained():
    moments = random_moments(seed=4, start=False)
    result = key(moments, "qaa", 0.1, keep=["qad"])
    expected = solve_by_kkt(naive_form(moments, 0.1), moments.mean[:, [1, 3]], [1.0, 0.0])
    torch.testing.assert_close(result.vector, expected, rtol=1e-8, atol=1e-10)
    assert result.means[[0, 2]].abs().min() > 1e-3


def test_contributions_sum_to_one_and_carriers_are_counted():
    moments = random_moments(seed=5)
    result = key(moments, ("qaa", "qab"), 0.3)
    contributions = [
        float(result.vector[i]) * (float(moments.mean[i, 1]) + float(moments.mean[i, 2])) / 2
        for i in range(11)
    ]
    assert result.contribution.tolist() == pytest.approx(contributions)
    assert sum(contributions) == pytest.approx(1)
    ordered = sorted(map(abs, contributions), reverse=True)
    fewest = next(n for n in range(1, 12) if sum(ordered[:n]) >= 0.9 * sum(ordered) - 1e-12)
    assert result.carriers == fewest and 1 < fewest < 11


@pytest.mark.parametrize(
    ("contributions", "expected"),
    [([0.9, 0.1], 1), ([0.89, -0.11], 2), ([0.0, 0.0, -5.0], 1), ([1.0] * 10, 9), ([0.1] * 10, 9)],
)
def test_carriers_of_known_contributions(contributions, expected):
    assert count_carriers(torch.tensor(contributions, dtype=torch.float64)) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": ()}, "source"),
        ({"source": "xx"}, "no text of xx"),
        ({"keep": ["xx"]}, "no text of xx"),
        ({"keep_softly": ["xx"]}, "no text of xx"),
        ({"keep": ["qaa"]}, "name it once"),
        ({"keep": ["qab"], "keep_softly": ["qab"]}, "name it once"),
        ({"source": ("qaa", "qaa")}, "name it once"),
        ({"eps": -0.1}, "negative"),
        ({"eps": float("nan")}, "negative"),
        ({"keep_softly": ["qab"], "soft_weight": -1.0}, "negative"),
        ({"keep_softly": ["qab"], "soft_weight": float("inf")}, "inf"),
        ({"eps": float("inf")}, "inf"),
    ],
)
def test_refuses_bad_settings(settings, words):
    with pytest.raises(UsageError, match=words):
        key_problem(random_moments(), **{"source": "qaa", **settings})


def test_an_indefinite_covariance_has_no_key():
    """A general solver finds a saddle point."""
    moments = random_moments()
    indefinite = moments.covariance - 2 * torch.linalg.eigvalsh(moments.covariance)[1] * torch.eye(11)
    with pytest.raises(BrocaError, match="separate"):
        key(replace(moments, covariance=indefinite), "qaa", eps=0)


def test_refuses_sources_that_another_language_equals():
    moments = random_moments()
    mean = moments.mean.clone()
    mean[:, 3] = mean[:, 1]
    with pytest.raises(BrocaError, match=r" 4 languages"):
        key(replace(moments, mean=mean), ("qaa", "qab"))
    # Also refused if both are sources, although their constraints are then consistent.
    with pytest.raises(BrocaError, match="separate"):
        key(replace(moments, mean=mean), ("qaa", "qad"))
