"""``broca diff``."""

import json

import models
import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file

from cli.diff import command
from editing.checkpoints.export import export
from editing.plans.plan import load_plan
from neurons.errors import BrocaError
from neurons.files.tensor_files import read_tensor, tensor_entries
from neurons.models.source import open_model

DOWN, UP = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def pair(tmp_path):
    """A base, and a copy in which one neuron is zeroed."""
    base = models.build_checkpoint(tmp_path / "base")
    edited = models.build_checkpoint(tmp_path / "edited")
    rewrite(edited, lambda tensors: tensors[DOWN][:, 5].zero_())
    return base, edited


def rewrite(checkpoint, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_a_plan_that_does_it_again(pair, tmp_path):
    base, edited = pair
    out = run(command, base, edited, "--out", tmp_path / "edit.safetensors").stdout
    assert DOWN in out and "column scale" in out
    assert out.strip().splitlines()[-1] == str(tmp_path / "edit.safetensors")
    source = open_model(str(base))
    export(source, load_plan(tmp_path / "edit.safetensors"), tmp_path / "again")
    again, expected = (
        read_tensor(tensor_entries(checkpoint)[DOWN]) for checkpoint in (tmp_path / "again", edited)
    )
    assert torch.equal(again, expected) and not bool(expected[:, 5].any())


def test_json(pair, tmp_path):
    printed = json.loads(run(command, *pair, "--out", tmp_path / "edit.safetensors", "--json").stdout)
    (tensor,) = printed["tensors"]
    assert tensor["name"] == DOWN and tensor["covered"] and 0 < tensor["relative"] < 1
    assert printed["not_covered"] == [] and printed["modules"][0]["layer"] == 1
    assert printed["modules"][0]["components"] == 1


def test_others_are_refused_and_allowed(pair, tmp_path):
    rewrite(pair[1], lambda tensors: tensors[UP].add_(1))
    out = tmp_path / "edit.safetensors"
    with pytest.raises(BrocaError, match=r"up_proj\.weight.*--allow-others"):
        run(command, *pair, "--out", out)
    assert not out.exists()
    assert UP in run(command, *pair, "--allow-others", "--out", out).stdout
    assert load_plan(out).metadata["not_covered"] == [UP]
