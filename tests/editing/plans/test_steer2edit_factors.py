"""Files of Steer2Edit's released code: applied as that code applies them, and equal to Broca's own plan."""

import models
import pytest
import torch

from editing.directions.direction import Direction
from editing.methods.steer2edit import steer2edit_plan
from editing.plans.steer2edit_factors import read_factors
from editing.plans.weights import Weights
from neurons.errors import BrocaError, NothingToChangeError, UsageError
from neurons.models.source import open_model

RHO, ALPHA = {"attn": 0.2, "mlp": 0.25}, 0.4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(models.build_checkpoint(tmp_path_factory.mktemp("model"), "mistral"))


@pytest.fixture(scope="module")
def direction(source):
    generator = torch.Generator().manual_seed(3)
    sizes = {site: source.anatomy.width(site) for site in ("attn_in", "mlp_in")}

    def draw(width):
        return torch.randn(source.anatomy.layers, width, generator=generator).double()

    vectors = {site: draw(source.anatomy.residual) for site in ("attn_out", "mlp_out")}
    means = {site: draw(width) for site, width in sizes.items()}
    return Direction("en", "fr", vectors, means, {"fingerprint": source.fingerprint})


@pytest.fixture(scope="module")
def factors(source, direction):
    """What the released ``edit.py`` saves, from its formulas."""
    content = {
        "attn": {},
        "mlp": {},
        "meta": {"rho_attn": 0.2, "rho_mlp": 0.25, "alpha": ALPHA, "format": {}},
    }
    for block, rho in RHO.items():
        content["meta"][f"vhat_{block}"] = of_layers = {}
        width = source.anatomy.head_dim if block == "attn" else 1
        for layer in range(source.anatomy.layers):
            weight = Weights(source).read(layer, block)
            v = direction.vectors[f"{block}_out"][layer]
            of_layers[layer] = v = v / v.norm()
            for i in range(weight.shape[1] // width):
                part = weight[:, i * width : (i + 1) * width]
                g = torch.cosine_similarity(
                    v, part @ direction.input_means[f"{block}_in"][layer][i * width : (i + 1) * width], dim=0
                )
                size = float(g.sign() * (g.abs() - rho * ALPHA).clamp(min=0) / (rho * (1 - ALPHA)))
                key = part.T @ v
                if size == 0:
                    continue
                if block == "attn":
                    content["attn"][layer, i] = {"lambda": size, "k_hat": (key / key.norm()).bfloat16()}
                else:
                    content["mlp"][layer, i] = {"lambda": size * float(key.sign())}
    assert (
        len(content["attn"]) > 2 and 10 < len(content["mlp"]) < source.anatomy.layers * source.anatomy.neurons
    )
    return content


@pytest.fixture
def saved(factors, tmp_path):
    def save(content=factors):
        torch.save(content, tmp_path / "factors.pt")
        return tmp_path / "factors.pt"

    return save


def test_equals_the_released_loop(source, factors, saved):
    plan = read_factors(saved(), source)
    width = source.anatomy.head_dim
    for edit in plan.edits:
        weight = Weights(source).read(edit.layer, edit.block)
        expected = weight.clone()
        v = factors["meta"][f"vhat_{edit.block}"][edit.layer]
        for (layer, i), factor in factors[edit.block].items():
            if layer == edit.layer and edit.block == "attn":
                key = factor["k_hat"].double()
                expected[:, i * width : (i + 1) * width] += factor["lambda"] * torch.outer(v, key)
            elif layer == edit.layer:
                expected[:, i] += factor["lambda"] * v
        torch.testing.assert_close(edit.apply(weight), expected, rtol=0, atol=2e-6)
        assert edit.notes["change_norm"] == pytest.approx(float((expected - weight).norm()))
    assert len(plan.edits) == len({(b, layer) for b in RHO for layer, _ in factors[b]})


def test_equals_the_plan_of_the_method(source, direction, saved):
    ours = steer2edit_plan(source, direction, range(source.anatomy.layers), RHO["attn"], RHO["mlp"], ALPHA)
    found = read_factors(saved(), source)
    assert [(e.layer, e.block, e.components) for e in found.edits] == [
        (e.layer, e.block, e.components) for e in ours.edits
    ]
    for edit, own in zip(found.edits, ours.edits, strict=True):
        for name in ("lambda", "c"):  # keys of heads were rounded to bfloat16
            torch.testing.assert_close(edit.details[name], own.details[name])
        torch.testing.assert_close(edit.right, own.right, rtol=0, atol=2e-2)
        torch.testing.assert_close(edit.left, own.left)


def test_the_command(broca, source, saved, tmp_path):
    words = ["edit", source.checkpoint, "--convert", saved(), "--strength", "0.5", "--out", tmp_path / "edit"]
    assert broca(*words)[0] == 0
    status, printed, _ = broca(
        "export", source.checkpoint, "--edit", tmp_path / "edit", "--verify", "--out", tmp_path / "out"
    )
    assert status == 0 and "down_proj" in printed
    assert broca("edit", "--convert", saved(), "--out", tmp_path / "other")[0] == 2


def changed(factors, block="attn", **changes):
    """The file with other values of its first factor, or, for ``meta``, of itself."""
    content = {name: dict(value) for name, value in factors.items()}
    if block == "meta":
        content["meta"] |= changes
    else:
        place = next(iter(content[block]))
        content[block][place] = {**content[block][place], **changes}
    return content


def test_what_is_not_such_a_file_or_another_model_s(source, factors, saved, tmp_path):
    key = next(iter(factors["attn"].values()))["k_hat"]
    cases = [
        ([torch.ones(3)], BrocaError, "attn, mlp and meta"),
        ({**factors, "mlp": {3: {"lambda": 1.0}}}, BrocaError, "layer and a component"),
        ({**factors, "mlp": {(0, 999): {"lambda": 1.0}}}, UsageError, "neuron 999"),
        ({**factors, "mlp": {(7, 0): {"lambda": 1.0}}}, UsageError, "layer 7"),
        (changed(factors, **{"lambda": float("nan")}), BrocaError, "nan"),
        (changed(factors, k_hat=key.flip(0)), UsageError, "not this model's"),
        (changed(factors, k_hat=key[:5]), UsageError, r"shape \[5\]"),
        (changed(factors, "meta", vhat_mlp={}), BrocaError, "mlp: it has no vector"),
        ({**factors, "attn": {}, "mlp": {}}, NothingToChangeError, "changes nothing"),
    ]
    for content, error, message in cases:
        with pytest.raises(error, match=message):
            read_factors(saved(content), source)
    with pytest.raises(BrocaError, match="no such file"):
        read_factors(tmp_path / "none.pt", source)


def test_neurons_of_a_mixture_are_refused(checkpoint_of, factors, saved):
    mixture = open_model(checkpoint_of("mixtral"))
    with pytest.raises(UsageError, match="mixture"):
        read_factors(saved({**factors, "attn": {}}), mixture)
