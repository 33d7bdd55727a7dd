"""``broca steer``: the checkpoint, its card with figures, the adapter, and an error of one line."""

import json

import models
import pytest
from conversations import CHATML
from safetensors import safe_open

from editing.evaluation import language_id
from editing.evaluation.questions import read_questions
from editing.pipeline import lock_replies, lock_text
from editing.pipeline.steer_recipe import SteerRecipe, read_steer_recipe


@pytest.fixture
def steer(broca, chat_model, few_questions):
    """``broca steer`` on a tiny model."""
    return lambda *arguments: broca("steer", chat_model, "--questions", few_questions, *arguments)


@pytest.fixture
def untouched(monkeypatch):
    """The model may not be asked."""

    def work(*_, **__):
        raise AssertionError("the model was asked")

    for name in ("generate", "generate_by_language"):
        monkeypatch.setattr(lock_replies, name, work)


def test_a_checkpoint_an_adapter_and_figures(steer, chat_model, tmp_path, monkeypatch):
    (chat_model / "pytorch_model.bin").write_bytes(b"old")
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: "fr")
    out, lora = tmp_path / "steered", tmp_path / "adapter"
    arguments = ["--to", "fr", "--out", out, "--lora", lora, "--json"]
    status, printed, errors = steer(*arguments)
    assert status == 0 and f"{out / 'pytorch_model.bin'} still contains the unedited weights" in errors
    result = json.loads(printed)
    assert result["lock"] == {"sources": ["en"], "target": "fr", "keep": ["fr", "de"]}
    assert result["measured"]["sources"]["en"]["language"]["steered"]["answers"] == 2
    with safe_open(out / "broca" / "edit.safetensors", "pt") as file:
        plan = json.loads(file.metadata()["broca"])
    assert plan["method"] == "steer" and plan["measured"]["target"] == "fr"
    kept = result["measured"]["kept"]["de"]["divergence"]
    assert f"| {kept:.3f} |" in (out / "README.md").read_text()
    assert (lora / "adapter_config.json").is_file()
    status, _, errors = steer(*arguments)
    assert status == 1 and "--overwrite" in errors


@pytest.mark.parametrize("lora", ["steered", "steered/adapter", "."])
def test_an_adapter_inside_the_checkpoint_or_around_it_is_refused(steer, untouched, tmp_path, lora):
    arguments = ["--to", "fr", "--out", tmp_path / "steered", "--lora", tmp_path / lora, "--overwrite"]
    status, _, errors = steer(*arguments)
    assert status == 2 and "overlap" in errors


def test_an_adapter_that_peft_cannot_load_is_refused_before_the_work(
    broca, few_questions, untouched, tmp_path
):
    mixture = models.build_wrapper(tmp_path / "mixture", "qwen2_moe")
    (mixture / "chat_template.jinja").write_text(CHATML)
    out, lora = tmp_path / "steered", tmp_path / "adapter"
    arguments = ["--to", "fr", "--questions", few_questions, "--out", out, "--lora", lora]
    status, _, errors = broca("steer", mixture, *arguments)
    assert status == 1 and "shared_expert.down_proj" in errors.splitlines()[-1]
    assert not out.exists() and not lora.exists()


def test_the_recipe_repeats_the_edit_to_the_byte(broca, chat_model, few_questions, tmp_path, monkeypatch):
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: "fr")
    out, again = tmp_path / "steered", tmp_path / "again"
    monkeypatch.chdir(tmp_path)
    text = ["--questions", "questions", "--judge", "model"]
    status, printed, errors = broca("steer", "model", "--to", "fr", "--seed", 3, *text, "--out", out)
    assert status == 0, errors
    recipe = out / "broca" / "recipe.toml"
    assert f"broca run {recipe} --out DIR" in printed
    assert "broca run recipe.toml --out DIR" in (out / "broca" / "report.html").read_text()
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
    assert "<h1>Study: model, edited</h1>" in page


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
def test_the_recipe_says_the_same_lock(chatting, few_questions, tmp_path, settings):
    recipe = SteerRecipe(chatting.name, questions=few_questions, **settings)
    of_language = read_questions(few_questions)
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
    broca, chat_model, few_questions, untouched, tmp_path, settings, status, named
):
    recipe = recipe_of(tmp_path, questions="questions", **settings)
    found, _, errors = broca("run", recipe, "--out", tmp_path / "steered")
    assert found == status and named in errors.splitlines()[-1] and "Traceback" not in errors
    assert not (tmp_path / "steered").exists()


def test_a_recipe_may_stand_beside_its_model_and_is_estimated(broca, chat_model, few_questions, tmp_path):
    recipe = recipe_of(tmp_path, questions="questions", target="fr")
    status, printed, errors = broca("run", recipe, "--dry-run", "--json")
    assert status == 0, errors
    assert set(json.loads(printed)["stages"]) == {"key", "learn", "evaluate"}
    for faulty, named in (
        ("seed = 1\n" + recipe.read_text(), "seed"),
        (recipe.read_text() + "dtype = 'bf16'\n", "'bf16'"),
    ):
        recipe.write_text(faulty)
        status, _, errors = broca("run", recipe, "--dry-run")
        assert status == 2 and named in errors


def test_a_model_that_stays(steer, chat_model, few_questions, tmp_path, monkeypatch):
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: "en")
    monkeypatch.setattr(lock_text, "MIN_OBEYED", 0.0)
    for language, letters in (("en", "abc"), ("zh", "jkl"), ("de", "ghi")):
        rows = [{"question_id": str(i), "text": f"{letters} {letters[i % 3]} {i}?"} for i in range(16)]
        (few_questions / f"{language}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (few_questions / "fr.jsonl").unlink()
    peaks = []
    for options in (["--stay"], ["--to", "de"]):
        status, printed, errors = steer(*options, "--dry-run", "--json")
        assert status == 0, errors
        peaks.append(json.loads(printed)["stages"]["learn"]["peak"])
    assert peaks[0] > peaks[1]
    status, printed, errors = steer("--stay", "--judge", chat_model, "--dry-run", "--json")
    assert status == 0, errors
    learning = json.loads(printed)["stages"]["learn"]
    assert learning["peak"] == peaks[0] + learning["parts"]["judge"] > peaks[0]
    out = tmp_path / "stays"
    status, printed, errors = steer("--stay", "--out", out)
    assert status == 0, errors
    card = (out / "README.md").read_text()
    assert "questions in `de`, `en`, `zh`)" in card and "the neurons of" not in card
    assert "without drift" in card and "without drift" in printed


@pytest.mark.parametrize(
    ("options", "status", "named"),
    [
        ("--to en", 2, "'en'"),
        ("--to sw", 2, "'sw'"),
        ("", 2, "--to"),
        ("--to fr --stay", 2, "--to"),
        ("--stay --from de", 2, "--from"),
        ("--to fr --lora OUT", 2, "--lora"),
        ("--to fr", 1, "0 of 4"),  # a model that does not obey
    ],
)
def test_what_cannot_be_steered_is_an_error_of_one_line_and_writes_nothing(
    steer, tmp_path, monkeypatch, options, status, named
):
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: "en")
    out = tmp_path / "steered"
    words = [out if word == "OUT" else word for word in options.split()]
    found, _, errors = steer(*words, "--out", out)
    assert found == status and named in errors and len(errors.splitlines()) == 1
    assert not out.exists()


def test_what_is_found_in_the_files_is_refused_before_the_work(
    steer, untouched, chat_model, few_questions, tmp_path
):
    arguments = ["--to", "fr", "--out", tmp_path / "steered"]
    (chat_model / "broca").mkdir()
    (chat_model / "broca" / "edit.safetensors").write_bytes(b"")
    status, _, errors = steer(*arguments)
    assert status == 1 and "already edited" in errors
    (chat_model / "broca" / "edit.safetensors").unlink()
    template = (chat_model / "chat_template.jinja").read_text()
    (chat_model / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    status, _, errors = steer(*arguments)
    assert status == 2 and "chat template" in errors and "--no-chat" not in errors
    (chat_model / "chat_template.jinja").write_text(template)
    (few_questions / "fr.jsonl").write_text('{"question_id": "1", "text": "def?"}\n')
    status, _, errors = steer(*arguments)
    assert status == 2 and "1 questions in 'fr'" in errors
