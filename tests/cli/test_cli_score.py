"""``broca score``: tables, file and refusals."""

import json

import pytest

from editing.evaluation.answer_scores import AnswerScores
from neurons.errors import UsageError
from neurons.files.json_file import checked, read_json


@pytest.fixture
def answers(tmp_path):
    texts = {
        "en": ["Le chat dort sur le canapé du salon.", "The cat sleeps on the sofa of the living room."],
        "de": ["Je ne sais pas ce que vous voulez dire par là."],
    }
    rows = [
        {
            "question_id": str(i),
            "language": language,
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}],
            "of": "0123",
        }
        for language, of_language in texts.items()
        for i, text in enumerate(of_language)
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_of_a_file(broca, answers, tmp_path):
    out = tmp_path / "scores.json"
    status, printed, err = broca("score", answers, "--target", "fr", "--out", out, "--json")
    assert status == 0, err
    found = checked(AnswerScores, read_json(out), out)
    assert {k: of.forcing.forcing for k, of in found.questions.items()} == {"en": 0.5, "de": 1.0, "all": 0.75}
    assert {k: of.confusion.lines for k, of in found.questions.items()} == {"en": 0.5, "de": 1.0, "all": 0.75}
    assert found.about["answers_of"] == ["0123"] and json.loads(printed)["target"] == "fr"
    status, printed, _ = broca("score", answers, "--target", "fr")
    assert status == 0 and "CLaS-Bench" in printed and "Language Confusion Benchmark" in printed


def test_a_judge_that_gives_no_rating_is_named(broca, answers, chat_model):
    status, printed, err = broca("score", answers, "--target", "fr", "--judge", chat_model, "--json")
    assert status == 0, err
    assert (
        "--device cpu" in json.loads(printed)["command"]
        and "--dtype float32" in json.loads(printed)["command"]
    )
    unrated = 3 - json.loads(printed)["questions"]["all"]["forcing"]["rated"]
    assert unrated and f"{unrated} replies of the judge have no rating" in err


def test_the_judge_computes_in_the_dtype_of_serving(broca, answers, chat_model, monkeypatch):
    def load(model, device, dtype):
        raise UsageError(f"loaded in {dtype}")

    def own_dtype(model, device, dtype):
        return "the dtype of serving" if dtype == "auto" else dtype

    monkeypatch.setattr("neurons.models.own_dtype.own_dtype", own_dtype)
    monkeypatch.setattr("neurons.models.source.load_model", load)
    for words, dtype in ([], "the dtype of serving"), (["--dtype", "float16"], "float16"):
        assert f"loaded in {dtype}" in broca("score", answers, "--judge", chat_model, *words)[2]


def test_the_judge_reads_the_instruction_as_it_stands_in_the_file(
    broca, answers, chat_model, tmp_path, monkeypatch
):
    given = []
    monkeypatch.setattr(
        "editing.evaluation.language_forcing.ratings", lambda *args: given.append(args) or [1] * len(args[1])
    )
    text = "Rate from 0 to 2.  \n\nIn {target}:\n"
    (tmp_path / "instruction.txt").write_text(text, encoding="utf-8")
    words = ["--judge", chat_model, "--judge-instruction", tmp_path / "instruction.txt", "--json"]
    status, _, errors = broca("score", answers, *words)
    assert status == 0, errors
    assert given and all(text in args for args in given)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--target", "xx"], "does not identify xx"),
        (["--judge", "{model}"], "has no chat template, so it cannot judge"),
        (["--judge-instruction", "answers.jsonl"], "needs --judge"),
        (["--identifier", "answers.jsonl"], "not a fastText model"),
        (["--judge", "{model}", "--judge-instruction", "latin.txt"], "latin.txt: line 1 is not UTF-8"),
        (["--out", "answers.jsonl"], "is the input of ANSWERS"),
    ],
)
def test_refusals(broca, answers, checkpoint_of, monkeypatch, words, reason):
    monkeypatch.chdir(answers.parent)
    (answers.parent / "latin.txt").write_bytes(b"R\xe9ponds")
    words = [word.format(model=checkpoint_of()) for word in words]
    status, _, err = broca("score", answers, "--target", "fr", *words)
    assert status in (1, 2) and reason in err and len(err.splitlines()) == 1


def test_a_file_without_answers_is_refused(broca, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    status, _, err = broca("score", tmp_path / "empty.jsonl")
    assert status == 2 and "broca ask" in err
