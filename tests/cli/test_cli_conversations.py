"""Conversations as the text of every command that reads a corpus: ``--roles``, and the answers of ``broca ask``."""

import json

import models
import pytest
from conversations import CHATML, said, written

from editing.plans.plan import load_plan
from neurons.files.artifact import load_artifact

QUESTIONS = {"en": ("bad cab", "fed bee"), "fr": ("high hill", "kill him"), "de": ("ill", "hi")}
ROLES = "header,answer"
KEPT = ["header", "answer"]


@pytest.fixture
def chats(tmp_path):
    rows = {
        language: [
            said(("user", question), ("assistant", f"{question} {i}")) for i in range(2) for question in pair
        ]
        for language, pair in QUESTIONS.items()
    }
    return written(tmp_path / "chats", rows)


def test_answers_of_a_model_are_a_corpus(broca, chat_model, few_questions, tmp_path):
    answers, out = tmp_path / "answers.jsonl", tmp_path / "statistics.safetensors"
    status, _, errors = broca(
        "ask", chat_model, "--questions", few_questions, "--new-tokens", 6, "--out", answers
    )
    assert status == 0, errors
    text = ["--corpus", answers, "--languages", "en,fr", "--roles", "answer"]
    status, printed, errors = broca("record", chat_model, *text, "--out", out, "--json")
    assert status == 0, errors
    assert json.loads(printed)["texts"] == {"en": 8, "fr": 8}
    assert load_artifact(out, "statistics").metadata["corpora"][0]["roles"] == ["answer"]


def test_every_command_reads_the_tokens_of_the_roles(broca, chat_model, chats, tmp_path):
    def run(command, *arguments, out):
        status, printed, errors = broca(command, chat_model, *arguments, *text, "--out", out, "--json")
        assert status == 0, errors
        return json.loads(printed)

    text = ["--corpus", chats, "--roles", ROLES]
    neurons, direction, edit = (tmp_path / f"{name}.safetensors" for name in ("n", "d", "e"))
    run("identify", "--method", "gradient-contrast", "--top-rate", "0.2", out=neurons)
    assert load_artifact(neurons, "neurons").metadata["corpora"][0]["roles"] == KEPT
    run("direction", "--source", "en", "--target", "fr", out=direction)
    assert load_artifact(direction, "direction").metadata["corpus"]["roles"] == KEPT
    run("edit", "--direction", direction, out=edit)
    assert load_artifact(edit, "edit").metadata["settings"]["corpus"]["roles"] == KEPT
    study = tmp_path / "study.json"
    run("ablate", neurons, "--draws", 0, out=study)
    assert json.loads(study.read_text())["corpus"]["roles"] == KEPT


def test_the_protocol_of_steer2edit_from_questions_to_the_edit(broca, chat_model, few_questions, tmp_path):
    """Of the documentation: the model's answers, a direction where they are predicted, an edit."""
    answers, direction, edit = (tmp_path / name for name in ("a.jsonl", "d.safetensors", "e.safetensors"))
    asked = ["--questions", few_questions, "--languages", "en,fr", "--new-tokens", 6]
    text = ["--corpus", answers, "--source", "en", "--target", "fr", "--roles", "before-answer"]
    for command in (
        ["ask", chat_model, *asked, "--out", answers],
        ["direction", chat_model, *text, "--out", direction],
        ["edit", chat_model, "--method", "steer2edit", "--direction", direction, "--out", edit],
    ):
        status, _, errors = broca(*command)
        assert status == 0, errors
    assert load_artifact(direction, "direction").metadata["corpus"]["roles"] == ["before-answer"]
    plan = load_plan(edit)
    assert plan.metadata["method"] == "steer2edit" and plan.components > 0


def test_evaluation_needs_questions_and_measures_the_answers(
    broca, chat_model, chats, few_questions, tmp_path
):
    out = tmp_path / "report.json"
    command = [
        "evaluate",
        chat_model,
        "--corpus",
        chats,
        "--source",
        "en",
        "--target",
        "fr",
        "--new-tokens",
        4,
    ]
    status, _, errors = broca(*command, "--out", out)
    assert status == 2 and "en.jsonl: line 1" in errors and "--questions" in errors
    (few_questions / "de.jsonl").unlink()
    status, _, errors = broca(*command, "--questions", few_questions, "--others", "--out", out)
    assert status == 2 and "de.jsonl: line 1" in errors
    nll = {}
    for roles in ("answer", "user"):
        status, _, errors = broca(*command, "--questions", few_questions, "--roles", roles, "--out", out)
        assert status == 0, errors
        report = json.loads(out.read_text())
        assert report["corpus"]["roles"] == [roles] and f"--roles {roles}" in report["command"]
        nll[roles] = report["outcomes"][0]["nll"]
    assert nll["answer"] != nll["user"]


def test_prompts_of_openings_need_plain_text(broca, chat_model, chats, tmp_path):
    common = ["--source", "en", "--target", "fr", "--out", tmp_path / "tuned"]
    status, _, errors = broca("tune", chat_model, "--corpus", chats, *common)
    assert status == 2 and "en.jsonl: line" in errors
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'model = "{chat_model}"\ncorpus = "{chats}"\nsource = "en"\ntargets = ["fr"]\n')
    status, _, errors = broca("run", recipe, "--out", tmp_path / "run")
    assert status == 2 and "en.jsonl: line" in errors


@pytest.mark.parametrize(
    ("roles", "message"),
    [("assistant", "'assistant'"), ("thought", "thought"), ("user,,answer", "empty item")],
)
def test_bad_roles_are_errors_of_one_line(broca, chat_model, chats, tmp_path, roles, message):
    out = tmp_path / "d.safetensors"
    common = ["--corpus", chats, "--source", "en", "--target", "fr", "--out", out]
    status, _, errors = broca("direction", chat_model, *common, "--roles", roles)
    assert status == 2 and message in errors and "Traceback" not in errors
    assert not out.exists()


def test_roles_without_conversations_are_refused(broca, chat_model, tmp_path):
    text = ["--corpus", models.write_corpus(tmp_path / "text"), "--roles", "user"]
    status, _, errors = broca("record", chat_model, *text, "--out", tmp_path / "s.safetensors")
    assert status == 2 and "plain text" in errors
    scale = ["--method", "scale", "--neurons", chat_model / "config.json", "--languages", "en"]
    status, _, errors = broca(
        "edit", chat_model, *scale, "--roles", "user", "--out", tmp_path / "e.safetensors"
    )
    assert status == 2 and "--roles" in errors


def test_a_model_without_a_template_is_named_with_the_line(broca, checkpoint_of, chats, tmp_path):
    out = tmp_path / "s.safetensors"
    status, _, errors = broca("record", checkpoint_of(), "--corpus", chats, "--out", out)
    assert status == 2 and "de.jsonl: line 1" in errors and "chat template" in errors


def test_memory_is_estimated_for_rows_not_blocks(broca, tmp_path):
    directory = models.build_checkpoint(tmp_path / "model", max_position_embeddings=2048)
    (directory / "chat_template.jinja").write_text(CHATML)
    rows = {k: [said(("user", question)) for question in pair] for k, pair in QUESTIONS.items()}
    texts = {"chats": written(tmp_path / "chats", rows), "plain": models.write_corpus(tmp_path / "plain")}
    at_once = {}
    for name, corpus in texts.items():
        dry = ["--for", "lape", "--dry-run", "--json", "--out", tmp_path / "s"]
        status, printed, errors = broca("record", directory, "--corpus", corpus, *dry)
        assert status == 0, errors
        at_once[name] = json.loads(printed)["stages"]["record"]["tokens_at_once"]
    assert at_once["chats"] < at_once["plain"]
