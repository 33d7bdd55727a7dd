"""What a stage takes of the memory, computed from the model's sizes before any work is done.

All sizes are bytes.  L layers, d residual width, I neurons that one token reaches, A heads of width D, V tokens
of vocabulary, b bytes a value, t tokens read at once.  On a CPU in one process:

    libraries    Python, torch and transformers
    weights      of the model, in the type that it is computed in; where that is the file's and no logits are made,
                 without the embeddings, of which a mapped file keeps all but a few rows on disk
    activations  forward: what two layers hold; backward: what autograd keeps of every layer,
                 t L ((3 b + 1) A D + 2 * 4 d + 4 b I): queries, keys, values and what attention returns, both
                 norms' float32 inputs, gate, act(gate), up and their product; or, where activations are
                 recomputed, the same of one layer and b d a token of each
    logits       of as many positions as are made at once (``neurons.models.next_token``), in several copies
    sums         8 bytes a neuron, language and moment
    covariances  8 I^2 a layer, and rows that wait to be added, in as many layers at a time as there is room for

Freed memory is not all used again: what is computed is multiplied by ``FRAGMENTATION``, which is measured
(``benchmarks/memory.py`` sets estimates beside peaks).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neurons.errors import BrocaError
from neurons.files.tensor_files import READABLE_DTYPES, tensor_entries
from neurons.models.next_token import LOGIT_BYTES_AT_ONCE

if TYPE_CHECKING:
    from neurons.models.source import LoadedModel, ModelSource

LIBRARIES = 500 * 2**20
MARGIN = 0.1  # of what is free, left alone
WORK = 3 * 2**29  # on a CPU: larger batches bring no speed
LEAST_WORK = 2**29  # with less, weights are better left on disk
GPU_SHARE = 0.4  # of a GPU's memory, the same whatever else is on it
FRAGMENTATION = 1.4
# Copies of a piece's logits: the model's own, float32, their softmax, and with a gradient those of two of them.
LOGIT_COPIES, LOGIT_COPIES_BACKWARD = 3, 5
MOST_TOKENS, MOST_TOKENS_ON_GPU = 4096, 32768
# Rows a product of a module's inputs: float32 sums of more lose digits, of fewer cost a pass over the float64 sum each.
WAITING = 4096
LEAST_TOKENS = 256  # below, a batch is too small to be quick: activations are recomputed instead


_limit: int | None = None


def limit_memory(size: int | None) -> None:
    """Set the most bytes that this process is to take, weights and all; None: what is free, less a margin."""
    global _limit
    _limit = size


def memory_limit() -> int:
    """The most bytes that this process is to take."""
    return _free() if _limit is None else _limit


@cache
def _free() -> int:
    """What was free when it was first asked, and what this process had, less the margin; of a container, its part."""
    import psutil

    process = psutil.Process().memory_info()
    own = process.rss - getattr(process, "shared", 0)
    free = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such limit, or the word "max"
            continue
    # Processes that share the work share the machine.
    here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return int((1 - MARGIN) * (max(free, 0) + own) / here)


@dataclass(frozen=True)
class Sizes:
    """What the memory of a model's stages is computed from.

    Attributes:
        layers: L.
        residual: d.
        inner: I, MLP neurons that one token reaches in a layer.
        neurons: MLP neurons of a layer in all.
        attention: A D.
        keys: width of a layer's keys, and of its values.
        vocabulary: V.
        value: bytes of a value of the activations, b.
        weights: bytes of all weights.
    """

    layers: int
    residual: int
    inner: int
    neurons: int
    attention: int
    keys: int
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
    return int(at_once * (LOGIT_COPIES_BACKWARD if backward else LOGIT_COPIES))


def covariance_bytes(units: int) -> int:
    """Of a module's inputs, while text is read, and rows that wait to be added to it."""
    return 8 * units**2 + 4 * WAITING * units


def solving_bytes(units: int) -> int:
    """Beside the covariances that wait: of one of them the form that a key minimises, and its Cholesky factor."""
    return 16 * units**2


def product_bytes(units: int) -> int:
    """Of a batch's rows, in float32, before it is added to a covariance."""
    return 4 * units**2


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
            tokens = 1 << power
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


def sizes_of(source: ModelSource, value: int | None = None) -> Sizes:
    """The sizes of a model, in memory or still on disk.

    Args:
        source: the model.
        value: bytes of a value that it is to be computed in; None: of a loaded model its own, else as stored.
    """
    anatomy, model = source.anatomy, getattr(source, "model", None)
    config = (_config(source.checkpoint) if model is None else model.config).get_text_config()
    if model is not None:
        value, parameters = model.dtype.itemsize, list(model.parameters())
        # Of an offloaded model some weights wait elsewhere; a model that is planned with has none anywhere.
        planned = all(p.is_meta for p in parameters)
        weights = sum(p.nbytes for p in parameters if planned or not p.is_meta)
    else:
        stored, count = _stored(source.checkpoint)
        value = stored if value is None else value
        weights = count * value
    reached = anatomy.expert_width * max(1, getattr(config, "num_experts_per_tok", 1) or 1)
    return Sizes(
        layers=anatomy.layers,
        residual=anatomy.residual,
        inner=min(anatomy.neurons, reached),
        neurons=anatomy.neurons,
        attention=anatomy.heads * anatomy.head_dim,
        keys=anatomy.head_dim * (getattr(config, "num_key_value_heads", None) or anatomy.heads),
        vocabulary=config.vocab_size,
        value=value,
        weights=weights,
    )


def read_weights(planned: LoadedModel, logits: bool) -> int:
    """Bytes of weights that a pass over text brings into memory.

    Args:
        planned: the model.
        logits: whether the LM head is used.
    """
    weights = sizes_of(planned).weights
    try:
        stored = _stored(planned.checkpoint)[0]
    except (BrocaError, ValueError):  # a config alone
        return weights
    if logits or planned.device.type == "cuda" or stored != planned.model.dtype.itemsize:
        return weights
    ends = (planned.model.get_input_embeddings(), planned.model.get_output_embeddings())
    embeddings = {id(end.weight): int(end.weight.nbytes) for end in ends if end is not None}
    return weights - sum(embeddings.values())


def room(loaded: LoadedModel) -> int:
    """Bytes for the work on a loaded model: what is allowed, less libraries and weights, and no more than helps.

    Raises:
        BrocaError: the weights leave nothing.
    """
    if loaded.device.type == "cuda":
        return int(GPU_SHARE * torch.cuda.get_device_properties(loaded.device).total_memory)
    return min(WORK, most_room(loaded))


def covariance_room(loaded: LoadedModel) -> int:
    """Bytes for covariances and what is solved with them: half, since a group of fewer layers costs no further pass."""
    return room(loaded) // 2


def memory_for_weights() -> int | None:
    """Bytes that weights may take in main memory where a limit was set: what is left beside libraries and work."""
    return None if _limit is None else max(0, _limit - LIBRARIES - LEAST_WORK)


def most_room(loaded: LoadedModel) -> int:
    """Bytes for the work on a loaded model, all that is allowed.

    Raises:
        BrocaError: the weights leave nothing.
    """
    if loaded.device.type == "cuda":
        return room(loaded)
    weights = sizes_of(loaded).weights
    left = memory_limit() - LIBRARIES - weights
    if left <= 0:
        raise BrocaError(
            f"{loaded.name}: its weights take {weights / 1e9:.1f} GB and libraries {LIBRARIES / 1e9:.1f} GB, and "
            f"{memory_limit() / 1e9:.1f} GB are allowed: give more (--max-memory), or --dtype bfloat16"
        )
    return left


def batches_for(loaded: LoadedModel, backward: bool, row: int) -> tuple[int, bool]:
    """Tokens to read at once and whether activations are recomputed, for rows of up to ``row`` tokens.

    Raises:
        BrocaError: one row does not fit; it says what would.
    """
    sizes, most = sizes_of(loaded), MOST_TOKENS_ON_GPU if loaded.device.type == "cuda" else MOST_TOKENS
    tokens, recomputes = batch_plan(sizes, room(loaded), backward, row, most)
    if tokens < row:
        # More than helps, but a row cannot be parted.
        tokens, recomputes = batch_plan(sizes, most_room(loaded), backward, row, max(most, row))
        needed = row_bytes(sizes, backward, row)
        if tokens < row and needed > most_room(loaded):
            most_tokens = batch_plan(sizes, most_room(loaded), backward, 1, most)[0]
            raise BrocaError(
                f"{loaded.name}: a row of {row} tokens needs {needed / 1e9:.1f} GB beside weights and libraries, and "
                f"{most_room(loaded) / 1e9:.1f} GB are left of what is allowed: rows of {most_tokens} tokens fit, or "
                f"allow {(needed + LIBRARIES + sizes.weights) / 1e9:.1f} GB (--max-memory)"
            )
        tokens = max(tokens, row)
    return tokens, recomputes


def row_bytes(sizes: Sizes, backward: bool, row: int) -> int:
    """The least that a row takes."""
    if not backward:
        return forward_bytes(sizes, row)
    return backward_bytes(sizes, row, recomputes=True) + logit_bytes(sizes, row, True)


def kept_bytes(loaded: LoadedModel, tokens: int) -> int:
    """Hidden states between two layers of so many tokens."""
    sizes = sizes_of(loaded)
    return sizes.value * sizes.residual * tokens


def _config(checkpoint: Path) -> Any:
    import transformers

    return transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)


def _stored(checkpoint: Path) -> tuple[int, int]:
    """Bytes of a value of the widest floating-point tensor, and number of all values."""
    entries = tensor_entries(checkpoint).values()
    return (
        max(READABLE_DTYPES[entry.dtype].itemsize for entry in entries if entry.dtype in READABLE_DTYPES),
        sum(prod(entry.shape) for entry in entries),
    )
