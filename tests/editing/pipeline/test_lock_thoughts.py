"""A lock of a model that thinks before it answers, on a tiny model that is patched to obey."""

from dataclasses import replace

import pytest
import torch
from conversations import CHATML, MAY_THINK, OPENS_THOUGHT

from editing.checkpoints.model_card import model_card
from editing.evaluation import language_id
from editing.evaluation.generation import Continuation
from editing.evaluation.questions import read_questions
from editing.methods.distilled_values import mean_divergence
from editing.pipeline import lock as lock_module
from editing.pipeline import lock_measures, lock_text
from editing.pipeline.lock import language_lock
from editing.pipeline.lock_kinds import Lock, lock_of
from editing.pipeline.lock_measures import lock_figures
from editing.pipeline.lock_prompts import REPORT, prompt_of
from editing.pipeline.lock_replies import ended_thought, replies
from editing.pipeline.lock_text import lessons, taught
from editing.pipeline.needs import lock_needs
from editing.report.lock_section import lock_content
from neurons.errors import UsageError
from neurons.text.conversations import END_OF_THOUGHT, HEADER, ROLES, THOUGHT

LOCK = Lock("fr", ("en",), ("fr", "de"), thoughts=True)
TOKENS = 16


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """The tiny model reads 128 tokens."""
    for module in (lock_text, lock_measures):
        monkeypatch.setattr(module, "ANSWER_TOKENS", TOKENS)
    monkeypatch.setattr(lock_text, "KEPT_ANSWER_TOKENS", 8)


@pytest.fixture(params=[MAY_THINK, OPENS_THOUGHT])
def loaded(chatting, monkeypatch, request):
    monkeypatch.setattr(chatting.tokenizer, "chat_template", request.param)
    return chatting


@pytest.fixture
def questions(few_questions):
    return read_questions(few_questions)


def labelled(monkeypatch, *labels):
    """Texts get these labels, the last one again and again."""
    left = list(labels)
    monkeypatch.setattr(
        language_id, "identify_language", lambda text, languages: left.pop(0) if len(left) > 1 else left[0]
    )


def ids_of(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("after", ["\n\na cab", "", " cab</think> bad"])
def test_a_thought_ends_where_the_model_ends_it(chatting, after):
    tokenizer = chatting.tokenizer
    written = ids_of(tokenizer, "be good\n</think>" + after)
    thought, end = ended_thought(tokenizer, Continuation(written, ""))
    assert thought.text == tokenizer.decode(thought.ids) == "be good\n"
    assert tokenizer.decode(end) == "</think>\n\n"
    assert written[: len(thought.ids)] == thought.ids


def test_a_thought_without_an_end_is_ended(chatting):
    written = Continuation(ids_of(chatting.tokenizer, "be good"), "be good")
    assert ended_thought(chatting.tokenizer, written) == (written, ids_of(chatting.tokenizer, END_OF_THOUGHT))


def test_replies_are_what_the_model_continues(loaded):
    prompt = prompt_of(loaded, "abc?", thinks=True)
    (reply,) = replies(loaded, {"en": [prompt]}, 5, True)["en"]

    def continued(ids, count):
        ids = list(ids)
        with torch.no_grad():
            for _ in range(count):
                ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids

    ids = continued(prompt.ids.tolist(), 5)
    assert reply.thought.ids == tuple(ids[-5:])
    ids = continued([*ids, *ids_of(loaded.tokenizer, END_OF_THOUGHT)], 5)
    assert reply.answer.ids == tuple(ids[-5:])
    whole = reply.conversation
    assert whole.ids.tolist() == ids
    headers = whole.of(HEADER).nonzero().flatten().tolist()
    assert headers == [len(prompt.ids) - 1, len(ids) - 6]
    assert whole.ids[whole.of(THOUGHT)].tolist() == list(reply.thought.ids)
    assert [ROLES[role] for role in whole.roles[-5:]] == ["answer"] * 5


def test_thoughts_and_answers_are_examples_of_their_own(loaded, questions, monkeypatch):
    labelled(monkeypatch, "fr", "de", "de", "fr")  # two answers, then their thoughts
    (english,) = taught(loaded, questions, LOCK, lessons(loaded, questions, LOCK, ("en",), REPORT)).values()
    assert english.obeyed == 0.5
    (thought,), (answer,) = english.thoughts.examples, english.answers.examples
    texts = [question.text for question in questions.of["en"]][3::4]
    teachers = [prompt_of(loaded, f"{text} Think and respond in French.", thinks=True) for text in texts]
    students = [prompt_of(loaded, text, thinks=True) for text in texts]
    first, second = replies(loaded, {"en": teachers}, TOKENS, True)["en"]
    assert thought.student == tuple(students[1].ids.tolist())
    assert thought.teacher == tuple(teachers[1].ids.tolist()) and thought.answer == second.thought.ids
    before = (*first.thought.ids, *first.end)
    assert answer.student == (*students[0].ids.tolist(), *before)
    assert answer.teacher == (*teachers[0].ids.tolist(), *before) and answer.answer == first.answer.ids


def test_thoughts_are_learned_and_measured_apart(loaded, questions, monkeypatch):
    labelled(monkeypatch, "fr")
    assert lock_of(questions, "fr", "en", thoughts=True) == LOCK
    made = language_lock(loaded, questions, LOCK, passes=2)
    assert made.thoughts is True and made.obeyed == {"en": 1.0}
    metadata = made.plan.metadata
    assert (metadata["thinks"], metadata["thoughts"]) == (True, "learned")
    assert metadata["settings"]["instructions"] == {"en": "Think and respond in French."}
    assert made.held_out[-1] < made.held_out[0]
    figures = lock_figures(loaded, questions, LOCK, made.plan)
    (teacher,) = taught(loaded, questions, LOCK, lessons(loaded, questions, LOCK, ("en",), REPORT)).values()
    for of_part, asked in ((figures, teacher.answers), (figures.thoughts, teacher.thoughts)):
        found = of_part.sources["en"].divergence
        assert found["base"] == pytest.approx(mean_divergence(loaded, asked.examples))
        assert found["steered"] == pytest.approx(mean_divergence(loaded, asked.examples, made.plan))
        assert set(of_part.kept) == {"fr", "de"}
    apart = figures.sources["en"], figures.thoughts.sources["en"]
    assert apart[0].divergence != apart[1].divergence and apart[0].chrf != apart[1].chrf
    values = figures.as_json()
    made.plan.metadata["measured"] = values
    card, page = model_card(loaded, made.plan), lock_content(values)
    assert "thoughts are steered like answers" in card
    for what in ("answers", "thoughts"):
        assert f"{what} in `fr`" in card and f"{what.capitalize()} in fr" in page
    for of_part in (values, values["thoughts"]):
        assert f"{of_part['sources']['en']['divergence']['steered']:.3f}" in card
        assert f"{of_part['kept']['de']['divergence']:.3f}" in page


def test_thoughts_of_a_teacher_that_thinks_in_another_language_are_kept(loaded, questions, monkeypatch):
    labelled(monkeypatch, *["fr"] * 4, *["en"] * 4, *["fr"] * 2, "en")
    seen = {}

    def learned(loaded, plan, examples, held_out, **_):
        seen.update(examples=examples)
        raise KeyboardInterrupt

    monkeypatch.setattr(lock_module, "distilled_values", learned)
    with pytest.raises(KeyboardInterrupt):
        language_lock(loaded, questions, LOCK)
    own = [example for example in seen["examples"] if example.student == example.teacher]
    texts = [questions.of["en"][i].text for i in (0, 1, 4, 5)]
    prompts = [prompt_of(loaded, text, thinks=True) for text in texts]
    assert [example.student for example in own] == [tuple(prompt.ids.tolist()) for prompt in prompts]
    thoughts = [reply.thought.ids for reply in replies(loaded, {"en": prompts}, TOKENS, True)["en"]]
    assert [example.answer for example in own] == thoughts
    assert len(seen["examples"]) == 2 * len(own)


def test_thoughts_need_memory(loaded, questions):
    without, with_thoughts = (
        lock_needs(loaded, questions, replace(LOCK, thoughts=thoughts)) for thoughts in (False, True)
    )
    assert [need.stage for need in without] == [need.stage for need in with_thoughts]
    # The keys' batches are as large as before, of longer conversations.
    for less, more in zip(without[1:], with_thoughts[1:], strict=True):
        assert more.total > less.total, more.stage


def test_a_model_that_always_thinks_is_steered_with_its_thoughts(
    broca, chat_model, few_questions, monkeypatch
):
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: "fr")
    (chat_model / "chat_template.jinja").write_text(OPENS_THOUGHT)
    out = chat_model.parent / "steered"
    given = ("steer", chat_model, "--to", "fr", "--questions", few_questions)
    status, printed, err = broca(*given, "--dry-run", "--json")
    assert status == 0, err
    status, printed, err = broca(*given, "--out", out)
    assert status == 0, err
    assert "Answers in fr" in printed and "Thoughts in fr" in printed
    assert "thoughts = true" in (out / "broca" / "recipe.toml").read_text()
    again = out.with_name("again")
    assert broca("run", out / "broca" / "recipe.toml", "--out", again)[0] == 0
    plan = (again / "broca" / "edit.safetensors").read_bytes()
    assert plan == (out / "broca" / "edit.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("template", "option", "named"),
    [
        (CHATML, "--thoughts", "leave out --thoughts"),
        (OPENS_THOUGHT, "--no-thoughts", "thinks before every answer"),
    ],
)
def test_thoughts_that_a_model_cannot_have_are_refused(
    broca, chat_model, few_questions, template, option, named
):
    (chat_model / "chat_template.jinja").write_text(template)
    given = ("steer", chat_model, "--to", "fr", "--questions", few_questions, option)
    status, _, err = broca(*given, "--out", chat_model.parent / "steered")
    assert status == 2 and named in err and err.count("\n") == 1


def test_a_lock_without_thoughts_of_a_model_that_always_thinks_is_refused(chatting, questions, monkeypatch):
    monkeypatch.setattr(chatting.tokenizer, "chat_template", OPENS_THOUGHT)
    with pytest.raises(UsageError, match="thinks before every answer"):
        language_lock(chatting, questions, Lock("fr", ("en",), ("fr", "de")))
