"""Low-rank shift against its formulas in loops, planted subspaces, and windows by hand."""

import itertools
import math
import statistics

import pytest
import torch

from editing.directions.low_rank_shift import low_rank_shift, window
from neurons.errors import BrocaError


def naive(differences, seed=0, bootstraps=20):
    """(r_eff, r_gap, r, mass, stability, projector) from the formulas; SVDs of the full matrices."""
    _, values, right = torch.linalg.svd(differences, full_matrices=True)
    values = values.tolist()
    total = sum(s * s for s in values)
    shares = [s * s / total for s in values]
    effective = math.ceil(math.exp(-sum(p * math.log(p) for p in shares if p > 0)))
    ratios = [values[i] / values[i + 1] for i in range(min(12, len(values) - 1))]
    gap = ratios.index(max(ratios)) + 1
    rank = max(1, min(effective, 12, gap))
    generator = torch.Generator().manual_seed(seed)
    projectors = []
    for _ in range(bootstraps):
        drawn = torch.randint(len(differences), (len(differences),), generator=generator)
        _, strengths, basis = torch.linalg.svd(differences[drawn], full_matrices=False)
        basis = basis[: min(rank, sum(s > 1e-9 * strengths[0] for s in strengths))]
        projectors.append(basis.T @ basis)
    overlaps = [float(torch.trace(a @ b) / torch.trace(a)) for a, b in itertools.combinations(projectors, 2)]
    mass = sum(shares[:rank])
    return effective, gap, rank, mass, statistics.median(overlaps), right[:rank].T @ right[:rank]


def planted(strengths, texts=40, width=9, noise=0.0, seed=0):
    """Differences whose singular values are ``strengths``, and noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(texts, len(strengths), generator=generator).double()).Q
    columns = torch.linalg.qr(torch.randn(width, len(strengths), generator=generator).double()).Q
    made = rows * torch.tensor(strengths, dtype=torch.float64) @ columns.T
    return made + noise * torch.randn(texts, width, generator=generator).double(), columns


@pytest.mark.parametrize(
    ("strengths", "noise"),
    [([9.0, 8.0, 7.0], 0.02), ([5.0], 0.3), ([6.0, 5.0, 1.0, 0.9], 0.01), ([1.0], 1.0)],
)
@pytest.mark.parametrize("texts", [40, 8])
def test_equals_the_formulas(strengths, noise, texts):
    differences, _ = planted(strengths, texts, noise=noise)
    effective, gap, rank, mass, stability, projector = naive(differences)
    found = low_rank_shift(differences)
    assert (found.effective_rank, found.gap_rank, found.rank) == (effective, gap, rank)
    assert found.mass == pytest.approx(mass, rel=1e-12)
    assert found.stability == pytest.approx(stability, rel=1e-6)
    torch.testing.assert_close(found.basis @ found.basis.T, projector)


def test_finds_the_planted_subspace():
    differences, columns = planted([4.0, 4.0, 4.0])
    found = low_rank_shift(differences)
    # Three equal values: exp of the entropy is 3 exactly, and after the third nothing is left.
    assert (found.effective_rank, found.gap_rank, found.rank) == (3, 3, 3)
    torch.testing.assert_close(found.basis @ found.basis.T, columns @ columns.T)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(3).double())
    assert found.mass == pytest.approx(1)
    assert found.stability == pytest.approx(1)


def test_the_rank_stops_at_twelve():
    differences, _ = planted([3.0] * 20, texts=60, width=30)
    found = low_rank_shift(differences)
    assert found.effective_rank == 20
    assert found.rank <= 12


def test_only_the_first_twelve_gaps_count():
    # The widest gap comes after the fifteenth value, the widest of the first twelve after the fifth.
    differences, _ = planted([4.0] * 5 + [3.0] * 10 + [0.1] * 5, texts=60, width=30)
    found = low_rank_shift(differences)
    assert (found.gap_rank, found.rank) == (5, 5)


def test_what_no_two_texts_share_is_not_stable():
    noise = torch.randn(30, 200, generator=torch.Generator().manual_seed(3)).double()
    steady = noise + 5
    assert low_rank_shift(noise).stability < 0.8
    assert low_rank_shift(steady).stability > 0.9


def test_seeds_change_the_bootstraps_only():
    differences, _ = planted([5.0, 4.0], noise=0.5)
    first, again, other = (low_rank_shift(differences, seed) for seed in (0, 0, 1))
    assert first.stability == again.stability != other.stability
    torch.testing.assert_close(first.basis, other.basis)


def test_one_text_has_one_direction():
    found = low_rank_shift(torch.tensor([[0.0, -3.0, 4.0]]))
    torch.testing.assert_close(found.basis[:, 0], torch.tensor([0.0, -0.6, 0.8]).double())
    assert (found.rank, found.mass, found.stability) == (1, pytest.approx(1), pytest.approx(1))


def test_refuses_languages_that_do_not_differ():
    with pytest.raises(BrocaError, match="do not differ"):
        low_rank_shift(torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("worth", "expected"),
    [
        ([1, 1, 1, 1, 1, 1, 9], (1, 6)),
        ([0, 0, 5, 5, 5, 0, 0, 0, 0], (2, 4)),  # longer runs add nothing: the shortest
        ([5, 5, 5, 0, 0, 0, 5, 5, 5], (0, 2)),  # of equals the first
        ([0.5, 0.25], (0, 1)),  # fewer layers than a window has
        ([1.0] * 10, (0, 5)),
    ],
)
def test_window(worth, expected):
    assert window(worth) == expected


def test_window_equals_all_runs_tried():
    worth = torch.rand(14, generator=torch.Generator().manual_seed(5)).tolist()
    runs = {}
    for first in range(14):
        for last in range(first + 2, min(first + 6, 14)):
            runs[first, last] = sum(worth[layer] for layer in range(first, last + 1))
    assert runs[window(worth)] == pytest.approx(max(runs.values()))
