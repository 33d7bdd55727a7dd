"""Tokens of conversations and their roles, against hand-written pieces of text."""

import models
import pytest
import torch
from conversations import CHATML, MAY_THINK, OF_PARTS, OPENS_THOUGHT

from neurons.errors import UsageError
from neurons.text.conversations import (
    ALWAYS,
    END_OF_THOUGHT,
    HEADER,
    OPTIONAL,
    ROLES,
    USER,
    Message,
    role_tokens,
    thinking,
)

# As Qwen 3: drops the thoughts of all answers but the last.
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] | trim }}{% else %}{{ m['content'] | trim }}{% endif %}<|end|>\n{% endfor %}"
)
CHAT = (
    Message("user", "what is a cab? "),
    Message("assistant", "\na cab is a car."),
    Message("user", "user"),
    Message("assistant", "good", thought="be good, they said"),
)


@pytest.fixture
def tokenizer():
    made = models.tiny_tokenizer.__wrapped__()
    made.chat_template = CHATML
    return made


def naive(tokenizer, pieces, answer_follows):
    """(ids, roles) from hand-written pieces (role, text)."""
    letters = [role for role, text in pieces for _ in text]
    text = "".join(text for _, text in pieces)
    result, end = [], 0
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for _, end in encoded["offset_mapping"]:
        result.append(letters[end - 1] if end else "template")
    spoken = [i for i in range(len(result)) if result[i] in ("answer", "thought")]
    for i in spoken:
        if i - 1 not in spoken:
            result[i - 1] = "header"
    if answer_follows:
        result[-1] = "header"
    return encoded["input_ids"], result


def pieces_of(messages, first, think=True):
    pieces = [("template", first)]
    for message in messages:
        pieces.append(("template", f"<|{message.role}|>\n"))
        if message.thought is not None:
            pieces += [("template", "<think>\n"), ("thought", message.thought.strip())]
            pieces.append(("template", "\n</think>\n\n"))
        role = "answer" if message.role == "assistant" else message.role
        pieces += [(role, message.content.strip()), ("template", "<|end|>\n")]
    return pieces


@pytest.mark.parametrize("answer_follows", [False, True])
@pytest.mark.parametrize("system", [False, True])
def test_roles_are_those_of_each_tokens_last_character(tokenizer, system, answer_follows):
    chat = [Message("system", "answer in French"), *CHAT] if system else list(CHAT)
    pieces = pieces_of(chat, "" if system else "<|system|>\nbe good<|end|>\n")
    pieces += [("template", "<|assistant|>\n")] if answer_follows else []
    ids, roles = naive(tokenizer, pieces, answer_follows)
    result = role_tokens(tokenizer, chat, answer_follows)
    assert result.ids.tolist() == ids
    assert [ROLES[role] for role in result.roles] == roles
    assert set(roles) == {*ROLES} - (set() if system else {"system"})
    both = result.of("user", "answer")
    assert torch.equal(both, result.of("user") | result.of("answer"))
    assert int(both.sum()) == roles.count("user") + roles.count("answer")


def test_a_message_equal_to_a_word_of_the_template_has_its_own_role(tokenizer):
    result = role_tokens(tokenizer, [Message("user", "user"), Message("assistant", "end")])
    for role, text in (("user", "user"), ("answer", "end")):
        assert tokenizer.decode(result.ids[result.of(role)]).strip() == text


def test_a_conversation_whose_thought_the_template_drops_is_refused(tokenizer):
    tokenizer.chat_template = FORGETFUL
    last = role_tokens(tokenizer, CHAT)
    assert bool(last.of("thought").any())
    with pytest.raises(UsageError):
        role_tokens(tokenizer, [CHAT[0], CHAT[3], CHAT[2], CHAT[1]])


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ messages[0]['content'] | upper }}", "without the user's message"),
        ("{{ messages[0]['content'] }}", "without the assistant's message"),
        (
            "{% for m in messages %}{{ m['content'] }}{{ m['content'] | length }}{% endfor %}",
            "changes a message",
        ),
        ("{{ raise_exception('no such role') }}", "no such role"),
        # A list of parts would be longer than the cut.
        ("{% for m in messages %}{{ m['content'][:3] }}{% endfor %}", "without the user's message"),
    ],
)
def test_a_template_that_changes_messages_is_refused(tokenizer, template, fault):
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match=fault):
        role_tokens(tokenizer, CHAT[:2])


def test_a_template_may_take_messages_in_parts(tokenizer):
    chat = [message for message in CHAT if message.thought is None]
    tokenizer.chat_template = CHATML
    plain = role_tokens(tokenizer, chat, True)
    tokenizer.chat_template = OF_PARTS
    in_parts = role_tokens(tokenizer, chat, True)
    for role in ("user", "answer", "header"):
        assert in_parts.ids[in_parts.of(role)].tolist() == plain.ids[plain.of(role)].tolist()
    assert bool(in_parts.of("user").any())


def test_an_empty_message_is_refused(tokenizer):
    with pytest.raises(UsageError, match="message 2"):
        role_tokens(tokenizer, [CHAT[0], Message("assistant", " ")])


@pytest.mark.parametrize(
    ("template", "expected"), [(CHATML, None), (MAY_THINK, OPTIONAL), (OPENS_THOUGHT, ALWAYS)]
)
def test_templates_show_whether_a_model_thinks(tokenizer, monkeypatch, template, expected):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert thinking(tokenizer) == expected


def test_without_thoughts_the_header_follows_the_closed_thought(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", MAY_THINK)
    message = [Message("user", "cab bad?")]
    thoughtful = role_tokens(tokenizer, message, True)
    without = role_tokens(tokenizer, message, True, thinks=False)
    added = tokenizer.decode(without.ids[len(thoughtful.ids) - 1 :])
    assert "</think>" in added and "</think>" not in tokenizer.decode(thoughtful.ids)
    assert without.of(HEADER).nonzero().flatten().tolist() == [len(without.ids) - 1]
    assert int(without.of(USER).sum()) == int(thoughtful.of(USER).sum())


@pytest.mark.parametrize("template", [MAY_THINK, OPENS_THOUGHT])
def test_a_thought_and_its_answer_follow_a_prompt_as_the_template_renders_them(
    tokenizer, monkeypatch, template
):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    question = Message("user", "cab bad?")
    prompt = role_tokens(tokenizer, [question], True, thinks=True)
    assert tokenizer.decode(prompt.ids).endswith("<think>\n")
    assert prompt.of(HEADER).nonzero().flatten().tolist() == [len(prompt.ids) - 1]
    thought, end, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("be good", END_OF_THOUGHT, "a cab")
    )
    found = prompt.thought(thought, end).answered(answer)
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    whole = role_tokens(tokenizer, [question, Message("assistant", "a cab", thought="be good")])
    both = whole.ids[: len(found.ids)]
    assert found.ids.tolist() == both.tolist()
    assert found.roles.tolist() == whole.roles[: len(found.ids)].tolist()


def test_a_template_that_always_thinks_gets_an_empty_thought(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", OPENS_THOUGHT)
    without = role_tokens(tokenizer, [Message("user", "cab bad?")], True, thinks=False)
    monkeypatch.setattr(tokenizer, "chat_template", MAY_THINK)
    turned_off = role_tokens(tokenizer, [Message("user", "cab bad?")], True, thinks=False)
    assert without.ids.tolist() == turned_off.ids.tolist()
    assert without.roles.tolist() == turned_off.roles.tolist()
