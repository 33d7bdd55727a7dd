"""``broca diff``."""

import json

import models
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from cli.diff import command
from editing.checkpoints.export import export
from editing.plans.plan import load_plan
from neurons.errors import BrocaError
from neurons.files.tensor_files import read_tensor, tensor_entries
from neurons.models.source import open_model

DOWN, UP = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"


def run(*arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


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
    out = run(base, edited, "--out", tmp_path / "edit.safetensors")
    assert DOWN in out and "column scale" in out
    assert out.strip().splitlines()[-1] == str(tmp_path / "edit.safetensors")
    source = open_model(str(base))
    export(source, load_plan(tmp_path / "edit.safetensors"), tmp_path / "again")
    again, expected = (
        read_tensor(tensor_entries(checkpoint)[DOWN]) for checkpoint in (tmp_path / "again", edited)
    )
    assert torch.equal(again, expected) and not bool(expected[:, 5].any())


def test_json(pair, tmp_path):
    printed = json.loads(run(*pair, "--out", tmp_path / "edit.safetensors", "--json"))
    (tensor,) = printed["tensors"]
    assert tensor["name"] == DOWN and tensor["covered"] and 0 < tensor["relative"] < 1
    assert printed["not_covered"] == [] and printed["modules"][0]["layer"] == 1


def test_others_are_refused_and_allowed(pair, tmp_path):
    rewrite(pair[1], lambda tensors: tensors[UP].add_(1))
    out = tmp_path / "edit.safetensors"
    with pytest.raises(BrocaError, match=r"up_proj\.weight.*--allow-others"):
        run(*pair, "--out", out)
    assert not out.exists()
    assert UP in run(*pair, "--allow-others", "--out", out)
    assert load_plan(out).metadata["not_covered"] == [UP]


def test_help_has_an_example():
    assert "broca diff artifacts/demo/model steered" in CliRunner().invoke(command, ["--help"]).output
