"""Every command does its job on a real model in the memory that it may take."""

import pytest

COMMANDS = ("direction", "edit", "export", "contrast", "lape", "ablate", "evaluate")
BESIDE_THE_WEIGHTS = 2.5e9  # bytes


@pytest.mark.parametrize("command", COMMANDS)
def test_memory_stays_near_the_weights(request, model, command):
    ran = request.getfixturevalue(command)
    assert ran.out.exists()
    assert ran.peak < (model / "model.safetensors").stat().st_size + BESIDE_THE_WEIGHTS


def test_another_model_refuses_the_edit(run, edit):
    refused = run("export", "artifacts/demo/model", "--edit", edit.out, name="refused", status=1)
    assert not refused.out.exists()
    assert refused.value == {}
    assert "Traceback" not in refused.errors
