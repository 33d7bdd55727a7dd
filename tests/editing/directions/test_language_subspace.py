"""The language subspace against Gram-Schmidt, planted means, and its refusals."""

import pytest
import torch

from editing.directions.language_subspace import language_subspace
from editing.directions.length import into
from neurons.errors import BrocaError, UsageError


def naive_projector(means):
    """Onto what the centred means span: Gram-Schmidt, number by number."""
    rows = means.tolist()
    count, width = len(rows), len(rows[0])
    centre = [sum(row[i] for row in rows) / count for i in range(width)]
    kept = []
    for row in rows[:-1]:
        rest = [row[i] - centre[i] for i in range(width)]
        for unit in kept:
            along = sum(a * b for a, b in zip(rest, unit, strict=True))
            rest = [a - along * b for a, b in zip(rest, unit, strict=True)]
        length = sum(x * x for x in rest) ** 0.5
        kept.append([x / length for x in rest])
    return [[sum(u[i] * u[j] for u in kept) for j in range(width)] for i in range(width)]


def random_means(languages=4, width=7, seed=0):
    return torch.randn(languages, width, generator=torch.Generator().manual_seed(seed)).double() + 3


@pytest.mark.parametrize("languages", [2, 3, 5])
def test_spans_the_centred_means(languages):
    means = random_means(languages)
    basis, explained = language_subspace(means)
    assert basis.shape == (7, languages - 1)
    torch.testing.assert_close(basis.T @ basis, torch.eye(languages - 1).double())
    torch.testing.assert_close(basis @ basis.T, torch.tensor(naive_projector(means), dtype=torch.float64))
    assert explained == pytest.approx(1)


def test_holds_every_difference_of_two_languages():
    means = random_means()
    basis, _ = language_subspace(means)
    for one in means:
        for other in means:
            torch.testing.assert_close(into(basis, one - other), one - other)


def test_a_lower_rank_keeps_what_differs_most():
    # Centred: the first two coordinates carry the spread, the third a little of it.
    means = torch.tensor([[9.0, 0, 0.1], [-9.0, 0, 0.1], [0, 3.0, -0.1], [0, -3.0, -0.1]]).double()
    basis, explained = language_subspace(means, rank=1)
    torch.testing.assert_close(basis[:, 0], torch.tensor([1.0, 0, 0]).double())
    assert explained == pytest.approx(162 / (162 + 18 + 0.04))


def test_means_that_span_less():
    line = torch.tensor([1.0, 2.0, 2.0]).double()
    basis, _ = language_subspace(torch.stack([line, 2 * line, 4 * line]))
    torch.testing.assert_close(basis, line[:, None] / 3)


def test_refusals():
    with pytest.raises(UsageError, match="rank 3"):
        language_subspace(random_means(3), rank=3)
    with pytest.raises(UsageError, match="rank 0"):
        language_subspace(random_means(3), rank=0)
    with pytest.raises(BrocaError, match="do not differ"):
        language_subspace(torch.ones(3, 4))
