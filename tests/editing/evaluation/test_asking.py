"""Prompts: openings, questions by chat template and in completion style."""

import models
import pytest

from editing.evaluation.asking import (
    CHAT,
    COMPLETION,
    OPENING,
    Prompt,
    openings,
    question_prompts,
    question_style,
)
from editing.evaluation.generation import encoded, generate
from editing.evaluation.language_id import identify_language, second_opinion
from editing.evaluation.questions import Question, Questions
from editing.hooks.instructions import ENGLISH_NAMES, IN_SOURCE, IN_TARGET, instructions
from neurons.errors import UsageError
from neurons.text.corpus import Corpus

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} [reply]{% endif %}"


@pytest.fixture
def chatting():
    tokenizer = models.tiny_tokenizer.__wrapped__()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_openings_of_parallel_lines_have_the_rest_of_the_target_as_reference():
    corpus = Corpus(
        {
            "en": (
                "One two three four five six seven eight.",
                "",
                "Too  short",
                "The third of the lines is here now.",
            ),
            "fr": ("Un deux trois quatre cinq six sept huit neuf.", "Le reste.", "Court", ""),
            "de": ("Nur eine Zeile.",),
        },
        "digest",
        "all",
    )
    assert openings(corpus, "en", "fr") == [
        Prompt("One two three four five six", OPENING, "sept huit neuf."),
        Prompt("Too short", OPENING, None),
        Prompt("The third of the lines is", OPENING, None),
    ]
    assert len(openings(corpus, "en", "fr", 1)) == 1
    assert openings(corpus, "de", "fr") == [Prompt("Nur eine Zeile.", OPENING, None)]


def test_styles(chatting):
    plain = models.tiny_tokenizer()
    opening, completion, chat = (Prompt("beef cab", style) for style in (OPENING, COMPLETION, CHAT))
    assert opening.model_input(plain) == "beef cab"
    assert opening.model_input(plain, "In bed.") == "In bed. beef cab"
    assert completion.model_input(plain) == "beef cab\n"
    assert completion.model_input(plain, "In bed.") == "In bed.\nbeef cab\n"
    for instruction, text in ((None, "beef cab"), ("In bed.", "beef cab In bed.")):
        ids = chat.model_input(chatting, instruction)
        assert chatting.decode(ids) == f"<s>[user] {text} [reply]"
        assert ids.count(chatting.bos_token_id) == 1
    assert (question_style(plain), question_style(chatting)) == (COMPLETION, CHAT)


def test_questions_are_asked_as_the_tokenizer_has_it(chatting):
    questions = Questions({"en": (Question("1", "Why?", "Car."), Question("2", "How?"))}, "digest")
    assert question_prompts(chatting, questions, "en") == [Prompt("Why?", CHAT, "Car."), Prompt("How?", CHAT)]
    assert question_prompts(models.tiny_tokenizer(), questions, "en", 1) == [
        Prompt("Why?", COMPLETION, "Car.")
    ]


def test_a_chat_is_read_without_a_second_start_token(chatting):
    ids = Prompt("beef", CHAT).model_input(chatting)
    assert encoded(chatting, [ids, "beef"]) == [list(ids), chatting("beef")["input_ids"]]


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[0]['content'] | no_filter }}", "no_filter"),
        ("{{ messages[0].content.text.more }}", "UndefinedError"),
        ("", None),
        ("{{ nothing }} ", "renders nothing"),
        ("{{ bos_token }}", "without the user's message"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_one_sentence_with_a_remedy(chatting, template, fault):
    chatting.chat_template = template
    if fault is None:
        assert question_style(chatting) == COMPLETION
        return
    with pytest.raises(UsageError, match=f"{fault}.*--no-chat") as refused:
        Prompt("beef", CHAT).model_input(chatting)
    assert "\n" not in str(refused.value)
    questions = Questions({"en": (Question("1", "Why?"),)}, "digest")
    assert question_prompts(chatting, questions, "en", chat=False)[0].model_input(chatting) == "Why?\n"


def test_token_prompts_and_texts_are_written_on_alike(llama):
    text = "beef cab"
    ids = llama.tokenizer(text)["input_ids"]
    found = generate(llama, [text, ids, "a"], 6, temperature=0)
    assert found[0] == found[1] != found[2]


def test_instructions_name_the_target_in_both_languages():
    assert instructions("en", "fr") == {"en": "Respond in French.", "fr": "Réponds en français."}
    assert instructions("fr", "de") == {"fr": "Réponds en allemand.", "de": "Antworte auf Deutsch."}
    assert instructions("ko", "fr") == {"en": "Respond in French.", "fr": "Réponds en français."}
    assert instructions("en", "xh") == {"en": "Respond in xh."}


@pytest.mark.parametrize("language", sorted(IN_TARGET))
def test_instructions_are_in_the_language_that_they_claim(language):
    # So short a sentence is not told apart by either detector alone, and Danish not from Norwegian.
    text = f"{IN_TARGET[language]} {IN_TARGET[language]}"
    found = {identify(text, tuple(IN_TARGET)) for identify in (identify_language, second_opinion)}
    assert found & {language, "no" if language == "da" else language}
    assert language in ENGLISH_NAMES
    if language in IN_SOURCE:
        assert language not in IN_SOURCE[language][1]
