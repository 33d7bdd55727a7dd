"""Losses (with gradients), hits and KL of next-token distributions, computed in chunks of positions.

The logits of a batch can be larger than the model: 152k tokens x 4096 positions x 4 bytes is 2.5 GB a copy.  So
logits are computed for as many positions as fit in ``LOGIT_BYTES_AT_ONCE``, and the gradient of a chunk before
the next chunk (as in fused linear cross-entropy, arXiv 2410.10989): a token's loss depends on no other
position's last hidden state, so the backward pass needs only one vector [d] a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from neurons.architectures.sites import logits

LOGIT_BYTES_AT_ONCE = 64 * 2**20

Head = Callable[[torch.Tensor], torch.Tensor]
# (hidden states [n, d], another value of each position) -> one number of each position [n]
PerPosition = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def positions_at_once(model: Any) -> int:
    """Number of positions whose float32 logits fit in ``LOGIT_BYTES_AT_ONCE``; at least one."""
    vocabulary: int = model.get_output_embeddings().weight.shape[0]
    return max(1, LOGIT_BYTES_AT_ONCE // (4 * vocabulary))


def token_losses(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (nats) of the token that follows each position.

    Args:
        model: causal language model, its weights frozen.
        hidden: last hidden states [n, d]; the result is differentiable if gradients are enabled.
        targets: int64 [n], on any device.

    Returns:
        float32 [n], on the device of the hidden states.
    """

    def losses(chunk: torch.Tensor, chunk_targets: torch.Tensor) -> torch.Tensor:
        made = logits(model, chunk).float()
        return torch.nn.functional.cross_entropy(made, chunk_targets.to(made.device), reduction="none").to(
            chunk.device
        )

    return _in_chunks(model, losses, hidden, targets.to(hidden.device).long())


def token_hits(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whether the token that follows each position is the most likely one, which greedy decoding writes.

    Args:
        model: causal language model.
        hidden: last hidden states [n, d].
        targets: int64 [n], on any device.

    Returns:
        bool [n], on the device of the hidden states.
    """

    def hits(chunk: torch.Tensor, chunk_targets: torch.Tensor) -> torch.Tensor:
        # In float32, as transformers decodes.
        return logits(model, chunk).float().argmax(-1).to(chunk.device) == chunk_targets

    with torch.no_grad():
        return _in_chunks(model, hits, hidden, targets.to(hidden.device).long())


def token_divergences(
    model: Any, before: torch.Tensor, after: torch.Tensor, head: Head | None = None
) -> torch.Tensor:
    """KL(p || q) of next-token distributions at each position, nats.

    Args:
        model: causal language model, as it is now.
        before: last hidden states [n, d] of p.
        after: last hidden states [n, d] of q; the result is differentiable by them if gradients are enabled.
        head: output embeddings for ``before`` instead of the model's.

    Returns:
        float64 [n].
    """

    def divergences(of_q: torch.Tensor, of_p: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            p = torch.log_softmax(logits(model, of_p, head).float(), -1)
        q = torch.log_softmax(logits(model, of_q).float(), -1)
        return (p.exp() * (p - q)).sum(-1, dtype=torch.float64).to(of_q.device)

    return _in_chunks(model, divergences, after, before)


def _in_chunks(
    model: Any, per_position: PerPosition, hidden: torch.Tensor, other: torch.Tensor
) -> torch.Tensor:
    if torch.is_grad_enabled() and hidden.requires_grad:
        values: torch.Tensor = _InChunks.apply(hidden, other, model, per_position)  # type: ignore[no-untyped-call]
        return values
    with torch.no_grad():
        return torch.cat([per_position(*chunk) for chunk in _chunks(model, hidden, other)])


def _chunks(model: Any, *rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    at_once = positions_at_once(model)
    return zip(*(part.split(at_once) for part in rows), strict=True)


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, other: torch.Tensor, model: Any, per_position: PerPosition
    ) -> torch.Tensor:
        values, gradients = [], []
        for chunk, chunk_other in _chunks(model, hidden, other):
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_(True)
                chunk_values = per_position(leaf, chunk_other)
                (gradient,) = torch.autograd.grad(chunk_values.sum(), leaf)
            values.append(chunk_values.detach())
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * outer[0][:, None].to(gradients.dtype), None, None, None
