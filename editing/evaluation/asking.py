"""Prompts: openings of lines, or questions by chat template or in completion style.

The model reads an opening unchanged.  A question is the only user message of a chat if the tokenizer has a chat
template; otherwise it is a line by itself, ``"{question}\\n"``, without words in another language around it.  An
instruction precedes an opening, stands on the line before a question in completion style, and follows the question
in a chat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from editing.evaluation.questions import Questions
from neurons.text.conversations import rendered, up_to_reply
from neurons.text.corpus import Corpus
from neurons.text.words import opening

OPENING, COMPLETION, CHAT = "opening", "completion", "chat"


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: the opening or the question.
        style: OPENING, COMPLETION or CHAT.
        reference: the expected continuation or answer in the target language; None if unknown.
    """

    text: str
    style: str
    reference: str | None = None

    def model_input(self, tokenizer: Any, instruction: str | None = None) -> str | tuple[int, ...]:
        """The input of ``editing.evaluation.generation.generate``: text, or the tokens of a chat.

        Raises:
            UsageError: as ``chat_tokens``.
        """
        if self.style == CHAT:
            return chat_tokens(tokenizer, self.text if instruction is None else f"{self.text} {instruction}")
        if self.style == COMPLETION:
            return f"{self.text}\n" if instruction is None else f"{instruction}\n{self.text}\n"
        return self.text if instruction is None else f"{instruction} {self.text}"


def chat_tokens(
    tokenizer: Any, content: str, remedy: str = "leave it out with --no-chat", thinks: bool | None = None
) -> tuple[int, ...]:
    """The tokens of a chat with one user message, up to the start of the answer.

    Args:
        tokenizer: a tokenizer with a chat template.
        content: the user message.
        remedy: what to do if the template fails, as the end of the error message.
        thinks: as ``role_tokens``.

    Raises:
        UsageError: the template raises, or renders nothing or a text without the content.
    """
    chat = [{"role": "user", "content": content}]
    text = up_to_reply(rendered(tokenizer, chat, True, remedy, thinks), thinks)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tuple(ids)


def openings(corpus: Corpus, language: str, target: str, max_prompts: int | None = None) -> list[Prompt]:
    """The openings of a language's lines; in parallel text the rest of the target's line is the reference."""
    corpus.require(language, target)
    texts, target_texts = corpus.lines(language), corpus.lines(target)
    parallel = is_parallel(corpus, language, target)
    lines = [i for i, text in enumerate(texts) if text][:max_prompts]
    return [
        Prompt(opening(texts[i]), OPENING, _rest(target_texts[i]) if parallel and target_texts[i] else None)
        for i in lines
    ]


def is_parallel(corpus: Corpus, source: str, target: str) -> bool:
    """Whether both languages have the same number of lines: line i then counts as the same text."""
    return len(corpus.texts[source]) == len(corpus.texts[target])


def question_style(tokenizer: Any, chat: bool = True) -> str:
    """CHAT if ``chat`` and the tokenizer has a chat template, else COMPLETION."""
    return CHAT if chat and getattr(tokenizer, "chat_template", None) else COMPLETION


def question_prompts(
    tokenizer: Any, questions: Questions, language: str, max_prompts: int | None = None, chat: bool = True
) -> list[Prompt]:
    """A language's questions in the style of ``question_style``."""
    style = question_style(tokenizer, chat)
    return [
        Prompt(question.text, style, question.reference) for question in questions.of[language][:max_prompts]
    ]


def _rest(text: str) -> str | None:
    """The text after its opening; None if there is none."""
    whole = " ".join(text.split())
    return whole[len(opening(whole)) :].strip() or None
