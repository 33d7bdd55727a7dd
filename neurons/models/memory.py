"""Estimates of the memory that a stage needs, from the sizes of the model.

All sizes are in bytes.  L layers, d residual width, I neurons active for a token, A heads of width D, V tokens in
the vocabulary, b bytes a value, t tokens a batch.  On a CPU in one process:

    libraries    Python, torch and transformers
    weights      of the model, in the dtype of the computation; if that is the file's and no logits are computed,
                 without the embeddings, of which all but a few rows of the mapped file stay on disk
    activations  forward: of two layers; backward: what autograd keeps of every layer,
                 t L ((3 b + 1) A D + 2 * 4 d + 4 b I): queries, keys, values and the attention output, both
                 norms' float32 inputs, gate, act(gate), up and their product; or, if activations are
                 recomputed, the same for one layer and b d a token for each
    logits       of the positions of a chunk (``neurons.models.next_token``), in several copies
    sums         8 bytes a neuron, language and moment
    covariances  8 I^2 a layer, and buffered rows, of all layers if they fit, else of one at a time

Not all freed memory is reused: estimates are multiplied by the measured ``FRAGMENTATION``
(``benchmarks/memory.py`` compares estimates with peaks).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from neurons.architectures.offload import offloaded_bytes
from neurons.errors import BrocaError
from neurons.files.tensor_files import READABLE_DTYPES, tensor_entries
from neurons.models.next_token import LOGIT_BYTES_AT_ONCE
from neurons.models.processes import all_reduce

if TYPE_CHECKING:
    from neurons.architectures.anatomy import Anatomy
    from neurons.models.source import LoadedModel, ModelSource

CGROUPS = Path("/sys/fs/cgroup")
LIBRARIES = 500 * 2**20
MARGIN = 0.1  # fraction of the free memory that stays free
WORK = 3 * 2**29  # on a CPU: larger batches are not faster
MIN_WORK = 2**29  # with less, offload weights instead
GPU_FRACTION = 0.4  # of a GPU's memory, if the weights on it leave as much
FRAGMENTATION = 1.4
# Copies of a chunk's logits: the model's, float32, their softmax, and with a gradient those of two of them.
LOGIT_COPIES, LOGIT_COPIES_BACKWARD = 3, 5
MAX_TOKENS, MAX_TOKENS_ON_GPU = 4096, 32768
# Paused passes grow with the text: more of the memory that a stage needs at least is kept in a file.
PAUSED_FRACTION = 0.08
# Rows of a product of a module's inputs: more lose digits in float32, fewer cost more passes over the float64 sum.
WAITING = 8192
MIN_TOKENS = 256  # smaller batches are slow: recompute activations instead


_limit: int | None = None


def limit_memory(size: int | None) -> None:
    """Set the maximum bytes of this process, with weights; None is the free memory less a margin."""
    global _limit
    _limit = size


# Bytes in main memory of the weights of the models that are loaded.
_of_models: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def count_model(loaded: LoadedModel) -> None:
    """Count a model's weights against the limit while the model is loaded."""
    if loaded.device.type != "cuda":
        _of_models[loaded.model] = sizes_of(loaded).weights


def _other_models(model: Any = None) -> int:
    """Bytes of the weights of the models that are loaded beside ``model``."""
    return sum(size for other, size in _of_models.items() if other is not model)


def memory_limit() -> int:
    """The maximum bytes of this process."""
    return _free() if _limit is None else _limit


@cache
def _free() -> int:
    """Free memory at the first call, with that of this process, less the margin."""
    import psutil

    process = psutil.Process().memory_info()
    used_here = process.rss - getattr(process, "shared", 0)
    free = free_memory()
    # Processes of one launch share the machine.
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return int((1 - MARGIN) * (free + used_here) / processes)


def free_memory() -> int:
    """Free bytes of the machine's main memory; within a container no more than its limit leaves.

    Pages of files, such as mapped weights, are counted as free: the kernel drops them when memory is needed.
    """
    import psutil

    free: int = psutil.virtual_memory().available
    for folder, limit, used, prefix in (
        (CGROUPS, "memory.max", "memory.current", ""),
        (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
        except (OSError, ValueError):  # no such limit, or the word "max"
            continue
        pages = {}
        with suppress(OSError, ValueError):  # not every runtime of containers tells
            pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        left += sum(int(pages.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        free = min(free, max(left, 0))
    return free


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model for memory estimates.

    Attributes:
        layers: L.
        residual: d.
        inner: I, MLP neurons of a layer that are active for a token, those of shared experts included: the maximum
            over the layers.
        neurons: all MLP neurons of a layer.
        attention: A D.
        keys: width of a layer's keys, and of its values.
        vocabulary: V.
        value: bytes of a value of the activations, b.
        weights: bytes of all weights; if some are or would be offloaded, of the others and of one layer.
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
    """Memory that a stage needs.

    Attributes:
        parts: purpose -> bytes.
        tokens: of a batch; 0 without batches.
        recomputes: whether activations are recomputed in the backward pass.
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
    """Activations of a forward pass, with a layer's values summed in float32."""
    each = sizes.value * (4 * sizes.inner + 4 * sizes.attention + 6 * sizes.residual) + 8 * sizes.inner
    return int(FRAGMENTATION * tokens * each)


def backward_bytes(sizes: Sizes, tokens: int, recomputes: bool = False) -> int:
    """Activations that are kept for the backward pass."""
    layer = sizes.value * (4 * sizes.attention + 4 * sizes.inner) + 8 * sizes.residual
    passing = sizes.value * sizes.residual * sizes.layers
    each = layer + passing if recomputes else layer * sizes.layers
    return int(FRAGMENTATION * tokens * each)


def logit_bytes(sizes: Sizes, positions: int, backward: bool) -> int:
    """Logits of a chunk of positions, in all their copies."""
    chunk = min(max(4 * sizes.vocabulary, LOGIT_BYTES_AT_ONCE), 4 * sizes.vocabulary * positions)
    return int(chunk * (LOGIT_COPIES_BACKWARD if backward else LOGIT_COPIES))


def covariance_bytes(units: int) -> int:
    """The covariance of a module's inputs, and its buffered rows."""
    return 8 * units**2 + 4 * WAITING * units


def solving_bytes(units: int) -> int:
    """Beside the covariances: the quadratic form that a key minimises, which its Cholesky factor replaces."""
    return 8 * units**2


def product_bytes(units: int) -> int:
    """The centred rows of a product, and the product before it is added to a covariance: float32."""
    return 4 * units**2 + 4 * WAITING * units


def batch_plan(
    sizes: Sizes, room: int, backward: bool, row: int, max_tokens: int = MAX_TOKENS
) -> tuple[int, bool]:
    """Tokens of a batch, a power of two, and whether activations are recomputed.

    Args:
        room: bytes for the work.
        backward: whether gradients are computed.
        row: tokens of the longest row.
    """

    def fitting(recomputes: bool) -> int:
        for power in range(max_tokens.bit_length() - 1, -1, -1):
            tokens = 1 << power
            size = backward_bytes(sizes, tokens, recomputes) if backward else forward_bytes(sizes, tokens)
            if size + (logit_bytes(sizes, tokens, True) if backward else 0) <= room:
                return tokens
        return 1

    plain = fitting(False)
    if backward and plain < min(max_tokens, max(row, MIN_TOKENS)):
        recomputing = fitting(True)
        if recomputing > plain:
            return recomputing, True
    return plain, False


def sizes_of(source: ModelSource, value: int | None = None) -> Sizes:
    """The sizes of a model, in memory or still on disk.

    Args:
        value: bytes of a value in the computation; None uses the model's dtype, or the stored one.
    """
    anatomy, model = source.anatomy, getattr(source, "model", None)
    config = (_config(source.checkpoint) if model is None else model.config).get_text_config()
    if model is not None:
        value = model.dtype.itemsize
        weights = sum(parameter.nbytes for parameter in model.parameters())
        offloaded = offloaded_bytes(model)
        if offloaded:
            weights += max(offloaded_bytes(layer) for layer in anatomy.blocks) - offloaded
    else:
        stored, count = _stored(source.checkpoint)
        value = stored if value is None else value
        weights = count * value
    reached = max(1, getattr(config, "num_experts_per_tok", 1) or 1)
    sizes = Sizes(
        layers=anatomy.layers,
        residual=anatomy.residual,
        inner=max(_active_neurons(anatomy, layer, reached) for layer in range(anatomy.layers)),
        neurons=anatomy.neurons,
        attention=anatomy.width("attn_in"),
        keys=anatomy.head_dim * (getattr(config, "num_key_value_heads", None) or anatomy.heads),
        vocabulary=config.vocab_size,
        value=value,
        weights=weights,
    )
    planned = model is not None and not offloaded and all(weight.is_meta for weight in model.parameters())
    if planned and weights > memory_limit() - LIBRARIES - MIN_WORK:
        layer = max(sum(weight.nbytes for weight in block.parameters()) for block in anatomy.blocks)
        return replace(sizes, weights=max(layer, memory_beside_work(sizes)))
    return sizes


def _active_neurons(anatomy: Anatomy, layer: int, reached: int) -> int:
    """MLP neurons of a layer that are active for a token, which reaches so many routed experts."""
    return sum(
        part.width if part.experts is None else part.width // part.experts * min(reached, part.experts)
        for part in anatomy.parts(layer, "mlp")
    )


def read_weights(planned: LoadedModel, logits: bool) -> int:
    """Bytes of weights that a pass over text loads into memory.

    Args:
        logits: whether the LM head is used.
    """
    weights = sizes_of(planned).weights
    try:
        stored = _stored(planned.checkpoint)[0]
    except (BrocaError, ValueError):  # a config alone
        return weights
    offloads = weights < sum(parameter.nbytes for parameter in planned.model.parameters())
    if logits or offloads or planned.device.type == "cuda" or stored != planned.model.dtype.itemsize:
        return weights
    ends = (planned.model.get_input_embeddings(), planned.model.get_output_embeddings())
    embeddings = {id(end.weight): int(end.weight.nbytes) for end in ends if end is not None}
    return weights - sum(embeddings.values())


def room(loaded: LoadedModel) -> int:
    """Bytes for work on a loaded model: the limit, or a GPU's memory, less libraries and weights, at most ``WORK``, or
    ``GPU_FRACTION`` of a GPU.

    Raises:
        BrocaError: the weights leave none.
    """
    if loaded.device.type == "cuda":
        total = int(torch.cuda.get_device_properties(loaded.device).total_memory)
        on_it = (weight.nbytes for weight in loaded.model.parameters() if weight.device == loaded.device)
        return max(0, min(int(GPU_FRACTION * total), total - LIBRARIES - int(sum(on_it))))
    return min(WORK, max_room(loaded))


def covariance_room(loaded: LoadedModel) -> int:
    """Bytes for covariances and their solutions: half of ``room``."""
    return room(loaded) // 2


def memory_for_weights() -> int | None:
    """Maximum bytes of weights in main memory if a limit was set: the limit less libraries, work and other models."""
    return None if _limit is None else max(0, _limit - LIBRARIES - MIN_WORK - _other_models())


def memory_beside_work(sizes: Sizes) -> int:
    """Maximum bytes of weights in main memory if some stay on disk: what the largest work on a layer leaves."""
    width = max(sizes.inner, sizes.attention)
    solving = covariance_bytes(width) + solving_bytes(width)
    return max(0, memory_limit() - LIBRARIES - WORK - solving - _other_models())


def max_room(loaded: LoadedModel) -> int:
    """Maximum bytes for work on a loaded model.

    Raises:
        BrocaError: the weights leave none.
    """
    if loaded.device.type == "cuda":
        return room(loaded)
    weights = sizes_of(loaded).weights + _other_models(loaded.model)
    left = memory_limit() - LIBRARIES - weights
    if left <= 0:
        raise BrocaError(
            f"{loaded.name}: the weights of all loaded models need {weights / 1e9:.1f} GB and libraries "
            f"{LIBRARIES / 1e9:.1f} GB, but the limit is {memory_limit() / 1e9:.1f} GB: raise it (--max-memory), or use --dtype bfloat16"
        )
    return left


def batches_for(loaded: LoadedModel, backward: bool, row: int) -> tuple[int, bool]:
    """Tokens of a batch and whether activations are recomputed, for rows of up to ``row`` tokens.

    Raises:
        BrocaError: a row does not fit.
    """
    sizes, max_tokens = sizes_of(loaded), MAX_TOKENS_ON_GPU if loaded.device.type == "cuda" else MAX_TOKENS
    tokens, recomputes = batch_plan(sizes, room(loaded), backward, row, max_tokens)
    if tokens < row:
        # More than is fast, but a row cannot be split.
        tokens, recomputes = batch_plan(sizes, max_room(loaded), backward, row, max(max_tokens, row))
        needed = row_bytes(sizes, backward, row)
        if tokens < row and needed > max_room(loaded):
            fitting = batch_plan(sizes, max_room(loaded), backward, 1, max_tokens)[0]
            raise BrocaError(
                f"{loaded.name}: a row of {row} tokens needs {needed / 1e9:.1f} GB beside weights and libraries, and "
                f"{max_room(loaded) / 1e9:.1f} GB are left: rows of {fitting} tokens fit, or allow "
                f"{(needed + LIBRARIES + sizes.weights) / 1e9:.1f} GB (--max-memory)"
            )
        if tokens < row:
            tokens = row
            recomputes = backward and backward_bytes(sizes, row) + logit_bytes(sizes, row, True) > max_room(
                loaded
            )
    return tokens, recomputes


def common_batches(loaded: LoadedModel, backward: bool, row: int) -> tuple[int, bool]:
    """``batches_for`` of the process with the least memory: all processes of a launch must cut text alike."""
    tokens, recomputes = batches_for(loaded, backward, row)
    return (
        int(all_reduce(torch.tensor(tokens), torch.minimum)),
        bool(all_reduce(torch.tensor(int(recomputes)), torch.maximum)),
    )


def row_bytes(sizes: Sizes, backward: bool, row: int) -> int:
    """The minimum for one row."""
    if not backward:
        return forward_bytes(sizes, row)
    return backward_bytes(sizes, row, recomputes=True) + logit_bytes(sizes, row, True)


def kept_bytes(loaded: LoadedModel, tokens: int) -> int:
    """Hidden states of ``tokens`` between two layers."""
    sizes = sizes_of(loaded)
    return sizes.value * sizes.residual * tokens


def paused_bytes(loaded: LoadedModel, tokens: int) -> int:
    """What paused passes over ``tokens`` keep: embeddings and hidden states."""
    return 2 * kept_bytes(loaded, tokens)


def paused_room(loaded: LoadedModel, solving: int = 0) -> int:
    """Bytes for paused passes: what other work leaves, and of a CPU's memory no more than ``PAUSED_FRACTION``.

    Args:
        solving: bytes that are needed while the passes are paused.
    """
    if loaded.device.type == "cuda":
        return room(loaded) // 2
    least = LIBRARIES + sizes_of(loaded).weights + solving
    return min(int(PAUSED_FRACTION * least), max(0, max_room(loaded) - max(room(loaded), solving)))


def _config(checkpoint: Path) -> Any:
    import transformers

    return transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)


def _stored(checkpoint: Path) -> tuple[int, int]:
    """Bytes of a value of the widest floating-point dtype, and number of all values."""
    entries = tensor_entries(checkpoint).values()
    return (
        max(READABLE_DTYPES[entry.dtype].itemsize for entry in entries if entry.dtype in READABLE_DTYPES),
        sum(prod(entry.shape) for entry in entries),
    )
