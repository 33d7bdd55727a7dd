"""An evaluation of a tiny model, with steering whose outcome is known."""

import math
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial

import models
import pytest
import torch
from test_language_id import TEXTS
from test_likelihood import naive_nlls

from editing.evaluation.classifier import LANGUAGE_IDENTIFICATION
from editing.evaluation.evaluation import Evaluation
from editing.evaluation.generation import Continuation, generate
from editing.evaluation.language_id import identify_language, second_opinion
from editing.evaluation.questions import Question, Questions
from editing.evaluation.relevance import ChrfScorer, LikelihoodScorer
from editing.evaluation.repetition import distinct_ngrams, longest_repeat, loops
from editing.hooks.residual import residual_steering
from editing.study.comparison import choose, largest_rise
from neurons.errors import UsageError
from neurons.models.source import load_model
from neurons.text.corpus import Corpus
from neurons.text.words import distinct_rate, opening, words

LANGUAGES = ("de", "en", "es", "fr")
LINES = {
    "de": ("Der Hund schläft heute lange im großen Haus.", "Wir gehen morgen früh ins Kino.", "Guten Tag!"),
    "en": ("The dog sleeps in the big house all day.", "", "We go to the cinema early tomorrow.", "Hello you!"),
    "es": ("El perro duerme hoy en la casa grande.", "Mañana vamos temprano al cine."),
    "fr": ("Le chien dort aujourd'hui dans la grande maison.", "Demain nous allons au cinéma tôt.", "Bonjour!"),
}  # fmt: skip
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def corpus():
    return Corpus(LINES, "digest", "report")


@pytest.fixture(scope="module")
def evaluation(llama, corpus):
    return Evaluation(llama, corpus, "en", "fr", samples=2, new_tokens=NEW_TOKENS, seed=5)


@contextmanager
def always(loaded, token, strength=60.0):
    """One token is by far the most likely, whatever was read."""

    def after(_, __, logits):
        raised = logits.clone()
        raised[..., token] = logits.amax(-1) + strength
        return raised

    handle = loaded.model.lm_head.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def prompts(language):
    return [opening(line) for line in LINES[language] if line] * 2


def mean(values):
    return sum(values) / len(values)


def text_rows(loaded, language):
    return [loaded.tokenizer(line)["input_ids"][:128] for line in LINES[language] if line]


def test_prompts_are_openings_of_the_source(llama, evaluation, corpus):
    assert evaluation.continuations == 6
    assert evaluation.base.samples[0].prompt == "The dog sleeps in the big"
    few = Evaluation(llama, corpus, "en", "fr", samples=3, max_prompts=2, new_tokens=2)
    assert few.continuations == 6
    shown = [sample.prompt for sample in few.base.samples]
    assert shown == ["The dog sleeps in the big", "We go to the cinema early"] * 2 + [shown[0]]


def test_the_unedited_model_has_not_risen(llama, evaluation):
    base = evaluation.base
    assert base.nll_rise == dict.fromkeys(LANGUAGES, 0.0)
    assert base.kl == {}
    for language in LANGUAGES:
        assert base.nll[language] == pytest.approx(
            mean(naive_nlls(llama.model, text_rows(llama, language))), rel=1e-5
        )


def test_base_equals_what_the_model_writes(llama, evaluation):
    answers = generate(llama, prompts("en"), NEW_TOKENS, seed=5)
    unedited = generate(llama, prompts("fr"), NEW_TOKENS, seed=5)
    base = evaluation.base
    labels = [identify_language(item.text, LANGUAGES) for item in answers]
    assert base.languages_found == dict(Counter(labels))
    assert base.target_share == labels.count("fr") / 6
    assert base.source_share == labels.count("en") / 6
    assert evaluation.ceiling == mean([identify_language(item.text, LANGUAGES) == "fr" for item in unedited])
    assert base.distinct == pytest.approx(mean([distinct_rate(item.text) for item in answers]))
    gap = mean(naive_nlls(llama.model, [[0, *item.ids] for item in answers])) - mean(
        naive_nlls(llama.model, [[0, *item.ids] for item in unedited])
    )
    assert base.fluency_gap == pytest.approx(gap, rel=1e-3, abs=1e-4)
    assert [sample.continuation for sample in base.samples] == [item.text for item in answers[:5]]
    assert [sample.language for sample in base.samples] == labels[:5]


def test_identity_steering_changes_nothing(evaluation):
    outcome = evaluation.measure("identity", lambda: nullcontext(), {"strength": 0}, kl=True)
    assert outcome.kl == {"de": 0.0, "es": 0.0}
    assert outcome.nll_rise == evaluation.base.nll_rise
    assert outcome.samples == evaluation.base.samples
    assert outcome.fluency_gap == evaluation.base.fluency_gap
    assert (outcome.name, outcome.details) == ("identity", {"strength": 0})


def spaced_word():
    """A token that is a space and a word of letters."""
    tokenizer = models.tiny_tokenizer()
    for index in range(len(tokenizer)):
        text = tokenizer.decode([index])
        if text.startswith(" ") and len(text) > 3 and text[1:].isalpha():
            return index, text
    raise AssertionError("the tokenizer has no such token")


def test_one_forced_token_is_no_fluent_text(llama, evaluation):
    token, text = spaced_word()
    outcome = evaluation.measure("forced", partial(always, llama, token))
    assert {sample.continuation for sample in outcome.samples} == {text * NEW_TOKENS}
    assert outcome.distinct == pytest.approx(1 / NEW_TOKENS)
    label = identify_language(text * NEW_TOKENS, LANGUAGES)
    assert outcome.languages_found == {label: 6}
    # Fluency is judged by the unedited model: under the forced one this text would be certain.
    unedited = generate(llama, prompts("fr"), NEW_TOKENS, seed=5)
    forced = mean(naive_nlls(llama.model, [[0, *[token] * NEW_TOKENS]]))
    gap = forced - mean(naive_nlls(llama.model, [[0, *item.ids] for item in unedited]))
    assert outcome.fluency_gap == pytest.approx(gap, rel=1e-4)
    assert all(rise > 10 for rise in outcome.nll_rise.values())
    with always(llama, token):
        steered = mean(naive_nlls(llama.model, text_rows(llama, "es")))
    assert outcome.nll["es"] == pytest.approx(steered, rel=1e-5)
    assert outcome.nll_rise["es"] == pytest.approx(steered - evaluation.base.nll["es"], rel=1e-5)


def test_a_target_that_is_forced_is_found(llama, corpus):
    class Translator:
        """Writes French whatever the tokens."""

        def __call__(self, *args, **options):
            return llama.tokenizer(*args, **options)

        def __getattr__(self, name):
            return getattr(llama.tokenizer, name)

        def decode(self, *_, **__):
            return TEXTS["fr"]

    forced = Evaluation(
        replace(llama, tokenizer=Translator()), corpus, "en", "fr", max_prompts=2, new_tokens=2
    )
    assert (forced.base.target_share, forced.base.source_share, forced.ceiling) == (1, 0, 1)
    assert forced.base.languages_found == {"fr": 2}


@pytest.mark.parametrize("bytes_at_once", [1, 256 * 2**20])
def test_kl_is_over_the_text_of_third_languages(llama, evaluation, monkeypatch, bytes_at_once):
    monkeypatch.setattr("neurons.text.batches.TOKENS_A_BATCH", 40)
    monkeypatch.setattr("neurons.models.next_token.LOGIT_BYTES_AT_ONCE", bytes_at_once)
    corpus = Corpus(LINES, "digest", "report")
    fresh = Evaluation(llama, corpus, "en", "fr", max_prompts=1, new_tokens=1)
    vector = torch.randn(64, generator=torch.Generator().manual_seed(3))
    steering = partial(residual_steering, llama, vector, 1, 0.5)
    divergences = fresh.measure("steered", steering, kl=True).kl
    assert set(divergences) == {"de", "es"}
    for language, value in divergences.items():
        total, positions = 0.0, 0
        for ids in text_rows(llama, language):
            with torch.no_grad():
                p = llama.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
                with steering():
                    q = llama.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
            positions += len(p)
        assert value == pytest.approx(total / positions, rel=1e-3)
        assert value > 0.001


def test_languages_share_the_head_of_a_model_on_disk(checkpoint_of, corpus):
    loaded = load_model(str(checkpoint_of(dtype="bfloat16")), max_memory=0)
    texts = Evaluation(loaded, corpus, "en", "fr", max_prompts=1, new_tokens=1)._unedited
    addresses = {texts[third].head.keywords["weight"].data_ptr() for third in ("de", "es")}
    assert len(addresses) == 1 and texts["en"].head is texts["fr"].head is None


def test_steering_is_gone_after_a_measurement(llama, evaluation):
    evaluation.measure("forced", partial(always, llama, 9))
    again = evaluation.measure("base", lambda: nullcontext())
    assert again == evaluation.base


def test_largest_rise_leaves_the_source_out(evaluation):
    outcome = replace(evaluation.base, nll_rise={"de": 0.1, "en": 5.0, "es": 0.3, "fr": 0.2})
    assert largest_rise(outcome, "en") == 0.3
    assert largest_rise(outcome, "es") == 5.0


def outcome_of(evaluation, share, gap, harm):
    return None, replace(
        evaluation.base, target_share=share, fluency_gap=gap, nll_rise={"en": 9.0, "fr": harm, "de": 0.0}
    )


def test_choose(evaluation):
    """The least harmful that steers well; else the most fluent that steers; else the strongest."""
    well = [
        outcome_of(evaluation, *values) for values in ((0.8, 0.4, 0.3), (0.73, 0.5, 0.1), (0.79, 0.1, 0.2))
    ]
    salad = outcome_of(evaluation, 1.0, 2.0, 0.0)
    weak = outcome_of(evaluation, 0.5, 0.0, 0.0)
    assert choose([weak, *well, salad], 0.8, "en") is well[1]
    worse = outcome_of(evaluation, 0.9, 0.8, 1.0)
    assert choose([weak, salad, worse], 0.8, "en") is worse
    assert choose([outcome_of(evaluation, 0.1, 0.0, 0.0), weak], 0.8, "en") is weak
    assert choose([well[1], well[1]], 0.8, "en") is well[1]
    # Nothing written is no steering, also where the model itself reaches nothing.
    silent = outcome_of(evaluation, 0.0, math.nan, 0.0)
    assert choose([silent, outcome_of(evaluation, 0.0, 0.1, 0.0), salad], 0.0, "en") is salad


def rate_of(texts, language):
    return mean([identify_language(text, LANGUAGES) == language and not loops(text) for text in texts])


def test_failures_count_to_no_share(llama, evaluation, corpus):
    token, _ = spaced_word()
    outcome = evaluation.measure("forced", partial(always, llama, token))
    assert outcome.failures == {"empty": 0, "looping": 6}
    assert (outcome.target_share, outcome.source_share) == (0, 0)
    assert sum(outcome.languages_found.values()) == 6
    assert (outcome.distinct_pairs, outcome.longest_repeat) == (
        pytest.approx(1 / (NEW_TOKENS - 1)),
        pytest.approx((NEW_TOKENS - 1) / NEW_TOKENS),
    )
    silent = evaluation.measure("silent", partial(always, llama, models.tiny_tokenizer().eos_token_id))
    assert silent.failures == {"empty": 6, "looping": 0} and silent.languages_found == {"empty": 6}
    assert (silent.target_share, silent.source_share, silent.distinct) == (0, 0, 0)
    assert math.isnan(silent.fluency_gap)
    assert silent.answer_words == silent.longest_repeat == silent.sentence_share == 0
    # Empty, since there is no letter, and a loop: one failure.
    digits = Continuation((5,), "1 1 1 1 1 1 1 1 1")
    counting = Evaluation(llama, corpus, "en", "fr", write=lambda asked, *_: [digits] * len(asked))
    assert counting.base.failures == {"empty": 3, "looping": 0}


def test_what_else_is_told_of_the_answers(llama, evaluation):
    texts = [item.text for item in generate(llama, prompts("en"), NEW_TOKENS, seed=5)]
    base = evaluation.base
    labels = [identify_language(text, LANGUAGES) for text in texts]
    assert base.agreement == mean(
        [second_opinion(t, LANGUAGES) == label for t, label in zip(texts, labels, strict=True)]
    )
    assert base.sentence_share == pytest.approx(
        mean([LANGUAGE_IDENTIFICATION.sentence_share(t, "fr", LANGUAGES) for t in texts])
    )
    assert base.distinct_pairs == pytest.approx(mean([distinct_ngrams(t, 2) for t in texts]))
    assert base.longest_repeat == pytest.approx(
        mean([longest_repeat(t) / max(len(words(t)), 1) for t in texts])
    )
    assert base.answer_words == pytest.approx(mean([len(words(t)) for t in texts]))
    assert (base.relevance, base.others, base.effectiveness, base.entanglement) == ({}, {}, None, None)


def test_side_effects_on_every_other_language(llama, corpus):
    fresh = Evaluation(llama, corpus, "en", "fr", new_tokens=12, seed=5)
    vector = torch.randn(64, generator=torch.Generator().manual_seed(3))
    steering = partial(residual_steering, llama, vector, 1, 2.0)
    outcome = fresh.measure("steered", steering, others=True)
    assert set(outcome.others) == {"de", "es", "fr"}
    squares = []
    for language, other in outcome.others.items():
        inputs = [opening(line) for line in LINES[language] if line]
        unedited = generate(llama, inputs, 12, seed=5)
        with steering():
            steered = generate(llama, inputs, 12, seed=5)
        texts = [item.text for item in steered]
        rates = [rate_of([item.text for item in answers], language) for answers in (steered, unedited)]
        squares.append((rates[0] - rates[1]) ** 2)
        gap = mean(naive_nlls(llama.model, [[0, *item.ids] for item in steered])) - mean(
            naive_nlls(llama.model, [[0, *item.ids] for item in unedited])
        )
        assert asdict(other) == {
            "share": rates[0],
            "ceiling": rates[1],
            "fluency_gap": pytest.approx(gap, rel=1e-3, abs=1e-4),
            "distinct_pairs": pytest.approx(mean([distinct_ngrams(t, 2) for t in texts])),
            "longest_repeat": pytest.approx(mean([longest_repeat(t) / max(len(words(t)), 1) for t in texts])),
            "answer_words": pytest.approx(mean([len(words(t)) for t in texts])),
        }
    assert outcome.entanglement == pytest.approx(math.sqrt(mean(squares)))
    base, share = fresh.base.target_share, outcome.target_share
    assert outcome.effectiveness == pytest.approx((share - base) / (1 - base))
    same = fresh.measure("identity", lambda: nullcontext(), others=True)
    assert same == replace(fresh.measure("base", nullcontext, others=True), name="identity")
    assert (same.effectiveness, same.entanglement) == (0, 0)
    silent = fresh.measure("silent", partial(always, llama, 1), others=True)
    assert all(other.fluency_gap is None and other.share == 0 for other in silent.others.values())


QUESTIONS = Questions(
    {
        "en": (
            Question("1", "How long does the dog sleep?", "Toute la journée."),
            Question("2", "Where do we go?", "Au cinéma."),
        ),
        "fr": (Question("1", "Combien de temps le chien dort-il ?"),),
    },
    "digest",
)


def test_questions_are_answered_in_completion_style(llama, corpus):
    fresh = Evaluation(llama, corpus, "en", "fr", new_tokens=NEW_TOKENS, temperature=0, questions=QUESTIONS)
    inputs = ["How long does the dog sleep?\n", "Where do we go?\n"]
    answers = generate(llama, inputs, NEW_TOKENS, temperature=0)
    assert (fresh.continuations, fresh.prompt_style, fresh.ceiling_from) == (2, "completion", "completion")
    assert [sample.continuation for sample in fresh.base.samples] == [item.text for item in answers]
    assert fresh.base.samples[0].prompt == "How long does the dog sleep?"
    unedited = generate(llama, ["Combien de temps le chien dort-il ?\n"], NEW_TOKENS, temperature=0)
    assert fresh.ceiling == rate_of([item.text for item in unedited], "fr")
    only = Questions({"en": QUESTIONS.of["en"]}, "digest")
    openings_too = Evaluation(llama, corpus, "en", "fr", new_tokens=2, questions=only)
    assert (openings_too.prompt_style, openings_too.ceiling_from) == ("completion", "opening")
    with pytest.raises(UsageError, match="no question in the source language 'de'"):
        Evaluation(llama, corpus, "de", "fr", questions=only)


def test_an_instruction_stands_before_every_prompt_of_the_source(llama, corpus):
    fresh = Evaluation(llama, corpus, "en", "fr", new_tokens=NEW_TOKENS, seed=5, max_prompts=2)
    outcome = fresh.measure("prompt", nullcontext, others=True, instruction="En français.")
    inputs = [f"En français. {opening(line)}" for line in LINES["en"] if line][:2]
    answers = generate(llama, inputs, NEW_TOKENS, seed=5)
    assert [sample.continuation for sample in outcome.samples] == [item.text for item in answers]
    assert outcome.samples[0].prompt == "The dog sleeps in the big"
    assert outcome.nll_rise == dict.fromkeys(LANGUAGES, 0.0)
    assert outcome.entanglement == 0


def test_relevance_is_scored_and_named(llama, corpus):
    class Loud:
        name = "judge"

        def __call__(self, prompts, answers):
            assert [prompt.text for prompt in prompts] == [
                "The dog sleeps in the big",
                "We go to the cinema early",
            ]
            assert all(item.text for item in answers)
            return [0.5, 1.0]

    fresh = Evaluation(llama, corpus, "en", "fr", new_tokens=NEW_TOKENS, max_prompts=2, scorer=Loud())
    assert fresh.base.relevance["scorer"] == "judge"
    assert fresh.base.relevance["mean"] == 0.75
    share = fresh.base.target_share
    assert fresh.base.relevance["steering_score"] == pytest.approx(2 * share * 0.75 / (share + 0.75))


def test_another_may_write_the_answers_while_all_else_is_measured_on_the_model(llama, corpus):
    token, text = spaced_word()
    calls, steered = [], []

    def write(prompts, new_tokens, temperature, seed):
        calls.append((list(prompts), new_tokens, temperature, seed, bool(steered)))
        return [Continuation((token,) * (2 + bool(steered)), text * (2 + bool(steered)))] * len(prompts)

    @contextmanager
    def steering():
        steered.append(True)
        with always(llama, token):
            yield
        steered.pop()

    settings = {"max_prompts": 2, "new_tokens": 3, "temperature": 0.5, "seed": 7}
    fresh = Evaluation(llama, corpus, "en", "fr", **settings, write=write)
    assert fresh.base.name == "base"
    outcome = fresh.measure("steered", steering, kl=True)
    openings_of = {language: list(dict.fromkeys(prompts(language)))[:2] for language in ("en", "fr")}
    assert calls == [
        (openings_of["fr"], 3, 0.5, 7, False),
        (openings_of["en"], 3, 0.5, 7, False),
        (openings_of["en"], 3, 0.5, 7, True),
    ]
    assert {sample.continuation for sample in fresh.base.samples} == {text * 2}
    assert {sample.continuation for sample in outcome.samples} == {text * 3}
    nlls = [mean(naive_nlls(llama.model, [[0, *[token] * count]])) for count in (2, 3)]
    assert outcome.fluency_gap == pytest.approx(nlls[1] - nlls[0], rel=1e-3, abs=1e-4)
    by_model = Evaluation(llama, corpus, "en", "fr", **settings)
    expected = by_model.measure("steered", partial(always, llama, token), kl=True)
    assert (outcome.nll, outcome.kl) == (expected.nll, expected.kl)
    assert by_model.base.samples != fresh.base.samples


def test_likelihood_is_always_the_unedited_models(llama, corpus):
    scorer = LikelihoodScorer(llama)
    fresh = Evaluation(
        llama, corpus, "en", "fr", new_tokens=NEW_TOKENS, questions=QUESTIONS, scorer=scorer, temperature=0
    )
    token, _ = spaced_word()
    outcome = fresh.measure("forced", partial(always, llama, token))
    # Under the forced model these answers would be certain.
    assert outcome.relevance["mean"] < 0.05
    with always(llama, token):
        forced = generate(llama, ["Where do we go?\n"], NEW_TOKENS, temperature=0)
        assert scorer(fresh._prompts["en"][1:], forced)[0] > 0.99


def test_references_are_the_rest_of_the_parallel_line(llama):
    even = Corpus({"en": LINES["en"], "fr": (*LINES["fr"], "")}, "digest", "report")
    fresh = Evaluation(llama, even, "en", "fr", new_tokens=2, max_prompts=1, scorer=ChrfScorer())
    assert fresh._prompts["en"][0].reference == "grande maison."
    assert fresh.base.relevance["scorer"] == "chrf"


def test_refuses_languages_it_cannot_measure(llama, corpus):
    with pytest.raises(UsageError, match="'it'"):
        Evaluation(llama, corpus, "en", "it")
    with pytest.raises(UsageError, match="both 'en'"):
        Evaluation(llama, corpus, "en", "en")
    odd = Corpus({**LINES, "qaa": ("beef",)}, "digest", "report")
    with pytest.raises(UsageError, match="qaa"):
        Evaluation(llama, odd, "en", "fr")
