"""Whether and how a checkpoint is quantised, from its config, and how to get an editable one."""

from __future__ import annotations

from typing import Any

_FP8, _MXFP4 = "fp8", "mxfp4"
# How to dequantise kinds that Broca does not, by quant_method of the config.
_REMEDIES = {
    "bitsandbytes": "load it in transformers, call model.dequantize() and save it",
    "compressed-tensors": "load it in transformers with "
    "quantization_config=CompressedTensorsConfig(run_compressed=False) and save it",
    _FP8: "load it in transformers with quantization_config=FineGrainedFP8Config(dequantize=True) and save it",
}


def quantisation(settings: Any) -> dict[str, Any] | None:
    """The ``quantization_config`` of a config (JSON values), or of one of its parts; None without one."""
    # Models of several parts have the setting in a part, for example under text_config.
    if not isinstance(settings, dict):
        return None
    config = settings.get("quantization_config")
    if config is not None:
        return config if isinstance(config, dict) else {}
    return next((of for part in settings.values() if (of := quantisation(part)) is not None), None)


def is_quantised(settings: Any) -> bool:
    return quantisation(settings) is not None


def fp8_tile_size(settings: Any) -> tuple[int, int] | None:
    """(a, b) of a config whose weights are FP8 in tiles of a x b numbers; None for any other."""
    config = quantisation(settings) or {}
    size = config.get("weight_block_size")
    if config.get("quant_method") != _FP8 or not isinstance(size, list) or len(size) != 2:
        return None
    if not all(type(item) is int and item > 0 for item in size):
        return None
    return size[0], size[1]


def is_mxfp4(settings: Any) -> bool:
    """Whether the weights are in 4 bits with a scale for 32 numbers, as gpt-oss's experts are."""
    return (quantisation(settings) or {}).get("quant_method") == _MXFP4


def quantised_remedy(settings: Any) -> str:
    """How to get an editable checkpoint from a quantised one, as the end of a sentence."""
    if fp8_tile_size(settings) is not None or is_mxfp4(settings):
        return "write it unquantised first, with `broca export MODEL --dequantise bf16 --out DIRECTORY`"
    method = (quantisation(settings) or {}).get("quant_method")
    other = _REMEDIES.get(str(method))
    return "start from the unquantised checkpoint" + ("" if other is None else f", or {other}")
