"""Invalid direction and neuron-set files are rejected in one sentence."""

import json

import pytest
import studies
import torch

from neurons.files.artifact import save_artifact

NONE = object()
DIRECTION = ("direction", {"vectors.block_out": torch.ones(3, 4)}, {"source": "en", "target": "fr"})
NEURONS = (
    "neurons",
    {"members.0": torch.tensor([[0, 1]]), "scores.0": torch.ones(1), "kinds.0": torch.tensor([0])},
    {"languages": ["en"], "layers": 2, "neurons": 3, "method": "m"},
)
# name -> (valid content, changed tensors, changed metadata)
FAULTS = {
    "no source": (DIRECTION, {}, {"source": NONE}),
    "a target that is a list": (DIRECTION, {}, {"target": ["fr"]}),
    "a direction's settings": (DIRECTION, {}, {"settings": None}),
    "one vector for all layers": (DIRECTION, {"vectors.block_out": torch.ones(4)}, {}),
    "whole numbers": (DIRECTION, {"vectors.block_out": torch.ones(3, 4).long()}, {}),
    "two depths": (DIRECTION, {"vectors.mlp_out": torch.ones(2, 4)}, {}),
    "a flat subspace": (DIRECTION, {"subspaces.block_out": torch.ones(3, 4)}, {}),
    "no languages": (NEURONS, {}, {"languages": NONE}),
    "a language more": (NEURONS, {}, {"languages": ["en", "fr"]}),
    "no layers": (NEURONS, {}, {"layers": NONE}),
    "layers that are a word": (NEURONS, {}, {"layers": "2"}),
    "no expert": (NEURONS, {}, {"experts": 0}),
    "a set's settings": (NEURONS, {}, {"settings": None}),
    "neurons of one dimension": (NEURONS, {"members.0": torch.tensor([0, 1])}, {}),
    "neurons that are fractions": (NEURONS, {"members.0": torch.tensor([[0.0, 1.0]])}, {}),
    "no scores": (NEURONS, {"scores.0": NONE}, {}),
    "kinds that are fractions": (NEURONS, {"kinds.0": torch.ones(1)}, {}),
    "a neuron outside": (NEURONS, {"members.0": torch.tensor([[0, 3]])}, {}),
}


def saved(path, content, tensors, metadata):
    kind, valid_tensors, valid_metadata = content
    kept = [
        {name: value for name, value in (a | b).items() if value is not NONE}
        for a, b in ((valid_tensors, tensors), (valid_metadata, metadata))
    ]
    save_artifact(path, kind, *kept)
    return path


def test_a_json_that_is_no_report_is_rejected(broca, tmp_path):
    studies.write_run(tmp_path)
    report, study = tmp_path / "report.json", tmp_path / "ablation.json"
    assert broca("inspect", report)[0] == 0
    report.write_bytes(report.read_bytes()[:-20])
    study.write_text(json.dumps(studies.ablation()))
    for path, reason in ((report, "JSON"), (study, "(source is missing)")):
        status, out, err = broca("inspect", path)
        assert (status, out) == (1, "") and err.count("\n") == 1
        assert str(path) in err and reason in err and "`broca report`" in err


@pytest.mark.parametrize("content", [DIRECTION, NEURONS], ids=["direction", "neurons"])
def test_the_valid_content_is_accepted(broca, tmp_path, content):
    assert broca("inspect", saved(tmp_path / "file.safetensors", content, {}, {}))[0] == 0


@pytest.mark.parametrize("name", FAULTS)
def test_invalid_content_is_rejected(broca, tmp_path, name):
    path = saved(tmp_path / "file.safetensors", *FAULTS[name])
    status, out, err = broca("inspect", path)
    assert (status, out) == (1, "") and err.count("\n") == 1, err
    assert "unexpected" not in err and str(path) in err
