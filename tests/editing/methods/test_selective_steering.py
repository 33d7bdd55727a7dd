"""Selective Steering against loops over the paper's formulas, and the folded rotation against a hook at the norms."""

import math

import models
import numpy
import pytest
import torch

from editing.methods.material import Material
from editing.methods.selective_steering import (
    SelectiveSteering,
    norm_means,
    opposite_layers,
    steering_planes,
    turn,
)
from editing.plans.applied import applied
from neurons.architectures.reading_norms import ReadingNorm, reading_norms
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError, NothingToChangeError, UsageError
from neurons.models.source import load_model
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus

IDS = torch.tensor([[0, 5, 80, 33, 200, 7], [0, 90, 91, 17, 4, 260]])
PAIR = ("qaa", "qac")


@pytest.fixture(scope="module")
def text():
    return Corpus({k: tuple(models.sentences(k, 24, seed=3)) for k in PAIR}, "", "all")


def naive_plane(means, own):
    """B of every norm by loops and the covariance's eigenvectors."""
    candidates = []
    for source, target in means.numpy().transpose(0, 2, 1):
        candidates.append((target - source) / math.sqrt(sum((target - source) ** 2)))
    similarity = [sum(sum(a * b) for b in candidates) / len(candidates) for a in candidates]
    best = candidates[similarity.index(max(similarity))]
    centre = sum(candidates) / len(candidates)
    covariance = sum(numpy.outer(c - centre, c - centre) for c in candidates)
    component = numpy.linalg.eigh(covariance)[1][:, -1]
    component *= numpy.sign(component[numpy.abs(component).argmax()])
    planes = []
    for candidate in candidates:
        first = candidate if own else best
        second = component - sum(component * first) * first
        planes.append(numpy.stack([first, second / math.sqrt(sum(second**2))], 1))
    return torch.from_numpy(numpy.stack(planes))


@pytest.mark.parametrize("plane", ["global", "layer"])
def test_planes_are_those_of_the_paper(plane):
    generator = torch.Generator().manual_seed(4)
    means = torch.randn(6, 9, 2, generator=generator, dtype=torch.float64)
    found = steering_planes(means, plane)
    torch.testing.assert_close(found, naive_plane(means, plane == "layer"), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.mT @ found, torch.eye(2).double().expand(6, 2, 2), rtol=0, atol=1e-12)


def test_a_planted_plane_and_its_layers_are_found():
    """Three norms differ along e0, one along e0 + e1: the plane is that of e0 and e1."""
    e = torch.eye(5, dtype=torch.float64)
    differences = torch.stack([e[0], e[0], e[0] + e[1], e[0]])
    source = torch.stack([-e[0], -e[0], -e[0], 0.25 * e[0] + e[2]])
    planes = steering_planes(torch.stack([source, source + 3 * differences], 2))
    torch.testing.assert_close(planes, torch.stack([e[0], e[1]], 1).expand(4, 5, 2), rtol=0, atol=1e-12)
    norms = [ReadingNorm(layer, path, ()) for layer in (2, 5) for path in ("a", "b")]
    projections = torch.stack([source @ e[0], (source + 3 * differences) @ e[0]], 1)
    assert opposite_layers(norms, projections) == [2]
    with pytest.raises(BrocaError, match="one line"):
        steering_planes(torch.stack([source, source + e[0]], 2))
    with pytest.raises(BrocaError, match="same mean"):
        steering_planes(torch.stack([source, source], 2))


def test_means_are_over_texts(checkpoint_of, text):
    loaded = load_model(str(checkpoint_of("gpt2")), device="cpu")
    norms = reading_norms(loaded.model, loaded.anatomy, [1])
    found = norm_means(loaded, language_batches(loaded, text), norms)
    expected = torch.zeros(2, 64, 2, dtype=torch.float64)
    seen = {}
    hooks = {(n.path, 1): lambda values, _, at=at: seen.update({at: values[0]}) for at, n in enumerate(norms)}
    for k, language in enumerate(PAIR):
        for line in text.texts[language]:
            ids = loaded.tokenizer(line, return_tensors="pt").input_ids
            with torch.no_grad(), site_hooks(loaded.anatomy, hooks):
                loaded.model(ids)
            for at in seen:
                expected[at, :, k] += seen[at][1:].double().mean(0) / len(text.texts[language])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def rotation(basis, theta):
    """R entry by entry."""
    angle, (b1, b2) = math.radians(theta), basis.double().T.tolist()
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor(
        [
            [
                float(i == j)
                - b1[i] * b1[j] - b2[i] * b2[j]
                + cos * (b1[i] * b1[j] + b2[i] * b2[j])
                + sin * (b2[i] * b1[j] - b1[i] * b2[j])
                for j in range(len(b1))
            ]
            for i in range(len(b1))
        ],
        dtype=torch.float64,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3", "cohere", "opt", "falcon-new"])
def test_the_folded_rotation_is_a_hook_at_the_norms(checkpoint_of, text, family):
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    method = SelectiveSteering(theta=140.0, plane="layer", select="all")
    plan = method.plan_for(Material(loaded, text, languages=PAIR))
    assert all(edit.rank == 2 for edit in plan.edits)
    norms = reading_norms(loaded.model, loaded.anatomy, range(3))
    assert {(e.layer, e.block) for e in plan.edits} == {(n.layer, path) for n in norms for path in n.readers}
    turned = {(e.layer, e.notes["norm"]): rotation(e.right, 140.0).float() for e in plan.edits}
    hooks = {(path, layer): lambda values, _, R=R: values @ R.T for (layer, path), R in turned.items()}
    with torch.no_grad():
        before = loaded.model(IDS).logits
        with site_hooks(loaded.anatomy, hooks):
            hooked = loaded.model(IDS).logits
        with applied(loaded, plan):
            folded = loaded.model(IDS).logits
    change = float((hooked - before).abs().max())
    assert change > 0.01
    torch.testing.assert_close(folded, hooked, rtol=0, atol=1e-4 * change)


def test_a_rotation_keeps_lengths_and_half_a_turn_exchanges_signs():
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(7, 2, generator=generator, dtype=torch.float64)).Q
    for theta in (30.0, 90.0, 180.0):
        matrix = torch.eye(7).double() + basis @ turn(theta) @ basis.T
        torch.testing.assert_close(matrix, rotation(basis, theta), rtol=0, atol=1e-14)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(7).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(basis.T @ matrix, -basis.T, rtol=0, atol=1e-14)


def test_only_layers_with_opposite_signs_are_rotated(llama):
    pair = ("qaa", "qab")
    text = Corpus({k: tuple(models.sentences(k, 24, seed=3)) for k in pair}, "", "all")
    material = Material(llama, text, languages=pair)
    signs = {0: True, 1: True, 2: True}
    for edit in SelectiveSteering(select="all").plan_for(material).edits:
        source, target = edit.notes["projections"]
        signs[edit.layer] &= source * target < 0
    assert signs == {0: False, 1: True, 2: True}
    plan = SelectiveSteering().plan_for(material)
    assert sorted({edit.layer for edit in plan.edits}) == plan.metadata["settings"]["layers"] == [1, 2]
    with pytest.raises(NothingToChangeError, match="select=all"):
        SelectiveSteering().plan_for(Material(llama, text, languages=pair, layers=(0,)))


def test_what_cannot_be_rotated_is_refused(llama, checkpoint_of, text):
    with pytest.raises(UsageError, match="360"):
        SelectiveSteering(theta=360.0, select="all").plan_for(Material(llama, text, languages=PAIR))
    for languages in (None, ("qaa",), ("qaa", "qaa"), ("qaa", "qac", "qab")):
        with pytest.raises(UsageError):
            SelectiveSteering().plan_for(Material(llama, text, languages=languages))
    for family in ("mixtral", "olmo2"):
        with pytest.raises(BrocaError, match=family):
            SelectiveSteering().plan_for(
                Material(load_model(str(checkpoint_of(family)), device="cpu"), text, languages=PAIR)
            )
