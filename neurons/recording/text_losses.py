"""How badly a model predicts each text: the sum of its tokens' negative log-likelihoods."""

from __future__ import annotations

from typing import Any

import torch

from neurons.models.next_token import token_losses
from neurons.text.batches import TokenBatch


def predicted(batch: TokenBatch) -> torch.Tensor:
    """bool [rows, length - 1]: the counted tokens that follow another, which are those predicted."""
    return batch.counted[:, 1:]


@torch.no_grad()
def text_losses(model: Any, hidden: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """Negative log-likelihood (nats) of the predicted tokens, summed over each row.

    Args:
        model: causal language model.
        hidden: last hidden states [rows, length, d] of the batch.
        batch: on the model's device.

    Returns:
        float64 [rows], on the CPU.
    """
    wanted = predicted(batch)
    losses = token_losses(model, hidden[:, :-1][wanted], batch.ids[:, 1:][wanted])
    # Put back in their places and summed by rows: adding at indices has no fixed order on a GPU.
    spread = torch.zeros(wanted.shape, dtype=torch.float64, device=hidden.device)
    spread[wanted] = losses.double()
    return spread.sum(1).cpu()
