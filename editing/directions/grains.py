"""GrAInS: the effect of the tokens that decide between two answers (Nguyen et al., arXiv 2507.18043).

The integrated gradient (arXiv 1703.01365) of f from embeddings 0 to e, along a straight line, gives each token i of a
prompt with its answer the score

    s_i = e_i . int_0^1 df/de_i (a e) da        f = log p(chosen | prompt), or -log p(rejected | prompt)

by Gauss and Legendre's rule with ``NODES`` nodes.  The ``tokens`` tokens of highest score above 0 are S+, those of lowest
score below 0 are S-.  With h(x) the activation at the answer's last token, and x \\ S the text with padding tokens instead
of S,

    D+ = {h(x) - h(x \\ S+)}    D- = {h(x) - h(x \\ S-)}    over the chosen and the rejected answers of all pairs
    v  = m(D+) - m(D-)          m: the mean ("mean"), or the first principal component in the length and sign of
                                the mean along it ("pca")

As in the released code (duykhuongnguyen/GrAInS): 10 tokens, of prompt and answer, and the end-of-sequence token as
padding.  Differences: there f is the log-probability of the answer's last token after itself, here of all its tokens;
there S+ and S- may hold scores of the other sign, and together the whole of a short text; there the principal component
has length 1 and either sign.  The paper also restores the length of the steered activation, which no weights can do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from editing.directions.diffmean import OUTPUT_SITES
from editing.directions.length import along
from editing.directions.method import Given, PreferenceMethod
from editing.directions.pca import pca
from editing.directions.recorded import record_texts
from neurons.errors import UsageError
from neurons.models.memory import common_batches
from neurons.models.source import LoadedModel
from neurons.recording.recomputation import recomputing
from neurons.recording.text_losses import row_losses
from neurons.recording.text_pass import Progress, expect, forward
from neurons.setting import COUNT, setting
from neurons.text.batches import TokenBatch, token_row_batches
from neurons.text.preferences import CHOSEN, numbered_together
from neurons.text.token_rows import TokenRow

NODES = 20
WHOLE, WITHOUT_POSITIVE, WITHOUT_NEGATIVE = "whole", "without S+", "without S-"


def token_scores(
    loaded: LoadedModel, rows: Sequence[TokenRow], progress: Progress | None = None
) -> list[torch.Tensor]:
    """The integrated gradient of each row's log-likelihood with respect to each token's embedding.

    Args:
        loaded: the model.
        rows: the positions that predict the answer are counted; line i is row i.
        progress: called with the number of rows of each batch.

    Returns:
        float64 [n] of each row.
    """
    at_once, recomputes = common_batches(loaded, True, max(len(row.ids) for row in rows))
    scores: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    expect(progress, len(rows))
    for batch in token_row_batches(rows, 0, at_once):
        batch = batch.to(loaded.device)
        total = torch.zeros(batch.ids.shape, dtype=torch.float64, device=loaded.device)
        for node, weight in zip((1 + nodes) / 2, weights / 2, strict=True):
            products = _gradient_products(loaded, batch, float(node), recomputes)
            total += float(weight) * products.to(total.device)
        for row, line in enumerate(batch.line_numbers.tolist()):
            scores[line] = total[row][batch.attention[row]].cpu()
        if progress is not None:
            progress(len(batch.ids))
    return scores


def _gradient_products(
    loaded: LoadedModel, batch: TokenBatch, fraction: float, recomputes: bool
) -> torch.Tensor:
    """e_i . df/de_i at ``fraction`` times the embeddings, float64 [rows, length]."""
    embedded: list[torch.Tensor] = []

    def scale(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        embedded[:] = [output.detach(), (fraction * output.detach()).requires_grad_(True)]
        return embedded[1]

    handle = loaded.model.get_input_embeddings().register_forward_hook(scale)
    try:
        with torch.enable_grad(), recomputing(loaded.anatomy) if recomputes else nullcontext():
            hidden = forward(loaded.model, batch)
            row_losses(loaded.model, hidden, batch.ids, batch.counted[:, :-1]).sum().neg().backward()
    finally:
        handle.remove()
    whole, scaled = embedded
    assert scaled.grad is not None
    return (whole.double() * scaled.grad.double()).sum(-1)


def replaced(row: TokenRow, scores: torch.Tensor, tokens: int, padding: int) -> TokenRow:
    """The row with padding instead of its tokens of highest score above 0.

    Args:
        row: of n tokens.
        scores: [n].
        tokens: maximum number of tokens to replace; of equal scores the first.
        padding: the token instead.
    """
    order = scores.argsort(descending=True, stable=True)[:tokens].tolist()
    ids = list(row.ids)
    for position in order:
        if scores[position] > 0:
            ids[position] = padding
    return replace(row, ids=ids)


def effect(differences: torch.Tensor, way: str) -> torch.Tensor:
    """m of differences [n, d], float64 [d]."""
    mean = differences.mean(0)
    centred = differences - mean
    if way == "mean" or not bool(centred.any()):
        return mean
    return along(pca(centred)[0], mean)


@dataclass(frozen=True)
class Grains(PreferenceMethod):
    """The registered method."""

    name = "grains"
    line = "the effect of the tokens that decide between chosen and rejected answers"
    source = "arXiv 2507.18043"

    tokens: int = setting(10, "tokens of a text to replace", kind=COUNT)
    way: str = setting("mean", "of the effects", words=("mean", "pca"))

    def given(
        self, loaded: LoadedModel, rows: Mapping[str, Sequence[TokenRow]], progress: Progress | None = None
    ) -> tuple[list[Given], dict[str, Any]]:
        """
        Raises:
            UsageError: a tokenizer without a padding and an end-of-sequence token.
        """
        padding = _padding(loaded)
        together = numbered_together(rows)
        scores = token_scores(loaded, together, progress)
        # f is -log p of the rejected answers.
        scores = [of_row if line < len(rows[CHOSEN]) else -of_row for line, of_row in enumerate(scores)]
        signed = {WHOLE: 0, WITHOUT_POSITIVE: 1, WITHOUT_NEGATIVE: -1}
        read = {
            name: [
                _last(replaced(row, sign * of_row, self.tokens, padding))
                for row, of_row in zip(together, scores, strict=True)
            ]
            for name, sign in signed.items()
        }
        at_once = common_batches(loaded, False, max(len(row.ids) for row in together))[0]
        recorded = record_texts(
            loaded, {name: token_row_batches(of_name, 0, at_once) for name, of_name in read.items()}
        )
        given = []
        for site in OUTPUT_SITES:
            for layer in range(loaded.anatomy.layers):
                whole, positive, negative = (
                    recorded.outputs[name][site][:, layer].double() for name in signed
                )
                vector = effect(whole - positive, self.way) - effect(whole - negative, self.way)
                given.append(Given(site, layer, vector))
        return given, {}


def _last(row: TokenRow) -> TokenRow:
    """The row with its last position counted alone."""
    return replace(row, counted=[len(row.ids) - 1])


def _padding(loaded: LoadedModel) -> int:
    tokenizer = loaded.tokenizer
    for name in ("eos_token_id", "pad_token_id", "unk_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None and token < loaded.embedding_rows:
            return int(token)
    raise UsageError(
        f"{loaded.name}: the tokenizer has no end-of-sequence or padding token to replace others by: use another method"
    )
