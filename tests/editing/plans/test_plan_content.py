"""A file that says it is a plan and holds none is refused in one sentence, by whatever reads plans."""

import pytest
import torch

from editing.plans.plan import load_plan
from neurons.errors import BrocaError
from neurons.files.artifact import save_artifact

NONE = object()
MODULE = {"layer": 1, "block": "mlp", "notes": {}}
# name -> (what differs in the module's tensors, what differs in the metadata)
FAULTS = {
    "no modules": ({}, {"modules": NONE}),
    "modules that are none": ({}, {"modules": [3]}),
    "no layer": ({}, {"modules": [{"block": "mlp", "notes": {}}]}),
    "a layer before the first": ({}, {"modules": [{**MODULE, "layer": -1}]}),
    "a layer that is a word": ({}, {"modules": [{**MODULE, "layer": "1"}]}),
    "an unknown block": ({}, {"modules": [{**MODULE, "block": "moe"}]}),
    "no notes": ({}, {"modules": [{"layer": 1, "block": "mlp"}]}),
    "a module without tensors": ({}, {"modules": [MODULE, {**MODULE, "layer": 2}]}),
    "no method": ({}, {"method": NONE}),
    "no settings": ({}, {"settings": None}),
    "a method that is a number": ({}, {"method": 3}),
    "languages that are a number": ({}, {"languages": 3}),
    "a source that is a list": ({}, {"source": ["en"]}),
    "no components": ({"components": NONE}, {}),
    "components of two dimensions": ({"components": torch.tensor([[0, 2]])}, {}),
    "components that are fractions": ({"components": torch.tensor([0.5])}, {}),
    "components before the first": ({"components": torch.tensor([-1, 2])}, {}),
    "a component twice": ({"components": torch.tensor([2, 2])}, {}),
    "a component past the last": ({"components": torch.tensor([0, 6])}, {}),
    "left alone": ({"right": NONE}, {}),
    "right alone": ({"left": NONE}, {}),
    "two ranks": ({"left": torch.ones(4, 2)}, {}),
    "a left of one dimension": ({"left": torch.ones(4)}, {}),
    "a scale of two dimensions": ({"column_scale": torch.ones(6, 1)}, {}),
    "a scale of another length": ({"column_scale": torch.ones(5)}, {}),
    "a bias of another length": ({"bias": torch.ones(5)}, {}),
    "a bias of whole numbers": ({"bias": torch.ones(4, dtype=torch.int64)}, {}),
    "an empty bias": ({"bias": torch.ones(0)}, {}),
    "a detail of another length": ({"details.g": torch.ones(3)}, {}),
}


@pytest.fixture
def saved(tmp_path):
    def save(tensors, metadata):
        own = {"components": torch.tensor([0, 2]), "left": torch.ones(4, 1), "right": torch.ones(6, 1)}
        about = {"method": "m", "settings": {}, "fingerprint": "f", "languages": ["en"], "modules": [MODULE]}
        path = tmp_path / "edit.safetensors"
        save_artifact(
            path,
            "edit",
            {f"1.mlp.{name}": value for name, value in {**own, **tensors}.items() if value is not NONE},
            {name: value for name, value in {**about, **metadata}.items() if value is not NONE},
        )
        return path

    return save


def test_what_the_faults_are_made_of_is_a_plan(saved):
    (edit,) = load_plan(saved({}, {})).edits
    assert (edit.layer, edit.block, edit.components, edit.rank) == (1, "mlp", (0, 2), 1)


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_without_a_plan_is_refused(broca, saved, name):
    path = saved(*FAULTS[name])
    with pytest.raises(BrocaError, match=f"{path}: not a valid plan"):
        load_plan(path)
    status, out, err = broca("inspect", path)
    assert (status, out) == (1, "") and err.count("\n") == 1 and str(path) in err
