"""The norm between an output module and the residual stream, and the module's inputs and outputs on text.

The norm is the child of the decoder layer whose input is bit-identical to the output of the module, so no names of
modules are needed.  Only an RMSNorm, g * y / sqrt(|y|^2 / d + eps), is supported (Gemma 2 and 3, OLMo 2).  Its gain
is its output for a vector of ones, and the formula is checked on text.  What it adds must reach the residual stream,
at most times one number (Gemma 4's scalar of a layer), which counts as a part of the gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from editing.methods.norm_value import rms_norm
from neurons.architectures.anatomy import COMMON_SITES, first, output_module
from neurons.architectures.self_check import example_ids, residual_factor
from neurons.architectures.sites import Routed
from neurons.errors import BrocaError
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Position, forward, read_text
from neurons.text.batches import TokenBatch
from neurons.text.sampling import even_order

MAX_TOKENS = 2048
TOLERANCE = 2e-2


@dataclass(frozen=True)
class OutputNorm:
    """The RMSNorm after an output module.

    Attributes:
        gain: g, float64 [d], times the number by which the layer multiplies the norm's output.
        eps: eps of the norm.
    """

    gain: torch.Tensor
    eps: float


@dataclass(frozen=True)
class SourceTokens:
    """Inputs and outputs of an output module on tokens.

    Attributes:
        inputs: float64 [T, n].
        outputs: float64 [T, d], before the norm.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor


def output_norm(loaded: LoadedModel, layer: int, module: str, batch: TokenBatch) -> OutputNorm:
    """Find the norm between a module's output and the residual stream.

    Args:
        loaded: the model.
        layer: index of the layer.
        module: "attn" or "mlp".
        batch: text for the search.

    Raises:
        BrocaError: no module of the layer has the output as its input, or it is not an RMSNorm, or its output is changed
            before it reaches the residual stream.
    """
    where = f"{loaded.name}: layer {layer}, {module}"
    loaded.anatomy.require(module, [layer])
    output = output_module(loaded.anatomy, f"{module}_out", layer)
    assert output is not None
    outputs: list[torch.Tensor] = []
    followers: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def keep(_: nn.Module, __: Any, made: Any) -> None:
        outputs[:] = [first(made).detach().clone()]

    def compare(child: nn.Module, inputs: Any, output: Any) -> None:
        if outputs and inputs and isinstance(inputs[0], torch.Tensor) and torch.equal(inputs[0], outputs[0]):
            followers.append((child, inputs[0].detach().clone(), first(output).detach().clone()))

    handles = [output.register_forward_hook(keep)]
    handles += [
        child.register_forward_hook(compare)
        for child in loaded.anatomy.blocks[layer].children()
        if child is not output
    ]
    try:
        with torch.no_grad():
            forward(loaded.model, batch.to(loaded.device))
    finally:
        for handle in handles:
            handle.remove()
    candidates = [
        item for item in followers if item[2].shape == item[1].shape and len(list(item[0].children())) == 0
    ]
    if len(candidates) != 1:
        raise BrocaError(
            f"{where}: its output is changed on its way to the residual stream, and no one norm that does it can be "
            f"identified ({len(candidates)} candidates), so a value cannot be solved: use another method"
        )
    norm, inputs, normed = candidates[0]
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if not isinstance(eps, float):
        raise BrocaError(
            f"{where}: {type(norm).__name__} has no eps, so a value through it cannot be solved: use another method"
        )
    ones = torch.ones(1, loaded.anatomy.residual, device=inputs.device, dtype=inputs.dtype)
    with torch.no_grad():
        gain = norm(ones)[0].double().cpu() * (1 + eps) ** 0.5
    rows = inputs.flatten(0, -2).double().cpu()
    expected = rms_norm(rows, gain, eps)
    difference = float((expected - normed.flatten(0, -2).double().cpu()).norm())
    if not difference <= TOLERANCE * float(expected.norm()):
        raise BrocaError(
            f"{where}: {type(norm).__name__} is not an RMSNorm, so a value through it cannot be solved: use another "
            "method"
        )
    path = next(path for path, child in loaded.anatomy.blocks[layer].named_children() if child is norm)
    ids = example_ids(loaded.model.config.get_text_config().vocab_size, loaded.device)
    factor = residual_factor(loaded.model, loaded.anatomy, path, layer, ids)
    if factor is None:
        raise BrocaError(
            f"{where}: the output of {path} does not reach the residual stream as it is, so a value through it cannot be "
            "solved: use another method"
        )
    return OutputNorm(gain * factor, eps)


def source_tokens(
    loaded: LoadedModel, layer: int, module: str, batches: Sequence[TokenBatch], max_tokens: int = MAX_TOKENS
) -> SourceTokens:
    """Inputs and outputs of a module on ``max_tokens`` counted tokens, of rows evenly from all; of a mixture, the
    shared expert's inputs."""
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def keep(kept: list[torch.Tensor], values: torch.Tensor, routed: Routed | None, at: Position) -> None:
        kept.append(at.rows(values).double().cpu())

    counts = torch.cat([batch.counted.sum(1) for batch in batches])
    # Batches are in the order of their rows' lengths.
    order = torch.tensor(even_order(len(counts)))
    chosen = torch.zeros(len(counts), dtype=torch.bool)
    chosen[order[counts[order].cumsum(0) - counts[order] < max_tokens]] = True
    few = [
        (0, TokenBatch(batch.ids[rows], batch.attention[rows], batch.counted[rows], starts=batch.starts))
        for batch, rows in zip(batches, chosen.split([len(batch.ids) for batch in batches]), strict=True)
        if rows.any()
    ]
    site = COMMON_SITES[module]
    readers = {(site, layer): partial(keep, inputs), (f"{module}_out", layer): partial(keep, outputs)}
    read_text(loaded, few, readers, layers=layer + 1)
    width = loaded.anatomy.width(site, layer)
    return SourceTokens(torch.cat(inputs)[:max_tokens, :width], torch.cat(outputs)[:max_tokens])
