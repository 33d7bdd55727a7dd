"""The type that a checkpoint is served in, where this machine computes in it at full speed."""

from __future__ import annotations

import torch

from neurons.models.source import locate, pick_device


def own_dtype(model: str, device: str = "auto") -> str:
    """What ``load_model`` takes as ``dtype`` to compute as the checkpoint is served: its own type, but float32 on a CPU that
    has no instructions for it.

    Args:
        model: hub id or local directory.
        device: as ``load_model``.

    Raises:
        UsageError: no such model or device.
    """
    import transformers

    checkpoint = locate(model)
    if pick_device(device).type != "cpu":
        return "auto"
    config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    stored = config.get_text_config().dtype or config.dtype
    return "bfloat16" if stored == torch.bfloat16 and _cpu_has_bfloat16() else "auto"


def _cpu_has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
