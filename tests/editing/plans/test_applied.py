"""A plan on a loaded model: the exported checkpoint's logits inside, the very same weights after."""

from dataclasses import replace

import pytest
import torch

from editing.checkpoints.export import export
from editing.pipeline.needs import edited_bytes
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, make_plan
from neurons.errors import BrocaError
from neurons.models.source import load_model, plan_model

IDS = torch.tensor([[0, 5, 80, 33, 200, 7], [0, 90, 91, 17, 4, 260]])


def random_plan(loaded, layers=(0, 2), fingerprint=None):
    """Every part of a plan at once, on attention and MLP."""
    anatomy = loaded.anatomy
    generator = torch.Generator().manual_seed(6)
    edits = []
    for layer in layers:
        for block, width in (("attn", anatomy.width("attn_in")), ("mlp", anatomy.neurons)):
            edits.append(
                ModuleEdit(
                    layer,
                    block,
                    (0, 1),
                    1 + 0.1 * torch.randn(anatomy.residual, generator=generator),
                    1 + 0.1 * torch.randn(width, generator=generator),
                    0.3 * torch.randn(anatomy.residual, 1, generator=generator),
                    0.3 * torch.randn(width, 1, generator=generator),
                    notes={"change_norm": 1.0, "weight_norm": 1.0},
                )
            )
    metadata = {
        "model": loaded.name,
        "fingerprint": fingerprint or loaded.fingerprint,
        "method": "test",
        "settings": {},
    }
    return make_plan(edits, metadata)


def logits(loaded):
    with torch.no_grad():
        return loaded.model(IDS).logits


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_copies_are_foreseen(checkpoint_of, monkeypatch, family):
    """Of the experts, the one that changes."""
    path = str(checkpoint_of(family))
    loaded, planned = load_model(path, "cpu"), plan_model(path, "cpu")
    plan = random_plan(loaded)
    if family == "mixtral":
        columns, deltas = torch.tensor([49, 60]), torch.ones(2, loaded.anatomy.residual)
        plan = replace(plan, edits=(ModuleEdit(1, "mlp", (49, 60), columns=columns, column_deltas=deltas),))
    copied, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: copied.append(tensor.nbytes) or clone(tensor))
    with applied(loaded, plan):
        assert edited_bytes(planned, plan.edits) == sum(copied) > 0
    every = [edit for edit in random_plan(loaded, range(3)).edits if edit.block == "mlp"]
    assert family == "mixtral" or edited_bytes(planned) == edited_bytes(planned, every)


def state(loaded):
    """Each parameter's place in memory, storage, version and values."""
    return {
        name: (id(parameter), parameter.data_ptr(), parameter.dtype, parameter.detach().clone())
        for name, parameter in loaded.model.named_parameters()
    }


def assert_untouched(loaded, before):
    for name, parameter in loaded.model.named_parameters():
        identity, pointer, dtype, values = before[name]
        assert id(parameter) == identity and parameter.data_ptr() == pointer, name
        assert parameter.dtype == dtype and torch.equal(parameter, values), name


@pytest.mark.parametrize(
    ("model_type", "tied", "dtype"),
    [
        ("llama", False, "float32"),
        ("llama", False, "bfloat16"),
        ("qwen3", True, "float16"),
        ("mistral", False, "float32"),
        ("gemma", True, "bfloat16"),
        ("qwen2", False, "float32"),
    ],
)
def test_logits_are_those_of_the_exported_checkpoint(checkpoint_of, tmp_path, model_type, tied, dtype):
    loaded = load_model(str(checkpoint_of(model_type, tied, dtype)), device="cpu")
    plan = random_plan(loaded)
    export(loaded, plan, tmp_path / "out")
    exported = load_model(str(tmp_path / "out"), device="cpu")
    base, before = logits(loaded), state(loaded)
    with applied(loaded, plan):
        found = logits(loaded)
    assert torch.equal(found, logits(exported))
    assert (found - base).abs().max() > 0.1
    assert_untouched(loaded, before)
    assert torch.equal(logits(loaded), base)


def test_no_plan_changes_nothing(llama):
    base, before = logits(llama), state(llama)
    with applied(llama, None):
        assert torch.equal(logits(llama), base)
        assert_untouched(llama, before)


def test_weights_return_after_an_exception(llama):
    before = state(llama)
    with pytest.raises(ZeroDivisionError), applied(llama, random_plan(llama)):
        raise ZeroDivisionError
    assert_untouched(llama, before)


def test_weights_return_when_a_later_edit_cannot_be_made(llama):
    before = state(llama)
    plan = random_plan(llama)
    late = make_plan([*plan.edits, replace(plan.edits[0], layer=3)], plan.metadata)
    with pytest.raises(BrocaError, match="layer 3"), applied(llama, late):
        raise AssertionError("entered")
    assert_untouched(llama, before)


def test_another_models_plan_is_refused(llama):
    before = state(llama)
    with (
        pytest.raises(BrocaError, match="0123456789abcdef"),
        applied(llama, random_plan(llama, fingerprint="0123456789abcdef")),
    ):
        raise AssertionError("entered")
    assert_untouched(llama, before)


def test_entered_again_it_is_the_same(llama):
    plan = random_plan(llama)
    with applied(llama, plan):
        once = logits(llama)
    with applied(llama, plan):
        assert torch.equal(logits(llama), once)
