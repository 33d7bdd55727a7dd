"""How badly a model predicts each text: the sum of its tokens' negative log-likelihoods."""

from __future__ import annotations

from typing import Any

import torch

from neurons.batches import TokenBatch
from neurons.sites import logits

LOGIT_BYTES_AT_ONCE = 64 * 2**20


def predicted(batch: TokenBatch) -> torch.Tensor:
    """bool [rows, length - 1]: the counted tokens that follow another, which are those predicted."""
    return batch.counted[:, 1:]


@torch.no_grad()
def text_losses(model: Any, hidden: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """Negative log-likelihood (nats) of the predicted tokens, summed over each row.

    Logits are made of a few positions at a time: those of a batch can be larger than the model.

    Args:
        model: causal language model.
        hidden: last hidden states [rows, length, d] of the batch.
        batch: on the model's device.

    Returns:
        float64 [rows], on the CPU.
    """
    wanted = predicted(batch)
    vocabulary: int = model.get_output_embeddings().weight.shape[0]
    at_once = max(1, LOGIT_BYTES_AT_ONCE // (4 * vocabulary))
    targets = batch.ids[:, 1:][wanted]
    losses = [
        torch.nn.functional.cross_entropy(logits(model, some).float(), right, reduction="none")
        for some, right in zip(hidden[:, :-1][wanted].split(at_once), targets.split(at_once), strict=True)
    ]
    # Put back in their places and summed by rows: adding at indices has no fixed order on a GPU.
    spread = torch.zeros(wanted.shape, dtype=torch.float64, device=hidden.device)
    spread[wanted] = torch.cat(losses).double()
    return spread.sum(1).cpu()
