"""The logit lens: the tokens that a vector in the residual stream promotes and suppresses.

The final norm and the output embeddings read the vector as if it were the output of the last layer
(nostalgebraist, 2020; for neurons' output weights: Geva et al., arXiv 2203.14680).  The logits of the zero vector,
which come from biases, are subtracted.
"""

from __future__ import annotations

from typing import Any

import torch

from neurons.architectures.anatomy import Anatomy
from neurons.architectures.sites import logits
from neurons.recording.partial_forward import ending


@torch.no_grad()
def lens_logits(model: Any, anatomy: Anatomy, vectors: torch.Tensor) -> torch.Tensor:
    """Logits of vectors minus those of the zero vector.

    Args:
        model: causal language model.
        vectors: [n, d].

    Returns:
        float32 [n, vocabulary], on the CPU.
    """
    with_zero = torch.cat([torch.zeros_like(vectors[:1]), vectors])
    scores = logits(model, ending(model, anatomy, len(with_zero))(with_zero)).float().cpu()
    return scores[1:] - scores[:1]
