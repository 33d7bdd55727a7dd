"""``broca train``: a plan that lowers the loss of its language, its controls, and what is refused."""

import json

import models
import pytest
import torch
from conversations import said, written

from editing.plans.plan import load_plan
from neurons.models.source import open_model
from neurons.neuron_sets.neuron_set import neuron_set

ROWS = torch.tensor([[0, 3], [0, 11], [2, 0], [2, 47]])


@pytest.fixture
def arguments(checkpoint_of, tmp_path):
    source = open_model(str(checkpoint_of()))
    about = {"fingerprint": source.fingerprint, "method": "m", "settings": {}}
    neuron_set({"qaa": ROWS}, {"qaa": torch.ones(4)}, 3, 48, about).save(tmp_path / "neurons.safetensors")
    corpus = models.write_corpus(tmp_path / "text")
    return [
        *("train", source.checkpoint, "--neurons", tmp_path / "neurons.safetensors", "--languages", "qaa"),
        *("--corpus", corpus, "--block", 32, "--tokens", 400, "--rate", 0.01),
    ]


def test_the_language_gains_and_the_plan_is_exported(broca, arguments, tmp_path):
    out = tmp_path / "plan.safetensors"
    status, printed, err = broca(*arguments, "--control", "random,lora", "--out", out, "--json")
    assert status == 0, err
    result = json.loads(printed)
    assert set(result["nll"]) == {"qaa", "qab", "qac"}
    for losses in result["nll"].values():
        assert set(losses) == {"base", "set", "random", "lora"}
    assert result["nll"]["qaa"]["set"] < result["nll"]["qaa"]["base"]
    assert result["components"] == {"set": 4, "random": 4, "lora": 0}
    assert set(result["read"]) == {"qaa"}
    plan = load_plan(out)
    assert {(edit.layer, edit.block) for edit in plan.edits} == {
        (layer, block) for layer in (0, 2) for block in ("mlp", "mlp.gate_proj", "mlp.up_proj")
    }
    status, printed, _ = broca("inspect", out)
    assert status == 0 and "mlp.gate_proj" in printed and "rows, columns" in printed
    assert broca("plot", out, "--out", tmp_path / "plan.svg")[0] == 0
    status, _, err = broca("export", arguments[1], "--edit", out, "--verify", "--out", tmp_path / "better")
    assert status == 0, err
    assert not [*tmp_path.glob(".*unfinished*")]
    again = tmp_path / "again.safetensors"
    broca(*arguments, "--out", again)
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("changed", "status", "named"),
    [
        (["--control", "none"], 2, "none"),
        (["--languages", "qab"], 2, "qab"),
        (["--languages", "xx"], 2, "xx"),
        (["--rate", "0"], 2, "rate"),
        (["--block", "4096"], 2, "4096"),
    ],
)
def test_what_is_refused(broca, arguments, tmp_path, changed, status, named):
    found, _, err = broca(*arguments, *changed, "--out", tmp_path / "plan.safetensors")
    assert found == status and named in err and err.count("\n") == 1
    assert not (tmp_path / "plan.safetensors").exists()


def test_conversations_are_refused_before_the_model_is_loaded(broca, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("neurons.models.source.load_model", None)
    chats = written(tmp_path / "chats", {"qaa": [said(("user", f"bad cab {i}")) for i in range(8)]})
    found, _, err = broca(*arguments, "--corpus", chats, "--out", tmp_path / "plan.safetensors")
    assert found == 2 and "train on plain text" in err


def test_two_files_of_a_language_need_no_option_that_names_something_else(broca, arguments, tmp_path):
    corpus = models.write_corpus(tmp_path / "text", lines=8)
    for name in ("zho_Hans", "zho_Hant"):
        (corpus / f"{name}.txt").write_text("text\n" * 4)
    found, _, err = broca(*arguments, "--corpus", corpus, "--out", tmp_path / "plan.safetensors")
    assert found == 2 and "keep one" in err and "--languages" not in err


@pytest.mark.parametrize(("rate", "named"), [("1e-30", "no pass lowers"), ("1e30", "the loss is nan")])
def test_a_training_that_helps_nothing_leaves_nothing(broca, arguments, tmp_path, monkeypatch, rate, named):
    monkeypatch.setattr("neurons.recording.resume.Unfinished.is_due", lambda self: True)
    before = sorted(tmp_path.iterdir())
    status, _, err = broca(*arguments, "--rate", rate, "--out", tmp_path / "plan.safetensors")
    assert status == 1 and named in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_grows_with_the_neurons(broca, arguments, tmp_path):
    out = tmp_path / "plan.safetensors"
    status, printed, err = broca(*arguments, "--control", "all", "--dry-run", "--json", "--out", out)
    assert status == 0, err
    stages = json.loads(printed)["stages"]
    assert stages["all"]["parts"]["deltas"] == stages["set"]["parts"]["deltas"] * 3 * 48 // 4
    # All losses are measured with copies of the edited weights: of three matrices in three layers.
    assert stages["measure"]["parts"]["edited"] == 4 * 3 * 3 * 48 * 64
    assert not out.exists()
