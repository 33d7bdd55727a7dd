"""``broca ask``: answers are the model's own, and a stopped run goes on where it was."""

import json
import shutil

import pytest
from conversations import CHATML

from editing.evaluation import ask as asking
from editing.evaluation.generation import generate
from editing.evaluation.questions import Question
from editing.pipeline.lock_text import prompt_of
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model


@pytest.fixture
def model(checkpoint_of, tmp_path):
    directory = shutil.copytree(checkpoint_of("llama"), tmp_path / "model")
    (directory / "chat_template.jinja").write_text(CHATML)
    return directory


@pytest.fixture
def questions(tmp_path):
    directory = tmp_path / "questions"
    directory.mkdir()
    for language, letters in (("en", "abc"), ("fr", "def")):
        rows = [{"question_id": str(i), "text": f"{letters} {letters[i % 3]} {i}?"} for i in range(5)]
        (directory / f"{language}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return directory


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_conversations_with_the_likeliest_answers(broca, model, questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    arguments = ["ask", model, "--questions", questions, "--new-tokens", 6, "--out", out]
    status, printed, errors = broca(*arguments)
    assert status == 0, errors
    assert printed.splitlines()[-1] == str(out)
    loaded = load_model(str(model), device="cpu")
    rows = read(out)
    assert [(row["language"], row["question_id"]) for row in rows] == [
        (language, str(i)) for language in ("en", "fr") for i in range(5)
    ]
    for row in rows:
        question, answer = row["messages"]
        (expected,) = generate(
            loaded, [prompt_of(loaded, question["content"]).ids.tolist()], 6, temperature=0
        )
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert answer["content"] == expected.text
    before = out.read_bytes()
    assert broca(*arguments)[0] == 0
    assert out.read_bytes() == before


def test_answers_of_other_settings_are_not_mixed(broca, model, questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    arguments = ["ask", model, "--questions", questions, "--out", out, "--languages", "fr"]
    assert broca(*arguments, "--new-tokens", 6)[0] == 0
    before = out.read_bytes()
    status, _, errors = broca(*arguments, "--new-tokens", 7)
    assert status == 2 and str(out) in errors
    assert out.read_bytes() == before


def test_a_stopped_run_keeps_whole_batches_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "AT_ONCE", 2)
    questions = {"en": [Question(str(i), f"q{i}") for i in range(5)]}
    out, asked = tmp_path / "answers.jsonl", []

    def write(prompts):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return [asking.Continuation(tuple(prompt), f"answer to {prompt[0]}") for prompt in prompts]

    def prompt(text):
        return [int(text[1:])]

    with pytest.raises(KeyboardInterrupt):
        asking.ask(write, prompt, questions, out, "one")
    assert len(read(out)) == 4
    asked.clear()
    told = []
    rows = asking.ask(write, prompt, questions, out, "one", told.append)
    assert asked == [[4]] and told == [4, 1]
    assert [row["messages"][1]["content"] for row in rows] == [f"answer to {i}" for i in range(5)]
    with pytest.raises(UsageError, match=str(out)):
        asking.ask(write, prompt, questions, out, "another")


@pytest.mark.parametrize("content", ["not JSON\n", "[]\n", '{"language": "en"}\n'])
def test_another_file_is_not_written_over(tmp_path, content):
    out = tmp_path / "answers.jsonl"
    out.write_text(content)
    with pytest.raises(BrocaError, match="line 1"):
        asking.ask(lambda prompts: [], lambda text: [1], {"en": [Question("1", "q")]}, out, "one")
    assert out.read_text() == content


@pytest.mark.parametrize(
    "more, named", [(["--languages", "xx"], "xx"), (["--out", "answers.txt"], "answers.txt")]
)
def test_what_cannot_be_asked(broca, model, questions, tmp_path, more, named):
    arguments = ["ask", model, "--questions", questions, "--out", tmp_path / "answers.jsonl", *more]
    status, _, errors = broca(*arguments)
    assert status == 2 and named in errors
