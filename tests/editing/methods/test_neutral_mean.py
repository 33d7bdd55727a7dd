"""The neutral mean against a loop over texts, tokens and layers."""

import pytest
import torch

from editing.methods.neutral_mean import neutral_means
from neurons.text.corpus import read_corpus

SITES = {"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj", "block_out": None}


def outputs_of(model, ids):
    """Outputs of every layer at every site for one row of tokens: (site, layer) -> [t, d]."""
    seen, hooks = {}, []

    def keep(place):
        def hook(module, given, output):
            seen[place] = (output[0] if isinstance(output, tuple) else output).reshape(len(ids), -1).double()

        return hook

    for number, layer in enumerate(model.model.layers):
        for site, name in SITES.items():
            module = layer if name is None else layer.get_submodule(name)
            hooks.append(module.register_forward_hook(keep((site, number))))
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("languages", [("qab",), ("qaa", "qac")])
def test_equals_a_loop_over_texts(llama, corpus_directory, languages):
    corpus = read_corpus(corpus_directory, languages, "report", min_languages=1)
    means = {site: torch.zeros(3, 64, dtype=torch.float64) for site in SITES}
    for language in languages:
        texts = corpus.non_empty(language)
        # The weight of a language does not depend on the amount of its text.
        for text in texts:
            tokens = llama.tokenizer(text, add_special_tokens=False)["input_ids"]
            seen = outputs_of(llama.model, [llama.tokenizer.bos_token_id, *tokens])
            for (site, layer), values in seen.items():
                for token in values[1:]:
                    means[site][layer] += token / len(tokens) / len(texts) / len(languages)
    result = neutral_means(llama, corpus, tuple(SITES))
    assert set(result) == set(SITES)
    for site, mean in means.items():
        assert result[site].dtype == torch.float64
        assert torch.allclose(result[site], mean, rtol=1e-4, atol=1e-6), site
