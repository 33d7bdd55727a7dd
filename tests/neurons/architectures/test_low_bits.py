"""Models in 4 or 8 bits read almost what the whole one does, name the whole one, and are not edited."""

from importlib.util import find_spec

import pytest
import torch

from editing.checkpoints.weight_exchange import Exchange
from editing.directions.diffmean import diffmean_direction
from editing.plans.applied import applied
from neurons.architectures import low_bits
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model, open_model
from neurons.neuron_sets.neuron_report import neuron_report
from neurons.recording.record import record
from neurons.text.batches import text_batches

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
FAMILIES = ["llama", "gpt2", "gemma2", "mixtral"]
MOMENTS = ["mlp_act:positive", "mlp_in:sum", "mlp_in:worst_rank", "mlp_in:attribution", "block_out:text_mean"]


def alike(found, expected):
    """Cosine of two tensors of figures."""
    return float(torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten().to(found), dim=0))


@pytest.fixture(scope="module", params=low_bits.BITS)
def bits(request):
    return request.param


@needs_bitsandbytes
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_almost_the_same(checkpoint_of, corpus, bits, family):
    path = str(checkpoint_of(family))
    whole, small = load_model(path, "cpu"), load_model(path, "cpu", bits=bits)
    batches = {
        language: text_batches(corpus.texts[language][:8], whole.tokenizer, 64, tokens_a_batch=128)
        for language in corpus.languages
    }
    expected, found = (record(loaded, batches, MOMENTS) for loaded in (whole, small))
    assert found.fingerprint == expected.fingerprint
    for name in MOMENTS:
        near = alike(found.moments[name].double(), expected.moments[name].double())
        assert near > (0.9 if bits == 4 else 0.97), (name, near)
        assert not torch.equal(found.moments[name], expected.moments[name])
    for block in ("attn", "mlp"):
        exact = whole.anatomy.weight_values(1, block)
        assert small.anatomy.weight_values(1, block).shape == exact.shape
        assert alike(small.anatomy.weight_values(1, block).float(), exact) > 0.97
    assert small.anatomy.neurons == whole.anatomy.neurons


@needs_bitsandbytes
def test_a_pass_without_gradients_leaves_the_weights_readable_and_gradients_right(
    checkpoint_of, corpus, bits
):
    """On CPUs with AVX-512 for bfloat16, bitsandbytes would pack 4-bit weights anew."""
    path = str(checkpoint_of())
    small, untouched = (load_model(path, "cpu", bits=bits) for _ in range(2))
    before = small.anatomy.weight_values(1, "mlp").clone()
    batches = {"qaa": text_batches(corpus.texts["qaa"][:8], small.tokenizer, 64, tokens_a_batch=128)}
    counts = record(small, batches, ["mlp_act:positive"])
    assert torch.equal(small.anatomy.weight_values(1, "mlp"), before)
    moments = ["mlp_act:positive", "mlp_in:attribution"]
    found, expected = (record(loaded, batches, moments) for loaded in (small, untouched))
    assert torch.equal(found.moments[moments[1]], expected.moments[moments[1]])
    assert torch.equal(found.moments[moments[0]], counts.moments[moments[0]])


@needs_bitsandbytes
def test_the_weights_are_smaller(checkpoint_of, bits):
    path = str(checkpoint_of())
    whole, small = (
        sum(p.nbytes for layer in loaded.anatomy.blocks for p in layer.parameters())
        for loaded in (load_model(path, "cpu"), load_model(path, "cpu", bits=bits))
    )
    assert small < whole * bits / 32 * 1.2


@needs_bitsandbytes
def test_they_are_not_edited(checkpoint_of, steered_like, bits):
    plan, path = steered_like
    small = load_model(str(checkpoint_of()), "cpu", bits=bits)
    with pytest.raises(BrocaError, match=f"{bits} bits"), applied(small, plan):
        raise AssertionError("entered")
    with pytest.raises(BrocaError, match=f"{bits} bits"):
        Exchange(small, load_model(str(path), max_memory=0))


@pytest.fixture(scope="module")
def steered_like(llama, tmp_path_factory):
    """(a plan for the llama, the checkpoint with it)."""
    from test_applied import random_plan

    from editing.checkpoints.export import export

    plan = random_plan(llama)
    return plan, export(llama, plan, tmp_path_factory.mktemp("edited") / "out").path


@needs_bitsandbytes
def test_a_direction_is_taken_and_made_into_an_edit_of_the_whole_model(checkpoint_of, parts, bits):
    from editing.methods.bake_bias import bake_bias_plan

    small = load_model(str(checkpoint_of()), "cpu", bits=bits)
    direction = diffmean_direction(small, parts["estimate"], "en", "fr")
    whole = open_model(str(checkpoint_of()))
    whole.require_fingerprint(direction.metadata, "the direction")
    assert direction.metadata["quantised"]["bits"] == bits
    exact = diffmean_direction(load_model(whole.name, "cpu"), parts["estimate"], "en", "fr")
    assert "quantised" not in exact.metadata
    vector = direction.vectors["block_out"][1]
    assert alike(vector, exact.vectors["block_out"][1]) > 0.9
    assert bake_bias_plan(whole, {1: vector}).metadata["fingerprint"] == small.fingerprint


@needs_bitsandbytes
def test_commands_tell_of_it(broca, checkpoint_of, corpus_directory, tmp_path, bits):
    from neurons.neuron_sets.neuron_set import load_neuron_set

    asked = [checkpoint_of(), "--corpus", corpus_directory, f"--load-in-{bits}bit", "--device", "cpu"]
    assert broca("identify", *asked, "--out", tmp_path / "n.safetensors")[0] == 0
    found = load_neuron_set(tmp_path / "n.safetensors")
    assert found.metadata["quantised"]["bits"] == bits
    assert found.metadata["fingerprint"] == open_model(str(checkpoint_of())).fingerprint
    study = ["--neurons", tmp_path / "n.safetensors", "--draws", 1, "--out", tmp_path / "a.json"]
    status, _, said = broca("ablate", *asked, *study)
    assert status == 0, said


@needs_bitsandbytes
def test_a_neuron_is_told(checkpoint_of, corpus, bits):
    small = load_model(str(checkpoint_of()), "cpu", bits=bits)
    assert neuron_report(small, corpus, 1, 3).value_norm > 0


@needs_bitsandbytes
def test_what_does_not_fit_is_refused(checkpoint_of, bits):
    with pytest.raises(UsageError, match=f"in {bits} bits"):
        load_model(str(checkpoint_of()), max_memory=1000, bits=bits)


def test_fused_experts_and_embeddings_count_in_full(checkpoint_of, monkeypatch):
    """Only the linear modules in the layers are quantised."""
    monkeypatch.setattr("neurons.models.source.quantised_settings", lambda bits: {"bits": bits})
    monkeypatch.setattr("neurons.models.source.quantisation_config", lambda *_: None)
    path = str(checkpoint_of("mixtral"))
    size = sum(
        parameter.nbytes // (8 if "self_attn" in name else 1)
        for name, parameter in load_model(path, "cpu").model.named_parameters()
    )
    load_model(path, "cpu", max_memory=size, bits=4)
    with pytest.raises(UsageError, match="in 4 bits"):
        load_model(path, "cpu", max_memory=size - 1, bits=4)


@pytest.mark.parametrize("command", ["record", "identify", "direction", "ablate"])
def test_without_bitsandbytes_one_sentence_says_how_to_get_it(
    broca, monkeypatch, checkpoint_of, corpus_directory, steered_like, llama, tmp_path, command
):
    from importlib.metadata import PackageNotFoundError

    from neurons.neuron_sets.identify import random_neurons

    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(low_bits, "version", missing)
    further = {"direction": ["--source", "qaa", "--target", "qab"]}
    if command == "ablate":
        random_neurons(llama, ("qaa",), 0.1).save(tmp_path / "n.safetensors")
        further["ablate"] = ["--neurons", tmp_path / "n.safetensors"]
    asked = [checkpoint_of(), "--corpus", corpus_directory, "--load-in-4bit", "--out", tmp_path / "out"]
    status, _, said = broca(command, *asked, *further.get(command, []))
    assert status == 2
    assert "bitsandbytes" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_both_at_once_are_refused(broca, checkpoint_of, corpus_directory, tmp_path):
    both = ["--load-in-4bit", "--load-in-8bit", "--out", tmp_path / "out"]
    status, _, said = broca("record", checkpoint_of(), "--corpus", corpus_directory, *both)
    assert status == 2 and "--load-in-8bit" in said


def test_other_numbers_of_bits_are_refused(checkpoint_of):
    with pytest.raises(UsageError, match="3 bits"):
        load_model(str(checkpoint_of()), "cpu", bits=3)
