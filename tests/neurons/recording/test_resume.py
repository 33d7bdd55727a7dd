"""A stopped recording resumes from its state and gives the same bytes."""

from dataclasses import replace

import models
import pytest
import torch

from neurons.models.source import load_model
from neurons.recording.corpus_recording import record_corpus, recording_key, remove_unfinished
from neurons.recording.record import record
from neurons.recording.resume import Unfinished
from neurons.scorers.method import TEXTS
from neurons.text.batches import text_batches
from neurons.text.corpus import read_corpus

DENSE = (
    "mlp_act:positive",
    "mlp_in:square",
    "mlp_in:text_mean",
    "mlp_in:worst_rank",
    "mlp_in:attribution",
    "mlp_in:responses",
)
ORDER = ("qac", "qaa")
DONE = 4  # batches before the stop, in the second language


def make_batches(tokenizer, seed=3):
    result = {}
    for language, count in zip(ORDER, (5, 9), strict=True):
        texts = models.sentences(language, count, seed, words=(3, 9))
        result[language] = text_batches(texts, tokenizer, 100, tokens_a_batch=50)
    assert len(result["qac"]) < DONE < len(result["qac"]) + len(result["qaa"]) - 1
    return result


def stopped_after(number):
    """A progress callback that is interrupted at a batch."""
    calls = []

    def progress(tokens):
        calls.append(tokens)
        if len(calls) > number:
            raise KeyboardInterrupt

    return progress


def saved(statistics, path):
    statistics.save(path)
    return path.read_bytes()


def stop(loaded, batches, out, key="one", moments=DENSE):
    with pytest.raises(KeyboardInterrupt):
        record(loaded, batches, moments, stopped_after(DONE), Unfinished(out, key, every=0.0))
    assert not out.exists()


@pytest.fixture
def forwards(llama):
    """Shapes of the batches that the model reads."""
    shapes = []
    handle = llama.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    handle.remove()


def test_what_was_stopped_ends_with_the_same_bytes(llama, tmp_path, forwards):
    batches = make_batches(llama.tokenizer)
    plain = saved(record(llama, batches, DENSE), tmp_path / "plain.safetensors")
    shapes = list(forwards)
    everything = len(shapes)
    assert everything == sum(len(of_language) for of_language in batches.values())
    out = tmp_path / "out.safetensors"
    forwards.clear()
    stop(llama, batches, out)
    # The state is that after the batch before the interrupted one.
    assert forwards == shapes[: DONE + 1]
    forwards.clear()
    calls = []
    result = record(llama, batches, DENSE, calls.append, Unfinished(out, "one", every=0.0))
    assert forwards == shapes[DONE:]
    # One call for all that had been done, and one for each batch of the rest.
    assert len(calls) == 1 + everything - DONE
    tokens = [int(batch.counted.sum()) for of_language in batches.values() for batch in of_language]
    assert calls == [sum(tokens[:DONE]), *tokens[DONE:]]
    assert saved(result, out) == plain


def test_a_recording_of_experts_resumes(checkpoint_of, tmp_path):
    loaded = load_model(str(checkpoint_of("mixtral")), device="cpu")
    moments = ("mlp_act:positive", "mlp_in:sum", "mlp_in:text_mean")
    batches = make_batches(loaded.tokenizer)
    plain = saved(record(loaded, batches, moments), tmp_path / "plain.safetensors")
    out = tmp_path / "out.safetensors"
    stop(loaded, batches, out, moments=moments)
    calls = []
    result = record(loaded, batches, moments, calls.append, Unfinished(out, "one"))
    assert len(calls) == 1 + sum(len(of_language) for of_language in batches.values()) - DONE
    assert saved(result, out) == plain


def test_it_may_be_stopped_twice(llama, tmp_path):
    batches = make_batches(llama.tokenizer)
    plain = saved(record(llama, batches, DENSE), tmp_path / "plain.safetensors")
    out = tmp_path / "out.safetensors"
    stop(llama, batches, out)
    with pytest.raises(KeyboardInterrupt):
        record(llama, batches, DENSE, stopped_after(2), Unfinished(out, "one", every=0.0))
    # The first call is for the resumed batches, the second for a batch whose state was saved.
    assert Unfinished(out, "one").load()[0] == DONE + 1
    assert saved(record(llama, batches, DENSE, unfinished=Unfinished(out, "one")), out) == plain


def test_the_state_of_another_recording_is_not_used(llama, tmp_path, forwards):
    batches = make_batches(llama.tokenizer)
    out = tmp_path / "out.safetensors"
    stop(llama, batches, out, key="another")
    forwards.clear()
    result = record(llama, batches, DENSE, unfinished=Unfinished(out, "one"))
    assert len(forwards) == sum(len(of_language) for of_language in batches.values())
    plain = saved(record(llama, batches, DENSE), tmp_path / "plain.safetensors")
    assert saved(result, out) == plain


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_state_is_ignored(llama, tmp_path, forwards, damage):
    batches = make_batches(llama.tokenizer)
    out = tmp_path / "out.safetensors"
    stop(llama, batches, out)
    state = Unfinished(out, "one").file
    content = state.read_bytes()
    state.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"not a state\n"}[damage])
    forwards.clear()
    result = record(llama, batches, DENSE, unfinished=Unfinished(out, "one"))
    assert len(forwards) == sum(len(of_language) for of_language in batches.values())
    plain = saved(record(llama, batches, DENSE), tmp_path / "plain.safetensors")
    assert saved(result, out) == plain


def test_nothing_is_kept_before_it_is_due(llama, tmp_path):
    out = tmp_path / "out.safetensors"
    unfinished = Unfinished(out, "one", every=1e9)
    with pytest.raises(KeyboardInterrupt):
        record(llama, make_batches(llama.tokenizer), DENSE, stopped_after(DONE), unfinished)
    assert list(tmp_path.iterdir()) == []
    assert unfinished.load() == (0, {})


def test_writing_takes_a_small_fraction_of_the_time(tmp_path, monkeypatch):
    import neurons.recording.resume as module

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def slow(*_):
        now[0] += 5.0

    monkeypatch.setattr(module, "save_artifact", slow)
    unfinished = Unfinished(tmp_path / "out.safetensors", "one", every=30.0, _written=0.0)
    now[0] = 29.0
    assert not unfinished.is_due()
    now[0] = 30.0
    assert unfinished.is_due()
    unfinished.save(1, {})
    assert now[0] == 35.0
    now[0] = 35.0 + 249.0
    assert not unfinished.is_due()
    now[0] = 35.0 + 251.0
    assert unfinished.is_due()


def test_the_state_and_nothing_else_is_removed(llama, tmp_path):
    batches = make_batches(llama.tokenizer)
    out, other = tmp_path / "out [1].safetensors", tmp_path / "other.safetensors"
    for path in (out, other):
        stop(llama, batches, path)
    out.write_bytes(b"the output")
    for name in (
        ".out [1].safetensors.unfinished.2-of-2",
        "..out [1].safetensors.unfinished.2-of-2.x7_dk2qq",
    ):
        (tmp_path / name).write_bytes(b"of another process")
    assert Unfinished(out, "one").file.exists()
    remove_unfinished(out)
    assert not Unfinished(out, "one").file.exists()
    assert {path.name for path in tmp_path.iterdir()} == {out.name, Unfinished(other, "one").file.name}
    remove_unfinished(out)


def test_smaller_batches_after_running_out_of_memory_are_resumed(llama, tmp_path, forwards, monkeypatch):
    """Rows are sorted by length, so memory runs out late."""
    from neurons.recording import corpus_recording

    monkeypatch.setattr(Unfinished, "is_due", lambda self: True)
    monkeypatch.setattr(corpus_recording, "common_batches", lambda *_: (256, False))
    corpus = read_corpus(models.write_corpus(tmp_path / "corpus", lines=12))
    out, moments, sizes = tmp_path / "out.safetensors", ("mlp_in:text_mean",), []

    def limited(loaded, batches, *arguments):
        sizes.append(arguments[2].size)
        if sizes[-1] > 100:
            record(loaded, batches, *arguments)
            raise RuntimeError("CUDA out of memory. ")
        return record(loaded, batches, *arguments)

    class Bar:
        def __init__(self, stops):
            self.stops = stops
            self.begin_stage()

        def __call__(self, tokens):
            self.done.append(tokens)
            if self.stops and sizes[-1] == 64 and len(self.done) > DONE:
                raise KeyboardInterrupt

        def expect(self, tokens):
            self.total += tokens

        def begin_stage(self, *stage):
            self.done, self.total = [], 0

    plain = record_corpus(llama, corpus, moments, TEXTS, batch_tokens=64)
    everything = len(forwards)
    monkeypatch.setattr(corpus_recording, "record", limited)
    with pytest.raises(KeyboardInterrupt):
        record_corpus(llama, corpus, moments, TEXTS, progress=Bar(stops=True), out=out)
    assert sizes == [256, 128, 64]
    forwards.clear()
    bar = Bar(stops=False)
    result = record_corpus(llama, corpus, moments, TEXTS, progress=bar, out=out)
    assert sizes == [256, 128, 64, 64] and len(forwards) == everything - DONE
    assert sum(bar.done) == bar.total == int(plain.tokens.sum())
    assert saved(result, out) == saved(plain, tmp_path / "plain.safetensors")


@pytest.mark.parametrize("changed", ["lines", "fractions"])
def test_the_key_knows_which_line_a_row_is_of(llama, changed):
    """Rows are sorted by length, so two lines in another order can give the same rows."""
    batches = make_batches(llama.tokenizer)
    of_one = batches["qac"][0]
    tensor = torch.arange(len(of_one.ids)) if changed == "lines" else torch.ones(len(of_one.ids)).double()
    keys = {
        recording_key(llama, {"qac": [replace(of_one, **{changed: values})]}, DENSE)
        for values in (None, tensor, tensor * 2)
    }
    assert len(keys) == 3


def test_a_corpus_is_resumed_only_if_all_is_the_same(llama, tmp_path, forwards, monkeypatch):
    monkeypatch.setattr(Unfinished, "is_due", lambda self: True)
    corpus = read_corpus(models.write_corpus(tmp_path / "corpus", lines=12))
    out = tmp_path / "out.safetensors"
    moments = ("mlp_act:positive", "mlp_in:sum")
    plain = record_corpus(llama, corpus, moments, block=16, batch_tokens=64)
    everything = len(forwards)

    def stop_corpus():
        with pytest.raises(KeyboardInterrupt):
            record_corpus(
                llama, corpus, moments, block=16, batch_tokens=64, progress=stopped_after(DONE), out=out
            )
        forwards.clear()

    stop_corpus()
    result = record_corpus(llama, corpus, moments, block=16, batch_tokens=64, out=out)
    assert len(forwards) == everything - DONE
    assert saved(result, out) == saved(plain, tmp_path / "plain.safetensors")
    remove_unfinished(out)

    stop_corpus()
    record_corpus(llama, corpus, moments[::-1], block=16, batch_tokens=64, out=out)
    assert len(forwards) == everything
    remove_unfinished(out)

    stop_corpus()
    fewer = read_corpus(models.write_corpus(tmp_path / "other", lines=12, seed=9))
    record_corpus(llama, fewer, moments, block=16, batch_tokens=64, out=out)
    assert len(forwards) >= everything - 2 > everything - DONE
