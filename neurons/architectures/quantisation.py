"""Whether a config says that its checkpoint is quantised, in which way, and what to do to edit it."""

from __future__ import annotations

from typing import Any

_FP8 = "fp8"
# What dequantises the kinds that Broca does not, by quant_method of the config.
_OTHER_WAYS = {
    "mxfp4": "load it in transformers with quantization_config=Mxfp4Config(dequantize=True) and save it",
    "bitsandbytes": "load it in transformers, call model.dequantize() and save it",
    "compressed-tensors": "load it in transformers with "
    "quantization_config=CompressedTensorsConfig(run_compressed=False) and save it",
    _FP8: "load it in transformers with quantization_config=FineGrainedFP8Config(dequantize=True) and save it",
}


def quantisation(settings: Any) -> dict[str, Any] | None:
    """The ``quantization_config`` of a config (JSON values), or of one of its parts; None where it has none."""
    # Models of several parts keep the setting in the part, for example under text_config.
    if not isinstance(settings, dict):
        return None
    own = settings.get("quantization_config")
    if own is not None:
        return own if isinstance(own, dict) else {}
    return next((found for part in settings.values() if (found := quantisation(part)) is not None), None)


def is_quantised(settings: Any) -> bool:
    return quantisation(settings) is not None


def fp8_block_size(settings: Any) -> tuple[int, int] | None:
    """(a, b) of a config whose weights are FP8 blocks of a x b numbers; None for any other."""
    found = quantisation(settings) or {}
    size = found.get("weight_block_size")
    if found.get("quant_method") != _FP8 or not isinstance(size, list) or len(size) != 2:
        return None
    if not all(type(item) is int and item > 0 for item in size):
        return None
    return size[0], size[1]


def way_out(settings: Any) -> str:
    """What to do with a quantised checkpoint that shall be edited, as the end of a sentence."""
    if fp8_block_size(settings) is not None:
        return "write it unquantised first, with `broca export MODEL --dequantise bf16 --out DIRECTORY`"
    method = (quantisation(settings) or {}).get("quant_method")
    other = _OTHER_WAYS.get(str(method))
    return "start from the unquantised checkpoint" + ("" if other is None else f", or {other}")
