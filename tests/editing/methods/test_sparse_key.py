"""Sparse keys against a slow general solver (SLSQP on k = p - n, p and n >= 0) and by planted neurons."""

import numpy
import pytest
import torch
from scipy.optimize import minimize

from editing.methods.key import KeyProblem, solve_key
from editing.methods.sparse_key import _Net, sparse_key
from neurons.errors import BrocaError, UsageError


def random_problem(units=14, constraints=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factor = draw(units, 2 * units) * draw(units, 1).exp()
    form = factor @ factor.T / units + 0.01 * torch.eye(units).double()
    targets = torch.zeros(constraints, dtype=torch.float64)
    targets[seed % constraints] = 1.0
    return KeyProblem(form, draw(units, constraints), targets, constraints)


def elastic_net(problem, l1):
    return _Net(problem).minimum(l1)


def objective(problem, k, l1):
    """The objective, by loops."""
    form, k = problem.form.tolist(), k.tolist()
    units = range(len(k))
    variance = sum(k[i] * form[i][j] * k[j] for i in units for j in units)
    return variance + l1 * sum(map(abs, k))


def slow_minimum(problem, l1):
    form, constraints = problem.form.numpy(), problem.constraints.numpy()
    units = len(form)

    def split(x):
        return x[:units] - x[units:]

    def cost(x):
        k = split(x)
        return k @ form @ k + l1 * x.sum()

    def slope(x):
        k = split(x)
        smooth = 2 * form @ k
        return numpy.concatenate([smooth + l1, -smooth + l1])

    both = numpy.concatenate([constraints, -constraints]).T
    start = solve_key(problem).numpy()
    result = minimize(
        cost,
        numpy.concatenate([start.clip(0), (-start).clip(0)]),
        jac=slope,
        bounds=[(0, None)] * (2 * units),
        constraints={
            "type": "eq",
            "fun": lambda x: both @ x - problem.targets.numpy(),
            "jac": lambda x: both,
        },
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 2000},
    )
    return torch.from_numpy(split(result.x))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("l1", [0.03, 0.3, 3.0, 30.0])
def test_equals_a_slow_solver(seed, l1):
    problem = random_problem(seed=seed)
    result = elastic_net(problem, l1)
    expected = slow_minimum(problem, l1)
    assert float((problem.constraints.T @ result - problem.targets).abs().max()) < 1e-10
    assert objective(problem, result, l1) <= objective(problem, expected, l1) * (1 + 1e-7)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("l1", [0.01, 0.2, 5.0, 1e3])
def test_is_stationary(l1):
    problem = random_problem(units=60, constraints=5, seed=7)
    result = elastic_net(problem, l1)
    smooth = 2 * problem.form @ result
    on = result != 0
    # The multipliers, from the support; then the slope is -l1 sign(k) there and at most l1 elsewhere.
    multipliers = torch.linalg.lstsq(
        problem.constraints[on], (-smooth - l1 * result.sign())[on][:, None]
    ).solution[:, 0]
    slope = smooth + problem.constraints @ multipliers
    torch.testing.assert_close(slope[on], -l1 * result.sign()[on], rtol=1e-7, atol=1e-7 * l1)
    assert bool((slope[~on].abs() <= l1 * (1 + 1e-6)).all())
    assert int(on.sum()) >= 5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.6])
def test_the_key_has_the_given_fraction_of_units(seed, fraction):
    problem = random_problem(units=60, constraints=4, seed=seed)
    vector, l1 = sparse_key(problem, fraction)
    support = vector.nonzero()[:, 0]
    assert len(support) == round(fraction * 60)
    # The support is that of the elastic net at its l1, and the key on it has minimum variance.
    assert elastic_net(problem, l1).nonzero()[:, 0].tolist() == support.tolist()
    assert float((problem.constraints.T @ vector - problem.targets).abs().max()) < 1e-10
    on_support = KeyProblem(
        problem.form[support][:, support], problem.constraints[support], problem.targets, problem.languages
    )
    torch.testing.assert_close(vector[support], solve_key(on_support))


def test_has_less_variance_than_random_supports():
    problem = random_problem(units=40, constraints=4, seed=4)

    def variance(k):
        return float(k @ problem.form @ k)

    result = variance(sparse_key(problem, 0.25)[0])
    generator = torch.Generator().manual_seed(0)
    others = []
    for _ in range(100):
        support = torch.randperm(40, generator=generator)[:10]
        k = torch.zeros(40, dtype=torch.float64)
        k[support] = solve_key(problem.on(support))
        others.append(variance(k))
    assert sum(result < other for other in others) >= 98


def test_finds_the_planted_neurons():
    # Neurons 3 and 8 have little variance; the rest have much, and almost equal means in both languages.
    generator = torch.Generator().manual_seed(0)
    means = 1 + 0.1 * torch.rand(20, 2, generator=generator, dtype=torch.float64)
    means[3] = torch.tensor([5.0, 0.5])
    means[8] = torch.tensor([3.0, -0.5])
    variances = torch.full((20,), 1e4, dtype=torch.float64)
    variances[[3, 8]] = 1.0
    problem = KeyProblem(torch.diag(variances), means, torch.tensor([1.0, 0.0]).double(), 2)
    vector, _ = sparse_key(problem, 2 / 20)
    assert vector.nonzero()[:, 0].tolist() == [3, 8]
    # 5 a + 3 b = 1 and a / 2 = b / 2.
    assert vector[[3, 8]].tolist() == pytest.approx([1 / 8, 1 / 8])


def test_all_units_need_no_penalty():
    problem = random_problem()
    vector, l1 = sparse_key(problem, 1.0)
    assert l1 == 0
    torch.testing.assert_close(vector, solve_key(problem))


@pytest.mark.parametrize("fraction", [0.0, -0.2, 1.1, float("nan"), 0.1])
def test_refuses_a_fraction_out_of_range(fraction):
    with pytest.raises(UsageError, match="sparse"):
        sparse_key(random_problem(), fraction)


def test_refuses_dependent_constraints():
    problem = random_problem()
    constraints = problem.constraints.clone()
    constraints[:, 2] = constraints[:, 1]
    bad = KeyProblem(problem.form, constraints, problem.targets, 3)
    for refused in (lambda: elastic_net(bad, 0.1), lambda: sparse_key(bad, 0.5)):
        with pytest.raises(BrocaError, match="separate"):
            refused()
