"""What a vector in the residual stream says by itself: the tokens that it makes likelier and less likely.

The logit lens (nostalgebraist, 2020; of neurons' values: Geva et al., arXiv 2203.14680): the vector is read
by the final norm and the output embeddings, as if it were all that the last layer left.  What these give for
no vector at all, their biases, is taken off.
"""

from __future__ import annotations

from typing import Any

import torch

from neurons.architectures.anatomy import Anatomy
from neurons.architectures.sites import logits
from neurons.recording.partial_forward import end_of_model


@torch.no_grad()
def lens_logits(model: Any, anatomy: Anatomy, vectors: torch.Tensor) -> torch.Tensor:
    """Logits of vectors less those of the zero vector.

    Args:
        model: causal language model.
        anatomy: of the model.
        vectors: [n, d].

    Returns:
        float32 [n, vocabulary], on the CPU.
    """
    beside = torch.cat([torch.zeros_like(vectors[:1]), vectors])
    made = logits(model, end_of_model(model, anatomy, beside)).float().cpu()
    return made[1:] - made[:1]
