"""ARA: the objective against loops over its formula, and minima that are known in closed form."""

import math

import models
import pytest
import torch

from editing.methods.ara import (
    Ara,
    Objective,
    few_texts,
    make_problem,
    mean_distance,
    module_edit,
    solve,
)
from editing.methods.austeer import text_responses
from editing.methods.material import Material
from editing.plans.applied import applied
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.recording.text_pass import numbered, read_text
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus

IDS = torch.tensor([[0, 5, 80, 33, 200, 7], [0, 90, 91, 17, 4, 260]])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_of(inputs):
    return inputs.T @ inputs / len(inputs) + 1e-3 * torch.eye(inputs.shape[1]).double()


def new_weight(weight, problem, solution):
    """W' of a solution, in float64."""
    changed = weight + solution.left @ problem.keys.T
    return changed if solution.scale is None else solution.scale[:, None] * changed


def naive_distance(rows, to, neighbors):
    means = []
    for row in rows.tolist():
        distances = sorted(math.dist(row, other) for other in to.tolist())
        means.append(sum(distances[:neighbors]) / len(distances[:neighbors]))
    return sum(means) / len(means)


def naive_objective(weight, changed, second, source, target, steer, overcorrect, neighbors):
    """The docstring's formula by loops over rows."""
    before, aims = source @ weight.T, target @ weight.T
    sigma = naive_distance(before, aims, neighbors)
    kept = sum(float(row @ second @ row) for row in changed - weight)
    pull = naive_distance(source @ changed.T, aims, neighbors)
    push = naive_distance(source @ changed.T, before, neighbors)
    return kept / sigma**2 + steer / sigma * (pull - overcorrect * push)


@pytest.mark.parametrize("row_norms", [False, True])
@pytest.mark.parametrize("overcorrect, neighbors", [(0.0, 1), (0.8, 3), (0.5, 99)])
def test_the_objective_is_the_formula(row_norms, overcorrect, neighbors):
    weight, source, target, kept = drawn(5, 7), drawn(4, 7, seed=1), drawn(6, 7, seed=2), drawn(30, 7, seed=3)
    problem = make_problem(weight, source, target, second_of(kept))
    left = 0.3 * drawn(5, problem.keys.shape[1], seed=4)
    changed = weight + left @ problem.keys.T
    if row_norms:
        changed = changed * (weight.norm(dim=1) / changed.norm(dim=1))[:, None]
    sigma = naive_distance(source @ weight.T, target @ weight.T, neighbors)
    found = Objective(0.7, overcorrect, neighbors, row_norms).at(problem, left, sigma)[0]
    expected = naive_objective(weight, changed, second_of(kept), source, target, 0.7, overcorrect, neighbors)
    assert float(found) == pytest.approx(expected, rel=1e-9)
    change = problem.change(left, problem.row_scale(left) if row_norms else None)
    assert float(change.sqrt()) == pytest.approx(float((changed - weight).norm()), rel=1e-9)


@pytest.mark.parametrize("steer", [0.05, 0.4, 50.0])
def test_one_text_has_a_minimum_in_closed_form(steer):
    """With one text on either side and no push, D x = t (y - W x) with t = min(1, steer / (2 m)), m = 1 / (x^T S^-1 x)."""
    weight, x, y, kept = drawn(5, 7), drawn(1, 7, seed=1), drawn(1, 7, seed=2), drawn(40, 7, seed=3)
    second = second_of(kept)
    inverse = torch.linalg.inv(second)
    m = 1 / float(x[0] @ inverse @ x[0])
    fraction = min(1.0, steer / (2 * m))
    expected = weight + fraction * m * torch.outer(weight @ (y - x)[0], inverse @ x[0])
    problem = make_problem(weight, x, y, second.clone())
    solution = solve(problem, Objective(steer, 0.0, 1, False))
    found = new_weight(weight, problem, solution)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert 1 - solution.distance == pytest.approx(fraction, abs=1e-6)


def test_without_steering_nothing_changes():
    weight, source, target, kept = drawn(5, 7), drawn(4, 7, seed=1), drawn(6, 7, seed=2), drawn(40, 7, seed=3)
    problem = make_problem(weight, source, target, second_of(kept))
    solution = solve(problem, Objective(0.0, 1.0, 2, False))
    assert float(solution.left.abs().max()) == 0 and solution.kept == 0 and solution.distance == 1


@pytest.mark.parametrize("row_norms", [False, True])
def test_no_other_change_is_better(row_norms):
    """Steps of gradient descent over the whole matrix, from the solution, do not lower the objective (no row norms),
    and with row norms the rows keep them."""
    weight, source, target, kept = drawn(5, 9), drawn(4, 9, seed=1), drawn(3, 9, seed=2), drawn(60, 9, seed=3)
    second = second_of(kept)
    problem = make_problem(weight, source, target, second.clone())
    solution = solve(problem, Objective(0.5, 0.0, 3, row_norms))
    changed = new_weight(weight, problem, solution)
    assert solution.distance < 0.95
    if row_norms:
        torch.testing.assert_close(changed.norm(dim=1), weight.norm(dim=1), rtol=1e-12, atol=0)
        return
    reached = naive_objective(weight, changed, second, source, target, 0.5, 0.0, 3)
    for seed in range(30):
        other = changed + 1e-3 * drawn(5, 9, seed=seed + 10)
        assert naive_objective(weight, other, second, source, target, 0.5, 0.0, 3) > reached
    free = changed.clone().requires_grad_(True)
    difference = free - weight
    sigma = naive_distance(source @ weight.T, target @ weight.T, 3)
    pull = mean_distance(source @ free.T, target @ weight.T, 3) / sigma
    ((difference @ second * difference).sum() / sigma**2 + 0.5 * pull).backward()
    assert float(free.grad.abs().max()) < 1e-5


def test_a_planted_source_moves_and_kept_languages_stay():
    """The source has two dimensions that the kept languages lack: its outputs reach the target's, theirs hardly move."""
    weight = drawn(6, 10)
    kept, source, target = (drawn(200, 10, seed=s) for s in (1, 2, 3))
    kept[:, :2] *= 1e-3
    source[:, :2] += 4.0
    target[:, :2] *= 1e-3
    problem = make_problem(weight, source[:20], target[:20], second_of(torch.cat([kept, target])))
    solution = solve(problem, Objective(0.3, 0.0, 1, True))
    changed = new_weight(weight, problem, solution)
    assert solution.distance < 0.4
    moved = (kept @ (changed - weight).T).norm() / (kept @ weight.T).norm()
    assert float(moved) < 0.15 and solution.kept < 0.15
    # Texts that the edit has not seen move too.
    aims = target[20:] @ weight.T
    before, after = (mean_distance(source[20:] @ w.T, aims, 1) for w in (weight, changed))
    assert float(after) < 0.6 * float(before)
    edit = module_edit((0, "mlp"), problem, solution)
    torch.testing.assert_close(edit.apply(weight), changed, rtol=1e-5, atol=1e-6)
    assert edit.notes["change_norm"] == pytest.approx(float((changed - weight).norm()), rel=1e-6)


def test_a_row_of_zeros_stays_one():
    weight, source, target, kept = drawn(5, 7), drawn(4, 7, seed=1), drawn(6, 7, seed=2), drawn(40, 7, seed=3)
    weight[2] = 0
    problem = make_problem(weight, source, target, second_of(kept))
    solution = solve(problem, Objective(0.5, 0.0, 1, True))
    assert float(new_weight(weight, problem, solution)[2].norm()) < 1e-9


@pytest.fixture(scope="module")
def text():
    return Corpus({k: tuple(models.sentences(k, 40, seed=5)) for k in models.LANGUAGES}, "", "all")


def outputs(loaded, text, site, layer):
    """language -> float64 [texts, d], means at a site; and all tokens' values, the start tokens' first."""
    means = {language: [] for language in text.languages}
    tokens = {language: [] for language in (*text.languages, "start")}

    def read(values, _, at):
        language = text.languages[at.language]
        for row, counted in zip(values.double(), at.counted, strict=True):
            means[language].append(row[counted].mean(0))
            tokens[language].append(row[counted])
        if language != "qaa":
            tokens["start"].append(values.double()[at.batch.at_start])

    read_text(loaded, numbered(language_batches(loaded, text)), {(site, layer): read})
    of_texts = {language: torch.stack(rows) for language, rows in means.items()}
    return of_texts, {language: torch.cat(rows) for language, rows in tokens.items()}


@pytest.mark.parametrize("family, module", [("llama", "mlp"), ("gpt2", "attn"), ("gemma2", "mlp")])
def test_a_model_with_the_edit_has_the_objective_that_was_solved(checkpoint_of, text, family, module):
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    material = Material(loaded, text, languages=("qaa", "qab", "qac"), layers=(1,), blocks=(module,))
    method = Ara(steer=1.0, eps=1e-9)
    plan = method.plan_for(material)
    squares = method.problems(material)[1, module].kept_squares.sum()
    means, tokens = outputs(loaded, text, f"{module}_out", 1)
    with applied(loaded, plan):
        new_means, new_tokens = outputs(loaded, text, f"{module}_out", 1)
    notes = plan.edits[0].notes
    sigma, reached = (mean_distance(of["qaa"], means["qab"], 1) for of in (means, new_means))
    assert float(reached / sigma) == pytest.approx(notes["distance"], rel=1e-5)
    assert notes["distance"] < 0.8
    change = {k: new_tokens[k] - tokens[k] for k in tokens}
    kept = torch.cat([change["qab"], change["qac"]]).square().sum(1).mean()
    kept += change["start"].mean(0).square().sum()
    expected = notes["kept"] ** 2 * float(squares)
    assert float(kept) == pytest.approx(expected, rel=1e-4)
    relative = {k: float(change[k].norm() / tokens[k].norm()) for k in change}
    assert max(relative["qab"], relative["qac"]) < 0.8 * relative["qaa"]


def test_inputs_of_other_widths_in_other_layers(tmp_path, text):
    loaded = load_model(str(models.build_wrapper(tmp_path, "deepseek_v3")), device="cpu")
    assert loaded.anatomy.width("mlp_common", 0) != loaded.anatomy.width("mlp_common", 1)
    given = Material(loaded, text, languages=("qaa", "qab", "qac"), layers=(0,), blocks=("mlp",))
    (edit,) = Ara().plan_for(given).edits
    assert len(edit.right) == 96 and edit.notes["distance"] < 1
    means, _ = outputs(loaded, text, "mlp_common", 0)
    sites = ["mlp_common", "mlp_in"]
    found, _ = text_responses(loaded, text, sites, None)
    mean = found["qaa"]["mlp_common"][:, 0].double().mean(0)
    torch.testing.assert_close(mean, means["qaa"].mean(0), rtol=1e-4, atol=1e-5)
    assert found["qaa"]["mlp_common"].shape[2] == 96 and not found["qaa"]["mlp_common"][:, 1:, 32:].any()
    # A shared expert is the last group of the neurons.
    torch.testing.assert_close(found["qaa"]["mlp_common"][:, 1:, :32], found["qaa"]["mlp_in"][:, 1:, 128:])
    few, _ = text_responses(loaded, text, sites, None, [1])
    assert torch.equal(few["qaa"]["mlp_in"][:, 1], found["qaa"]["mlp_in"][:, 1])
    assert not few["qaa"]["mlp_in"][:, [0, 2, 3]].any()


def test_equal_runs_give_equal_bytes(llama, text):
    plans = [Ara().plan_for(Material(llama, text, languages=("qaa", "qab"), layers=(0,))) for _ in range(2)]
    assert plans[0].to_bytes() == plans[1].to_bytes()
    half = Ara(strength=0.5).plan_for(Material(llama, text, languages=("qaa", "qab"), layers=(0,)))
    torch.testing.assert_close(half.edits[0].left, 0.5 * plans[0].edits[0].left)


def test_a_search_tries_whole_numbers_of_neighbors(llama):
    assert Ara.knobs(Material(llama))["neighbors"].whole and not Ara.knobs(Material(llama))["steer"].whole


def test_texts_are_taken_evenly():
    text = Corpus({"qaa": ("a", "", "b", "c", "d", "e", "f", "g")}, "", "all")
    assert few_texts(text, 3).texts["qaa"] == ("a", "", "b", "", "d", "", "", "")
    assert few_texts(text, 99) == text


def test_what_cannot_be_solved_is_refused(llama, checkpoint_of, text):
    same = drawn(3, 7)
    with pytest.raises(BrocaError, match="equal"):
        solve(make_problem(drawn(5, 7), same, same, second_of(drawn(40, 7))), Objective(1.0, 0.0, 1, True))
    with pytest.raises(BrocaError, match="0 in every text"):
        make_problem(drawn(5, 7), 0 * same, same, second_of(drawn(40, 7)))
    for settings, given in (({"eps": 0.0}, ("qaa", "qab")), ({}, ("qaa",)), ({}, ("qaa", "qxx"))):
        with pytest.raises(UsageError):
            Ara(**settings).plan_for(Material(llama, text, languages=given))
    mixture = load_model(str(checkpoint_of("mixtral")), device="cpu")
    with pytest.raises(UsageError, match="--blocks attn"):
        Ara().plan_for(Material(mixture, text, languages=("qaa", "qab")))
