"""Conversations for tests: a template, and chats of some languages with answers that need no model."""

import json

from neurons.text.conversations import MESSAGE_ROLES, Message, role_tokens

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|system|>\nbe good<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As of processors, whose messages are lists of parts: text or an image.
OF_PARTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As of models that think before every answer, and of Qwen 3.
OPENS_THOUGHT = CHATML.replace("<|assistant|>\n{% endif", "<|assistant|>\n<think>\n{% endif")
MAY_THINK = CHATML.replace(
    "<|assistant|>\n{% endif",
    "<|assistant|>\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif",
)


def chats_of(tokenizer, languages, count=6):
    """Language -> chats of a question and a few tokens of an answer, none like another."""
    chats = {}
    for number, language in enumerate(languages):
        chats[language] = []
        for place in range(count):
            question = f"{'abcd'[number]} cab {'bad' * (place % 3 + 1)} {place + number}"
            prompt = role_tokens(tokenizer, [Message("user", question)], answer_follows=True)
            answer = [5 + (7 * number + 3 * step + place) % 40 for step in range(4 + place)]
            chats[language].append(prompt.answered(answer))
    return chats


def said(*messages):
    """A row of a corpus, of (role, content)."""
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def written(directory, rows):
    """A corpus of rows by language; None is a blank line."""
    directory.mkdir(exist_ok=True)
    for language, of_language in rows.items():
        lines = ["" if row is None else json.dumps(row) for row in of_language]
        (directory / f"{language}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def counted_by_hand(tokenizer, pieces, roles):
    """(ids, counted positions) of a conversation from hand-written pieces (role, text)."""
    text = "".join(part for _, part in pieces)
    of_character = [role for role, part in pieces for _ in part]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    of_token = [of_character[end - 1] for _, end in encoded["offset_mapping"]]
    ends = [end for _, end in encoded["offset_mapping"]]
    marker = "<|assistant|>\n"
    first = text.find(marker)
    while first >= 0:
        begin = first + len(marker)
        begin += len("<think>\n") if text[begin:].startswith("<think>\n") else 0
        of_token[max(i for i, end in enumerate(ends) if end <= begin)] = "header"
        first = text.find(marker, begin)
    closing = "</think>\n\n"
    first = text.find(closing)
    while first >= 0:
        of_token[max(i for i, end in enumerate(ends) if end <= first + len(closing))] = "header"
        first = text.find(closing, first + 1)
    chosen = MESSAGE_ROLES if roles is None else roles
    counted = [
        i
        for i, role in enumerate(of_token)
        if i and (role in chosen or ("before-answer" in chosen and of_token[i + 1 : i + 2] == ["answer"]))
    ]
    return encoded["input_ids"], counted
