"""Weights in 4 or 8 bits with bitsandbytes: for activations and gradients, not for edits."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from neurons.errors import UsageError

BITS = (4, 8)
_QUANTISED = ("Params4bit", "Int8Params")


def quantised_settings(bits: int) -> dict[str, Any]:
    """The provenance that files record for results from quantised weights.

    Args:
        bits: 4 (NF4) or 8 (LLM.int8).

    Raises:
        UsageError: another number, or bitsandbytes is not installed.
    """
    if bits not in BITS:
        raise UsageError(f"{bits} bits are not supported: choose 4 or 8")
    try:
        installed = version("bitsandbytes")
    except PackageNotFoundError as error:
        raise UsageError(
            f"--load-in-{bits}bit needs the package bitsandbytes, which is not installed: "
            "pip install bitsandbytes"
        ) from error
    return {"bits": bits, "type": "nf4" if bits == 4 else "int8", "bitsandbytes": installed}


def quantisation_config(bits: int, dtype: Any) -> Any:
    """transformers' configuration for loading in 4 or 8 bits.

    Args:
        bits: 4 or 8.
        dtype: of the computation; None is float32.
    """
    import transformers

    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )


def quantised_bytes(model: Any, bits: int, each: int) -> int:
    """Bytes of a model's weights when quantised: of linear modules without the LM head; fused experts stay as they are.

    Args:
        model: the unquantised model, which may be empty.
        bits: 4 or 8.
        each: bytes of another weight.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = {
        id(part.weight) for part in model.modules() if type(part) in (nn.Linear, Conv1D) and part is not head
    }
    return sum(
        weight.numel() * bits // 8 if id(weight) in linear else weight.numel() * each
        for weight in model.parameters()
    )


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes' layout of the weights from loading.

    On some CPUs it repacks them at the first pass without gradients; later passes then have no gradients, and
    the weights can no longer be dequantised.
    """
    for module in model.modules():
        owner: Any = module
        if hasattr(owner, "support_avx512bf16_for_cpu"):
            owner.support_avx512bf16_for_cpu = False


def dequantised(module: nn.Module, parameter: torch.Tensor) -> torch.Tensor:
    """A quantised parameter dequantised, in the model's shape; any other parameter unchanged."""
    if type(parameter).__name__ not in _QUANTISED:
        return parameter
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    from transformers.pytorch_utils import Conv1D

    owner: Any = module
    values: torch.Tensor = dequantize_bnb_weight(parameter, getattr(owner, "state", None))
    # bitsandbytes has only linear modules.
    return values.T if issubclass(owner.source_cls, Conv1D) else values
