"""The norm between an output module and the residual stream, found by what it is given, and what passes it.

Nothing names the norm of a family: it is the child of the decoder layer whose input is, bit for bit, what the
module returned.  Only an RMSNorm, g * y / sqrt(|y|^2 / d + eps), is taken (Gemma 2 and 3, OLMo 2): its gain
is what it returns for a vector of ones, and its formula is compared with it on the tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from editing.methods.norm_value import rms_norm
from neurons.architectures.anatomy import first, site_module
from neurons.architectures.sites import Routed
from neurons.errors import BrocaError
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Position, PositionReader, forward, read_text
from neurons.text.batches import TokenBatch

MOST_TOKENS = 2048
SAME = 2e-2


@dataclass(frozen=True)
class OutputNorm:
    """The RMSNorm after an output module.

    Attributes:
        gain: g, float64 [d].
        eps: of the norm.
    """

    gain: torch.Tensor
    eps: float


@dataclass(frozen=True)
class SourceTokens:
    """What an output module is given and returns on some tokens.

    Attributes:
        inputs: float64 [T, n].
        outputs: float64 [T, d], before the norm.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor


def output_norm(loaded: LoadedModel, layer: int, block: str, batch: TokenBatch) -> OutputNorm:
    """Find the norm that a block's output passes on its way to the residual.

    Args:
        loaded: the model.
        layer: which layer.
        block: "attn" or "mlp".
        batch: some text.

    Raises:
        BrocaError: no module of the layer is given the output as it is, or it is no RMSNorm.
    """
    where = f"{loaded.name}: layer {layer}, {block}"
    module, _ = site_module(loaded.anatomy, f"{block}_out", layer)
    written: list[torch.Tensor] = []
    followers: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        written[:] = [first(output).detach().clone()]

    def compare(child: nn.Module, inputs: Any, output: Any) -> None:
        if written and inputs and isinstance(inputs[0], torch.Tensor) and torch.equal(inputs[0], written[0]):
            followers.append((child, inputs[0].detach().clone(), first(output).detach().clone()))

    handles = [module.register_forward_hook(keep)]
    handles += [
        child.register_forward_hook(compare)
        for child in loaded.anatomy.blocks[layer].children()
        if child is not module
    ]
    try:
        with torch.no_grad():
            forward(loaded.model, batch.to(loaded.device))
    finally:
        for handle in handles:
            handle.remove()
    found = [
        item for item in followers if item[2].shape == item[1].shape and len(list(item[0].children())) == 0
    ]
    if len(found) != 1:
        raise BrocaError(
            f"{where}: between the module and the residual stands a norm that is not told from the layer's "
            "other parts, so no value can be written through it: use another method"
        )
    norm, inputs, outputs = found[0]
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if not isinstance(eps, float):
        raise BrocaError(f"{where}: {type(norm).__name__} has no eps, so no value can be written through it")
    ones = torch.ones(1, loaded.anatomy.residual, device=inputs.device, dtype=inputs.dtype)
    with torch.no_grad():
        gain = norm(ones)[0].double().cpu() * (1 + eps) ** 0.5
    rows = inputs.flatten(0, -2).double().cpu()
    expected = rms_norm(rows, gain, eps)
    difference = float((expected - outputs.flatten(0, -2).double().cpu()).norm())
    if not difference <= SAME * float(expected.norm()):
        raise BrocaError(
            f"{where}: {type(norm).__name__} is no RMSNorm, so no value can be written through it: use another "
            "method"
        )
    return OutputNorm(gain, eps)


def source_tokens(
    loaded: LoadedModel, layer: int, block: str, batches: Sequence[TokenBatch], most: int = MOST_TOKENS
) -> SourceTokens:
    """Inputs and outputs of a module on the first ``most`` counted tokens.

    Raises:
        BrocaError: the MLP of a mixture, whose experts share no input.
    """
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def keep(kept: list[torch.Tensor]) -> PositionReader:
        def read(values: torch.Tensor, routed: Routed | None, at: Position) -> None:
            if routed is not None:
                raise BrocaError("a value through the norm after experts is not solved: take --blocks attn")
            kept.append(at.rows(values).double().cpu())

        return read

    before = itertools.accumulate((int(batch.counted.sum()) for batch in batches), initial=0)
    enough = [(0, batch) for tokens, batch in zip(before, batches, strict=False) if tokens < most]
    read_text(loaded, enough, {(f"{block}_in", layer): keep(inputs), (f"{block}_out", layer): keep(outputs)})
    return SourceTokens(torch.cat(inputs)[:most], torch.cat(outputs)[:most])
