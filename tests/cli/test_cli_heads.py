"""Heads on the command line: identified, listed, compared, plotted, ablated, scaled and exported like neurons."""

import json

import models
import pytest
import torch

from neurons.models.source import load_model
from neurons.neuron_sets.neuron_set import load_neuron_set


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of four heads a layer, and a corpus."""
    folder = tmp_path_factory.mktemp("heads")
    models.build_checkpoint(folder / "model", num_attention_heads=4, num_key_value_heads=4)
    models.write_corpus(folder / "text", lines=12)
    return folder


@pytest.fixture
def identified(broca, files):
    """Method -> its set of heads, two of each language."""

    def made(method, *words):
        out = files / f"{method}.safetensors"
        if not out.exists():
            status, shown, err = broca(
                "identify",
                files / "model",
                "--corpus",
                files / "text",
                "--method",
                method,
                *words,
                "--out",
                out,
            )
            assert status == 0, err
            assert "3 layers of 4 heads" in shown
        return out

    return made


def test_heads_from_identification_to_an_exported_checkpoint(broca, files, identified, tmp_path):
    heads = identified("head-gradient", "--top-rate", "0.17")
    chosen = load_neuron_set(heads)
    assert (chosen.unit, chosen.site, chosen.neurons) == ("head", "attn_in", 4)
    assert chosen.metadata["unit"] == "head" and chosen.experts == 1
    assert [len(chosen.of(k)) for k in chosen.languages] == [2, 2, 2]
    out = tmp_path / "edit.safetensors"
    words = ["--method", "scale", "--neurons", heads, "--languages", "qab", "--factor", "0", "--out", out]
    status, _, err = broca("edit", files / "model", *words)
    assert status == 0, err
    status, _, err = broca("export", files / "model", "--edit", out, "--out", tmp_path / "edited")
    assert status == 0, err
    base, edited = (load_model(str(at), device="cpu").model for at in (files / "model", tmp_path / "edited"))
    zeroed = {
        (layer, head)
        for layer, block in enumerate(edited.model.layers)
        for head in range(4)
        if not block.self_attn.o_proj.weight[:, 16 * head : 16 * (head + 1)].any()
    }
    assert zeroed == {tuple(row) for row in chosen.of("qab").tolist()}
    for name, before in base.state_dict().items():
        after = edited.state_dict()[name]
        changed = {layer for layer, _ in zeroed if name == f"model.layers.{layer}.self_attn.o_proj.weight"}
        assert torch.equal(before, after) != bool(changed)


def test_heads_are_listed_compared_and_plotted_as_heads(broca, identified, tmp_path):
    methods = ("head-gradient", "head-gradient-contrast")
    first, second = (identified(method, "--top-rate", "0.17") for method in methods)
    status, shown, _ = broca("inspect", first)
    assert status == 0 and "3 layers x 4 heads" in shown and "layers with most heads" in shown
    status, shown, _ = broca("compare", first, second, "--plot", tmp_path / "c.png", "--details")
    assert status == 0 and "sets of heads" in shown
    status, _, _ = broca("plot", first, "--out", tmp_path / "p.svg")
    assert status == 0 and (tmp_path / "p.svg").stat().st_size > 1000
    status, shown, _ = broca("identify", "--method", "list")
    assert all(name in shown for name in ("head-gradient", "head-gradient-contrast", "head-shapley"))


def test_controls_and_ablation_of_heads(broca, files, identified, tmp_path):
    heads = identified("head-gradient", "--top-rate", "0.17")
    control = tmp_path / "random.safetensors"
    status, _, err = broca("identify", "--method", "random", "--like", heads, "--out", control)
    assert status == 0, err
    like, drawn = load_neuron_set(heads), load_neuron_set(control)
    assert drawn.unit == "head"
    for language in like.languages:
        assert drawn.of(language)[:, 0].tolist() == like.of(language)[:, 0].tolist()
        assert not {*map(tuple, drawn.of(language).tolist())} & {*map(tuple, like.of(language).tolist())}
    out = tmp_path / "study.json"
    words = ["--neurons", heads, control, "--draws", "1", "--resamples", "20", "--doses", "50%", "--out", out]
    status, shown, err = broca(
        "ablate", files / "model", "--corpus", files / "text", *words, "--picture", tmp_path / "m.png"
    )
    assert status == 0, err
    assert "| neuron set | method | heads |" in shown
    written = json.loads(out.read_text())
    assert [one["unit"] for one in written["sets"]] == ["head", "head"]
    assert written["sets"][0]["neurons"] == {"qaa": 2, "qab": 2, "qac": 2}
    status, _, err = broca("report", tmp_path, "--out", tmp_path / "report.html")
    assert status == 0, err
    assert "each language&#39;s heads" in (tmp_path / "report.html").read_text().replace("'", "&#39;")


def test_shapley_values_of_one_language(broca, files, tmp_path):
    out = tmp_path / "shapley.safetensors"
    words = ["--method", "head-shapley", "--languages", "qaa", "--tokens", "30", "--set", "permutations=2"]
    command = ["identify", files / "model", "--corpus", files / "text", *words, "--top-rate", "0.1"]
    status, printed, err = broca(*command, "--dry-run", "--json")
    assert status == 0 and json.loads(printed)["stages"]["ablate"]["peak"] > 0, err
    status, _, err = broca(*command, "--out", out)
    assert status == 0, err
    heads = load_neuron_set(out)
    assert heads.metadata["notes"]["permutations"] == [2]
    assert len(heads.metadata["notes"]["standard_errors"][0]) == 3


def test_refusals_name_heads(broca, files, identified, tmp_path):
    heads = identified("head-gradient", "--top-rate", "0.17")
    neurons, out = tmp_path / "neurons.safetensors", tmp_path / "out.safetensors"
    model, text = files / "model", ["--corpus", files / "text"]
    assert broca("identify", model, *text, "--top-rate", "0.1", "--out", neurons)[0] == 0
    arithmetic = ["--method", "language-arithmetic", "--neurons", heads, "--set", "target=qab", "--out", out]
    for words, fault in (
        (["compare", heads, neurons], "is of heads"),
        (["convert", heads, "--out", tmp_path / "masks.pth"], "published masks are of neurons"),
        (["edit", model, *text, *arithmetic], "the neuron set is of heads"),
        (["record", model, *text, "--for", "head-shapley", "--out", out], "reads ablations"),
        (
            ["identify", model, *text, "--method", "head-shapley", "--block", "16", "--out", out],
            "--block is not supported",
        ),
    ):
        status, _, err = broca(*words)
        assert status in (1, 2) and fault in err, err
        assert not out.exists()


def test_a_plan_is_restricted_to_a_set_of_heads(broca, files, identified, tmp_path):
    heads, plan, out = identified("head-gradient", "--top-rate", "0.17"), tmp_path / "a", tmp_path / "b"
    every = ["--method", "scale", "--neurons", heads, "--languages", "qaa,qab,qac", "--factor", "0.5"]
    assert broca("edit", files / "model", *every, "--out", plan)[0] == 0
    words = ["--restrict", plan, "--neurons", heads, "--languages", "qac"]
    assert broca("edit", files / "model", *words, "--out", out)[0] == 0
    from editing.plans.plan import load_plan

    kept = {(edit.layer, head) for edit in load_plan(out).edits for head in edit.components}
    assert kept == {tuple(row) for row in load_neuron_set(heads).of("qac").tolist()}
    status, _, err = broca("edit", files / "model", *words, "--heads", "0", "--out", tmp_path / "c")
    assert status == 2 and "--heads" in err
