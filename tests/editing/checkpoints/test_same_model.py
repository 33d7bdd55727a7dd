"""Two checkpoints side by side: added biases are weights like others, settings that compute otherwise are refused."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from test_biases import bias_plan, logits

from cli.evaluate import command
from editing.checkpoints.export import export
from editing.checkpoints.same_model import require_same_settings, require_same_tokens
from editing.checkpoints.weight_exchange import Exchange
from neurons.errors import BrocaError
from neurons.models.source import load_model, open_model


@pytest.fixture(scope="module")
def biased(llama, tmp_path_factory):
    """(the plan's file, its export)."""
    directory = tmp_path_factory.mktemp("biased")
    plan = bias_plan(llama)
    plan.save(directory / "edit.safetensors")
    export(llama, plan, directory / "out")
    return directory / "edit.safetensors", directory / "out"


@pytest.fixture
def changed(llama, tmp_path):
    """Makes the llama's checkpoint with other settings."""

    def make(**settings):
        shutil.copytree(llama.checkpoint, tmp_path / "changed")
        config = tmp_path / "changed" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
        return tmp_path / "changed"

    return make


def test_added_biases_are_exchanged_and_gone_again(llama, biased):
    other = load_model(str(biased[1]), device="cpu")
    base, before = logits(llama), dict(llama.model.named_parameters())
    with Exchange(llama, other)():
        assert torch.equal(logits(llama), logits(other))
    assert not torch.equal(base, logits(other))
    after = dict(llama.model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in after)
    assert torch.equal(logits(llama), base)


def test_biases_that_the_other_lacks_are_refused(llama, biased):
    other = load_model(str(biased[1]), device="cpu")
    with pytest.raises(BrocaError, match="_bias is False, not True"), Exchange(other, llama)():
        raise AssertionError("entered")


@pytest.mark.parametrize("settings", [{"rms_norm_eps": 0.5}, {"hidden_act": "relu"}, {"eos_token_id": 7}])
def test_settings_that_compute_otherwise_are_refused_by_name(llama, changed, settings):
    ((name, value),) = settings.items()
    with pytest.raises(BrocaError, match=rf"\({name} is {value!r}, not "):
        require_same_settings(llama, open_model(str(changed(**settings))))


def test_settings_that_say_nothing_of_the_computation_are_passed_over(llama, changed):
    settings = {
        "use_cache": False,
        "attention_dropout": 0.5,
        "transformers_version": "9",
        "dtype": "bfloat16",
    }
    require_same_settings(llama, open_model(str(changed(**settings))))


def test_another_tokenizer_or_end_is_refused_by_name(llama, changed):
    directory = changed()
    ends = directory / "generation_config.json"
    ends.write_text(json.dumps({**json.loads(ends.read_text()), "eos_token_id": [1, 7]}))
    with pytest.raises(BrocaError, match=r"not the same end tokens \(generation_config.json\) as"):
        require_same_tokens(llama, load_model(str(directory), device="cpu"))
    shutil.copy(llama.checkpoint / "generation_config.json", ends)
    require_same_tokens(llama, load_model(str(directory), device="cpu"))
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(BrocaError, match="not the same chat template as"):
        Exchange(llama, load_model(str(directory), device="cpu"))
    (directory / "chat_template.jinja").unlink()
    tokens = directory / "tokenizer.json"
    content = json.loads(tokens.read_text())
    content["model"]["vocab"] = {
        f"x{word}" if i == 9 else word: i for word, i in content["model"]["vocab"].items()
    }
    tokens.write_text(json.dumps(content))
    with pytest.raises(BrocaError, match="vocabulary"):
        require_same_tokens(llama, load_model(str(directory), device="cpu"))


@pytest.fixture
def evaluate(llama, known_text, tmp_path):
    def run(*arguments):
        out = tmp_path / "report.json"
        pair = ("--source", "en", "--target", "fr", "--prompts", 2, "--new-tokens", 4)
        given = [llama.name, "--corpus", known_text, *pair, "--out", out, *arguments]
        found = CliRunner().invoke(command, list(map(str, given)))
        if found.exception is not None:
            raise found.exception
        return json.loads(out.read_text(encoding="utf-8"))["outcomes"]

    return run


def test_an_export_with_added_biases_is_measured_as_its_plan_is(evaluate, biased):
    plan, exported = biased
    base, edited = evaluate("--edit", plan)
    against = evaluate("--against", exported)
    told = {"name": "edited", "details": edited["details"]}
    assert [against[0], {**against[1], **told}] == [base, edited]
    assert edited["nll_rise"]["fr"] != 0


def test_another_models_settings_are_refused_before_anything_is_measured(evaluate, changed, monkeypatch):
    monkeypatch.setattr("editing.evaluation.evaluation.Evaluation", None)
    with pytest.raises(BrocaError, match="rms_norm_eps"):
        evaluate("--against", changed(rms_norm_eps=0.5))
