"""Invalid files of directions, neuron sets and statistics are rejected in one sentence."""

import json

import pytest
import studies
import torch
from safetensors.torch import save_file

from neurons.files.artifact import save_artifact

NONE = object()
DIRECTION = ("direction", {"vectors.block_out": torch.ones(3, 4)}, {"source": "en", "target": "fr"})
NEURONS = (
    "neurons",
    {"members.0": torch.tensor([[0, 1]]), "scores.0": torch.ones(1), "kinds.0": torch.tensor([0])},
    {"languages": ["en"], "layers": 2, "neurons": 3, "method": "m"},
)
STATISTICS = (
    "statistics",
    {
        "tokens": torch.tensor([5, 7]),
        "texts": torch.tensor([1, 1]),
        "moments.mlp_act:positive": torch.ones(2, 3, 2, dtype=torch.int64),
        "moments.mlp_in:sum": torch.ones(2, 3, 2, dtype=torch.float64),
        "responses.1": torch.ones(4, 2, 3),
        "lines.1": torch.arange(4),
    },
    {"languages": ["en", "fr"], "fingerprint": "f" * 16, "corpora": [{"digest": "d"}]},
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
    "statistics of no language": (STATISTICS, {}, {"languages": NONE}),
    "statistics of numbered languages": (STATISTICS, {}, {"languages": [1, 2]}),
    "no fingerprint": (STATISTICS, {}, {"fingerprint": NONE}),
    "settings of statistics": (STATISTICS, {}, {"settings": None}),
    "a corpus without a digest": (STATISTICS, {}, {"corpora": [{}]}),
    "no tokens": (STATISTICS, {"tokens": NONE}, {}),
    "texts of three languages": (STATISTICS, {"texts": torch.ones(3).long()}, {}),
    "counts that are fractions": (STATISTICS, {"moments.mlp_act:positive": torch.ones(2, 3, 2)}, {}),
    "sums of one language": (STATISTICS, {"moments.mlp_in:sum": torch.ones(2, 3, 1).double()}, {}),
    "layers that differ": (STATISTICS, {"moments.mlp_in:sum": torch.ones(1, 3, 2).double()}, {}),
    "an unknown moment": (STATISTICS, {"moments.mlp_in:mean": torch.ones(2, 3, 2)}, {}),
    "prompts that are fractions": (STATISTICS, {"prompts.answer": torch.ones(2)}, {}),
    "flat routing": (STATISTICS, {"routed": torch.ones(2).long()}, {}),
    "responses without lines": (STATISTICS, {"lines.1": NONE}, {}),
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
    for path, reason in ((report, "JSON"), (study, "source is missing")):
        status, out, err = broca("inspect", path)
        assert (status, out) == (1, "") and err.count("\n") == 1
        assert str(path) in err and reason in err and "`broca report`" in err


@pytest.mark.parametrize("content", [DIRECTION, NEURONS, STATISTICS], ids=lambda content: content[0])
def test_the_valid_content_is_accepted(broca, tmp_path, content):
    assert broca("inspect", saved(tmp_path / "file.safetensors", content, {}, {}))[0] == 0


@pytest.mark.parametrize(
    ("kind", "advice"),
    [("unfinished", "repeat the command"), ("remainder", "name the directory"), ("tomorrow", "update broca")],
)
def test_kinds_that_are_not_shown(broca, tmp_path, kind, advice):
    path = tmp_path / "file.safetensors"
    save_file({"x": torch.ones(1)}, path, {"broca": json.dumps({"kind": kind, "format_version": 1})})
    status, _, err = broca("inspect", path)
    assert status == 1 and repr(kind) in err and advice in err


@pytest.mark.parametrize("name", FAULTS)
def test_invalid_content_is_rejected(broca, tmp_path, name):
    path = saved(tmp_path / "file.safetensors", *FAULTS[name])
    status, out, err = broca("inspect", path)
    assert (status, out) == (1, "") and err.count("\n") == 1, err
    assert "unexpected" not in err and str(path) in err
