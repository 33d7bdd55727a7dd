"""LEACE: the projection against the paper's formula entry by entry, and equal means in a model."""

import models
import pytest
import torch
from scipy.linalg import fractional_matrix_power

from editing.methods.leace import Leace, eraser
from editing.methods.material import Material
from editing.plans.applied import applied
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.recording.text_pass import numbered, read_text
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus


def tokens_of(count, d, groups, seed=0):
    """float64 [count, d] of correlated values whose means differ between groups, and the group of each."""
    generator = torch.Generator().manual_seed(seed)
    of_token = torch.arange(count) % groups
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    means = torch.randn(groups, d, generator=generator, dtype=torch.float64)
    return torch.randn(count, d, generator=generator, dtype=torch.float64) @ mixing + means[
        of_token
    ], of_token


@pytest.mark.parametrize("groups", [2, 4])
def test_the_projection_is_the_papers(groups):
    """P = I - W^+ (W S_xz)(W S_xz)^+ W of theorem 4.2, with one-hot z, from loops over the tokens."""
    x, group = tokens_of(400, 6, groups)
    mean = x.mean(0)
    sigma, sigma_xz = torch.zeros(6, 6).double(), torch.zeros(6, groups).double()
    for value, k in zip(x, group.tolist(), strict=True):
        z = torch.tensor(
            [float(k == j) - float((group == j).double().mean()) for j in range(groups)]
        ).double()
        sigma += torch.outer(value - mean, value - mean) / len(x)
        sigma_xz += torch.outer(value - mean, z) / len(x)
    whitening = torch.from_numpy(fractional_matrix_power(sigma.numpy(), -0.5)).double()
    # The one-hot z are linearly dependent, so the pseudo-inverse drops one dimension that is rounding.
    seen = whitening @ sigma_xz
    expected = torch.linalg.inv(whitening) @ (seen @ torch.linalg.pinv(seen, rtol=1e-8)) @ whitening
    deviations = torch.stack([x[group == k].mean(0) - mean for k in range(groups)], 1)
    written, read = eraser(deviations, sigma)
    assert written.shape == read.shape == (6, groups - 1)
    torch.testing.assert_close(written @ read.T, expected, rtol=1e-9, atol=1e-9)


def test_another_oblique_projection_changes_more():
    x, group = tokens_of(500, 5, 2, seed=3)
    mean = x.mean(0)
    difference = x[group == 1].mean(0) - x[group == 0].mean(0)
    deviations = torch.stack([x[group == k].mean(0) - mean for k in range(2)], 1)
    written, read = eraser(deviations, (x - mean).T @ (x - mean) / len(x))

    def change(left, right):
        return float(((x - mean) @ right @ left.T).square().sum(1).mean())

    orthogonal = difference[:, None] / difference.norm()
    assert change(written, read) < change(orthogonal, orthogonal)


def test_a_direction_without_variance_is_no_dimension():
    x, group = tokens_of(200, 4, 2, seed=5)
    x[:, 2] = 7.0
    mean = x.mean(0)
    deviations = torch.stack([x[group == k].mean(0) - mean for k in range(2)], 1)
    written, read = eraser(deviations, (x - mean).T @ (x - mean) / len(x))
    assert bool(torch.isfinite(written).all() & torch.isfinite(read).all())
    with pytest.raises(BrocaError, match="nothing to erase"):
        eraser(torch.zeros(4, 2).double(), torch.eye(4).double())


@pytest.fixture(scope="module")
def text():
    return Corpus({k: tuple(models.sentences(k, 60, seed=8)) for k in ("qaa", "qab", "qac")}, "", "all")


def output_means(loaded, text, site, layer):
    """float64 [d, K], the mean of a site's values over the counted tokens of each language; and at the start."""
    batches = language_batches(loaded, text)
    sums = torch.zeros(len(batches), loaded.anatomy.residual, dtype=torch.float64)
    counts, starts = torch.zeros(len(batches)), []

    def read(values, _, at):
        sums[at.language] += at.rows(values).double().sum(0)
        counts[at.language] += int(at.counted.sum())
        starts.append(values[at.batch.at_start].double())

    read_text(loaded, numbered(batches), {(site, layer): read})
    return (sums / counts[:, None]).T, torch.cat(starts)


@pytest.mark.parametrize("model_type, module", [("llama", "mlp"), ("llama", "attn"), ("opt", "mlp")])
def test_outputs_of_the_first_edited_module_have_equal_means(checkpoint_of, text, model_type, module):
    loaded = load_model(str(checkpoint_of(model_type)), device="cpu")
    site = f"{module}_out"
    before, starts = output_means(loaded, text, site, 1)
    plan = Leace().plan_for(Material(loaded, text, layers=(1,), blocks=(module,)))
    assert plan.edits[0].rank == 2
    with applied(loaded, plan):
        after, starts_after = output_means(loaded, text, site, 1)
    spread = (before - before.mean(1, keepdim=True)).norm()
    assert float((after - after.mean(1, keepdim=True)).norm()) < 1e-3 * float(spread)
    batches = language_batches(loaded, text)
    weights = torch.tensor([sum(int(b.counted.sum()) for b in of) for of in batches.values()]).double()
    torch.testing.assert_close(after.mean(1), before @ weights / weights.sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(starts_after, starts, rtol=1e-4, atol=1e-5)


def test_half_a_strength_leaves_half_of_the_difference(checkpoint_of, text):
    loaded = load_model(str(checkpoint_of("llama")), device="cpu")
    before, _ = output_means(loaded, text, "mlp_out", 0)
    plan = Leace().plan_for(Material(loaded, text, layers=(0,), blocks=("mlp",)))
    with applied(loaded, plan.scaled(0.5)):
        after, _ = output_means(loaded, text, "mlp_out", 0)
    torch.testing.assert_close(
        after[:, 1] - after[:, 0], (before[:, 1] - before[:, 0]) / 2, rtol=1e-3, atol=1e-5
    )


def test_what_it_cannot_erase_is_refused(checkpoint_of, text):
    loaded = load_model(str(checkpoint_of("llama")), device="cpu")
    with pytest.raises(UsageError, match="one language"):
        Leace().plan_for(Material(loaded, Corpus({"qaa": text.texts["qaa"]}, "", "all")))
    with pytest.raises(UsageError, match="strength"):
        Leace(strength=0).plan_for(Material(loaded, text))
    with pytest.raises(BrocaError, match="site=own"):
        Leace().plan_for(Material(load_model(str(checkpoint_of("gemma2")), device="cpu"), text))
    with pytest.raises(UsageError, match="--blocks attn"):
        Leace().plan_for(Material(load_model(str(checkpoint_of("mixtral")), device="cpu"), text))
