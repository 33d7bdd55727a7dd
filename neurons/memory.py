"""What a stage takes of the memory, computed from the model's sizes before any work is done.

All sizes are bytes.  L layers, d residual width, I neurons that one token reaches, A heads of width D, V tokens
of vocabulary, b bytes a value, t tokens read at once.  On a CPU in one process:

    libraries    Python, torch and transformers
    weights      of the model, in the type that it is computed in
    activations  forward: what two layers hold; backward: what autograd keeps of every layer,
                 t L ((3 b + 1) A D + 2 * 4 d + 4 b I): queries, keys, values and what attention returns, both
                 norms' float32 inputs, gate, act(gate), up and their product; or, where activations are
                 recomputed, the same of one layer and b d a token of each
    logits       of as many positions as are made at once (``neurons.next_token``), in several copies
    sums         8 bytes a neuron, language and moment
    covariances  8 I^2 a layer, in as many layers at a time as there is room for

Freed memory is not all used again: what is computed is multiplied by ``FRAGMENTATION``, which is measured
(``benchmarks/memory.py`` sets estimates beside peaks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neurons.next_token import LOGIT_BYTES_AT_ONCE

LIBRARIES = 500 * 2**20
MARGIN = 0.1  # of what is free, left alone
WORK = 3 * 2**29  # on a CPU: larger batches bring no speed
GPU_SHARE = 0.4  # of a GPU's memory, the same whatever else is on it
FRAGMENTATION = 1.4
# Copies of a piece's logits: the model's own, float32, their softmax, and with a gradient those of two of them.
LOGIT_COPIES, LOGIT_COPIES_BACKWARD = 3, 5
MOST_TOKENS, MOST_TOKENS_ON_GPU = 4096, 32768
LEAST_TOKENS = 256  # below, a batch is too small to be quick: activations are recomputed instead


@dataclass(frozen=True)
class Sizes:
    """What the memory of a model's stages is computed from.

    Attributes:
        layers: L.
        residual: d.
        inner: I, MLP neurons that one token reaches in a layer.
        neurons: MLP neurons of a layer in all.
        attention: A D.
        vocabulary: V.
        value: bytes of a value of the activations, b.
        weights: bytes of all weights.
    """

    layers: int
    residual: int
    inner: int
    neurons: int
    attention: int
    vocabulary: int
    value: int
    weights: int


@dataclass(frozen=True)
class Need:
    """What a stage needs.

    Attributes:
        stage: its name.
        parts: what for -> bytes.
        tokens: read at once; 0 where none are.
        recomputes: whether activations are computed again in the backward pass.
    """

    stage: str
    parts: Mapping[str, int]
    tokens: int = 0
    recomputes: bool = False

    @property
    def total(self) -> int:
        """The peak of the process, bytes."""
        return sum(self.parts.values())


def forward_bytes(sizes: Sizes, tokens: int) -> int:
    """Activations of a pass without gradients, in which a layer's values are summed in float32."""
    each = sizes.value * (4 * sizes.inner + 4 * sizes.attention + 6 * sizes.residual) + 8 * sizes.inner
    return int(FRAGMENTATION * tokens * each)


def backward_bytes(sizes: Sizes, tokens: int, recomputes: bool = False) -> int:
    """Activations that are kept for the backward pass."""
    layer = sizes.value * (4 * sizes.attention + 4 * sizes.inner) + 8 * sizes.residual
    passing = sizes.value * sizes.residual * sizes.layers
    each = layer + passing if recomputes else layer * sizes.layers
    return int(FRAGMENTATION * tokens * each)


def logit_bytes(sizes: Sizes, positions: int, backward: bool) -> int:
    """Logits of as many positions as are made at once, in all their copies."""
    at_once = min(max(4 * sizes.vocabulary, LOGIT_BYTES_AT_ONCE), 4 * sizes.vocabulary * positions)
    return at_once * (LOGIT_COPIES_BACKWARD if backward else LOGIT_COPIES)


def covariance_bytes(units: int) -> int:
    """Of a module's inputs, while text is read."""
    return 8 * units**2


def solving_bytes(units: int) -> int:
    """Beside the covariances that wait: a product of rows, and what a key is solved with."""
    return 24 * units**2


def batch_plan(
    sizes: Sizes, room: int, backward: bool, row: int, most: int = MOST_TOKENS
) -> tuple[int, bool]:
    """How many tokens to read at once, a power of two, and whether activations are recomputed.

    Args:
        sizes: of the model.
        room: bytes for the work.
        backward: whether gradients are taken.
        row: tokens of the longest row.
        most: tokens.
    """

    def fitting(recomputes: bool) -> int:
        for power in range(most.bit_length() - 1, -1, -1):
            tokens = 2**power
            own = backward_bytes(sizes, tokens, recomputes) if backward else forward_bytes(sizes, tokens)
            if own + (logit_bytes(sizes, tokens, True) if backward else 0) <= room:
                return tokens
        return 1

    plain = fitting(False)
    if backward and plain < min(most, max(row, LEAST_TOKENS)):
        again = fitting(True)
        if again > plain:
            return again, True
    return plain, False
