"""Sparse autoencoders on disk: SAE-Lens directories, read and written, and Gemma-Scope archives; never unpickled.

SAE-Lens      directory of cfg.json and sae_weights.safetensors: W_enc [d, F], b_enc [F], W_dec [F, d],
              b_dec [d], with jumprelu also threshold [F]; the path of the weights file works too.
              Inputs of length 1 are its constant_norm_rescale, whose inputs have length sqrt(d)
Gemma-Scope   params.npz (arXiv 2408.05147) of the same names, always jumprelu, b_dec not subtracted
              from the input; no file has its layer, which must be given, nor its site: of the residual stream (-res)
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from editing.directions.autoencoder import Autoencoder
from neurons.errors import BrocaError, UsageError, first_line
from neurons.files.artifact import json_bytes

CONFIG, WEIGHTS, ARCHIVE = "cfg.json", "sae_weights.safetensors", "params.npz"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
# TransformerLens hook -> site.
HOOKS = {"hook_resid_post": "block_out", "hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out"}
UNIT = "constant_norm_rescale"
FORMAT = "6.0.0"  # version of the configuration; without it SAE-Lens reads an older one


def read_autoencoder(path: Path, layer: int | None = None) -> Autoencoder:
    """Read an autoencoder.

    Args:
        path: a SAE-Lens directory, its sae_weights.safetensors, a Gemma-Scope directory or its params.npz.
        layer: of its site; None takes the configuration's.

    Raises:
        UsageError: no autoencoder, a missing layer, another layer than the configuration's, or Gemma-Scope's of attention
            or MLP.
        BrocaError: an unreadable file, or an unknown kind of autoencoder.
    """
    if path.is_dir():
        candidates = [path / name for name in (WEIGHTS, ARCHIVE) if (path / name).is_file()]
        if not candidates:
            raise UsageError(f"{path}: holds no autoencoder ({CONFIG} and {WEIGHTS}, or {ARCHIVE})")
        path = candidates[0]
    if not path.is_file():
        raise UsageError(f"{path}: there is no such autoencoder")
    if path.suffix == ".npz":
        return _gemma_scope(path, layer)
    return _sae_lens(path, layer)


def write_autoencoder(directory: Path, autoencoder: Autoencoder, metadata: Mapping[str, Any]) -> None:
    """Write an autoencoder without threshold and k as a SAE-Lens directory.

    Args:
        directory: an existing one for the files.
        autoencoder: the autoencoder.
        metadata: JSON values about it.
    """
    assert autoencoder.threshold is None and autoencoder.largest is None
    hook = next(hook for hook, site in HOOKS.items() if site == autoencoder.site)
    scaled = _rescaled(autoencoder, len(autoencoder.encoder) ** -0.5) if autoencoder.unit else autoencoder
    parts = (scaled.encoder, scaled.encoder_bias, scaled.decoder, scaled.decoder_bias)
    config = {
        "architecture": "standard",
        "d_in": len(autoencoder.encoder),
        "d_sae": autoencoder.features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": autoencoder.centred,
        "normalize_activations": UNIT if autoencoder.unit else "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": FORMAT,
            "hook_name": f"blocks.{autoencoder.layer}.{hook}",
            "fingerprint": autoencoder.fingerprint,
            **metadata,
        },
    }
    (directory / WEIGHTS).write_bytes(save(dict(zip(NAMES, parts, strict=True))))
    (directory / CONFIG).write_bytes(json_bytes(config))


def _rescaled(autoencoder: Autoencoder, scale: float) -> Autoencoder:
    """The same autoencoder for inputs that are divided by a scale."""
    return replace(
        autoencoder,
        encoder=autoencoder.encoder * scale,
        decoder=autoencoder.decoder / scale,
        decoder_bias=autoencoder.decoder_bias / scale,
    )


def _gemma_scope(path: Path, layer: int | None) -> Autoencoder:
    if layer is None:
        raise UsageError(f"{path}: the file does not name its layer: give --sae-layer")
    if re.search(r"gemma-scope-[^/]*-(att|mlp)\b", str(path.absolute())):
        raise UsageError(
            f"{path}: reads attention or MLP at a place that Broca does not read: give one of -res"
        )
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BrocaError(f"{path}: not a readable archive of arrays ({first_line(error)})") from error
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind == "f"}
    _require(path, tensors, (*NAMES, "threshold"))
    return _autoencoder(path, tensors, layer, "block_out", threshold=tensors["threshold"].float())


def _sae_lens(path: Path, layer: int | None) -> Autoencoder:
    config = _config(path.parent / CONFIG)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BrocaError(f"{path}: not a readable safetensors file ({first_line(error)})") from error
    _require(path, tensors, NAMES)
    architecture = config.get("architecture") or "standard"
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    if architecture not in ("standard", "jumprelu", "topk"):
        raise BrocaError(f"{path}: architecture {architecture!r}: Broca supports standard, jumprelu and topk")
    if architecture != "topk" and activation != "relu":
        raise BrocaError(f"{path}: activation {activation!r}: Broca supports relu, jumprelu and topk")
    for name, plain in (
        ("normalize_activations", (None, "none", UNIT)),
        ("rescale_acts_by_decoder_norm", (None, False)),
        ("finetuning_scaling_factor", (None, False)),
        ("reshape_activations", (None, "none")),
    ):
        if config.get(name) not in plain:
            raise BrocaError(
                f"{path.parent / CONFIG}: {name} is {config[name]!r}, which is not supported: fold it "
                "into the weights with SAE-Lens and save it again"
            )
    threshold = largest = None
    if architecture == "jumprelu":
        _require(path, tensors, ("threshold",))
        threshold = tensors["threshold"].float()
    if architecture == "topk":
        largest = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
        if not isinstance(largest, int) or not 1 <= largest <= len(tensors["b_enc"]):
            raise BrocaError(
                f"{path.parent / CONFIG}: k is {largest!r}: topk needs the number of features that may fire"
            )
    stated, site = _place(path.parent / CONFIG, config)
    if stated is None and layer is None:
        raise UsageError(f"{path.parent / CONFIG}: does not name its layer: give --sae-layer")
    if stated is not None and layer is not None and stated != layer:
        raise UsageError(f"{path.parent / CONFIG}: reads layer {stated}, but --sae-layer is {layer}")
    chosen_layer = stated if layer is None else layer
    assert chosen_layer is not None
    centred = bool(config.get("apply_b_dec_to_input", True))
    read = _autoencoder(path, tensors, chosen_layer, site, threshold, largest, centred)
    read = replace(read, fingerprint=(config.get("metadata") or {}).get("fingerprint"))
    if config.get("normalize_activations") != UNIT:
        return read
    return replace(_rescaled(read, len(read.encoder) ** 0.5), unit=True)


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path}: is missing: it configures the autoencoder beside it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrocaError(f"{path}: not valid JSON ({first_line(error)})") from error
    if not isinstance(config, dict):
        raise BrocaError(f"{path}: not a JSON object")
    return config


def _place(path: Path, config: Mapping[str, Any]) -> tuple[int | None, str]:
    """(layer, or None if not stated; site)."""
    inner = config.get("metadata") or config.get("meta") or {}
    hook = config.get("hook_name") or config.get("hook_point") or inner.get("hook_name")
    if hook is None:
        return None, "block_out"
    matched = re.fullmatch(r"blocks\.(\d+)\.(\w+)", hook)
    if matched and matched[2] in HOOKS:
        return int(matched[1]), HOOKS[matched[2]]
    if matched and matched[2] == "hook_resid_pre" and int(matched[1]) > 0:
        # The input of a layer is the output of the layer before.
        return int(matched[1]) - 1, "block_out"
    named = re.fullmatch(r"(?:model\.)?layers\.(\d+)", hook)
    if named:
        return int(named[1]), "block_out"
    raise BrocaError(
        f"{path}: reads at {hook!r}: Broca supports blocks.L.hook_resid_post, hook_attn_out and hook_mlp_out"
    )


def _require(path: Path, tensors: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise BrocaError(
            f"{path}: has no floating-point array {', '.join(missing)}: not an autoencoder of a known layout"
        )


def _autoencoder(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    layer: int,
    site: str,
    threshold: torch.Tensor | None = None,
    largest: int | None = None,
    centred: bool = False,
) -> Autoencoder:
    encoder, encoder_bias, decoder, decoder_bias = (tensors[name].float() for name in NAMES)
    parts = [encoder, encoder_bias, decoder, decoder_bias, *([] if threshold is None else [threshold])]
    d, features = encoder.shape if encoder.ndim == 2 else (0, 0)
    shapes = [(d, features), (features,), (features, d), (d,), (features,)]
    if any(tuple(part.shape) != shape for part, shape in zip(parts, shapes, strict=False)) or not features:
        shown = ", ".join(f"{name} {list(tensors[name].shape)}" for name in NAMES)
        raise BrocaError(f"{path}: inconsistent shapes: {shown}")
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise BrocaError(f"{path}: holds numbers that are not finite: download the file again")
    return Autoencoder(
        encoder,
        encoder_bias,
        decoder,
        decoder_bias,
        layer,
        site,
        threshold,
        largest,
        centred,
        name=path.parent.name,
    )
