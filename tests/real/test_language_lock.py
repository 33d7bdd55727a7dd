"""``broca steer``: English questions are answered in French without being told to; German ones as before.

Measured on 16 questions each: answers in French 0 -> .94 (1.00 told to); of German questions .88 -> .81 in German, KL .06.  This
model hardly speaks French, so one of five answers may be in no language.
"""

import pytest

from editing.evaluation.language_id import identify_language

QUESTIONS = (
    "How do I keep bread fresh for longer?",
    "Why do leaves turn red in autumn?",
    "What should I pack for a weekend in the mountains?",
    "How does a bicycle stay upright?",
    "Give me an idea for dinner with rice.",
)


@pytest.fixture(scope="module")
def steered(run, model):
    return run("steer", model, "--to", "fr", "--keep", "de,es", "--device", "cpu", name="locked")


def test_english_is_answered_as_if_told_to_answer_in_french(steered):
    one = steered.value["measured"]["sources"]["en"]
    base, prompted, locked = (one["language"][model] for model in ("base", "prompted", "steered"))
    assert base["whole"] < 0.25
    assert locked["whole"] >= prompted["whole"] - 0.125
    assert locked["begins"] >= 0.875
    assert one["divergence"]["steered"] < 0.5 * one["divergence"]["base"]


def test_no_question_in_a_language_that_is_kept_loses_it(steered):
    for one in steered.value["measured"]["kept"].values():
        assert one["steered"]["whole"] >= one["base"]["whole"] - 0.125


def test_german_and_spanish_are_left_alone(steered):
    for language in ("de", "es"):
        assert steered.value["measured"]["kept"][language]["divergence"] < 0.2


def test_the_checkpoint_answers_in_french_in_transformers_alone(steered):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(steered.out)
    model = transformers.AutoModelForCausalLM.from_pretrained(steered.out)
    found = []
    for question in QUESTIONS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        made = model.generate(**ids, max_new_tokens=40, do_sample=False)
        answer = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(identify_language(answer, ("de", "en", "es", "fr")))
    assert found.count("fr") >= 4, found
