"""``broca steer``: the checkpoint, its card with figures, the adapter, and an error of one line."""

import json

import pytest
from safetensors import safe_open

from editing.pipeline import lock_prompts, lock_text


@pytest.fixture
def model(chat_model):
    return chat_model


@pytest.fixture
def questions(few_questions):
    return few_questions


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


def test_a_model_that_stays(broca, model, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(lock_text, "identify_language", lambda text, languages: "en")
    monkeypatch.setattr(lock_text, "MIN_OBEYED", 0.0)
    for language, letters in (("en", "abc"), ("zh", "jkl"), ("de", "ghi")):
        rows = [{"question_id": str(i), "text": f"{letters} {letters[i % 3]} {i}?"} for i in range(16)]
        (questions / f"{language}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (questions / "fr.jsonl").unlink()
    peaks = []
    for options in (["--stay"], ["--to", "de"]):
        status, printed, errors = broca(
            "steer", model, *options, "--questions", questions, "--dry-run", "--json"
        )
        assert status == 0, errors
        peaks.append(json.loads(printed)["stages"]["learn"]["peak"])
    assert peaks[0] > peaks[1]
    out = tmp_path / "stays"
    status, printed, errors = broca("steer", model, "--stay", "--questions", questions, "--out", out)
    assert status == 0, errors
    card = (out / "README.md").read_text()
    assert "questions in `de`, `en`, `zh`)" in card and "the neurons of" not in card
    assert "without drift" in card and "without drift" in printed


def test_a_disobedient_model_is_an_error_of_one_line_and_writes_nothing(
    broca, model, questions, tmp_path, monkeypatch
):
    monkeypatch.setattr(lock_text, "identify_language", lambda text, languages: "en")
    arguments = ["steer", model, "--to", "fr", "--questions", questions, "--out", tmp_path / "steered"]
    status, _, errors = broca(*arguments)
    assert status == 1 and "0 of 4" in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "steered").exists()


@pytest.mark.parametrize("target, named", [("en", "en"), ("sw", "sw")])
def test_impossible_languages_are_refused_by_name(broca, model, questions, tmp_path, target, named):
    arguments = ["steer", model, "--to", target, "--questions", questions, "--out", tmp_path / "steered"]
    status, _, errors = broca(*arguments)
    assert status == 2 and f"'{named}'" in errors


def test_an_impossible_export_is_refused_before_the_work(broca, model, questions, tmp_path, monkeypatch):
    def work(*_, **__):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(lock_prompts, "generate", work)
    out = tmp_path / "steered"
    arguments = ["steer", model, "--to", "fr", "--questions", questions, "--out", out]
    status, _, errors = broca(*arguments, "--lora", out)
    assert status == 2 and "--lora" in errors
    (model / "broca").mkdir()
    (model / "broca" / "edit.safetensors").write_bytes(b"")
    status, _, errors = broca(*arguments)
    assert status == 1 and "already edited" in errors


def test_too_few_questions_are_refused_by_number(broca, model, questions, tmp_path):
    (questions / "fr.jsonl").write_text('{"question_id": "1", "text": "def?"}\n')
    arguments = ["steer", model, "--to", "fr", "--questions", questions, "--out", tmp_path / "steered"]
    status, _, errors = broca(*arguments)
    assert status == 2 and "1 questions in 'fr'" in errors


def test_a_failing_template_is_refused_without_an_option_of_other_commands(broca, model, questions, tmp_path):
    (model / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    arguments = ["steer", model, "--to", "fr", "--questions", questions, "--out", tmp_path / "steered"]
    status, _, errors = broca(*arguments)
    assert status == 2 and "chat template" in errors and "--no-chat" not in errors


@pytest.mark.parametrize("options", [[], ["--to", "fr", "--stay"], ["--stay", "--from", "de"]])
def test_to_and_stay_exclude_each_other(broca, model, questions, tmp_path, options):
    arguments = ["steer", model, *options, "--questions", questions, "--out", tmp_path / "steered"]
    status, _, errors = broca(*arguments)
    assert status == 2 and ("--to" in errors or "--from" in errors)
    assert not (tmp_path / "steered").exists()
