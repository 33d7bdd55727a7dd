"""The guard against its parts, each measured alone, on a tiny model and a plan."""

import json
import math
from dataclasses import replace

import models
import pytest
import torch
from conversations import CHATML

from editing.evaluation import generation
from editing.evaluation.ability import ANSWER_TOKENS, BASE, EDITED, PROMPTED, Tasks, ability, load_ability
from editing.evaluation.asking import chat_tokens
from editing.evaluation.choice_accuracy import choice_log_probabilities, right
from editing.evaluation.choices import Choice
from editing.evaluation.generation import Continuation, generate
from editing.evaluation.own_answers import answer_batches
from editing.evaluation.questions import Question
from neurons.errors import UsageError
from neurons.files.artifact import json_bytes
from neurons.files.json_file import document
from neurons.models.source import load_model

LETTERS = {"en": "abc", "fr": "def"}


@pytest.fixture(scope="module")
def loaded(checkpoint_of):
    loaded = load_model(str(checkpoint_of()), device="cpu")
    loaded.tokenizer.chat_template = CHATML
    return loaded


@pytest.fixture(scope="module")
def tasks():
    return Tasks(
        {
            language: tuple(
                Choice(
                    str(i),
                    f"{letters} {letters[i % 3]} {i}?",
                    tuple(f"{one} {i}" for one in (*letters, "cab")),
                    i % 4,
                )
                for i in range(24)
            )
            for language, letters in LETTERS.items()
        },
        {
            language: [Question(str(i), f"code {letters} {i}") for i in range(3)]
            for language, letters in LETTERS.items()
        },
        {
            language: [Question(str(i), f"{letters[i]}?") for i in range(3)]
            for language, letters in LETTERS.items()
        },
    )


def hits(loaded, items, choices, instruction=None):
    texts = [item.text if instruction is None else f"{item.text} {instruction}" for item in items]
    scores = choice_log_probabilities(loaded, texts, [item.choices for item in choices])
    return right(scores, [item.answer for item in items])


def test_each_model_is_measured_alone(loaded, tasks):
    counts = []
    result = ability(
        loaded,
        tasks,
        ("en", "fr"),
        steering=lambda: models.shifted(loaded.model),
        instructions={"en": "Be brief."},
        answers_in={"en": "fr"},
        progress=counts.append,
    )
    assert sum(counts) == 2 * tasks.items(("en", "fr")) + tasks.items(("en",)) == 135
    english, french = tasks.choices["en"], tasks.choices["fr"]
    expected = {BASE: hits(loaded, english, english), PROMPTED: hits(loaded, english, french, "Be brief.")}
    with models.shifted(loaded.model):
        expected[EDITED] = hits(loaded, english, french)
        in_english = hits(loaded, english, english)
        french_after = hits(loaded, french, french)
    assert {model: rate.rate.value for model, rate in result.accuracy["en"].items()} == {
        model: sum(of_model) / 24 for model, of_model in expected.items()
    }
    assert set(result.accuracy["fr"]) == {BASE, EDITED}
    assert result.accuracy["fr"][EDITED].rate.value == sum(french_after) / 24
    assert sum(in_english) != sum(expected[EDITED])  # or the language of the choices would not be seen
    change = result.accuracy["en"][EDITED].change
    assert change.value == pytest.approx((sum(expected[EDITED]) - sum(expected[BASE])) / 24)
    assert result.accuracy["en"][BASE].change is None and result.accuracy["en"][BASE].items == 24


def test_choices_are_those_of_the_same_item(loaded, tasks):
    def measured(choices):
        given = replace(tasks, choices=tasks.choices | {"fr": choices})
        return ability(
            loaded, given, ("en",), instructions={"en": "Be brief."}, answers_in={"en": "fr"}
        ).accuracy

    french = tasks.choices["fr"]
    assert measured(french[::-1]) == measured(french)
    with pytest.raises(UsageError, match="item '23' is missing in 'fr'"):
        measured(french[:-1])


def naive_losses(loaded, prompt, answer):
    """Log-probabilities [tokens, vocabulary] that predict the answer, from one row."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = loaded.model(ids).logits[0].double().log_softmax(-1)
    return logits[len(prompt) - 1 : -1]


def test_own_answers_by_loops(loaded, tasks):
    result = ability(loaded, tasks, ("fr",), steering=lambda: models.shifted(loaded.model))
    before, after, divergence, tokens = 0.0, 0.0, 0.0, 0
    for question in tasks.questions["fr"]:
        prompt = chat_tokens(loaded.tokenizer, question.text)
        (answer,) = generate(loaded, [prompt], ANSWER_TOKENS, temperature=0)
        p = naive_losses(loaded, prompt, answer.ids)
        with models.shifted(loaded.model):
            q = naive_losses(loaded, prompt, answer.ids)
        for place, token in enumerate(answer.ids):
            before -= float(p[place, token])
            after -= float(q[place, token])
            divergence += float((p[place].exp() * (p[place] - q[place])).sum())
            tokens += 1
    own = result.own_answers["fr"]
    assert own.tokens == tokens > 0
    assert (own.base, own.edited, own.divergence) == pytest.approx(
        (before / tokens, after / tokens, divergence / tokens), rel=1e-4
    )
    assert own.divergence > 0.001


def test_prompts_are_read_and_not_counted(loaded):
    batches = answer_batches(
        loaded,
        [(5, 6, 7), (8, 9), (4,)],
        [Continuation((10,), ""), Continuation((), ""), Continuation((11, 12), "")],
    )
    counted = sorted(batch.ids[batch.counted].tolist() for batch in batches)
    assert sorted(token for of_batch in counted for token in of_batch) == [10, 11, 12]


def test_code_is_judged_in_every_models_own_answers(loaded, tasks, monkeypatch):
    written = []

    def write(loaded, rows, tokens, temperature):
        written.append([loaded.tokenizer.decode(row) for row in rows])
        text = {2: "```\nx = 1\n```", 3: "```\nx = 1 1\n```"}.get(len(written), "no code")
        return [Continuation((5, 6), text)] * len(rows)

    monkeypatch.setattr(generation, "generate", write)
    result = ability(
        loaded,
        tasks,
        ("en",),
        steering=lambda: models.shifted(loaded.model),
        instructions={"en": "Be brief."},
    )
    assert [sum("Be brief." in prompt for prompt in prompts) for prompts in written] == [0, 0, 3, 0]
    blocks, python = (
        [rate.rate.value for rate in kind["en"].values()] for kind in (result.blocks, result.python)
    )
    assert list(result.blocks["en"]) == [BASE, PROMPTED, EDITED]
    assert (blocks, python) == ([1, 1, 0], [1, 0, 0])
    assert result.python["en"][EDITED].change.value == -1


def test_without_an_edit_there_is_only_the_base(loaded, tasks):
    result = ability(loaded, tasks, ("en",))
    assert set(result.accuracy) == {"en"} and set(result.accuracy["en"]) == {BASE}
    own = result.own_answers["en"]
    assert own.base > 0 and math.isnan(own.edited) and math.isnan(own.divergence)


def test_a_result_is_read_back_or_refused_by_field(loaded, tasks, tmp_path):
    result = replace(ability(loaded, tasks, ("en",)), about={"model": "tiny"})
    path = tmp_path / "ability.json"
    path.write_bytes(json_bytes(document(result)))
    again = load_ability(path)
    assert again.accuracy == result.accuracy and again.about == result.about
    assert again.own_answers["en"].base == result.own_answers["en"].base
    value = json.loads(path.read_bytes())
    del value["accuracy"]["en"]["base"]["items"]
    path.write_text(json.dumps(value))
    with pytest.raises(UsageError, match=r"accuracy\.en\.base\.items"):
        load_ability(path)
