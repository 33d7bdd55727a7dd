"""Language-confusion neurons: the formula of a score, against loops over numbers."""

import math

import pytest
import torch

from neurons.errors import UsageError
from neurons.scorers.language_confusion import language_confusion, rises


def test_rises_equal_the_formula():
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(11, generator=generator)
    changes = torch.randn(4, 11, generator=generator)
    found = rises(changes, z.log_softmax(-1), 6)
    for i in range(4):
        moved = [float(z[v]) + float(changes[i, v]) for v in range(11)]
        after = moved[6] - math.log(sum(map(math.exp, moved)))
        before = float(z[6]) - math.log(sum(map(math.exp, z.tolist())))
        assert float(found[i]) == pytest.approx(after - before, abs=1e-6)


def test_scores_are_means_less_those_of_the_sibling():
    counted = torch.tensor([[[6.0, 1.0], [0.0, 3.0]], [[2.0, 0.0], [4.0, 0.0]]]).double()
    sibling = torch.tensor([[[2.0, 1.0], [0.0, 6.0]], [[2.0, 0.0], [0.0, 0.0]]]).double()
    prompts = torch.tensor([2, 1])
    found = language_confusion(counted, prompts)
    assert found.values.tolist() == [[[3, 1], [0, 3]], [[1, 0], [2, 0]]]
    assert torch.equal(found.member, found.values > 0)
    found = language_confusion(counted, prompts, sibling)
    assert found.values.tolist() == [[[2, 0], [0, -3]], [[0, 0], [2, 0]]]
    assert found.member.sum() == 2
    with pytest.raises(UsageError, match="2 layers of 1 neurons"):
        language_confusion(counted, prompts, sibling[:, :1])
    with pytest.raises(UsageError, match="number 2"):
        language_confusion(counted, torch.tensor([1, 0]))
