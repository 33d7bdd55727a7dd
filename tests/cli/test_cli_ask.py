"""``broca ask``: answers are the model's greedy ones, and a stopped run continues where it stopped."""

import json

import pytest

from editing.evaluation import ask as asking
from editing.evaluation.generation import generate
from editing.evaluation.questions import Question
from editing.pipeline.lock_text import prompt_of
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_conversations_with_greedy_answers(broca, chat_model, few_questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    arguments = ["ask", chat_model, "--questions", few_questions, "--new-tokens", 6, "--out", out]
    status, printed, errors = broca(*arguments)
    assert status == 0, errors
    assert printed.splitlines()[-1] == str(out)
    loaded = load_model(str(chat_model), device="cpu")
    rows = read(out)
    assert [(row["language"], row["question_id"]) for row in rows] == [
        (language, str(i)) for language in ("de", "en", "fr") for i in range(8)
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


@pytest.mark.parametrize(
    ("before", "after"),
    [(["--new-tokens", 6], ["--new-tokens", 7]), (["--dtype", "float32"], ["--dtype", "bfloat16"])],
)
def test_answers_of_other_settings_are_not_mixed(broca, chat_model, few_questions, tmp_path, before, after):
    out = tmp_path / "answers.jsonl"
    common = [
        "ask",
        chat_model,
        "--questions",
        few_questions,
        "--out",
        out,
        "--languages",
        "FR",
        "--new-tokens",
        4,
    ]
    assert broca(*common, *before)[0] == 0
    content = out.read_bytes()
    status, _, errors = broca(*common, *after)
    assert status == 2 and str(out) in errors
    assert out.read_bytes() == content


@pytest.mark.parametrize("command", ["ask", "steer"])
def test_questions_without_a_language_are_refused(broca, chat_model, few_questions, tmp_path, command):
    out = tmp_path / "out.jsonl"
    words = ["--languages", "fr"] if command == "ask" else ["--to", "fr"]
    status, _, errors = broca(
        command, chat_model, "--questions", few_questions / "en.jsonl", *words, "--out", out
    )
    assert status == 2 and "no language" in errors and "<language>.jsonl" in errors
    assert not out.exists()


def test_a_stopped_run_keeps_whole_batches_and_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "AT_ONCE", 2)
    questions = {"en": [Question(str(i), f"q{i}") for i in range(5)]}
    out, answered = tmp_path / "answers.jsonl", []

    def write(prompts):
        if len(answered) == 4:
            raise KeyboardInterrupt
        answered.extend(prompts)
        return [asking.Continuation(tuple(prompt), f"answer to {prompt[0]}") for prompt in prompts]

    def prompt(text):
        return [int(text[1:])]

    with pytest.raises(KeyboardInterrupt):
        asking.ask(write, prompt, questions, out, "one")
    assert len(read(out)) == 4
    answered.clear()
    counts = []
    rows = asking.ask(write, prompt, questions, out, "one", counts.append)
    assert answered == [[4]] and counts == [4, 1]
    assert [row["messages"][1]["content"] for row in rows] == [f"answer to {i}" for i in range(5)]
    with pytest.raises(UsageError, match=str(out)):
        asking.ask(write, prompt, questions, out, "another")


def test_an_answer_may_contain_any_line_separator(tmp_path):
    questions = {"en": [Question("1", "q1")]}
    out, text = tmp_path / "answers.jsonl", "one\u2028two\x85three\nfour"

    def write(prompts):
        return [asking.Continuation((1,), text) for _ in prompts]

    for _ in range(2):
        (row,) = asking.ask(write, lambda text: [1], questions, out, "one")
        assert row["messages"][1]["content"] == text


def test_an_answer_to_a_different_question_with_the_same_id_is_refused(tmp_path):
    out = tmp_path / "answers.jsonl"

    def write(prompts):
        return [asking.Continuation((1,), "answer") for _ in prompts]

    asking.ask(write, lambda text: [1], {"en": [Question("7", "before")]}, out, "one")
    with pytest.raises(UsageError, match="question 7 in 'en'"):
        asking.ask(write, lambda text: [1], {"en": [Question("7", "after")]}, out, "one")


def test_answers_with_another_chat_template_are_not_mixed(broca, chat_model, few_questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    arguments = ["ask", chat_model, "--questions", few_questions, "--out", out, "--new-tokens", 2]
    assert broca(*arguments, "--languages", "FR")[0] == 0
    template = chat_model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    status, _, errors = broca(*arguments)
    assert status == 2 and "of another model or with other settings" in errors


def test_a_second_run_that_writes_the_same_file_is_refused(
    broca, chat_model, few_questions, tmp_path, monkeypatch
):
    out, ask = tmp_path / "answers.jsonl", asking.ask
    arguments = ["ask", chat_model, "--questions", few_questions, "--languages", "FR", "--new-tokens", 2]
    second = []

    def crowded(*given):
        second.append(broca(*arguments, "--out", out))
        return ask(*given)

    monkeypatch.setattr(asking, "ask", crowded)
    assert broca(*arguments, "--out", out)[0] == 0
    assert second[0][0] == 1 and f"{out}: another `broca ask`" in second[0][2]
    assert not list(tmp_path.glob(".*"))


def test_an_engine_starts_once_for_all_batches(broca, chat_model, few_questions, tmp_path, monkeypatch):
    """A replacement for vLLM's writer, because the test environment has no vLLM."""
    from editing.evaluation import vllm_generation

    started, batches = [], []

    class Writer:
        def __init__(self, name, tokenizer, dtype):
            started.append(dtype)

        def __enter__(self):
            return lambda prompts, **settings: (
                batches.append(len(prompts)) or [asking.Continuation((1,), "answer")] * len(prompts)
            )

        def __exit__(self, *_):
            started.append("stopped")

    monkeypatch.setattr(vllm_generation, "require_vllm", lambda: None)
    monkeypatch.setattr(vllm_generation, "VllmWriter", Writer)
    monkeypatch.setattr(asking, "AT_ONCE", 5)
    out = tmp_path / "answers.jsonl"
    status, _, errors = broca(
        "ask", chat_model, "--engine", "vllm", "--questions", few_questions, "--out", out
    )
    assert status == 0, errors
    assert started == ["auto", "stopped"] and batches == [5, 5, 5, 5, 4]


@pytest.mark.parametrize("content", [b"not JSON\n", b"[]\n", b'{"language": "en"}\n', b"\xff\xfe\n"])
def test_another_file_is_not_overwritten(tmp_path, content):
    out = tmp_path / "answers.jsonl"
    out.write_bytes(content)
    with pytest.raises(BrocaError, match="line 1"):
        asking.ask(lambda prompts: [], lambda text: [1], {"en": [Question("1", "q")]}, out, "one")
    assert out.read_bytes() == content


@pytest.mark.parametrize(
    "more, named", [(["--languages", "xx"], "xx"), (["--out", "answers.txt"], "answers.txt")]
)
def test_impossible_arguments_are_refused_by_name(broca, chat_model, few_questions, tmp_path, more, named):
    arguments = ["ask", chat_model, "--questions", few_questions, "--out", tmp_path / "answers.jsonl", *more]
    status, _, errors = broca(*arguments)
    assert status == 2 and named in errors
