"""A language lock from questions to figures, on a tiny model whose teacher is patched to obey."""

import pytest
import torch
from conversations import CHATML, MAY_THINK

from editing.checkpoints.model_card import model_card
from editing.evaluation import language_id
from editing.evaluation.questions import Question, Questions, questions_of_part
from editing.methods import distilled_values
from editing.methods.conversation_keys import coefficients
from editing.methods.distilled_values import mean_divergence
from editing.pipeline import lock as lock_module
from editing.pipeline import lock_text
from editing.pipeline.drift import SYSTEM_MESSAGES, drift_contexts
from editing.pipeline.lock import language_lock
from editing.pipeline.lock_kinds import Lock, lock_of
from editing.pipeline.lock_measures import BASE, PROMPTED, STEERED, lock_figures, mean_chrf
from editing.pipeline.lock_prompts import BUILD, CHOOSE, REPORT, prompt_of
from editing.pipeline.lock_replies import answered
from editing.pipeline.lock_text import ANSWER_TOKENS, base_conversations, lessons, taught
from editing.plans.applied import applied
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.text.conversation_batches import conversation_batches

LETTERS = {"en": "abc", "fr": "def", "de": "ghi"}


@pytest.fixture(scope="module")
def questions():
    return Questions(
        {
            language: tuple(
                Question(str(place), f"{letters[place % 3] * 3} {letters} {place}?") for place in range(16)
            )
            for language, letters in LETTERS.items()
        },
        "digest",
    )


@pytest.fixture(scope="module")
def loaded(chatting):
    return chatting


@pytest.fixture
def obedient(monkeypatch):
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: "fr")


def taught_in_english(loaded, questions, part):
    lock = Lock("fr", ("en",), ("fr",))
    return taught(loaded, questions, lock, lessons(loaded, questions, lock, ("en",), part))["en"]


def test_examples_are_the_teachers_own_answers_without_its_instruction(loaded, questions, obedient):
    result = taught_in_english(loaded, questions, REPORT)
    assert len(result.answers.texts) == 4 and result.obeyed == 1
    for index, example in zip((3, 7, 11, 15), result.examples, strict=True):
        text = questions.of["en"][index].text
        assert example.student == tuple(prompt_of(loaded, text).ids.tolist())
        assert example.teacher == tuple(prompt_of(loaded, text, "Respond in French.").ids.tolist())
        ids = torch.tensor([example.teacher])
        with torch.no_grad():
            for token in example.answer:
                assert int(loaded.model(ids).logits[0, -1].argmax()) == token
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_an_answer_in_another_language_is_no_example(loaded, questions, monkeypatch):
    labels = iter(["fr", "en", "fr", "other"])
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: next(labels))
    result = taught_in_english(loaded, questions, CHOOSE)
    assert result.obeyed == 0.5 and len(result.answers.texts) == 4
    students = [example.student for example in result.examples]
    assert students == [tuple(prompt_of(loaded, questions.of["en"][i].text).ids.tolist()) for i in (2, 10)]


def test_a_teacher_that_does_not_obey_is_refused_by_number(loaded, questions, monkeypatch):
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: "en")
    with pytest.raises(BrocaError, match="0 of 8"):
        language_lock(loaded, questions, Lock("fr", ("en",), ("fr", "de")))


def test_a_source_in_which_the_teacher_does_not_obey_leaves_the_others_to_learn_from(
    loaded, questions, monkeypatch
):
    labels = iter((["de"] * 8 + ["fr"] * 8) + (["de"] * 4 + ["fr"] * 4))
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: next(labels))
    made = language_lock(loaded, questions, Lock("fr", ("de", "en"), ("fr",)), passes=1)
    assert made.obeyed == {"de": 0.0, "en": 1.0}


def test_another_language_is_asked_for_in_english():
    lock = Lock("fr", ("de", "ja", "fr"), ())
    assert [lock.instruction_in(name) for name in ("de", "ja", "fr")] == [
        "Respond in French.",
        "Respond in French.",
        "Réponds en français.",
    ]


def test_a_lock_without_examples_to_choose_on_is_refused_before_keys(loaded, questions, monkeypatch):
    """The teacher obeys on all BUILD questions and on no CHOOSE question."""
    labels = iter(["fr"] * 8 + ["en"] * 4)
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: next(labels))
    with pytest.raises(BrocaError, match="0 of 4"):
        language_lock(loaded, questions, Lock("fr", ("en",), ("fr", "de")))


def test_prompts_are_without_thoughts_where_the_template_can(loaded, monkeypatch):
    monkeypatch.setattr(loaded.tokenizer, "chat_template", MAY_THINK)
    text = loaded.tokenizer.decode(prompt_of(loaded, "aaa abc?").ids)
    assert text.rstrip().endswith("</think>")


@pytest.mark.parametrize("template, thinks", [(MAY_THINK, False), (CHATML, None)])
def test_the_plan_and_its_card_say_that_thoughts_were_off(
    loaded, questions, obedient, monkeypatch, template, thinks
):
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    made = language_lock(loaded, questions, Lock("fr", ("en",), ("fr", "de")), passes=1)
    assert made.plan.metadata.get("thinks") is thinks
    card = model_card(loaded, made.plan)
    assert ("thoughts" in card) == (thinks is False)
    digest = made.plan.metadata["settings"]["questions"]
    assert "instructions en=Respond in French." in card and f"questions {digest[:12]}," in card


def test_a_mixture_of_experts_is_refused_before_the_work(checkpoint_of, questions):
    loaded = load_model(str(checkpoint_of("mixtral")), device="cpu")
    loaded.tokenizer.chat_template = CHATML
    with pytest.raises(UsageError, match="expert"):
        language_lock(loaded, questions, Lock("fr", ("en",), ("fr", "de")))


def test_a_lock_learns_is_measured_and_leaves_the_model(loaded, questions, obedient):
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    lock = lock_of(questions, "fr", "en")
    assert lock == Lock("fr", ("en",), ("fr", "de"))
    made = language_lock(loaded, questions, lock, passes=3)
    again = language_lock(loaded, questions, lock, passes=3)
    assert again.plan.to_bytes() == made.plan.to_bytes()
    assert made.plan.metadata["source"] == "en" and made.plan.metadata["target"] == "fr"
    assert made.obeyed == {"en": 1.0} and len(made.held_out) == 4
    assert set(made.deviations) == {edit.layer for edit in made.plan.edits}
    report = taught_in_english(loaded, questions, REPORT)
    figures = lock_figures(loaded, questions, lock, made.plan)
    english = figures.sources["en"]
    assert english.divergence[BASE] == pytest.approx(mean_divergence(loaded, report.examples))
    assert english.divergence[STEERED] == pytest.approx(mean_divergence(loaded, report.examples, made.plan))
    assert english.divergence[PROMPTED] is None and english.chrf[PROMPTED] is None
    assert set(figures.kept) == {"fr", "de"}
    with applied(loaded, made.plan):
        prompts = [prompt_of(loaded, questions.of["en"][i].text) for i in (3, 7, 11, 15)]
        after = [answer.text for answer in answered(loaded, prompts, ANSWER_TOKENS)]
    assert [example.after for example in figures.examples] == after
    every = lock_figures(loaded, questions, lock, made.plan, part="all")
    assert [example.question for example in every.examples] == [
        question.text for question in questions.of["en"]
    ]
    assert every.kept["de"].base.answers == len(questions.of["de"]) == 4 * figures.kept["de"].base.answers
    assert english.chrf[STEERED] == pytest.approx(mean_chrf(after, report.answers.texts))
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_teachers_answers_are_read_once_for_all_figures(loaded, questions, obedient, monkeypatch):
    lock = lock_of(questions, "fr", "en")
    made = language_lock(loaded, questions, lock, passes=1)
    read = []

    def noted(model, batch):
        read.extend(tuple(ids[seen].tolist()) for ids, seen in zip(batch.ids, batch.attention, strict=True))
        return forward(model, batch)

    forward = distilled_values.forward
    monkeypatch.setattr(distilled_values, "forward", noted)
    lock_figures(loaded, questions, lock, made.plan)
    for example in taught_in_english(loaded, questions, REPORT).examples:
        assert read.count((*example.teacher, *example.answer)) == 1
        assert read.count((*example.student, *example.answer)) == 2


def test_from_every_language(loaded, questions, obedient):
    lock = lock_of(questions, "fr")
    assert lock == Lock("fr", ("de", "en"), ("fr",))
    made = language_lock(loaded, questions, lock, passes=1)
    assert made.plan.metadata["source"] is None
    assert made.plan.metadata["settings"]["sources"] == ["de", "en"]
    text = conversation_batches(loaded, base_conversations(loaded, questions, lock.languages))
    of_edit = coefficients(loaded, made.plan.edits, text)
    expected = {name: [1, 0] for name in lock.languages} | {
        f"{name}/header": [0, 1] for name in lock.languages
    }
    for result in of_edit.values():
        for group in ("de", "de/header", "en", "en/header", "fr", "fr/header", "template"):
            assert result["means"][group] == pytest.approx(expected.get(group, [0, 0]), abs=1e-4)


def test_from_every_language_the_target_trains_on_its_own_answers(loaded, questions, obedient, monkeypatch):
    trained = []
    learn = lock_module.distilled_values
    monkeypatch.setattr(
        lock_module,
        "distilled_values",
        lambda *given, **named: (trained.append(given[2:4]), learn(*given, **named))[1],
    )
    language_lock(loaded, questions, lock_of(questions, "fr"), passes=1)
    language_lock(loaded, questions, lock_of(questions, "fr", "en"), passes=1)
    (everywhere, held_out), (from_english, _) = trained
    own = [example for example in everywhere if example.student == example.teacher]
    asked = [
        tuple(prompt_of(loaded, question.text).ids.tolist())
        for question in questions_of_part(questions.of["fr"], BUILD)
    ]
    assert [example.student for example in own] == asked
    assert sum(example.student == example.teacher for example in held_out) == 4
    assert not [example for example in from_english if example.student == example.teacher]


def test_the_teacher_gets_the_users_instruction(loaded, questions, obedient):
    lock = lock_of(questions, "fr", "fr", instruction="Be brief.")
    assert lock == Lock("fr", ("fr",), ("de", "en"), "Be brief.")
    (lesson, *_) = lessons(loaded, questions, lock, ("fr",), REPORT)["fr"]
    text = questions.of["fr"][3].text
    assert torch.equal(lesson.student.ids, prompt_of(loaded, text).ids)
    assert torch.equal(lesson.teacher.ids, prompt_of(loaded, f"{text} Be brief.").ids)
    everywhere = lock_of(questions, "fr", instruction="Be brief.")
    assert set(everywhere.sources) == {"fr", "de", "en"} and everywhere.keep == ()
    made = language_lock(loaded, questions, everywhere, passes=1)
    # Every answer is to change, so none is measured as unchanged.
    assert lock_figures(loaded, questions, everywhere, made.plan).kept == {}
    assert made.plan.metadata["settings"]["instructions"]["de"] == "Be brief."


def test_a_teacher_by_question_is_asked_in_the_target(loaded, questions):
    lock = lock_of(questions, "fr", "en", teacher="question")
    assert lock.as_json()["instructions"] == {}
    for index, lesson in zip(
        (2, 6, 10, 14), lessons(loaded, questions, lock, ("en",), CHOOSE)["en"], strict=True
    ):
        assert torch.equal(lesson.student.ids, prompt_of(loaded, questions.of["en"][index].text).ids)
        assert torch.equal(lesson.teacher.ids, prompt_of(loaded, questions.of["fr"][index].text).ids)
    incomplete = Questions({**questions.of, "fr": questions.of["fr"][:-2]}, "digest")
    with pytest.raises(UsageError, match="'14'"):
        lock_of(incomplete, "fr", "en", teacher="question")


@pytest.fixture
def chinese(questions):
    in_chinese = tuple(Question(str(i), f"{'jkl'[i % 3] * 3} jkl {i}?") for i in range(16))
    return Questions({**questions.of, "zh": in_chinese}, "digest")


@pytest.mark.parametrize("count", [0, 8, 14])
def test_too_few_questions_to_plant_drift_are_refused_before_the_work(chinese, count):
    """With 8 there are enough to build on, and too few to measure with."""
    few = Questions({**chinese.of, "zh": chinese.of["zh"][:count]}, "digest")
    with pytest.raises(UsageError, match=rf"{count} questions in 'zh'"):
        lock_of(few, None)


def test_answers_stay_after_planted_drift(loaded, chinese, monkeypatch):
    lock = lock_of(chinese, None)
    assert lock == Lock(None, ("de", "en", "fr", "zh"), ())
    contexts = drift_contexts(loaded, chinese, lock.sources, BUILD)
    systems = {
        source: [context[0].content for context in of_source] for source, of_source in contexts.items()
    }
    assert set(systems["de"]) == set(SYSTEM_MESSAGES.values()) and len(systems["de"]) == 4
    assert set(systems["en"]) == {SYSTEM_MESSAGES["zh"]} and set(systems["zh"]) == {SYSTEM_MESSAGES["en"]}
    first, *_ = lessons(loaded, chinese, lock, ("de",), BUILD, 3)["de"]
    text = chinese.of["de"][0].text
    assert torch.equal(first.student.ids, prompt_of(loaded, text, None, contexts["de"][0]).ids)
    teacher = prompt_of(loaded, text, "Antworte auf Deutsch.", contexts["de"][0])
    assert torch.equal(first.teacher.ids, teacher.ids)
    monkeypatch.setattr(lock_text, "MIN_OBEYED", 0.0)
    monkeypatch.setattr(language_id, "identify_language", lambda text, languages: "de")
    made = language_lock(loaded, chinese, lock, passes=2)
    assert made.obeyed == {"de": 1.0, "en": 0.0, "fr": 0.0, "zh": 0.0}
    (edit, *_) = made.plan.edits
    assert edit.rank == 4 and made.plan.metadata["target"] is None
    figures = lock_figures(loaded, chinese, lock, made.plan)
    assert set(figures.sources) == set(figures.kept) == set(lock.sources)
    german = lessons(loaded, chinese, lock, ("de",), REPORT)["de"]
    with applied(loaded, made.plan):
        after = answered(loaded, [lesson.student for lesson in german], ANSWER_TOKENS)
    assert [example.after for example in figures.examples] == [answer.text for answer in after]


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"target": "es", "source": "en"}, "es"),
        ({"target": "fr", "source": "fr"}, "fr"),
        ({"target": "fr", "source": "en", "keep": ["en"]}, "en"),
        ({"target": "fr", "source": "en", "keep": ["xx"]}, "xx"),
        ({"target": "fr", "keep": ["de"]}, "--keep"),
        ({"target": None, "source": "en"}, "--from"),
        ({"target": None, "instruction": "Be brief."}, "--instruction"),
        ({"target": "fr", "source": "en", "teacher": "master"}, "master"),
        (
            {"target": "fr", "source": "en", "teacher": "question", "instruction": "Be brief."},
            "--instruction.*--teacher",
        ),
        ({"target": "fr", "source": "en", "instruction": " "}, "--instruction"),
    ],
)
def test_an_impossible_lock_is_refused_by_name(questions, arguments, named):
    with pytest.raises(UsageError, match=named):
        lock_of(questions, **arguments)


def test_a_model_without_a_template_is_refused(checkpoint_of, questions):
    loaded = load_model(str(checkpoint_of("llama")), device="cpu")
    with pytest.raises(UsageError, match="chat template"):
        language_lock(loaded, questions, Lock("fr", ("en",), ("fr", "de")))


def test_parts_are_a_half_and_two_quarters(questions):
    from editing.evaluation.questions import questions_of_part

    parts = [
        [question.question_id for question in questions_of_part(questions.of["en"], part)]
        for part in (BUILD, CHOOSE, REPORT)
    ]
    assert [len(part) for part in parts] == [8, 4, 4]
    assert sorted(int(question_id) for part in parts for question_id in part) == list(range(16))
