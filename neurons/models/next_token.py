"""What is made of next-token distributions, a few positions at a time: losses with their gradient, KL.

The logits of a batch can be larger than the model: 152k tokens x 4096 positions x 4 bytes is 2.5 GB a copy.  So
logits are made of as many positions as fit in ``LOGIT_BYTES_AT_ONCE``, and where a gradient is wanted that of a
piece is taken before the next piece is made (as fused linear cross-entropy does, arXiv 2410.10989): a token's
loss depends on no other position's hidden state, so one vector [d] a token is all that the backward pass needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from neurons.architectures.sites import logits

LOGIT_BYTES_AT_ONCE = 64 * 2**20

Head = Callable[[torch.Tensor], torch.Tensor]
# Of some positions' hidden states [n, d], and of what is beside them, a value [n] each.
Of = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def positions_at_once(model: Any) -> int:
    """How many positions' float32 logits fit in ``LOGIT_BYTES_AT_ONCE``; at least one."""
    vocabulary: int = model.get_output_embeddings().weight.shape[0]
    return max(1, LOGIT_BYTES_AT_ONCE // (4 * vocabulary))


def token_losses(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (nats) of the token that follows each position.

    Args:
        model: causal language model, its weights frozen.
        hidden: last hidden states [n, d]; the result can be differentiated by them where gradients are enabled.
        targets: int64 [n], on any device.

    Returns:
        float32 [n], on the device of the hidden states.
    """
    wanted = targets.to(hidden.device).long()

    def losses(own: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        made = logits(model, own).float()
        return torch.nn.functional.cross_entropy(made, targets.to(made.device), reduction="none").to(
            own.device
        )

    return _by_pieces(model, losses, hidden, wanted)


def token_divergences(
    model: Any, before: torch.Tensor, after: torch.Tensor, head: Head | None = None
) -> torch.Tensor:
    """KL(p || q) of next-token distributions at each position, nats.

    Args:
        model: causal language model, as it is now.
        before: last hidden states [n, d] that give p.
        after: those that give q; the result can be differentiated by them where gradients are enabled.
        head: output embeddings that read ``before`` in place of the model's own.

    Returns:
        float64 [n].
    """

    def divergences(own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            p = torch.log_softmax(logits(model, others, head).float(), -1)
        q = torch.log_softmax(logits(model, own).float(), -1)
        return (p.exp() * (p - q)).sum(-1, dtype=torch.float64).to(own.device)

    return _by_pieces(model, divergences, after, before)


def _by_pieces(model: Any, of: Of, hidden: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and hidden.requires_grad:
        values: torch.Tensor = _ByPieces.apply(hidden, beside, model, of)  # type: ignore[no-untyped-call]
        return values
    with torch.no_grad():
        return torch.cat([of(*piece) for piece in _pieces(model, hidden, beside)])


def _pieces(model: Any, *rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    at_once = positions_at_once(model)
    return zip(*(some.split(at_once) for some in rows), strict=True)


class _ByPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, beside: torch.Tensor, model: Any, of: Of) -> torch.Tensor:
        values, slopes = [], []
        for some, others in _pieces(model, hidden, beside):
            with torch.enable_grad():
                own = some.detach().requires_grad_(True)
                found = of(own, others)
                (slope,) = torch.autograd.grad(found.sum(), own)
            values.append(found.detach())
            slopes.append(slope)
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradients[0][:, None].to(slopes.dtype), None, None, None
