"""The fix in an error message works: the command succeeds with it."""

import re

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

PAIR = ("--source", "en", "--target", "fr")


@pytest.fixture(scope="module")
def mixture(checkpoint_of):
    return checkpoint_of("mixtral")


@pytest.fixture
def dead(tmp_path):
    """A llama in which the neurons of layer 1 never fire."""
    directory = models.build_checkpoint(tmp_path / "dead")
    stored = load_file(directory / "model.safetensors")
    stored["model.layers.1.mlp.gate_proj.weight"].zero_()
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture
def edit(broca, tmp_path, known_text):
    """Make an edit of a model: (status, stderr)."""

    def run(model, method, *more):
        direction = tmp_path / "direction.safetensors"
        assert broca("direction", model, "--corpus", known_text, *PAIR, "--out", direction)[0] == 0
        given = {
            "keyed": ["--direction", direction, "--corpus", known_text],
            "bake": ["--direction", direction, "--corpus", known_text],
            "steer2edit": ["--direction", direction],
            "ablate": ["--direction", direction],
            "scale": ["--neurons", tmp_path / "set", "--languages", "fr", "--factor", "0"],
            "clas": ["--statistics", tmp_path / "statistics"],
            "austeer": ["--corpus", known_text, "--languages", "en,fr"],
        }[method]
        if method == "scale":
            random = ["--method", "random", "--languages", "fr", "--top-rate", "0.2"]
            assert broca("identify", model, *random, "--out", tmp_path / "set")[0] == 0
        if method == "clas":
            record = ["record", model, "--corpus", known_text, "--for", "clas"]
            assert broca(*record, "--out", tmp_path / "statistics")[0] == 0
        status, _, err = broca("edit", model, "--method", method, *given, *more, "--out", tmp_path / "edit")
        return status, err

    return run


@pytest.mark.parametrize(
    ("method", "layers", "others"),
    [("keyed", (), "0,2"), ("keyed", ("--set", "jointly=yes"), "0,2"), ("bake", ("--layers", "1"), "0")],
)
def test_a_dead_layer_is_named_and_may_be_left_out(edit, dead, method, layers, others):
    status, err = edit(dead, method, *layers)
    assert status == 1 and "layer 1, mlp" in err and "are 0 on every token" in err
    assert "more text" not in err
    assert edit(dead, method, *layers, "--layers", others)[0] == 0


def test_a_layer_that_writes_the_same_in_both_languages_is_named(edit, dead):
    status, err = edit(dead, "steer2edit")
    assert status == 1 and "layer 1, mlp" in err
    assert edit(dead, "steer2edit", "--layers", "0,2")[0] == 0


def test_experts_are_refused_with_the_methods_that_serve(edit, mixture):
    status, err = edit(mixture, "keyed")
    assert status == 2 and "dense" not in err
    methods = re.search(r"edits experts \(([\w, ]+)\)", err).group(1).split(", ")
    assert len(methods) > 3
    for method in methods:
        status, err = edit(mixture, method)
        assert status == 0, err
    for method in ("keyed", "bake"):
        assert edit(mixture, method, "--layers", "1", "--blocks", "attn")[0] == 0


def test_a_comparison_goes_on_without_what_experts_cannot_do(checkpoint_of, known_text):
    from editing.methods.material import Material
    from editing.study.candidates import candidates_of
    from editing.study.registry import compared_named
    from neurons.models.source import load_model
    from neurons.text.corpus import read_corpus

    loaded = load_model(str(checkpoint_of("mixtral")), "cpu")
    material = Material(loaded, read_corpus(known_text, part="estimate"), "en", "fr")
    for method in compared_named(["selective-steering"]).values():
        candidates, refused = candidates_of(method, material)
        assert not candidates and refused and all("mixture" in outcome.refused for outcome in refused)


def test_moments_know_when_nothing_fires(llama, corpus):
    from neurons.recording.covariance import language_moments
    from neurons.text.batches import language_batches

    moments = language_moments(llama, language_batches(llama, corpus), "mlp_in", {1: torch.arange(5)})[1]
    assert not moments.all_zero
