"""CULNIG: the prompt's score from plain autograd, the choice from loops over the formula."""

import math
import random

import pytest
import torch

from neurons.errors import BrocaError, UsageError
from neurons.scorers.culnig import MIN_Z, RECOGNITION_RATE, TOP_RATE, answer_scores, culnig
from neurons.scorers.selection import Selection, select

LAYERS, WIDTH, LANGUAGES = 2, 100, 4


def sums(seed):
    """(target, control, recognition, prompts, control prompts, recognition prompts) with planted neurons."""
    generator = torch.Generator().manual_seed(seed)

    def drawn():
        return torch.randn(LAYERS, WIDTH, LANGUAGES, generator=generator, dtype=torch.float64)

    counts = [torch.randint(5, 30, (LANGUAGES,), generator=generator) for _ in range(3)]
    target, control, recognition = drawn(), drawn().clamp(min=0), drawn()
    for k in range(LANGUAGES):
        target[0, 10 + k, k] = 9  # the language's own
        target[1, 20 + k, k] = 9  # ... but only because its answer is recognised
        recognition[1, 20 + k, k] = 9
        target[0, 30 + k, k] = control[0, 30 + k, k] = 9  # ... but without the question, too
    target[1, 50], control[1, 50] = 9, 0  # everybody's
    target, control, recognition = (
        of * count for of, count in zip((target, control, recognition), counts, strict=True)
    )
    return [target, control, recognition, *counts]


def naive_culnig(target, control, recognition, counts, top_rate, recognition_rate, least_z):
    """(values, members) as {(layer, neuron): [a number a language]} and a list of sets."""
    everywhere = [(layer, j) for layer in range(LAYERS) for j in range(WIDTH)]
    prompts, control_prompts, recognition_prompts = counts

    def best(of, rate, k):
        order = sorted(everywhere, key=lambda place: (-of[place][k], place))
        return set(order[: round(rate * len(everywhere))])

    values, seen = {}, {}
    for layer, j in everywhere:
        values[layer, j] = [
            target[layer][j][k] / prompts[k] - control[layer][j][k] / control_prompts[k]
            for k in range(LANGUAGES)
        ]
        if recognition is not None:
            seen[layer, j] = [x / n for x, n in zip(recognition[layer][j], recognition_prompts, strict=True)]
    members = []
    for k in range(LANGUAGES):
        own = best(values, top_rate, k)
        if recognition is not None:
            own -= best(seen, recognition_rate, k)
        for place in list(own):
            row = values[place]
            mean = math.fsum(row) / LANGUAGES
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in row) / LANGUAGES)
            z = 0.0 if len(set(row)) == 1 else (row[k] - mean) / deviation
            if z < least_z:
                own.remove(place)
        members.append(own)
    return values, members


def members_of(scores):
    return [{tuple(row) for row in scores.member[..., k].nonzero().tolist()} for k in range(LANGUAGES)]


@pytest.mark.parametrize("with_recognition", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_formula(seed, with_recognition):
    given = sums(seed)
    if not with_recognition:
        given[2] = given[5] = None
    chooser = random.Random(seed)
    settings = chooser.uniform(0.05, 0.5), chooser.uniform(0.05, 0.5), chooser.uniform(-0.5, 1)
    result = culnig(*given, *settings)
    lists = [None if tensor is None else tensor.tolist() for tensor in given]
    values, members = naive_culnig(*lists[:3], lists[3:], *settings)
    for place, row in values.items():
        assert result.values[place].tolist() == pytest.approx(row, abs=1e-13)
    assert members_of(result) == members
    assert result.notes == {"recognition": with_recognition}
    assert result.exclusivity is None
    for k, found in enumerate(select(result, Selection(top_rate=settings[0]))):
        expected = sorted(members[k], key=lambda place: (-values[place][k], place))
        assert [tuple(row) for row in found.rows.tolist()] == expected


def test_each_step_removes_what_was_planted_for_it():
    given = sums(0)
    own = [{(0, 10 + k)} for k in range(LANGUAGES)]
    recognised = [{(1, 20 + k)} for k in range(LANGUAGES)]
    rates = {"top_rate": 3 / 200, "recognition_rate": 1 / 200}
    assert members_of(culnig(*given, **rates)) == own
    without = given[:2] + [None] + given[3:5] + [None]
    found = members_of(culnig(*without, **rates))
    assert found == [a | b for a, b in zip(own, recognised, strict=True)]
    alike = members_of(culnig(*given, **rates, min_z=-10.0))
    assert alike == [one | {(1, 50)} for one in own]
    given[1] = torch.zeros_like(given[1])
    uncontrolled = members_of(culnig(*given, **rates | {"top_rate": 4 / 200}))
    assert uncontrolled == [one | {(0, 30 + k)} for k, one in enumerate(own)]


def test_published_rates():
    assert (TOP_RATE, RECOGNITION_RATE, MIN_Z) == (0.003, 0.01, 0.5)
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 500, 3, generator=generator, dtype=torch.float64)
    recognition = torch.rand(2, 500, 3, generator=generator, dtype=torch.float64)
    counts = torch.ones(3, dtype=torch.int64)
    given = target, torch.zeros_like(target), recognition, counts, counts, counts
    assert torch.equal(culnig(*given).member, culnig(*given, 0.003, 0.01, 0.5).member)


def test_equal_values_deviate_by_nothing():
    # 3 * .1 / 3 is not .1 in floating point: a deviation from that mean would be all rounding.
    target = torch.full((1, 10, 3), 0.1, dtype=torch.float64)
    target[0, 5:] = torch.tensor([0.3, 0.1, 0.1])
    ones = torch.ones(3, dtype=torch.int64)
    result = culnig(target, torch.zeros_like(target), None, ones, ones, None, top_rate=1.0)
    assert members_of_first_five(result) == 0
    assert result.member[0, 5:].tolist() == [[True, False, False]] * 5
    result = culnig(target, torch.zeros_like(target), None, ones, ones, None, top_rate=1.0, min_z=0.0)
    assert members_of_first_five(result) == 15


def members_of_first_five(scores):
    return int(scores.member[0, :5].sum())


def test_ties_go_by_layer_then_neuron():
    target = torch.zeros(3, 60, 2, dtype=torch.float64)
    target[..., 0] = 1
    ones = torch.ones(2, dtype=torch.int64)
    result = culnig(target, torch.zeros_like(target), None, ones, ones, None, top_rate=70 / 180)
    assert result.member[..., 0].flatten().tolist() == [True] * 70 + [False] * 110


def test_refusals():
    given = sums(0)
    with pytest.raises(UsageError, match="at least two"):
        culnig(*[tensor[..., :1] for tensor in given])
    for at, name in ((3, "prompts"), (4, "control prompts"), (5, "recognition prompts")):
        wrong = list(given)
        wrong[at] = given[at] * torch.tensor([1, 1, 0, 1])
        with pytest.raises(UsageError, match=f"number 3 has no {name}"):
            culnig(*wrong, 0.1)
    for at in (2, 5):
        wrong = list(given)
        wrong[at] = None
        with pytest.raises(UsageError, match="both or neither"):
            culnig(*wrong, 0.1)
    with pytest.raises(BrocaError, match="control score is negative"):
        culnig(given[0], -given[1], *given[2:], 0.1)
    with pytest.raises(BrocaError, match="not finite"):
        culnig(given[0] * torch.inf, *given[1:], 0.1)
    with pytest.raises(UsageError, match=r"top rate 0.001 of 200 neurons is none"):
        culnig(*given, top_rate=0.001)
    for rate in (0.0, 1.2, math.nan):
        with pytest.raises(UsageError, match="top rate"):
            culnig(*given, top_rate=rate)
        with pytest.raises(UsageError, match="recognition rate"):
            culnig(*given, 0.1, recognition_rate=rate)


# --- one batch -----------------------------------------------------------------------------------


def batch(seed, rows=5, length=7, width=6):
    generator = torch.Generator().manual_seed(seed)
    activation = torch.randn(rows, length, width, generator=generator)
    gradient = torch.randn(rows, length, width, generator=generator)
    probability = torch.rand(rows, generator=generator)
    counted = torch.rand(rows, length, generator=generator) < 0.6
    counted[:, 2] = True
    return activation, gradient, probability, counted


@pytest.mark.parametrize("seed", range(5))
def test_answer_scores_equal_the_formula(seed):
    activation, gradient, probability, counted = batch(seed)
    found = answer_scores(activation, gradient, probability, counted)
    assert found.dtype == torch.float64
    assert found.shape == (5, 6)
    for row in range(5):
        for j in range(6):
            products = [
                float(activation[row, t, j]) * float(gradient[row, t, j])
                for t in range(7)
                if bool(counted[row, t])
            ]
            assert float(found[row, j]) == pytest.approx(float(probability[row]) * max(products), rel=1e-5)


def test_a_padded_row_stays_negative():
    activation = torch.tensor([[[2.0], [1.0], [0.0], [0.0]], [[2.0], [1.0], [3.0], [4.0]]])
    gradient = torch.tensor([[[-3.0], [-2.0], [0.0], [5.0]], [[-3.0], [-2.0], [-1.0], [-2.0]]])
    counted = torch.tensor([[True, True, False, False], [True, True, True, True]])
    found = answer_scores(activation, gradient, torch.tensor([0.5, 0.25]), counted)
    assert found.tolist() == [[-1.0], [-0.5]]
    activation[0, 2] = torch.nan  # what stands in padding does not matter
    assert answer_scores(activation, gradient, torch.tensor([0.5, 0.25]), counted)[0].tolist() == [-1.0]


def test_half_precision_is_multiplied_in_full():
    activation, gradient, probability, counted = batch(0)
    found = answer_scores(activation.bfloat16(), gradient.bfloat16(), probability, counted)
    expected = answer_scores(
        activation.bfloat16().double(), gradient.bfloat16().double(), probability, counted
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_answer_scores_of_a_model_made_by_hand():
    """p = softmax(W relu(a_1) + W relu(a_2))[y]; dp/da by the quotient rule."""
    weights = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.2]], dtype=torch.float64)
    activation = torch.tensor([[[0.4, 0.9], [1.2, -0.3]]], dtype=torch.float64, requires_grad=True)
    answer = torch.softmax(torch.relu(activation).sum(1) @ weights.T, -1)[:, 1]
    (gradient,) = torch.autograd.grad(answer.sum(), activation)
    found = answer_scores(activation.detach(), gradient, answer.detach(), torch.ones(1, 2, dtype=torch.bool))
    logits = [sum(w * x for w, x in zip(row, (1.6, 0.9), strict=True)) for row in weights.tolist()]
    total = sum(math.exp(x) for x in logits)
    p = [math.exp(x) / total for x in logits]
    for j, values in enumerate(((0.4, 1.2), (0.9, -0.3))):
        mean = sum(p[v] * float(weights[v, j]) for v in range(3))
        slope = p[1] * (float(weights[1, j]) - mean)
        products = [a * slope if a > 0 else 0.0 for a in values]
        assert float(found[0, j]) == pytest.approx(p[1] * max(products), rel=1e-12)


def test_a_prompt_without_a_counted_token_is_refused():
    activation, gradient, probability, counted = batch(0)
    counted[3] = False
    with pytest.raises(BrocaError, match="no counted token"):
        answer_scores(activation, gradient, probability, counted)
