"""Residual steering by a hook."""

from contextlib import contextmanager

import pytest
import torch

from editing.hooks.residual import residual_steering

IDS = torch.tensor([[0, 5, 80, 33], [0, 90, 91, 17]])


@contextmanager
def residual_before(model, layer):
    """What the layer is given, at the next forward pass."""
    seen = []
    handle = model.model.layers[layer].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def run(loaded, layer):
    with residual_before(loaded.model, layer) as seen, torch.no_grad():
        logits = loaded.model(IDS).logits
    return seen[0], logits


@pytest.fixture
def vector():
    return torch.randn(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("strength", [1.0, -2.5])
def test_adds_the_vector_after_the_layer_at_all_positions(llama, vector, strength):
    before, base = run(llama, 2)
    inputs, _ = run(llama, 1)
    with residual_steering(llama, vector, 1, strength):
        after, steered = run(llama, 2)
        same, _ = run(llama, 1)
    assert torch.equal(after, before + (strength * vector).float())
    assert torch.equal(same, inputs)  # nothing above the layer changes
    assert (steered - base).abs().max() > 0.01


def test_after_the_last_layer(llama, vector):
    hidden = []
    handle = llama.model.model.norm.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    with torch.no_grad():
        llama.model(IDS)
        with residual_steering(llama, vector, 2, 3.0):
            llama.model(IDS)
    handle.remove()
    assert torch.equal(hidden[1], hidden[0] + (3.0 * vector).float())


def test_two_add_up(llama, vector):
    before, _ = run(llama, 2)
    with residual_steering(llama, vector, 1), residual_steering(llama, vector, 1):
        after, _ = run(llama, 2)
    torch.testing.assert_close(after, before + 2 * vector.float())


def test_is_gone_afterwards(llama, vector):
    _, base = run(llama, 1)
    hooks = [len(block._forward_hooks) for block in llama.model.model.layers]
    with residual_steering(llama, vector, 0):
        pass
    assert torch.equal(run(llama, 1)[1], base)
    with pytest.raises(ZeroDivisionError), residual_steering(llama, vector, 0):
        raise ZeroDivisionError
    assert torch.equal(run(llama, 1)[1], base)
    assert [len(block._forward_hooks) for block in llama.model.model.layers] == hooks
