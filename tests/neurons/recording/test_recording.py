"""Recorded sums against a hand-written llama, token by token."""

import models
import pytest
import torch

from neurons.architectures.anatomy import SITES
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.recording import corpus_recording
from neurons.recording import record as recording
from neurons.recording.corpus_recording import record_corpus
from neurons.recording.needs import text_of
from neurons.recording.record import record
from neurons.scorers.method import TEXTS
from neurons.statistics.statistics import parse_moment
from neurons.text.batches import TokenBatch, packed_batches, text_batches

WIDTHS = {
    "mlp_act": 48,
    "mlp_up": 48,
    "mlp_in": 48,
    "attn_in": 64,
    "mlp_out": 64,
    "attn_out": 64,
    "block_out": 64,
}
ORDER = ("qac", "qaa", "qab")  # not alphabetical


def make_batches(kind, tokenizer, monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setattr("neurons.text.batches.TOKENS_A_BATCH", 60)
    batches = {}
    for number, language in enumerate(ORDER, start=3):
        texts = models.sentences(language, number, seed=7, words=(1, 9))
        if kind == "packed":
            batches[language] = packed_batches(texts, tokenizer, 12, language)
        else:
            batches[language] = text_batches(texts, tokenizer, 100)
    return batches


def naive_sums(model, rows):
    """Per site: sum over all tokens after the first of each row, sum of row means, positive count."""
    layers = model.config.num_hidden_layers
    total = {site: torch.zeros(layers, width, dtype=torch.float64) for site, width in WIDTHS.items()}
    mean = {site: torch.zeros_like(values) for site, values in total.items()}
    positive, unsure = torch.zeros(layers, 48), torch.zeros(layers, 48)
    for row in rows:
        _, values = models.naive_llama(model, row)
        for layer, sites in enumerate(values):
            for site, activation in sites.items():
                for position in range(1, len(row)):
                    token = activation[position].detach()
                    total[site][layer] += token
                    mean[site][layer] += token / (len(row) - 1)
                    if site == "mlp_act":
                        activated = token * torch.sigmoid(token)
                        positive[layer] += activated > 0
                        unsure[layer] += activated.abs() < 1e-5
    return total, mean, positive, unsure


def test_the_naive_llama_is_the_model(llama):
    ids = llama.tokenizer("beef stop milk")["input_ids"]
    output = llama.model(torch.tensor([ids]), output_hidden_states=True)
    logits, layers = models.naive_llama(llama.model, ids)
    torch.testing.assert_close(output.logits[0].double(), logits, rtol=1e-4, atol=1e-4)
    for layer in range(2):  # the last hidden state is behind the final norm
        expected = output.hidden_states[layer + 1][0].double()
        torch.testing.assert_close(expected, layers[layer]["block_out"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_equals_a_loop_over_tokens(llama, kind, monkeypatch):
    batches = make_batches(kind, llama.tokenizer, monkeypatch)
    assert any(batch.padded for of_language in batches.values() for batch in of_language) == (
        kind == "padded"
    )
    assert all(len(of_language) > 1 or len(of_language[0].ids) > 1 for of_language in batches.values())
    wanted = [f"{site}:{moment}" for site in SITES for moment in ("sum", "text_mean")]
    statistics = record(llama, batches, [*wanted, "mlp_act:positive"])
    assert statistics.languages == ORDER
    assert statistics.fingerprint == llama.fingerprint
    for k, language in enumerate(ORDER):
        rows = [
            ids[attention].tolist()
            for batch in batches[language]
            for ids, attention in zip(batch.ids, batch.attention, strict=True)
        ]
        total, mean, positive, unsure = naive_sums(llama.model, rows)
        assert int(statistics.tokens[k]) == sum(len(row) - 1 for row in rows)
        assert int(statistics.texts[k]) == len(rows)
        for site in SITES:
            result = statistics.moments[f"{site}:sum"]
            assert result.dtype == torch.float64
            torch.testing.assert_close(result[..., k], total[site], rtol=1e-4, atol=1e-3)
            result = statistics.moments[f"{site}:text_mean"][..., k]
            torch.testing.assert_close(result, mean[site], rtol=1e-4, atol=1e-3)
        result = statistics.moments["mlp_act:positive"]
        assert result.dtype == torch.int64
        assert bool(((result[..., k] - positive).abs() <= unsure).all())
        assert unsure.sum() <= 2


def test_means_divide_by_tokens_and_by_texts(llama):
    batches = make_batches("padded", llama.tokenizer)
    statistics = record(llama, batches, ["mlp_in:sum", "mlp_in:text_mean"])
    for k, language in enumerate(ORDER):
        means = []
        for batch in batches[language]:
            for ids, attention in zip(batch.ids, batch.attention, strict=True):
                _, layers = models.naive_llama(llama.model, ids[attention].tolist())
                means.append(torch.stack([layer["mlp_in"][1:].detach() for layer in layers]))
        by_token = torch.cat(means, dim=1).mean(1)
        by_text = torch.stack([mean.mean(1) for mean in means]).mean(0)
        assert not torch.allclose(by_token, by_text, atol=1e-3)
        torch.testing.assert_close(statistics.token_mean("mlp_in")[..., k], by_token, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics.text_mean("mlp_in")[..., k], by_text, rtol=1e-4, atol=1e-4)


def test_padding_and_bos_are_not_counted(llama):
    row = llama.tokenizer("trust sport")["input_ids"]
    alone = torch.tensor([row])
    moments = ["mlp_act:positive", "mlp_in:sum", "mlp_in:text_mean", "mlp_in:attribution"]
    counted = torch.ones_like(alone, dtype=torch.bool)
    counted[:, 0] = False
    plain = record(llama, {"qac": [TokenBatch(alone, torch.ones_like(counted), counted)]}, moments)
    rest = torch.full((1, 9), 50)
    no = torch.zeros(1, 9, dtype=torch.bool)
    padded = TokenBatch(
        torch.cat([alone, rest], 1),
        torch.cat([torch.ones_like(counted), no], 1),
        torch.cat([counted, no], 1),
    )
    other = record(llama, {"qac": [padded]}, moments)
    assert plain.tokens.tolist() == other.tokens.tolist() == [len(row) - 1]
    for name in moments:
        torch.testing.assert_close(plain.moments[name], other.moments[name], rtol=1e-4, atol=1e-5)


def test_languages_keep_the_order_given(llama):
    batches = make_batches("packed", llama.tokenizer)
    first = record(llama, batches, ["mlp_act:positive"])
    second = record(llama, dict(reversed(batches.items())), ["mlp_act:positive"])
    assert second.languages == first.languages[::-1]
    assert torch.equal(second.tokens, first.tokens.flip(0))
    assert torch.equal(second.moments["mlp_act:positive"], first.moments["mlp_act:positive"].flip(-1))
    assert not torch.equal(second.moments["mlp_act:positive"], first.moments["mlp_act:positive"])


def test_two_runs_give_identical_bytes(checkpoint_of):
    moments = ["mlp_act:positive", "mlp_in:sum", "block_out:text_mean", "mlp_in:attribution"]
    runs = []
    for _ in range(2):
        loaded = load_model(str(checkpoint_of()), device="cpu")
        runs.append(record(loaded, make_batches("padded", loaded.tokenizer), moments))
    for name in moments:
        first, second = (run.moments[name].numpy().tobytes() for run in runs)
        assert first == second
        assert any(first)


def test_progress_adds_up_to_the_counted_tokens(llama):
    done = []
    statistics = record(llama, make_batches("padded", llama.tokenizer), ["mlp_in:sum"], done.append)
    assert sum(done) == int(statistics.tokens.sum())


@pytest.mark.parametrize("moment", ["mlp_in:sum", "mlp_in:text_mean", "mlp_act:sum", "mlp_act:positive"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_is_named(checkpoint_of, moment, bad):
    loaded = load_model(str(checkpoint_of()), device="cpu")
    with torch.no_grad():
        loaded.anatomy.gates[1].weight[7] = bad
    site = moment.partition(":")[0]
    with pytest.raises(BrocaError, match=rf"{site}.*layer 1"):
        record(loaded, make_batches("padded", loaded.tokenizer), [moment])


def test_an_attribution_that_is_not_finite_is_named(checkpoint_of):
    loaded = load_model(str(checkpoint_of()), device="cpu")
    with torch.no_grad():
        loaded.anatomy.gates[1].weight[7] = float("nan")
    with pytest.raises(BrocaError, match=r"mlp_in:attribution.*not finite"):
        record(loaded, make_batches("padded", loaded.tokenizer), ["mlp_in:attribution"])


@pytest.mark.parametrize("name", ["mlp_in", "mlp_in:median", "mlp:sum", "", "mlp_in:"])
def test_unknown_moments_are_refused(name):
    with pytest.raises(ValueError, match="is not site:moment"):
        parse_moment(name)


def test_only_responses_that_are_kept_need_room(llama, corpus, monkeypatch):
    """The limit holds for the texts that are read, not for those of the files."""
    monkeypatch.setattr(corpus_recording, "MAX_RESPONSE_BYTES", 4 * 3 * 48 * 30)
    moments = ["mlp_in:responses"]
    with pytest.raises(UsageError, match=r"--tokens\), at most 10 texts of each language"):
        record_corpus(llama, corpus, moments, TEXTS)
    few = record_corpus(llama, corpus, moments, TEXTS, tokens=30)
    kept = sum(map(len, few.responses.values()))
    assert 3 <= kept <= 30
    assert text_of(llama, corpus, default=30).texts == kept


def test_a_batch_that_no_process_reads_is_noticed(llama, monkeypatch):
    monkeypatch.setattr(recording, "batches_of_process", lambda batches: batches[1:])
    with pytest.raises(BrocaError, match="batches differ"):
        record(llama, make_batches("texts", llama.tokenizer), ["mlp_in:sum"])
