"""The logit lens by language, against loops in float64 and a model whose layers write in known languages."""

import models
import pytest
import torch

from neurons.architectures.sites import site_hooks
from neurons.recording.language_lens import DOMINANT, FEWEST, language_masses, token_languages
from neurons.text.batches import TokenBatch

PROMPTS = [[3, 7, 11, 2], [5, 9], [4, 8, 6, 10, 12, 1, 13]]


def batch(rows, uncounted=0):
    ids = torch.tensor(rows)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, :uncounted] = False
    return TokenBatch(ids, torch.ones_like(counted), counted)


def test_a_token_belongs_to_the_language_that_dominates():
    # Of a's 20 tokens 10 are 1, of b's 100 10 are: fractions .5 and .1, of which a has 5/6.  5 and 6 stand 5 and 4 times.
    text = {
        "a": [batch([[1] * 10 + [2] * 9 + [3]])],
        "b": [
            batch([[0, *[1] * 5, *[4] * 36, *[5] * 5, *[6] * 4]], uncounted=1),
            batch([[1] * 5 + [3] * 45]),
        ],
    }
    assert (DOMINANT, FEWEST) == (0.9, 5)
    assert token_languages(text, 8).tolist() == [-1, -1, 0, 1, 1, 1, -1, -1]  # 3 has .05 and .45


def test_equal_to_loops(llama):
    generator = torch.Generator().manual_seed(0)
    vocabulary = llama.embedding_rows
    of_tokens = torch.randint(-1, 2, (vocabulary,), generator=generator)
    found = language_masses(llama, PROMPTS, of_tokens, 2)
    model = llama.model.double()
    try:
        expected = torch.zeros(llama.anatomy.layers, 2, dtype=torch.float64)
        for prompt in PROMPTS:
            kept = {}

            def keep(layer, kept=kept):
                return lambda values, _: kept.update({layer: values[0, -1].clone()})

            hooks = {("block_out", layer): keep(layer) for layer in range(llama.anatomy.layers)}
            with site_hooks(llama.anatomy, hooks), torch.no_grad():
                last = model(torch.tensor([prompt])).logits[0, -1]
            for layer, h in kept.items():
                normed = h / (h.square().mean() + model.config.rms_norm_eps).sqrt() * model.model.norm.weight
                exponentials = (model.lm_head.weight @ normed).exp().tolist()
                if layer == max(kept):
                    torch.testing.assert_close(
                        torch.tensor(exponentials).double(), last.exp(), rtol=1e-6, atol=0
                    )
                for token, value in enumerate(exponentials):
                    if of_tokens[token] >= 0:
                        expected[layer, of_tokens[token]] += value / sum(exponentials) / len(PROMPTS)
    finally:
        llama.model.float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert bool((found.sum(1) < 1).all())


def test_planted_layers_write_in_their_languages(tmp_path):
    """Layer 0 writes a token of b after every prompt, layer 2 one of a, far longer."""
    from neurons.models.source import load_model

    loaded = load_model(str(models.build_checkpoint(tmp_path / "model")), device="cpu")
    of_tokens = torch.full((loaded.embedding_rows,), -1)
    of_tokens[20], of_tokens[30] = 0, 1
    with torch.no_grad():
        head = torch.nn.functional.normalize(loaded.model.lm_head.weight, dim=1)
        for layer, token, size in ((0, 30, 1e3), (1, 20, 0.0), (2, 20, 1e6)):
            block = loaded.model.model.layers[layer].mlp
            block.down_proj.bias = torch.nn.Parameter(size * head[token])
        loaded.model.lm_head.weight.copy_(50 * head)
    found = language_masses(loaded, PROMPTS, of_tokens, 2)
    torch.testing.assert_close(found, torch.tensor([[0, 1], [0, 1], [1, 0]]).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "gpt2"])
def test_the_last_layer_is_the_model_s_own_next_token(checkpoint_of, family):
    from neurons.models.source import load_model

    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    of_tokens = torch.arange(loaded.embedding_rows) % 3 - 1
    found = language_masses(loaded, PROMPTS, of_tokens, 2)[-1]
    expected = torch.zeros(2, dtype=torch.float64)
    for prompt in PROMPTS:
        with torch.no_grad():
            own = loaded.model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        expected += torch.stack([own[of_tokens[: len(own)] == k].sum() for k in (0, 1)]) / len(PROMPTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
