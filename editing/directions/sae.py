"""SAE: the features of a sparse autoencoder that only the target language brings out (LangFIR, arXiv 2604.03532).

An autoencoder of the residual stream writes x ~ f W_dec + b_dec with features f [F]:

    z = (x - b_dec) W_enc + b_enc        b_dec is taken off only where the autoencoder says so
    f = max(z, 0)                        standard
    f = z where z > max(threshold, 0)    jumprelu, else 0
    f = max(z, 0) of the k largest z     topk, else 0

A feature fires on a text where it is above 0 on some counted token.  With p_f the share of the target's
texts that f fires on and q_f the share of random-token sequences of the same lengths,

    S = {f: p_f > target_rate} minus {f: q_f > random_rate}
    v = sum_{f in S} a_f W_dec[f]        a_f: mean over the target's texts of the mean over their tokens

What fires on random tokens fires on any text.  Both rates are 0.5 unless said otherwise, "most" read as more
than half: a random sequence over a vocabulary of many languages holds tokens of the target too.

The length is the method's own: what the features add to the residual in the target's texts.  At other layers
and sites, of which the autoencoder says nothing, the nearest autoencoder's direction is taken as a line:
v = (u . delta) u with delta DiffMean there (``editing.directions.length``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from editing.directions.method import DirectionMethod
from neurons.errors import BrocaError, UsageError
from neurons.scorers.setting import setting

TARGET_RATE = RANDOM_RATE = 0.5


@dataclass(frozen=True)
class Autoencoder:
    """A sparse autoencoder and where it reads.

    Attributes:
        encoder: float32 [d, F], W_enc.
        encoder_bias: float32 [F], b_enc.
        decoder: float32 [F, d], W_dec.
        decoder_bias: float32 [d], b_dec.
        layer: index of the layer.
        site: "attn_out", "mlp_out" or "block_out".
        threshold: float32 [F], of jumprelu; None: not one.
        largest: k of topk; None: not one.
        centred: whether b_dec is taken off the input.
        name: as files and errors call it.
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
    name: str = "the autoencoder"

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
        if self.centred:
            inputs = inputs - self.decoder_bias
        before = inputs @ self.encoder + self.encoder_bias
        active = before.clamp(min=0)
        if self.threshold is not None:
            active = torch.where(before > self.threshold, active, 0.0)
        if self.largest is not None:
            best = active.topk(self.largest, dim=-1)
            active = torch.zeros_like(active).scatter_(-1, best.indices, best.values)
        return active


@dataclass(frozen=True)
class Firing:
    """How an autoencoder's features fire on some texts.

    Attributes:
        texts: how many.
        fired: int64 [F], texts with a counted token where the feature is above 0.
        activation: float64 [F], mean over texts of the mean over their counted tokens.
    """

    texts: int
    fired: torch.Tensor
    activation: torch.Tensor


@dataclass(frozen=True)
class LanguageFeatures:
    """The features of a language and the vector that they make.

    Attributes:
        features: int64 [S], ascending.
        vector: float64 [d].
    """

    features: torch.Tensor
    vector: torch.Tensor


def language_features(
    target: Firing,
    random: Firing,
    decoder: torch.Tensor,
    target_rate: float = TARGET_RATE,
    random_rate: float = RANDOM_RATE,
) -> LanguageFeatures:
    """The target's features S and v.

    Args:
        target: on the target's texts.
        random: on random-token sequences.
        decoder: [F, d].
        target_rate: in [0, 1): a feature must fire on more than this share of the target's texts.
        random_rate: in [0, 1]: and on no more than this share of the random sequences.

    Raises:
        UsageError: a rate out of range.
        BrocaError: no feature passes, or those that do make a vector of length 0.
    """
    if not 0 <= target_rate < 1 or not 0 <= random_rate <= 1:
        raise UsageError(
            f"target rate {target_rate} and random rate {random_rate}: they are shares, the first below 1"
        )
    often = target.fired.double() / target.texts > target_rate
    always = random.fired.double() / random.texts > random_rate
    features = (often & ~always).nonzero().flatten()
    vector = target.activation[features] @ decoder[features].double()
    if not vector.norm() > 0:
        raise BrocaError(
            f"none of the autoencoder's {len(often)} features is the target's own: {int(often.sum())} fire on "
            f"more than {target_rate:g} of its texts, and all of these on more than {random_rate:g} of the "
            "random-token sequences: take a lower target_rate or a higher random_rate"
        )
    return LanguageFeatures(features, vector)


@dataclass(frozen=True)
class Sae(DirectionMethod):
    """The method, whose finders are made from the autoencoders (``editing.directions.take``)."""

    name = "sae"
    line = "features of a sparse autoencoder that fire on the target's texts and not on random tokens"
    source = "arXiv 2604.03532"
    needs = "text, autoencoder"

    target_rate: float = setting(TARGET_RATE, "least share of the target's texts that a feature fires on")
    random_rate: float = setting(RANDOM_RATE, "least share of random rows that rules a feature out")
    seed: int = setting(0, "of what is drawn")
