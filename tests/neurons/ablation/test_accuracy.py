"""Accuracy of answers under ablation, against greedy decoding token by token with zeroed weights."""

import copy
import json

import models
import pytest
import torch

from neurons.ablation.accuracy import ACCURACY, ANSWER_NLL
from neurons.ablation.report import as_markdown
from neurons.ablation.study import Settings, ablation_study
from neurons.ablation.study_file import study_document, study_of
from neurons.errors import UsageError
from neurons.files.artifact import json_bytes
from neurons.neuron_sets.neuron_set import neuron_set
from neurons.text.prompts import Prompt, Prompts, answer_tokens, read_prompts

PLACES = {
    "qaa": [(0, n) for n in range(20)],
    "qab": [(1, 3)],
    "qac": [(0, 30), *((layer, n) for layer in (1, 2) for n in range(20, 40))],
}
SETTINGS = Settings(controls=("random",), draws=2, doses=(0.5,), resamples=50)


def set_of(places):
    members = {k: torch.tensor(rows, dtype=torch.int64) for k, rows in places.items()}
    scores = {k: torch.arange(len(rows), dtype=torch.float64) for k, rows in places.items()}
    return neuron_set(members, scores, 3, 48, {"method": "planted"})


def greedy(model, ids, count):
    """The first tokens of the greedy continuation, one whole pass for each."""
    made = list(ids)
    for _ in range(count):
        with torch.no_grad():
            made.append(int(model(torch.tensor([made])).logits[0, -1].argmax()))
    return made[len(ids) :]


def naive(model, tokenizer, prompts):
    """(fraction right, mean NLL of the answer) of one language's prompts."""
    right, total = 0, 0.0
    for prompt in prompts:
        ids, answer = answer_tokens(tokenizer, prompt)
        right += greedy(model, ids, len(answer)) == answer
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer])).logits[0].double()
        for place, token in enumerate(answer, start=len(ids) - 1):
            total -= float(logits[place].log_softmax(-1)[token])
    return right / len(prompts), total / len(prompts)


def without(model, rows):
    ablated = copy.deepcopy(model)
    for layer, neuron in rows:
        ablated.model.layers[layer].mlp.down_proj.weight.data[:, neuron] = 0
    return ablated


@pytest.fixture(scope="module")
def prompts(llama):
    """Two of three answers are what the model writes, one or two tokens long."""
    of = {}
    for language in models.LANGUAGES:
        of_language = []
        for i, text in enumerate(models.sentences(language, 6)):
            ids = llama.tokenizer(text)["input_ids"]
            answer = llama.tokenizer.decode(greedy(llama.model, ids, 1 + i % 2))
            of_language.append(Prompt(text, answer if i % 3 else " pop bed"))
        of[language] = tuple(of_language)
    return Prompts(of, "digest")


@pytest.fixture(scope="module")
def study(llama, corpus, prompts):
    return ablation_study(llama, corpus, {"planted": set_of(PLACES)}, SETTINGS, prompts=prompts)


def test_equals_a_naive_loop(llama, study, prompts):
    (outcome,) = study.sets
    assert study.prompts == (6, 6, 6)
    accuracy, nll = study.answers[ACCURACY], study.answers[ANSWER_NLL]
    assert float(accuracy.min()) > 0 and float(accuracy.max()) < 1
    for j, measured in enumerate(study.languages):
        right, loss = naive(llama.model, llama.tokenizer, prompts.of[measured])
        assert float(accuracy[j]) == right
        assert float(nll[j]) == pytest.approx(loss, rel=1e-5)
        for i, ablated in enumerate(study.languages):
            model = without(llama.model, PLACES[ablated])
            right_without, loss_without = naive(model, llama.tokenizer, prompts.of[measured])
            effects = outcome.answers
            assert float(effects[ACCURACY].own.nll[i, j]) == pytest.approx(right_without)
            assert float(effects[ACCURACY].own.change[i, j]) == pytest.approx(right_without - right)
            assert float(effects[ANSWER_NLL].own.change[i, j]) == pytest.approx(
                loss_without - loss, rel=1e-4, abs=1e-5
            )
    assert float(outcome.answers[ACCURACY].own.change.min()) < 0
    assert len(outcome.answers[ACCURACY].controls["random"]) == 2


def test_text_is_measured_as_without_prompts(llama, corpus, study):
    plain = ablation_study(llama, corpus, {"planted": set_of(PLACES)}, SETTINGS)
    assert torch.equal(plain.sets[0].own.nll, study.sets[0].own.nll)
    assert plain.sets[0].answers == plain.answers == {} and "prompts" not in study_document(plain)


def test_is_written_read_back_and_told(study):
    value = json.loads(json_bytes(study_document(study)))
    again = study_of(value, "file")
    assert json_bytes(study_document(again)) == json_bytes(study_document(study))
    told = as_markdown(study)
    assert "accuracy of 18 prompts" in told and "accuracy unablated" in told
    broken = value | {"answers": {"accuracy": {"qaa": 0.5}}}
    with pytest.raises(UsageError, match="qab"):
        study_of(broken, "file")


def test_resumes_with_the_same_bytes_and_not_with_other_answers(llama, corpus, study, prompts, tmp_path):
    sets, out = {"planted": set_of(PLACES)}, tmp_path / "ablation.json"
    done = []
    for given in (prompts, prompts, Prompts(prompts.of, "other")):
        again = ablation_study(
            llama, corpus, sets, SETTINGS, out=out, progress=lambda *count: done.append(count), prompts=given
        )
        assert torch.equal(again.sets[0].answers[ACCURACY].own.nll, study.sets[0].answers[ACCURACY].own.nll)
    assert {total for _, total in done} == {done[0][1]}
    assert sum(count for count, _ in done) == 3 * done[0][1]


def test_every_language_needs_prompts(llama, corpus, prompts):
    some = Prompts({"qaa": prompts.of["qaa"]}, "digest")
    with pytest.raises(UsageError, match="no prompts for qab, qac"):
        ablation_study(llama, corpus, {"planted": set_of(PLACES)}, SETTINGS, prompts=some)


def test_prompts_of_one_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a", "answer": " b", "label": label} for label in ("formal", "slang", "formal")]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_prompts(path)
    assert {label: len(some) for label, some in found.of.items()} == {"formal": 2, "slang": 1}
    assert list(read_prompts(path, ["slang"]).of) == ["slang"]
    assert read_prompts(path, ["slang"]).digest != found.digest
    with pytest.raises(UsageError, match=r"no prompt for python.*formal, slang"):
        read_prompts(path, ["python"])
    for line, fault in (
        ('{"prompt": "a", "answer": "b"}', "line 1 has no label"),
        ("[]", "line 1"),
        ("", "no prompt"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(UsageError, match=fault):
            read_prompts(path)
