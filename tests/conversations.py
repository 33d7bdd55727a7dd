"""Conversations for tests: a template, and chats of some languages with answers that need no model."""

from neurons.text.conversations import Message, role_tokens

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|system|>\nbe good<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
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
