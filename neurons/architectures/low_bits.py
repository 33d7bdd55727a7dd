"""Weights in 4 or 8 bits, by bitsandbytes: enough to read activations and gradients, not to edit."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from neurons.errors import UsageError

BITS = (4, 8)
_QUANTISED = ("Params4bit", "Int8Params")


def quantised_settings(bits: int) -> dict[str, Any]:
    """What files say of figures that were read off quantised weights.

    Args:
        bits: 4 (NF4) or 8 (LLM.int8).

    Raises:
        UsageError: another number, or bitsandbytes is not installed.
    """
    if bits not in BITS:
        raise UsageError(f"weights cannot be loaded in {bits} bits: choose 4 or 8")
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
        dtype: in which is computed; None: float32.
    """
    import transformers

    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )


def keep_layout(model: nn.Module) -> None:
    """Have bitsandbytes leave the weights as it laid them out on loading.

    On some CPUs it packs them anew at the first pass without gradients; passes with gradients then have none,
    and what the weights stand for can no longer be read.
    """
    for module in model.modules():
        owner: Any = module
        if hasattr(owner, "support_avx512bf16_for_cpu"):
            owner.support_avx512bf16_for_cpu = False


def dequantised(module: nn.Module, parameter: torch.Tensor) -> torch.Tensor:
    """The numbers that a quantised parameter stands for, shaped as the model's own; any other as it is."""
    if type(parameter).__name__ not in _QUANTISED:
        return parameter
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    from transformers.pytorch_utils import Conv1D

    owner: Any = module
    values: torch.Tensor = dequantize_bnb_weight(parameter, getattr(owner, "state", None))
    # bitsandbytes has linear modules alone.
    return values.T if issubclass(owner.source_cls, Conv1D) else values
