"""``broca steer``: the checkpoint, its card with figures, the adapter, and an error of one line."""

import json

import pytest
from safetensors import safe_open

from editing.evaluation import language_id
from editing.evaluation.questions import read_questions
from editing.pipeline import lock_prompts, lock_text
from editing.pipeline.steer_recipe import SteerRecipe, read_steer_recipe


@pytest.fixture
def model(chat_model):
    return chat_model


@pytest.fixture
def questions(few_questions):
    return few_questions


def test_a_checkpoint_an_adapter_and_figures(broca, model, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: "fr")
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


def test_the_recipe_repeats_the_edit_to_the_byte(broca, model, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: "fr")
    out, again = tmp_path / "steered", tmp_path / "again"
    monkeypatch.chdir(tmp_path)
    text = ["--questions", "questions", "--judge", "model"]
    status, printed, errors = broca("steer", "model", "--to", "fr", "--seed", 3, *text, "--out", out)
    assert status == 0, errors
    recipe = out / "broca" / "recipe.toml"
    assert f"broca run {recipe}" in printed
    assert "broca run broca/recipe.toml" in (out / "README.md").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    status, printed, errors = broca("run", recipe, "--out", again, "--json")
    assert status == 0, errors
    for name in ("edit.safetensors", "recipe.toml", "report.html"):
        assert (again / "broca" / name).read_bytes() == (out / "broca" / name).read_bytes(), name
    # The judge's scores, on every way of writing the figures.
    figures = json.loads(printed)["measured"]
    assert figures["judge"]["model"] == "model"
    scores = figures["sources"]["en"]["relevance"]
    assert set(scores) == {"base", "prompted", "steered"}
    page, card = (out / "broca" / "report.html").read_text(), (out / "README.md").read_text()
    for score in scores.values():
        assert 0 < score < 1 and f'<td class="n">{score:.2f}</td>' in page and f"| {score:.2f} |" in card
    assert figures["examples"][0]["question"] in page and "broca run recipe.toml" in page


@pytest.mark.parametrize(
    "settings",
    [
        {"target": "fr"},
        {"target": "fr", "source": "de", "keep": ("en",)},
        {"target": "fr", "source": "all"},
        {"target": "fr", "teacher": "question"},
        {"target": "de", "source": "de", "instruction": 'Say "ja",\n\\ in German.'},
    ],
)
def test_the_recipe_says_the_same_lock(chatting, questions, tmp_path, settings):
    recipe = SteerRecipe(chatting.name, questions=questions, **settings)
    of_language = read_questions(questions)
    lock = recipe.lock(of_language)
    (tmp_path / "r.toml").write_text(recipe.resolved(chatting, of_language, lock).to_toml())
    again = read_steer_recipe(tmp_path / "r.toml")
    assert again.lock(of_language) == lock
    assert (again.device, again.dtype, again.fingerprint) == ("cpu", "float32", chatting.fingerprint)
    assert again.resolved(chatting, of_language, lock) == again


def recipe_of(tmp_path, **settings):
    lines = [f"{name} = {json.dumps(value)}" for name, value in {"model": "model", **settings}.items()]
    (tmp_path / "r.toml").write_text("\n".join(["[steer]", *lines, ""]))
    return tmp_path / "r.toml"


@pytest.mark.parametrize(
    "settings, status, named",
    [
        ({}, 2, "--stay"),
        ({"target": "fr", "to": "fr"}, 2, "unknown to"),
        ({"target": "fr", "teacher": "master"}, 2, "'master'"),
        ({"target": "fr", "keep": "de"}, 2, "'de'"),
        ({"target": "fr", "questions_digest": "0"}, 2, "questions_digest"),
        ({"target": "fr", "fingerprint": "0"}, 1, "fingerprint"),
        ({"target": "fr", "judge": "nowhere/at/all"}, 2, "nowhere/at/all"),
    ],
)
def test_a_recipe_that_cannot_be_repeated_is_an_error_of_one_line(
    broca, model, questions, tmp_path, monkeypatch, settings, status, named
):
    def work(*_, **__):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(lock_prompts, "generate", work)
    recipe = recipe_of(tmp_path, questions="questions", **settings)
    found, _, errors = broca("run", recipe, "--out", tmp_path / "steered")
    assert found == status and named in errors.splitlines()[-1] and "Traceback" not in errors
    assert not (tmp_path / "steered").exists()


def test_a_recipe_may_stand_beside_its_model_and_is_estimated(broca, model, questions, tmp_path):
    recipe = recipe_of(tmp_path, questions="questions", target="fr")
    status, printed, errors = broca("run", recipe, "--dry-run", "--json")
    assert status == 0, errors
    assert set(json.loads(printed)["stages"]) == {"key", "learn", "evaluate"}
    recipe.write_text("seed = 1\n" + recipe.read_text())
    status, _, errors = broca("run", recipe, "--dry-run")
    assert status == 2 and "seed" in errors


def test_a_model_that_stays(broca, model, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: "en")
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
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: "en")
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
