"""The dtype in which a checkpoint is served, if this machine computes in it at full speed."""

from __future__ import annotations

import torch

from neurons.models.source import locate, pick_device, read_config


def own_dtype(model: str, device: str = "auto", dtype: str = "auto") -> str:
    """The argument ``dtype`` of ``load_model`` for the checkpoint's dtype; float32 on a CPU without instructions for it.

    Args:
        model: hub id or local directory.
        device: as in ``load_model``.
        dtype: what the user chose, which is returned; auto: the checkpoint's.

    Returns:
        For auto "bfloat16", or "auto", which is float32 on a CPU.

    Raises:
        UsageError: no such model or device.
        BrocaError: a config that cannot be read.
    """
    checkpoint = locate(model)
    if dtype != "auto" or pick_device(device).type != "cpu":
        return dtype
    config = read_config(model, checkpoint, quantised=True)
    stored = config.get_text_config().dtype or config.dtype
    return "bfloat16" if stored == torch.bfloat16 and _cpu_has_bfloat16() else "auto"


def _cpu_has_bfloat16() -> bool:
    # A torch without oneDNN, as for macOS, lacks the function.
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
