"""Gradients with recomputed activations equal those with kept activations."""

import models
import pytest
import torch

from neurons.models.source import load_model
from neurons.recording.recomputation import recomputing
from neurons.recording.record import loss_sum, record
from neurons.text.batches import text_batches

MOMENTS = ["mlp_in:attribution", "mlp_act:positive", "mlp_in:sum", "mlp_in:text_mean", "block_out:sum"]


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2", "falcon", "qwen3_moe", "gpt_oss"])
def loaded(request, checkpoint_of):
    return load_model(str(checkpoint_of(request.param)), device="cpu")


def batches_of(loaded):
    return {k: text_batches(models.sentences(k, 5), loaded.tokenizer, 64) for k in ("qaa", "qab")}


def test_recorded_sums_are_the_same(loaded):
    kept = record(loaded, batches_of(loaded), MOMENTS)
    again = record(loaded, batches_of(loaded), MOMENTS, recomputes=True)
    assert torch.equal(again.tokens, kept.tokens)
    assert kept.moments["mlp_in:attribution"].sum() > 0
    for name, expected in kept.moments.items():
        torch.testing.assert_close(again.moments[name], expected, rtol=1e-5, atol=1e-8)
    if kept.routed is not None:
        assert torch.equal(again.routed, kept.routed)


def test_less_is_kept_for_the_backward_pass(loaded):
    batch = batches_of(loaded)["qaa"][0]

    def kept():
        result = {}

        def pack(tensor):
            result[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        gates = [gate.register_forward_hook(lambda *_: None) for gate in loaded.anatomy.gates]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            leaf = loaded.model.get_input_embeddings().register_forward_hook(
                lambda _, __, out: out.detach().requires_grad_(True)
            )
            loss_sum(loaded.model, batch)
        for handle in (*gates, leaf):
            handle.remove()
        weights = {p.untyped_storage()._cdata for p in loaded.model.parameters()}
        return sum(size for key, size in result.items() if key not in weights)

    plain = kept()
    with recomputing(loaded.anatomy):
        assert kept() < plain / 2


def test_the_model_is_as_it_was(loaded):
    before = [vars(block).get("forward") for block in loaded.anatomy.blocks]
    with pytest.raises(ZeroDivisionError), recomputing(loaded.anatomy):
        raise ZeroDivisionError
    assert [vars(block).get("forward") for block in loaded.anatomy.blocks] == before
