"""Partial passes are bit-identical to the whole pass, in every architecture."""

import models
import pytest
import torch
from tiny_models import tiny_config, tiny_model

from neurons.architectures.anatomy import anatomy_of
from neurons.architectures.sites import logits, site_hooks
from neurons.errors import BrocaError
from neurons.recording.lens import lens_logits
from neurons.recording.partial_forward import forward_from, forward_keeping, supports_partial_forward
from neurons.recording.text_pass import forward
from neurons.text.batches import row_batches

CPU = torch.device("cpu")


def padded_batch():
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, 250, (length,), generator=generator).tolist() for length in (5, 9, 13)]
    (batch,) = row_batches(rows, uncounted=1)
    assert batch.padded
    return batch.to(CPU)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_bits_of_the_whole_pass(family):
    model = models.tiny_model(family)
    anatomy, batch = anatomy_of(model), padded_batch()
    with torch.no_grad():
        whole = forward(model, batch)
    hidden, kept = forward_keeping(model, anatomy, batch, [1, 2, 3])
    assert torch.equal(hidden, whole)
    ran = []
    handles = [
        anatomy.outputs["attn"][layer].register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer in range(3)
    ]
    for layer in range(4):
        ran.clear()
        assert torch.equal(forward_from(model, anatomy, batch, layer, kept), whole)
        assert ran == list(range(layer, 3))
    for handle in handles:
        handle.remove()
    assert not any("forward" in vars(block) for block in anatomy.blocks)
    with torch.no_grad():
        assert torch.equal(forward(model, batch), whole)
    assert supports_partial_forward(model, anatomy)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "falcon", "mixtral"])
def test_the_bits_of_a_whole_pass_with_something_replaced(family):
    model = models.tiny_model(family)
    anatomy, batch = anatomy_of(model), padded_batch()

    def changed(values, routed):
        return values * 1.5

    _, kept = forward_keeping(model, anatomy, batch, [2])
    # A mixture with hooks computes its experts in another order, so both passes have hooks.
    quiet = {("mlp_in", layer): lambda values, routed: None for layer in range(3 * anatomy.mixed)}
    with torch.no_grad(), site_hooks(anatomy, quiet):
        plain, kept = forward_keeping(model, anatomy, batch, [2])
    with torch.no_grad(), site_hooks(anatomy, {**quiet, ("mlp_in", 2): changed}):
        whole = forward(model, batch)
        assert torch.equal(forward_from(model, anatomy, batch, 2, kept), whole)
    assert not torch.equal(whole, plain)


def test_a_replaced_forward_is_restored():
    model = models.tiny_model()
    anatomy, batch = anatomy_of(model), padded_batch()
    stock = anatomy.blocks[0].forward

    def replaced(*arguments, **named):
        return stock(*arguments, **named)

    anatomy.blocks[0].forward = replaced
    _, kept = forward_keeping(model, anatomy, batch, [1])
    forward_from(model, anatomy, batch, 1, kept)
    assert anatomy.blocks[0].forward is replaced


def test_a_start_at_a_layer_that_was_not_kept_is_refused():
    model = models.tiny_model()
    anatomy, batch = anatomy_of(model), padded_batch()
    _, kept = forward_keeping(model, anatomy, batch, [1])
    with pytest.raises(BrocaError, match="layer 2"):
        forward_from(model, anatomy, batch, 2, kept)


def test_layers_that_share_more_than_hidden_states_are_not_supported():
    model = models.tiny_model()
    anatomy = anatomy_of(model)
    shared = {}
    anatomy.blocks[0].self_attn.register_forward_hook(lambda m, i, output: shared.update(it=output[0]))
    anatomy.blocks[2].mlp.register_forward_hook(lambda m, i, output: output + shared.pop("it", 0))
    assert not supports_partial_forward(model, anatomy)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt-post_norm", "cohere"])
def test_the_lens_is_the_models_own_end(family):
    """By hand: the final norm and the head, of a vector minus those of the zero vector."""
    model = models.tiny_model(family)
    anatomy = anatomy_of(model)
    vectors = torch.randn(4, anatomy.residual, generator=torch.Generator().manual_seed(0))

    def end(x):
        if family == "llama":
            return model.lm_head(model.model.norm(x))
        if family == "cohere":
            return model.lm_head(model.model.norm(x)) * model.config.logit_scale
        if family == "gpt2":
            return model.lm_head(model.transformer.ln_f(x))
        return model.lm_head(model.model.decoder.project_out(x))

    with torch.no_grad():
        expected = end(vectors) - end(torch.zeros(1, anatomy.residual))
    torch.testing.assert_close(lens_logits(model, anatomy, vectors), expected)


def test_the_lens_of_several_streams_reads_the_first():
    model = tiny_model(tiny_config("gemma3n_text"))
    anatomy = anatomy_of(model)
    vectors = torch.randn(4, anatomy.residual, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # The final norm reads the mean of the four streams, of which the others are 0.
        expected = logits(model, model.model.norm(vectors / 4))
    torch.testing.assert_close(lens_logits(model, anatomy, vectors), expected)
