"""The loss of each text: the sum of its tokens' negative log-likelihoods."""

from __future__ import annotations

from typing import Any

import torch

from neurons.models.next_token import token_losses
from neurons.text.batches import TokenBatch


def predicted(batch: TokenBatch) -> torch.Tensor:
    """bool [rows, length - 1]: the predicted tokens, which are counted and follow another."""
    return batch.counted[:, 1:]


def row_losses(model: Any, hidden: torch.Tensor, ids: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (nats) of predicted tokens, summed over each row.

    Args:
        model: causal language model.
        hidden: final hidden states [rows, length, d].
        ids: int64 [rows, length].
        predicted: bool [rows, length - 1], the tokens after the first that count.

    Returns:
        float64 [rows], on the device of the hidden states; differentiable by them if gradients are enabled.
    """
    losses = token_losses(model, hidden[:, :-1][predicted], ids[:, 1:][predicted])
    # Summed over rows of a dense tensor: index_add has no fixed order on a GPU.
    dense = torch.zeros(predicted.shape, dtype=torch.float64, device=hidden.device)
    dense[predicted] = losses.double()
    return dense.sum(1)


@torch.no_grad()
def text_losses(model: Any, hidden: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """Negative log-likelihood (nats) of the predicted tokens, summed over each row.

    Args:
        model: causal language model.
        hidden: final hidden states [rows, length, d] of the batch.
        batch: the batch, on the model's device.

    Returns:
        float64 [rows], on the CPU.
    """
    return row_losses(model, hidden, batch.ids, predicted(batch)).cpu()
