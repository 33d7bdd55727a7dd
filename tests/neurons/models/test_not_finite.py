"""NaN in the weights, or in what they compute: the message says which."""

from dataclasses import replace

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from editing.directions.recorded import record_texts
from editing.evaluation.generation import generate
from neurons.errors import BrocaError
from neurons.models.not_finite import not_finite
from neurons.models.source import load_model
from neurons.neuron_sets.neuron_report import neuron_report
from neurons.recording.covariance import language_moments
from neurons.recording.record import record
from neurons.text.batches import language_batches

TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def checkpoint_with(tmp_path):
    """A checkpoint whose tensor is what a function makes of it."""

    def build(change, name=TENSOR):
        directory = models.build_checkpoint(tmp_path / "checkpoint")
        stored = load_file(directory / "model.safetensors")
        stored[name] = change(stored[name])
        save_file(stored, directory / "model.safetensors", {"format": "pt"})
        return str(directory)

    return build


def with_one(value):
    def change(weight):
        weight[-1, -1] = value
        return weight

    return change


# What reads text, and would compute with NaN.
READERS = {
    "record": lambda loaded, corpus: record(loaded, language_batches(loaded, corpus), ["mlp_in:sum"]),
    "attribution": lambda loaded, corpus: record(
        loaded, language_batches(loaded, corpus), ["mlp_in:attribution"]
    ),
    "text means": lambda loaded, corpus: record(
        loaded, language_batches(loaded, corpus), ["mlp_in:text_mean"]
    ),
    "covariance": lambda loaded, corpus: language_moments(
        loaded, language_batches(loaded, corpus), "mlp_in", {1: torch.arange(48)}
    ),
    "directions": lambda loaded, corpus: record_texts(loaded, language_batches(loaded, corpus)),
    "one neuron": lambda loaded, corpus: neuron_report(loaded, corpus, 1, 47),
    "sampling": lambda loaded, corpus: generate(loaded, ["abe bead"], 2, 1.0),
    "greedy": lambda loaded, corpus: generate(loaded, ["abe bead"], 2, 0.0),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_tensor_is_named_by_whatever_reads_text(checkpoint_with, corpus, name, value):
    loaded = load_model(checkpoint_with(with_one(value)), "cpu")
    with pytest.raises(BrocaError, match=TENSOR.replace(".", r"\.")) as caught:
        READERS[name](loaded, corpus)
    assert "--dtype" not in str(caught.value)


@pytest.mark.parametrize("name", READERS)
def test_finite_weights_are_not_blamed(checkpoint_with, corpus, name):
    loaded = load_model(checkpoint_with(lambda weight: weight * 1e38), "cpu")
    with pytest.raises(BrocaError, match=r"config\.json") as caught:
        READERS[name](loaded, corpus)
    assert TENSOR not in str(caught.value) and "--dtype" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "wider"), [("float16", ("bfloat16", "float32")), ("bfloat16", ("float32",)), ("float32", ())]
)
def test_a_dtype_is_advised_only_where_it_is_wider(llama, dtype, wider):
    narrow = models.tiny_model(dtype=dtype)
    said = str(not_finite(replace(llama, model=narrow), "what was computed"))
    advised = said.partition("--dtype ")[2].partition(":")[0]
    assert sorted(word for word in advised.split() if word.startswith(("float", "bfloat"))) == sorted(wider)


def test_a_large_tensor_is_looked_at_to_its_end(checkpoint_with, monkeypatch):
    loaded = load_model(checkpoint_with(with_one(float("nan"))), "cpu")
    monkeypatch.setattr("neurons.models.not_finite.AT_ONCE", 100)
    assert TENSOR in str(not_finite(loaded, "what was computed"))
