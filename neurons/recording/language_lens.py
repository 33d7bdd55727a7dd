"""The logit lens by language: in which language a model would answer if it ended after a layer.

With h_l(x) the residual stream after layer l at the last token of a prompt x, and T_k the tokens of language k,

    p_l(x) = softmax(logits of the final norm of h_l(x))        (nostalgebraist, 2020)
    mass[l, k] = mean over x of the sum of p_l(x)_v over v in T_k

After the last layer p_l(x) is the model's own distribution of the next token.  Token v belongs to the language in
whose text it dominates: with n[k, v] its count in the text of language k, N[k] the number of tokens there,

    r[k, v] = (n[k, v] / N[k]) / sum over j of n[j, v] / N[j],        v in T_k if r[k, v] >= 0.9 and n[k, v] >= 5

so tokens that languages share (punctuation, digits, names), and tokens that the text has too rarely to tell, belong to
none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from neurons.architectures.sites import Routed, logits
from neurons.models.not_finite import not_finite
from neurons.models.source import LoadedModel
from neurons.recording.partial_forward import ending
from neurons.recording.text_pass import Position, read_text
from neurons.text.batches import TokenBatch, row_batches

DOMINANT = 0.9
FEWEST = 5  # a token that stands once in the text of one language may be as usual in another
SITE = "block_out"
_POSITIONS_AT_ONCE = 64  # each has a float64 for every token of the vocabulary


def token_languages(batches: Mapping[str, Sequence[TokenBatch]], vocabulary: int) -> torch.Tensor:
    """The language of each token.

    Args:
        batches: text of each language; only counted tokens count.
        vocabulary: number of tokens V.

    Returns:
        int64 [V], the index of the language in ``batches``; -1 for none.
    """
    counts = torch.zeros(len(batches), vocabulary, dtype=torch.int64)
    for k, of_language in enumerate(batches.values()):
        for batch in of_language:
            counts[k] += torch.bincount(batch.ids[batch.counted].long(), minlength=vocabulary)
    rates = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    fractions, languages = (rates / rates.sum(0)).max(0)
    # Tokens without counts are 0 / 0, which is not at least DOMINANT.
    return torch.where((fractions >= DOMINANT) & (counts.amax(0) >= FEWEST), languages, -1)


@torch.no_grad()
def language_masses(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], languages_of_tokens: torch.Tensor, languages: int
) -> torch.Tensor:
    """The mass of each language after each layer.

    Args:
        loaded: the model, which the caller may have edited.
        prompts: token ids of each prompt, with start tokens.
        languages_of_tokens: as ``token_languages`` for at least as many tokens as there are logits.
        languages: number of languages K.

    Returns:
        float64 [L, K]; 1 minus the sum over K is the mass of tokens of no language.

    Raises:
        BrocaError: an activation or a probability that is not finite.
    """
    layers = loaded.anatomy.layers
    streams: list[list[torch.Tensor]] = [[] for _ in range(layers)]

    def keep(layer: int, values: torch.Tensor, routed: Routed | None, position: Position) -> None:
        last = (position.batch.attention.sum(1) - 1).to(values.device)
        streams[layer].append(values[torch.arange(len(last), device=values.device), last].float().cpu())

    batches = [(0, batch) for batch in row_batches(prompts, uncounted=0)]
    read_text(loaded, batches, {(SITE, layer): partial(keep, layer) for layer in range(layers)})
    masses = torch.zeros(layers, languages, dtype=torch.float64)
    end = ending(loaded.model, loaded.anatomy, _POSITIONS_AT_ONCE)
    for layer, of_layer in enumerate(streams):
        for vectors in torch.cat(of_layer).split(_POSITIONS_AT_ONCE):
            probabilities = logits(loaded.model, end(vectors)).double().softmax(-1).sum(0).cpu()
            of_tokens = languages_of_tokens[: len(probabilities)]
            known = of_tokens >= 0
            masses[layer].index_add_(0, of_tokens[known], probabilities[known])
    if not bool(torch.isfinite(masses).all()):
        raise not_finite(loaded, "the logit lens")
    return masses / len(prompts)
