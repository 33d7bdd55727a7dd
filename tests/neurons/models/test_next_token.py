"""Losses and divergences of next tokens, against whole logits in float64, and how many logits are made at once."""

import models
import pytest
import torch

from neurons.models import next_token
from neurons.models.next_token import positions_at_once, token_divergences, token_losses
from neurons.models.source import load_model

POSITIONS = 11
FAMILIES = ["llama", "gemma2", "cohere"]  # plain logits, capped ones, scaled ones


def hidden_states(loaded, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(POSITIONS, loaded.anatomy.residual, generator=generator)


def whole_logits(loaded, hidden):
    """[n, vocabulary] as the stock model makes them of its last hidden states."""
    text = loaded.model.config.get_text_config()
    made = loaded.model.get_output_embeddings()(hidden)
    if cap := getattr(text, "final_logit_softcapping", None):
        made = cap * torch.tanh(made / cap)
    return (made * getattr(text, "logit_scale", 1.0)).double()


def targets_of(loaded):
    size = loaded.model.config.get_text_config().vocab_size
    return torch.randint(size, (POSITIONS,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    return load_model(str(models.build_checkpoint(tmp_path / "model", request.param)), device="cpu")


@pytest.fixture
def made_at_once(monkeypatch):
    """Three positions at a time; how many logits each call made."""
    seen = []

    def counted(model, hidden, head=None, own=next_token.logits):
        seen.append(len(hidden))
        return own(model, hidden, head)

    monkeypatch.setattr(next_token, "logits", counted)
    monkeypatch.setattr(next_token, "positions_at_once", lambda model: 3)
    return seen


def test_losses_and_their_gradient(family, made_at_once):
    hidden, targets = hidden_states(family, 0).requires_grad_(True), targets_of(family)
    weights = torch.linspace(-1, 2, POSITIONS)
    (token_losses(family.model, hidden, targets) * weights).sum().backward()
    naive = hidden.detach().clone().requires_grad_(True)
    expected = [-row.log_softmax(-1)[t] for row, t in zip(whole_logits(family, naive), targets, strict=True)]
    (torch.stack(expected) * weights).sum().backward()
    found = token_losses(family.model, hidden, targets)
    torch.testing.assert_close(found.detach().double(), torch.stack(expected).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad, naive.grad, rtol=1e-4, atol=1e-6)
    assert max(made_at_once) == 3


def test_losses_without_gradients_are_the_same_bits(family, made_at_once):
    hidden, targets = hidden_states(family, 0), targets_of(family)
    with_gradient = token_losses(family.model, hidden.requires_grad_(True), targets)
    with torch.no_grad():
        without = token_losses(family.model, hidden, targets)
    assert with_gradient.requires_grad and not without.requires_grad
    assert torch.equal(with_gradient.detach(), without)


def test_divergences(family, made_at_once):
    before, after = hidden_states(family, 1), hidden_states(family, 2)
    p, q = (whole_logits(family, hidden).detach().log_softmax(-1) for hidden in (before, after))
    expected = [
        sum(float(a.exp() * (a - b)) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)
    ]
    found = token_divergences(family.model, before, after)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    assert max(made_at_once) == 3


@pytest.mark.parametrize(("size", "expected"), [(4096, 1), (12 * 4096, 12)])
def test_as_many_positions_as_fit(llama, monkeypatch, size, expected):
    vocabulary = llama.model.config.vocab_size
    monkeypatch.setattr(next_token, "LOGIT_BYTES_AT_ONCE", size * vocabulary // 1024)
    assert positions_at_once(llama.model) == expected


def test_the_gradient_of_divergences(family, made_at_once):
    before, after = hidden_states(family, 1), hidden_states(family, 2).requires_grad_(True)
    weights = torch.linspace(-1, 2, POSITIONS)
    (token_divergences(family.model, before, after) * weights).sum().backward()
    naive = after.detach().clone().requires_grad_(True)
    p = whole_logits(family, before).detach().log_softmax(-1)
    q = whole_logits(family, naive).log_softmax(-1)
    ((p.exp() * (p - q)).sum(-1) * weights).sum().backward()
    torch.testing.assert_close(after.grad, naive.grad, rtol=1e-4, atol=1e-6)
    assert max(made_at_once) == 3
