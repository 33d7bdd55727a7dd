"""SAE: the features of a sparse autoencoder that are specific to the target language (LangFIR, arXiv 2604.03532).

An autoencoder of the residual stream writes x ~ f W_dec + b_dec with features f [F]:

    z = (x - b_dec) W_enc + b_enc        b_dec is subtracted only if the config says so
    f = max(z, 0)                        standard
    f = z where z > max(threshold, 0)    jumprelu, else 0
    f = max(z, 0) of the k largest z     topk, else 0

A feature fires on a text if it is above 0 on some counted token.  With p_f the fraction of the target's texts
and q_f the fraction of random-token sequences of the same lengths on which f fires,

    S = {f: p_f > target_rate} minus {f: q_f > random_rate}
    v = sum_{f in S} a_f W_dec[f]        a_f: mean over the target's texts of the mean over their tokens

Features that fire on random tokens fire on any text.  Both rates default to 0.5, the paper's "most" read as more
than half: a random sequence over a vocabulary of many languages has tokens of the target too.

The length of v is the features' contribution to the residual in the target's texts.  At other layers and sites
the direction of the nearest autoencoder gives the line: v = (u . delta) u with delta DiffMean there
(``editing.directions.length``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from editing.directions.method import DirectionMethod
from neurons.errors import BrocaError, UsageError
from neurons.setting import setting

TARGET_RATE = RANDOM_RATE = 0.5


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
        name: in files and errors.
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
    """Activity of an autoencoder's features on texts.

    Attributes:
        texts: number of texts.
        fired: int64 [F], number of texts on which the feature fires.
        activation: float64 [F], mean over texts of the mean over their counted tokens.
    """

    texts: int
    fired: torch.Tensor
    activation: torch.Tensor


@dataclass(frozen=True)
class LanguageFeatures:
    """The features of a language and their vector.

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
        target_rate: in [0, 1); a feature must fire on more than this fraction of the target's texts.
        random_rate: in [0, 1]; and on at most this fraction of the random sequences.

    Raises:
        UsageError: a rate out of range.
        BrocaError: no feature passes, or their vector is 0.
    """
    if not 0 <= target_rate < 1 or not 0 <= random_rate <= 1:
        raise UsageError(
            f"target rate {target_rate} and random rate {random_rate} must lie in [0, 1), and [0, 1]"
        )
    frequent = target.fired.double() / target.texts > target_rate
    on_random = random.fired.double() / random.texts > random_rate
    features = (frequent & ~on_random).nonzero().flatten()
    vector = target.activation[features] @ decoder[features].double()
    if not vector.norm() > 0:
        raise BrocaError(
            f"none of the autoencoder's {len(frequent)} features is specific to the target: {int(frequent.sum())} fire "
            f"on more than {target_rate:g} of its texts, and all of these on more than {random_rate:g} of the "
            "random-token sequences: lower target_rate or raise random_rate"
        )
    return LanguageFeatures(features, vector)


@dataclass(frozen=True)
class Sae(DirectionMethod):
    """The registered method; ``editing.directions.estimation`` makes its estimators from the autoencoders."""

    name = "sae"
    line = "features of a sparse autoencoder that fire on the target's texts and not on random tokens"
    source = "arXiv 2604.03532"
    needs = "text, autoencoder"

    target_rate: float = setting(
        TARGET_RATE, "minimum fraction of the target's texts on which a feature fires"
    )
    random_rate: float = setting(RANDOM_RATE, "fraction of random rows above which a feature is excluded")
    seed: int = setting(0, "random seed")
