"""``broca chat``: the streamed answers are those of transformers, turn after turn."""

import io
import json
import shutil
import threading

import pytest
import torch
import transformers

from editing.evaluation.talk import Talk


@pytest.fixture
def model(chat_model):
    return with_context(chat_model, 512)


def with_context(directory, tokens):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": tokens}))
    return directory


def stock_answers(directory, turns, tokens, before=()):
    """The answers of transformers alone, after the messages ``before``."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    chat, answers = list(before), []
    for turn in turns:
        chat.append({"role": "user", "content": turn})
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        chat.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_turns_are_those_of_transformers(broca, model, monkeypatch):
    turns = ["what is a cab?", "and a bad cab?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(turns) + "\n\n"))
    status, printed, errors = broca("chat", model, "--new-tokens", 8)
    assert status == 0, errors
    assert printed == "".join(f"{answer}\n" for answer in stock_answers(model, turns, 8))


def test_a_new_conversation_and_a_model_beside(broca, model, monkeypatch):
    twin = shutil.copytree(model, model.parent / "twin")
    monkeypatch.setattr("sys.stdin", io.StringIO("what is a cab?\n/new\nand a bad cab?\n"))
    status, printed, errors = broca("chat", model, "--beside", twin, "--new-tokens", 8)
    assert status == 0, errors
    first, second = stock_answers(model, ["what is a cab?"], 8), stock_answers(model, ["and a bad cab?"], 8)
    expected = "".join(f"{model}:\n{answer}\n{twin}:\n{answer}\n" for answer in (*first, *second))
    assert printed == expected


def test_a_full_context_is_said_and_the_conversation_goes_on_anew(broca, model, monkeypatch):
    with_context(model, 100)
    turns = ["what is a cab?", "what is a cab? " * 8, "/new", "what is a cab?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(turns) + "\n\n"))
    status, printed, errors = broca("chat", model, "--new-tokens", 100)
    assert status == 0 and "context" in errors and " 100" in errors and "/new" in errors
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    chat = [{"role": "user", "content": turns[0]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    (answer,) = stock_answers(model, turns[:1], 100 - len(prompt))
    assert len(prompt) < 100 and printed == f"{answer}\n{answer}\n"


def test_a_model_without_a_template_is_refused(broca, checkpoint_of):
    status, _, errors = broca("chat", checkpoint_of("llama"))
    assert status == 2 and "chat template" in errors


def test_an_answer_that_is_not_awaited_stops_the_model(chatting):
    passes, settings = [], chatting.model.generation_config
    handle = chatting.model.register_forward_pre_hook(lambda *_: passes.append(1))
    threads = set(threading.enumerate())
    talk = Talk(chatting, new_tokens=48)
    pieces = talk.answer("cab")
    try:
        next(pieces)
        pieces.close()
        done = len(passes)
        assert set(threading.enumerate()) <= threads and talk.messages == []
        assert chatting.model.generation_config is settings
        assert "".join(talk.answer("cab")) and len(passes) - done > done
    finally:
        handle.remove()
