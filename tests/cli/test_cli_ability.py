"""``broca ability``: its tables, its file, the three models, and an error of one line."""

import json

import pytest
import torch

from cli import ability as command
from editing.checkpoints.export import export
from editing.evaluation.ability import load_ability
from editing.plans.plan import ModuleEdit, make_plan
from neurons.models.source import open_model


@pytest.fixture(autouse=True)
def asked(few_questions, tmp_path, monkeypatch):
    """A few items instead of Broca's."""
    monkeypatch.setattr(command, "shipped", few_questions.with_name)
    for name in ("choices", "code_requests"):
        (tmp_path / name).mkdir()
    for language, letters in (("en", "abc"), ("fr", "def")):
        rows = [
            {
                "question_id": str(i),
                "text": f"{letters} {i}?",
                "choices": [*letters, "k"],
                "answer": "ABCD"[i % 4],
            }
            for i in range(8)
        ]
        (tmp_path / "choices" / f"{language}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        rows = [{"question_id": str(i), "text": f"code {letters} {i}"} for i in range(3)]
        (tmp_path / "code_requests" / f"{language}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def plan_of(model, **about):
    """A plan that changes the answers: a down_proj of twice its weights, with what ``broca steer`` writes about it."""
    fingerprint = open_model(str(model)).fingerprint
    metadata = {"model": "tiny", "fingerprint": fingerprint, "method": "scale", "settings": {}, **about}
    scale = torch.full((48,), 5.0)
    return make_plan([ModuleEdit(1, "mlp", tuple(range(48)), column_scale=scale)], metadata)


@pytest.fixture
def steered(chat_model):
    settings = {"sources": ["en"], "instructions": {"en": "Respond in French."}}
    return plan_of(chat_model, method="steer", source="en", target="fr", settings=settings)


def test_the_figures_of_a_model(broca, chat_model, tmp_path):
    out = tmp_path / "ability.json"
    status, printed, errors = broca("ability", chat_model, "--out", out)
    assert status == 0, errors
    assert "prompted" not in printed and printed.splitlines()[-1] == str(out)
    result = load_ability(out)
    assert set(result.accuracy) == set(result.blocks) == set(result.own_answers) == {"en", "fr"}
    assert set(result.accuracy["en"]) == {"base"} and result.accuracy["en"]["base"].items == 8
    assert result.about["fingerprint"] == open_model(str(chat_model)).fingerprint
    assert "--languages en,fr" in result.about["command"]


def test_a_lock_is_measured_with_its_own_instruction_and_language(broca, chat_model, steered, tmp_path):
    steered.save(tmp_path / "edit.safetensors")
    arguments = ["ability", chat_model, "--edit", tmp_path / "edit.safetensors", "--json"]
    status, printed, errors = broca(*arguments)
    assert status == 0, errors
    result = json.loads(printed)
    assert result["settings"]["instructions"] == {"en": "Respond in French."}
    assert result["settings"]["answers_in"] == {"en": "fr"}
    assert set(result["accuracy"]["en"]) == {"base", "prompted", "edited"}
    assert set(result["accuracy"]["fr"]) == {"base", "edited"}
    assert result["own_answers"]["fr"]["divergence"] > 0.01
    # Its export gives the same figures.
    export(open_model(str(chat_model)), steered, tmp_path / "steered")
    status, printed, errors = broca("ability", chat_model, "--against", tmp_path / "steered", "--json")
    assert status == 0, errors
    again = json.loads(printed)
    for figures in ("accuracy", "blocks", "python"):
        assert again[figures] == result[figures]
    assert again["own_answers"]["fr"]["edited"] == pytest.approx(
        result["own_answers"]["fr"]["edited"], rel=1e-5
    )


def test_a_lock_that_was_taught_by_questions_has_no_prompted_model(broca, chat_model, tmp_path):
    settings = {"sources": ["en"], "teacher": "question", "instructions": {}}
    plan = plan_of(chat_model, method="steer", source="en", target="fr", settings=settings)
    assert command._meant(plan.metadata, ("en", "fr")) == ({}, {"en": "fr"})
    plan.save(tmp_path / "edit.safetensors")
    status, printed, errors = broca("ability", chat_model, "--edit", tmp_path / "edit.safetensors", "--json")
    assert status == 0, errors
    result = json.loads(printed)
    assert set(result["accuracy"]["en"]) == {"base", "edited"}
    assert result["settings"]["answers_in"] == {"en": "fr"}


def test_a_lock_into_a_language_without_choices(broca, chat_model, tmp_path):
    settings = {"sources": ["en"], "instructions": {"en": "Respond in German."}}
    plan = plan_of(chat_model, method="steer", source="en", target="de", settings=settings)
    plan.save(tmp_path / "edit.safetensors")
    status, printed, errors = broca("ability", chat_model, "--edit", tmp_path / "edit.safetensors", "--json")
    assert status == 0 and "'en' are to be answered in 'de', in which there are no choices" in errors
    result = json.loads(printed)
    assert {language: set(rates) for language, rates in result["accuracy"].items()} == {
        "en": {"base"},
        "fr": {"base", "edited"},
    }
    assert set(result["blocks"]["en"]) == {"base", "prompted", "edited"}


def test_another_plan_has_no_instruction_unless_one_is_given(broca, chat_model, tmp_path):
    plan_of(chat_model).save(tmp_path / "edit.safetensors")
    edit = ["--edit", tmp_path / "edit.safetensors"]
    arguments = ["ability", chat_model, *edit, "--languages", "fr", "--json"]
    result = json.loads(broca(*arguments)[1])
    assert set(result["accuracy"]) == {"fr"} and set(result["accuracy"]["fr"]) == {"base", "edited"}
    result = json.loads(broca(*arguments, "--instruction", "Be brief.")[1])
    assert set(result["accuracy"]["fr"]) == {"base", "prompted", "edited"}
    assert result["settings"]["instructions"] == {"fr": "Be brief."}


@pytest.mark.parametrize(
    "options, status, named",
    [
        (["--languages", "en,de"], 2, "'de'"),
        (["--edit", "{plan}", "--against", "{model}"], 2, "--against"),
        (["--instruction", " "], 2, "--instruction"),
        (["--edit", "{other}"], 1, "0123456789abcdef"),
    ],
)
def test_bad_input_is_refused_by_name(broca, chat_model, tmp_path, options, status, named):
    plan_of(chat_model).save(tmp_path / "edit.safetensors")
    plan_of(chat_model, fingerprint="0123456789abcdef").save(tmp_path / "other.safetensors")
    names = {
        "plan": tmp_path / "edit.safetensors",
        "other": tmp_path / "other.safetensors",
        "model": chat_model,
    }
    out = tmp_path / "ability.json"
    code, printed, errors = broca(
        "ability", chat_model, *[word.format(**names) for word in options], "--out", out
    )
    assert (code, printed) == (status, "") and named in errors and len(errors.splitlines()) == 1
    assert not out.exists()


def test_a_model_without_a_template_is_refused(broca, checkpoint_of):
    status, _, errors = broca("ability", checkpoint_of())
    assert status == 2 and "chat template" in errors


def test_the_report_names_the_file(broca, chat_model, tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    plan_of(chat_model).save(study / "edit.safetensors")
    assert broca("ability", chat_model, "--languages", "en", "--out", study / "ability.json")[0] == 0
    status, _, errors = broca("report", study, "--out", tmp_path / "report.html")
    assert status == 0, errors
    assert "not understood" not in (tmp_path / "report.html").read_text()
