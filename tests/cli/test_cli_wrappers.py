"""All commands on wrappers of a language model beside a tower for images, as on models of text."""

import json

import models
import pytest
from conversations import OF_PARTS

from editing.evaluation import language_id
from neurons.files.tensor_files import tensor_entries


@pytest.fixture(scope="module", params=["qwen2_vl", "smolvlm"])
def model(request, tmp_path_factory):
    """A wrapper with a chat template of its processor, which takes messages in parts."""
    directory = models.build_wrapper(tmp_path_factory.mktemp(request.param), request.param)
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": OF_PARTS}))
    return directory


def test_the_stages_one_after_the_other(broca, model, known_text, tmp_path):
    statistics, neurons, direction, edit, ablation = (
        tmp_path / f"{name}.safetensors"
        for name in ("statistics", "neurons", "direction", "edit", "ablation")
    )
    common, steps = [model, "--corpus", known_text], ["--source", "en", "--target", "fr"]
    stages = [
        ["record", *common, "--for", "lape", "--out", statistics],
        ["identify", "--method", "lape", "--statistics", statistics, "--top-rate", "0.2", "--out", neurons],
        ["direction", *common, *steps, "--out", direction],
        ["edit", *common, "--direction", direction, "--out", edit],
        ["ablate", *common, "--neurons", neurons, "--out", ablation],
        ["export", model, "--edit", edit, "--out", tmp_path / "steered"],
        ["export", model, "--edit", edit, "--format", "lora", "--out", tmp_path / "adapter"],
        ["evaluate", *common, *steps, "--prompts", "2", "--new-tokens", "3", "--edit", edit,
         "--out", tmp_path / "applied.json"],
        ["evaluate", *common, *steps, "--prompts", "2", "--new-tokens", "3", "--against", tmp_path / "steered",
         "--out", tmp_path / "exported.json"],
        ["inspect", tmp_path / "steered", "--json"],
        ["record", *common, "--for", "lape", "--dry-run", "--json", "--out", tmp_path / "unmade.safetensors"],
    ]  # fmt: skip
    for stage in stages:
        status, out, err = broca(*stage)
        assert status == 0, (stage[0], err)
    assert json.loads(out)["stages"]
    applied, exported = (
        json.loads((tmp_path / f"{name}.json").read_text())["outcomes"][1] for name in ("applied", "exported")
    )
    for name in ("nll", "kl", "samples"):
        assert applied[name] == exported[name], name
    assert applied["nll_rise"]["en"] != 0
    modules = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    tower = "model.text_model" if "text_model" in modules[0] else "model.language_model"
    assert modules and all(module.startswith(f"{tower}.layers.") for module in modules)
    assert (tmp_path / "steered" / "chat_template.json").read_bytes() == (
        model / "chat_template.json"
    ).read_bytes()


def test_steer(broca, model, few_questions, tmp_path, monkeypatch):
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: "fr")
    out = tmp_path / "steered"
    status, printed, errors = broca(
        "steer", model, "--to", "fr", "--questions", few_questions, "--out", out, "--json"
    )
    assert status == 0, errors
    assert json.loads(printed)["lock"]["target"] == "fr"
    card = (out / "README.md").read_text()
    named = [name for name in tensor_entries(out) if f"`{name}`" in card]
    assert named and not [name for name in named if "vis" in name]
