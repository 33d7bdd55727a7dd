"""A sparse autoencoder of activations, and the activity of its features.

An autoencoder writes x ~ f W_dec + b_dec with features f [F]:

    z = (x - b_dec) W_enc + b_enc        b_dec is subtracted only if the config says so
    f = max(z, 0)                        standard
    f = z where z > max(threshold, 0)    jumprelu, else 0
    f = max(z, 0) of the k largest z     topk, else 0

One that reads inputs of length 1 has x / ||x|| in place of x; its features are then multiplied by ||x||, so that
f W_dec is in the units of x (b_dec is too, times ||x||).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Autoencoder:
    """A sparse autoencoder and its site.

    Attributes:
        encoder: float32 [d, F], W_enc.
        encoder_bias: float32 [F], b_enc.
        decoder: float32 [F, d], W_dec.
        decoder_bias: float32 [d], b_dec.
        layer: index of the layer.
        site: "attn_out", "mlp_out" or "block_out".
        threshold: float32 [F], for jumprelu, else None.
        largest: k, for topk, else None.
        centred: whether b_dec is subtracted from the input.
        unit: whether it reads inputs of length 1.
        name: in files and errors.
        fingerprint: of the model that it was trained on, if the file has it.
    """

    encoder: torch.Tensor
    encoder_bias: torch.Tensor
    decoder: torch.Tensor
    decoder_bias: torch.Tensor
    layer: int
    site: str = "block_out"
    threshold: torch.Tensor | None = None
    largest: int | None = None
    centred: bool = False
    unit: bool = False
    name: str = "the autoencoder"
    fingerprint: str | None = None

    @property
    def features(self) -> int:
        return self.encoder.shape[1]

    def to(self, device: torch.device) -> Autoencoder:
        return replace(
            self,
            encoder=self.encoder.to(device),
            encoder_bias=self.encoder_bias.to(device),
            decoder=self.decoder.to(device),
            decoder_bias=self.decoder_bias.to(device),
            threshold=None if self.threshold is None else self.threshold.to(device),
        )

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Features, float32 [..., F], of activations [..., d]."""
        inputs = values.float()
        length = inputs.norm(dim=-1, keepdim=True) if self.unit else None
        if length is not None:
            inputs = inputs / torch.where(length > 0, length, 1.0)
        if self.centred:
            inputs = inputs - self.decoder_bias
        before = inputs @ self.encoder + self.encoder_bias
        active = before.clamp(min=0)
        if self.threshold is not None:
            active = torch.where(before > self.threshold, active, 0.0)
        if self.largest is not None:
            best = active.topk(self.largest, dim=-1)
            active = torch.zeros_like(active).scatter_(-1, best.indices, best.values)
        return active if length is None else active * length


@dataclass(frozen=True)
class Firing:
    """Activity of an autoencoder's features on texts.

    Attributes:
        texts: number of texts.
        fired: int64 [F], number of texts on which the feature fires.
        activation: float64 [F], mean over texts of a text's activation, its mean over the counted tokens.
        square: float64 [F], mean over texts of the square of a text's activation.
    """

    texts: int
    fired: torch.Tensor
    activation: torch.Tensor
    square: torch.Tensor


@dataclass(frozen=True)
class LanguageFeatures:
    """The features of a language at the site of an autoencoder, and their vector.

    Attributes:
        features: int64 [S], ascending.
        vector: float64 [d].
        notes: name -> a figure or a list, for the metadata of the direction.
    """

    features: torch.Tensor
    vector: torch.Tensor
    notes: dict[str, Any] = field(default_factory=dict)
