"""Language forcing by CLaS-Bench's protocol (arXiv 2601.08331): language, relevance and their harmonic mean.

    forcing     fraction of the answers whose most probable language is the target; Cantonese counts as Chinese and
                Nynorsk as Norwegian; the benchmark's identifier is NLLB's lid218e.bin
    relevance   mean of a judge's ratings 0, 1 or 2, divided by 2; the judge is told to ignore the language
    steering    harmonic mean of the two averages

The benchmark has 70 questions in 32 languages, greedy answers of up to 1,024 tokens, and samples the judge's ratings
(Qwen3-8B, temperature 0.7).  Here they are greedy, so that a rating can be repeated, and the judge's instruction says
the same in other words; ``instruction`` takes another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import regex

from editing.evaluation.asking import CHAT, question_style
from editing.evaluation.generation import PROMPTS_A_BATCH, generate
from editing.evaluation.language_id import MACROLANGUAGES
from editing.evaluation.relevance import harmonic_mean
from neurons.errors import UsageError
from neurons.models.source import LoadedModel
from neurons.text.conversations import Message, role_tokens

RATING_TOKENS = 256
INSTRUCTION = """\
You rate an answer to a question. The question is in {source}. The answer should be in {target}, but its language must \
not change your rating: rate only what it says.

0: it has nothing to do with the question, or it is meaningless or endlessly repetitive text.
1: it has something to do with the question, but is incomplete, partly off the subject or of little use.
2: it answers the question directly, in text that makes sense and is of use.

Give your reasons in two sentences. Then end with the rating in exactly this form: "Rating: [[0]]", with your number."""
_QUESTION = "Question ({source}):\n{question}\n\nAnswer ({target}):\n{answer}"
_EXACT = (regex.compile(r"Rating: \[\[([012])\]\]"), regex.compile(r"\[\[([012])\]\]"))
# No digit of a decimal number, a fraction or a range: "2.0", "1/2", "0-1".
_AT_END = regex.compile(r"(?<![\w./\-])([012])[\s.*]*$")
# Those of MACROLANGUAGES that the benchmark counts as their macrolanguage: Cantonese and Nynorsk.
_VARIETIES = ("yue", "nn")


@dataclass(frozen=True)
class Forcing:
    """Scores of answers that should be in one language.

    Attributes:
        forcing: fraction in the target.
        relevance: mean rating / 2; None without a judge, or if it rated no answer.
        steering: their harmonic mean; None without a relevance.
        answers: number of answers.
        rated: number of answers with a rating.
    """

    forcing: float
    relevance: float | None
    steering: float | None
    answers: int
    rated: int


def forcing(
    answers: Sequence[str],
    target: str,
    identify: Callable[[str], tuple[str, float]],
    ratings: Sequence[int | None] = (),
) -> Forcing:
    """The scores.

    Args:
        answers: texts; at least one.
        target: the language that they should be in.
        identify: a text -> its language and the probability of it.
        ratings: of the answers, None where the judge gave none; empty without a judge.
    """
    labels = [identify(answer)[0] for answer in answers]
    labels = [MACROLANGUAGES[label] if label in _VARIETIES and label != target else label for label in labels]
    share = labels.count(target) / len(answers)
    known = [rating for rating in ratings if rating is not None]
    relevance = sum(known) / len(known) / 2 if known else None
    steering = None if relevance is None else harmonic_mean(share, relevance)
    return Forcing(share, relevance, steering, len(answers), len(known))


def ratings(
    judge: LoadedModel,
    questions: Sequence[str],
    answers: Sequence[str],
    source: str,
    target: str,
    instruction: str = INSTRUCTION,
    seen: Callable[[int], None] | None = None,
) -> list[int | None]:
    """A judge's rating of each answer; None if its reply has none.

    Args:
        judge: an instruct model whose template takes a system message.
        questions: of the answers.
        answers: texts.
        source: name of the questions' language.
        target: name of the language that the answers should be in.
        instruction: the system message, in which {source} and {target} are replaced.
        seen: called with numbers of ratings.

    Raises:
        UsageError: the judge has no chat template; or as ``role_tokens``.
    """
    if question_style(judge.tokenizer) != CHAT:
        raise UsageError(f"{judge.name} has no chat template, so it cannot judge: choose an instruct model")
    about = instruction.replace("{source}", source).replace("{target}", target)
    asked = [
        _QUESTION.format(source=source, target=target, question=question, answer=answer)
        for question, answer in zip(questions, answers, strict=True)
    ]
    prompts = [
        role_tokens(
            judge.tokenizer,
            [Message("system", about), Message("user", text)],
            answer_follows=True,
            thinks=False,
        ).ids.tolist()
        for text in asked
    ]
    result: list[int | None] = []
    for first in range(0, len(prompts), PROMPTS_A_BATCH):
        replies = generate(judge, prompts[first : first + PROMPTS_A_BATCH], RATING_TOKENS, temperature=0)
        result += [rating_in(reply.text) for reply in replies]
        if seen is not None:
            seen(len(replies))
    return result


def rating_in(reply: str) -> int | None:
    """The rating in a judge's reply: after "Rating:", else in double brackets, else a digit at its end."""
    for pattern in _EXACT:
        if found := pattern.search(reply):
            return int(found[1])
    found = _AT_END.search(reply.strip())
    return int(found[1]) if found else None
