"""Passes in step give the bits of one pass after another, and read each offloaded weight once."""

import threading
from collections import Counter
from functools import partial

import models
import pytest
import torch
from accelerate.utils.offload import OffloadedWeightsLoader

from editing.methods.bake_correction import remainder_moments
from editing.plans.plan import ModuleEdit
from neurons.architectures.anatomy import anatomy_of
from neurons.models.source import load_model
from neurons.recording import waiting_states
from neurons.recording.covariance import each_moments
from neurons.recording.in_step import PassesInStep
from neurons.recording.partial_forward import supports_partial_forward
from neurons.recording.record import record
from neurons.recording.resume import Unfinished
from neurons.recording.text_pass import forward
from neurons.text.batches import counted_tokens, language_batches, row_batches


def padded_batches():
    generator = torch.Generator().manual_seed(1)
    lengths = [(5, 9, 13), (6, 9, 12), (8, 8, 8)]
    rows = [[torch.randint(2, 250, (n,), generator=generator).tolist() for n in of] for of in lengths]
    return [row_batches(of_batch, uncounted=1)[0].to(torch.device("cpu")) for of_batch in rows]


@pytest.fixture(params=["in memory", "on disk"])
def on_disk(request, monkeypatch):
    """Whether hidden states wait on disk, however small."""
    monkeypatch.setattr(waiting_states, "MIN_BYTES", 1)
    return request.param == "on disk"


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_bits_of_one_pass_after_another(family, on_disk):
    model = models.tiny_model(family)
    anatomy, batches = anatomy_of(model), padded_batches()
    with torch.no_grad():
        expected = [forward(model, batch) for batch in batches]
    hidden, ran = {}, []

    def run(number):
        hidden[number] = forward(model, batches[number])

    with PassesInStep(model, anatomy, [partial(run, at) for at in range(3)], on_disk) as passes:
        passes.run(2, after_layer=lambda *ran_now: ran.append(ran_now))
        assert ran == [(number, layer) for layer in (0, 1) for number in range(3)] and not hidden
        passes.run()
    assert all(torch.equal(hidden[number], whole) for number, whole in enumerate(expected))
    with torch.no_grad():
        assert torch.equal(forward(model, batches[0]), expected[0])


def test_layers_that_share_more_than_hidden_states(on_disk):
    """What a pass keeps for later layers is its own, and a start from hidden states alone would lack it."""
    model = models.tiny_model()
    anatomy, batches = anatomy_of(model), padded_batches()
    shared = {}

    def write(_, __, named, output):
        shared[id(named["position_embeddings"])] = output * 2

    def read(_, __, named, output):
        return output + shared[id(named["position_embeddings"])]

    anatomy.blocks[0].register_forward_hook(write, with_kwargs=True)
    anatomy.blocks[2].register_forward_hook(read, with_kwargs=True)
    with torch.no_grad():
        expected = [forward(model, batch) for batch in batches]
    shared.clear()
    assert not supports_partial_forward(model, anatomy)
    hidden = {}
    runs = [lambda at=at: hidden.__setitem__(at, forward(model, batches[at])) for at in range(3)]
    with PassesInStep(model, anatomy, runs, on_disk) as passes:
        passes.run()
    assert all(torch.equal(hidden[number], whole) for number, whole in enumerate(expected))


def test_hidden_states_leave_memory_while_they_wait(monkeypatch):
    monkeypatch.setattr(waiting_states, "MIN_BYTES", 1)
    model = models.tiny_model()
    anatomy, batches = anatomy_of(model), padded_batches()
    embedded = []
    of_embedding = model.get_input_embeddings().register_forward_hook(
        lambda _, __, output: embedded.append(output)
    )
    runs = [partial(forward, model, batch) for batch in batches]
    with PassesInStep(model, anatomy, runs, on_disk=True) as passes:
        passes.run(1)
        assert len(embedded) == 3 and all(output.untyped_storage().nbytes() == 0 for output in embedded)
        passes.run()
    of_embedding.remove()


def threads():
    return set(threading.enumerate())


@pytest.mark.parametrize("where", ["layer", "between layers"])
def test_an_error_ends_every_pass(where):
    model = models.tiny_model()
    anatomy, batches = anatomy_of(model), padded_batches()
    before = threads()
    module = anatomy.blocks[1].mlp if where == "layer" else model.model.rotary_emb
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the second of three")

    handle = module.register_forward_pre_hook(fail)
    runs = [partial(forward, model, batch) for batch in batches]
    with (
        pytest.raises(RuntimeError, match="the second of three"),
        PassesInStep(model, anatomy, runs) as passes,
    ):
        passes.run()
    handle.remove()
    assert threads() <= before
    with torch.no_grad():
        forward(model, batches[0])


def test_covariances_that_are_not_awaited_leave_no_thread(llama, corpus, monkeypatch):
    monkeypatch.setattr("neurons.recording.covariance.covariance_room", lambda loaded: 0)  # a layer at a time
    before = threads()
    batches = language_batches(llama, corpus, tokens_a_batch=64)
    units = {("attn_in", layer): torch.arange(8) for layer in range(3)}
    moments = each_moments(llama, batches, units)
    next(moments)
    assert threads() - before
    moments.close()
    assert threads() <= before


@pytest.fixture
def reads(monkeypatch):
    """Names of the weights read from the disk."""
    names = []
    own = OffloadedWeightsLoader.__getitem__

    def noted(self, key):
        if key not in self.state_dict:
            names.append(key)
        return own(self, key)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", noted)
    return names


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3"])
def test_each_weight_is_read_once_for_all_batches(checkpoint_of, corpus, reads, family):
    loaded = load_model(str(checkpoint_of(family, family == "gpt2")), max_memory=0)
    batches = language_batches(loaded, corpus, tokens_a_batch=64)
    assert sum(map(len, batches.values())) > 3
    reads.clear()
    tokens = []
    record(loaded, batches, ["mlp_in:sum"], tokens.append)
    assert set(Counter(reads).values()) == {1} and len(reads) > 20
    assert sum(tokens) == counted_tokens(batch for of in batches.values() for batch in of)


def test_covariances_read_each_weight_once_and_no_later_layer(checkpoint_of, corpus, reads, monkeypatch):
    whole, other = (
        load_model(str(checkpoint_of()), **where) for where in ({"device": "cpu"}, {"max_memory": 0})
    )
    batches = language_batches(whole, corpus, tokens_a_batch=64)
    units = {("mlp_in", layer): torch.arange(48) for layer in (0, 1)}
    expected = dict(each_moments(whole, batches, units))
    monkeypatch.setattr("neurons.recording.covariance.covariance_room", lambda loaded: 0)  # a layer at a time
    monkeypatch.setattr("neurons.recording.text_pass.paused_room", lambda loaded, solving: 0)
    monkeypatch.setattr(waiting_states, "MIN_BYTES", 1)
    reads.clear()
    result = dict(each_moments(other, batches, units))
    assert all(torch.equal(result[place].covariance, of.covariance) for place, of in expected.items())
    assert set(Counter(reads).values()) == {1}
    assert not any("layers.2" in name for name in reads)


def test_a_recording_in_step_resumes_after_the_batches_that_are_done(
    checkpoint_of, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr("neurons.recording.text_pass.MAX_PAUSED", 2)
    whole, other = (
        load_model(str(checkpoint_of()), **where) for where in ({"device": "cpu"}, {"max_memory": 0})
    )
    batches = language_batches(whole, corpus, tokens_a_batch=64)
    moments = ["mlp_in:sum", "mlp_in:text_mean", "mlp_in:responses"]
    expected = record(whole, batches, moments)
    state = Unfinished(tmp_path / "out", "one", every=0.0)
    calls = []

    def stop(tokens):
        calls.append(tokens)
        if len(calls) == 2 * 3 + 3:  # two batches of three layers, and half of the next two
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(other, batches, moments, stop, state)
    assert state.load()[0] == 2
    resumed = record(other, batches, moments, unfinished=state)
    assert torch.equal(resumed.tokens, expected.tokens)
    for name, values in expected.moments.items():
        assert torch.equal(resumed.moments[name], values), name
    for language, values in expected.responses.items():
        assert torch.equal(resumed.responses[language], values), language


def test_what_a_correction_sums_over_layers_is_of_one_batch(checkpoint_of, corpus):
    whole, other = (
        load_model(str(checkpoint_of()), **where) for where in ({"device": "cpu"}, {"max_memory": 0})
    )
    generator = torch.Generator().manual_seed(0)
    edits = [
        ModuleEdit(layer, "mlp", (0,), left=torch.zeros(64, 1), right=torch.randn(48, 1, generator=generator))
        for layer in (0, 1)
    ]
    batches = language_batches(whole, corpus, tokens_a_batch=64)["qaa"]
    assert len({batch.ids.shape for batch in batches}) > 1
    expected, found = (remainder_moments(loaded, batches, edits, 2) for loaded in (whole, other))
    assert torch.equal(found.product, expected.product) and found.remainder == expected.remainder > 0
