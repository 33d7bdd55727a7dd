"""``broca steer``: a checkpoint, its card with the figures, an adapter, and one sentence where it cannot be."""

import json
import shutil

import pytest
from conversations import CHATML
from safetensors import safe_open

from editing.pipeline import lock_text


@pytest.fixture
def model(checkpoint_of, tmp_path):
    directory = shutil.copytree(checkpoint_of("llama"), tmp_path / "model")
    (directory / "chat_template.jinja").write_text(CHATML)
    return directory


@pytest.fixture
def questions(tmp_path):
    directory = tmp_path / "questions"
    directory.mkdir()
    for language, letters in (("en", "abc"), ("fr", "def"), ("de", "ghi")):
        rows = [{"question_id": str(i), "text": f"{letters} {letters[i % 3]} {i}?"} for i in range(8)]
        (directory / f"{language}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return directory


def test_a_checkpoint_an_adapter_and_figures(broca, model, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(lock_text, "identify_language", lambda text, languages: "fr")
    out, lora = tmp_path / "steered", tmp_path / "adapter"
    arguments = [
        "steer",
        model,
        "--to",
        "fr",
        "--questions",
        questions,
        "--out",
        out,
        "--lora",
        lora,
        "--json",
    ]
    status, printed, errors = broca(*arguments)
    assert status == 0, errors
    result = json.loads(printed)
    assert result["lock"] == {"sources": ["en"], "target": "fr", "keep": ["fr", "de"]}
    assert result["measured"]["sources"]["en"]["language"]["steered"]["answers"] == 2
    with safe_open(out / "broca" / "edit.safetensors", "pt") as file:
        plan = json.loads(file.metadata()["broca"])
    assert plan["method"] == "steer" and plan["measured"]["target"] == "fr"
    kept = result["measured"]["kept"]["de"]["divergence"]
    assert f"| {kept:.3f} |" in (out / "README.md").read_text()
    assert (lora / "adapter_config.json").is_file()
    status, _, errors = broca(*arguments)
    assert status == 1 and "--overwrite" in errors


def test_a_disobedient_model_is_one_sentence_and_leaves_nothing(
    broca, model, questions, tmp_path, monkeypatch
):
    monkeypatch.setattr(lock_text, "identify_language", lambda text, languages: "en")
    arguments = ["steer", model, "--to", "fr", "--questions", questions, "--out", tmp_path / "steered"]
    status, _, errors = broca(*arguments)
    assert status == 1 and "0 of 4" in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "steered").exists()


@pytest.mark.parametrize("target, named", [("en", "en"), ("sw", "sw")])
def test_languages_that_cannot_be(broca, model, questions, tmp_path, target, named):
    arguments = ["steer", model, "--to", target, "--questions", questions, "--out", tmp_path / "steered"]
    status, _, errors = broca(*arguments)
    assert status == 2 and f"'{named}'" in errors
