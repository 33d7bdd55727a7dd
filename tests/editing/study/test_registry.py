"""One class is all that a method takes: a toy is found in every place, and the documentation's table is the registry's."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from editing.methods.method import Method
from editing.methods.scale import column_scaling
from editing.plans.plan import load_plan, make_plan
from editing.study import registry
from neurons.setting import Range, setting

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "artifacts" / "demo"
LITTLE = ["--source", "en", "--target", "fr", "--prompts", "2", "--new-tokens", "12", "--device", "cpu"]


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    name = "toy"
    title = "toy edit"
    line = "every neuron of the first layer times a factor"
    source = "nobody"
    takes = ("strength",)

    factor: float = setting(0.5, "of the neurons", search=Range(0.1, 0.9), grid=(0.5, 0.25))

    def prepare(self, material):
        return material.opened

    def plan(self, prepared):
        scale = torch.ones(prepared.anatomy.layers, prepared.anatomy.neurons, dtype=torch.float64)
        scale[0] = self.factor
        metadata = {
            "model": prepared.label,
            "fingerprint": prepared.fingerprint,
            "method": self.name,
            "languages": [],
            "settings": {"factor": self.factor, "strength": 1.0},
        }
        return make_plan(column_scaling(prepared, "mlp", scale), metadata).scaled(self.strength)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(registry, "METHODS", (*registry.METHODS, Toy))


def test_the_list_has_it(broca):
    listed = json.loads(broca("edit", "--method", "list", "--json")[1])
    assert listed["toy"] == {
        "line": Toy.line, "source": "nobody", "needs": [], "takes": ["strength"], "settings": {"factor": 0.5}
    }  # fmt: skip


def test_its_setting_is_set(broca, checkpoint_of, tmp_path):
    out = tmp_path / "edit.safetensors"
    words = ["edit", checkpoint_of(), "--method", "toy", "--out", out]
    status, _, err = broca(*words, "--set", "factor=0.25", "--strength", "2")
    assert status == 0, err
    assert load_plan(out).edits[0].column_scale.unique().tolist() == [-0.5]
    status, _, err = broca(*words, "--set", "factor=much")
    assert status == 2 and "factor=much" in err


def test_it_is_compared(broca, checkpoint_of, known_text, tmp_path):
    out = tmp_path / "methods.json"
    words = ["evaluate", checkpoint_of(), "--corpus", known_text, "--methods", "toy", *LITTLE, "--out", out]
    status, _, err = broca(*words)
    assert status == 0, err
    value = json.loads(out.read_text())
    assert [one["name"] for one in value["outcomes"]] == ["base", "toy edit"]
    assert [one["details"]["settings"] for one in value["tried"]] == [{"factor": 0.5}, {"factor": 0.25}]


def test_it_is_searched(broca, tmp_path):
    text, out = tmp_path / "text", tmp_path / "tuned"
    text.mkdir()
    for language in ("en", "fr", "de"):
        lines = (DEMO / "corpus" / f"{language}.txt").read_text(encoding="utf-8").splitlines()[:48]
        (text / f"{language}.txt").write_text("\n".join(lines), encoding="utf-8")
    words = ["tune", DEMO / "model", "--corpus", text, "--methods", "toy", "--trials", "2", *LITTLE]
    status, _, err = broca(*words, "--samples", "1", "--lines", "2", "--out", out)
    assert status == 0, err
    value = json.loads((out / "tune.json").read_text(encoding="utf-8"))
    assert value["identity"]["knobs"] == {"toy": {"factor": {"low": 0.1, "high": 0.9}}}
    first, second = (trial["settings"]["factor"] for trial in value["trials"])
    assert first == 0.5 != second and 0.1 <= second <= 0.9
    assert load_plan(out / "edit.safetensors").metadata["method"] == "toy"


def test_it_is_in_the_table():
    (row,) = (line for line in registry.table().splitlines() if "`toy`" in line)
    assert Toy.line in row and Toy.title in row and row.endswith("yes |")


def test_the_documentation_has_the_table(monkeypatch):
    monkeypatch.undo()
    assert registry.table() in (ROOT / "docs" / "editing.md").read_text(encoding="utf-8")
