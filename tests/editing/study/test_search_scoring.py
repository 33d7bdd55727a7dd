"""Measures of a trial against those of an evaluation, and the weights after a search."""

from functools import partial

import pytest
import torch
from test_evaluation import LINES, NEW_TOKENS, always, spaced_word

from editing.evaluation.evaluation import Evaluation
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, make_plan
from editing.study.search import Search
from editing.study.search_scoring import Scoring
from editing.study.search_space import Knob, Space
from editing.study.trial import MEASURED
from neurons.errors import BrocaError, UsageError
from neurons.text.corpus import Corpus

CORPUS = Corpus(LINES, "digest", "choose")


@pytest.fixture
def anything_is_french(monkeypatch):
    """A tiny random model writes no language: most of what it writes is to count as French."""
    label = lambda text, _: "fr" if sum(map(ord, text)) % 5 else "other"  # noqa: E731
    monkeypatch.setattr("editing.evaluation.language_id.identify_language", label)


def plan_of(llama, strength=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    edits = []
    for layer in (0, 2):
        for block, width in (("attn", "attn_in"), ("mlp", "mlp_in")):
            left = torch.randn(64, 1, generator=generator)
            right = 0.03 * strength * torch.randn(llama.anatomy.width(width), 1, generator=generator)
            edits.append(ModuleEdit(layer, block, (0,), left=left, right=right))
    return make_plan(edits, {"fingerprint": llama.fingerprint, "settings": {}, "method": "random"})


def test_figures_are_the_evaluations(llama, anything_is_french):
    scoring = Scoring(llama, CORPUS, "en", "fr", samples=2, seed=5, new_tokens=NEW_TOKENS)
    evaluation = Evaluation(llama, CORPUS, "en", "fr", samples=2, seed=5, new_tokens=NEW_TOKENS)
    assert scoring.ceiling == evaluation.ceiling
    assert scoring.third == ("de", "es")
    steering = partial(applied, llama, plan_of(llama))
    expected = evaluation.measure("edited", steering, kl=True)
    with steering():
        harm, written = scoring.harm(), scoring.written()
    assert written.hits / written.continuations == expected.target_share
    assert (written.continuations, written.prompts) == (6, 3)
    assert scoring.fluency_gap(written) == pytest.approx(expected.fluency_gap, rel=1e-5)
    third = {name: expected.nll_rise[name] for name in ("de", "es")}
    assert harm.nll_rise == pytest.approx(third, rel=1e-3, abs=1e-5)
    assert harm.kl == pytest.approx(expected.kl, rel=1e-3)
    assert min(harm.kl.values()) > 1e-3
    assert harm.rise == max(harm.nll_rise.values())


def test_answers_that_go_round_in_circles_are_no_success(llama, monkeypatch):
    monkeypatch.setattr("editing.evaluation.language_id.identify_language", lambda text, languages: "fr")
    scoring = Scoring(llama, CORPUS, "en", "fr", samples=2, seed=5, new_tokens=NEW_TOKENS)
    token, _ = spaced_word()
    with always(llama, token):
        assert scoring.few(2) == (0, 2)
        written = scoring.written()
    assert (written.hits, written.continuations) == (0, 6)


def test_the_unedited_model_harms_nothing(llama, anything_is_french):
    scoring = Scoring(llama, CORPUS, "en", "fr", new_tokens=NEW_TOKENS)
    harm = scoring.harm()
    assert set(harm.nll_rise.values()) == set(harm.kl.values()) == {0.0}


def test_budgets(llama, anything_is_french):
    scoring = Scoring(llama, CORPUS, "en", "fr", prompts=2, samples=3, lines=1, new_tokens=4)
    assert scoring.few(1)[1] == 1
    assert scoring.few(9)[1] == 2
    written = scoring.written()
    assert (written.continuations, written.prompts) == (6, 2)
    assert written.answers == scoring.written().answers
    assert written.answers != scoring.written(77).answers
    # One line a third language is read: the others may hold anything.
    other = Corpus({**LINES, "de": LINES["de"][:1], "es": LINES["es"][:1]}, "digest", "choose")
    with applied(llama, plan_of(llama)):
        harm = scoring.harm()
    same = Scoring(llama, other, "en", "fr", prompts=2, new_tokens=4)
    with applied(llama, plan_of(llama)):
        assert same.harm() == harm


@pytest.mark.parametrize("at_once", [1, 7])
def test_logits_are_made_a_few_at_a_time(llama, anything_is_french, monkeypatch, at_once):
    whole = Scoring(llama, CORPUS, "en", "fr", new_tokens=4)
    vocabulary = llama.model.config.vocab_size
    monkeypatch.setattr("neurons.models.next_token.LOGIT_BYTES_AT_ONCE", 4 * vocabulary * at_once)
    parts = Scoring(llama, CORPUS, "en", "fr", new_tokens=4)
    with applied(llama, plan_of(llama)):
        assert parts.harm().kl == pytest.approx(whole.harm().kl, rel=1e-4)


def test_weights_are_the_same_bits_after_a_search(llama, anything_is_french):
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    space = Space(
        {"strength": Knob(0.1, 2.0)}, (), lambda settings: plan_of(llama, float(settings["strength"]))
    )
    scoring = Scoring(llama, CORPUS, "en", "fr", new_tokens=4)
    changed = []

    class Watched:
        """The scoring; it looks whether the edit is really there."""

        ceiling = scoring.ceiling
        written, fluency_gap, few = scoring.written, scoring.fluency_gap, scoring.few

        def harm(self):
            state = llama.model.state_dict()
            changed.append(sum(not torch.equal(state[name], before[name]) for name in before))
            return scoring.harm()

    search = Search(Watched(), {"random": space}, partial(applied, llama))
    search.run(6)
    search.remeasured(next(trial for trial in search.trials if trial.state == MEASURED), [1])
    assert changed
    assert set(changed) == {4}
    after = llama.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert set(after) == set(before)


@pytest.mark.parametrize("kind", [Evaluation, Scoring])
def test_numbers_are_named(llama, kind):
    """Prompts and samples are told apart by name alone: the one has them the other way round."""
    with pytest.raises(TypeError, match="positional"):
        kind(llama, CORPUS, "en", "fr", 2)


@pytest.mark.parametrize("kind", [Evaluation, Scoring])
def test_the_likeliest_answer_is_not_counted_twice(llama, kind):
    with pytest.raises(UsageError, match="2 samples"):
        kind(llama, CORPUS, "en", "fr", samples=2, temperature=0)


def test_refuses_what_cannot_be_searched(llama):
    with pytest.raises(BrocaError, match="answers fr prompts in fr only"):
        Scoring(llama, CORPUS, "en", "fr", new_tokens=4)
    with pytest.raises(UsageError, match="no language 'it'"):
        Scoring(llama, CORPUS, "en", "it")
    with pytest.raises(UsageError, match="both 'en'"):
        Scoring(llama, CORPUS, "en", "en")
    two = Corpus({k: LINES[k] for k in ("en", "fr")}, "digest", "choose")
    with pytest.raises(UsageError, match="no language beside"):
        Scoring(llama, two, "en", "fr")
