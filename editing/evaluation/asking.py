"""What a model is given to write on: openings of lines, or questions by chat template or completion style.

An opening is read as it is.  A question goes through the tokenizer's chat template where there is one, as
the only message of the user; otherwise it is read as a line of its own, ``"{question}\\n"``, words in no other
language around it.  An instruction stands before an opening, on a line before a question of completion
style, and after the question in a chat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from editing.evaluation.questions import Questions
from neurons.text.conversations import rendered
from neurons.text.corpus import Corpus
from neurons.text.words import opening

OPENING, COMPLETION, CHAT = "opening", "completion", "chat"


@dataclass(frozen=True)
class Asked:
    """One thing to write on.

    Attributes:
        text: the opening or the question.
        style: OPENING, COMPLETION or CHAT.
        reference: what stands there in the target language; None where that is not known.
    """

    text: str
    style: str
    reference: str | None = None

    def given(self, tokenizer: Any, instruction: str | None = None) -> str | tuple[int, ...]:
        """What ``editing.evaluation.generation.generate`` is called with: text, or the tokens of a chat.

        Raises:
            UsageError: as ``chat_tokens``.
        """
        if self.style == CHAT:
            return chat_tokens(tokenizer, self.text if instruction is None else f"{self.text} {instruction}")
        if self.style == COMPLETION:
            return f"{self.text}\n" if instruction is None else f"{instruction}\n{self.text}\n"
        return self.text if instruction is None else f"{instruction} {self.text}"


def chat_tokens(
    tokenizer: Any, content: str, way_out: str = "leave it out with --no-chat"
) -> tuple[int, ...]:
    """The tokens of a chat in which the user has said one thing, up to where the answer begins.

    Args:
        tokenizer: one with a chat template.
        content: what the user says.
        way_out: of a template that cannot be used, as the end of a sentence.

    Raises:
        UsageError: the template raises, or renders nothing or a text without the content.
    """
    text = rendered(tokenizer, [{"role": "user", "content": content}], True, way_out)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tuple(ids)


def openings(corpus: Corpus, language: str, target: str, most: int | None = None) -> list[Asked]:
    """The openings of a language's lines; in parallel text with the rest of the target's line as reference."""
    corpus.require(language, target)
    texts, others = corpus.texts[language], corpus.texts[target]
    parallel = is_parallel(corpus, language, target)
    lines = [i for i, text in enumerate(texts) if text][:most]
    return [
        Asked(opening(texts[i]), OPENING, _rest(others[i]) if parallel and others[i] else None) for i in lines
    ]


def is_parallel(corpus: Corpus, source: str, target: str) -> bool:
    """Whether both have as many lines: then line i is taken for the same text."""
    return len(corpus.texts[source]) == len(corpus.texts[target])


def question_style(tokenizer: Any, chat: bool = True) -> str:
    """CHAT where the tokenizer has a template for one and it is wanted, else COMPLETION."""
    return CHAT if chat and getattr(tokenizer, "chat_template", None) else COMPLETION


def questions_asked(
    tokenizer: Any, questions: Questions, language: str, most: int | None = None, chat: bool = True
) -> list[Asked]:
    """A language's questions, in a chat where the tokenizer has a template for one and it is wanted."""
    style = question_style(tokenizer, chat)
    return [Asked(one.text, style, one.reference) for one in questions.of[language][:most]]


def _rest(text: str) -> str | None:
    whole = " ".join(text.split())
    return whole[len(opening(whole)) :].strip() or None
