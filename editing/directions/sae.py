"""SAE: the features of a sparse autoencoder that are specific to the target language (LangFIR, arXiv 2604.03532).

A feature f of an autoencoder (``editing.directions.autoencoder``) fires on a text if it is above 0 on some counted
token.  With p_f the fraction of the target's texts and q_f the fraction of random-token sequences of the same
lengths on which f fires,

    S = {f: p_f > target_rate} minus {f: q_f > random_rate}
    v = sum_{f in S} a_f W_dec[f]        a_f: mean over the target's texts of the mean over their tokens

Features that fire on random tokens fire on any text.  Both rates default to 0.5, the paper's "most" read as more
than half: a random sequence over a vocabulary of many languages has tokens of the target too.

The length of v is the features' contribution to the residual in the target's texts.  At other layers and sites
the direction of the nearest autoencoder gives the line: v = (u . delta) u with delta DiffMean there
(``editing.directions.length``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from editing.directions.autoencoder import Autoencoder, Firing, LanguageFeatures
from editing.directions.method import DirectionMethod
from editing.directions.sae_recording import firing, random_batches
from editing.directions.texts import Estimate, Texts
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress
from neurons.setting import setting
from neurons.text.batches import TokenBatch

TARGET_RATE = RANDOM_RATE = 0.5


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
    """The registered method."""

    name = "sae"
    line = "features of a sparse autoencoder that fire on the target's texts and not on random tokens"
    source = "arXiv 2604.03532"
    needs = "text, autoencoder"
    autoencoders = True

    target_rate: float = setting(
        TARGET_RATE, "minimum fraction of the target's texts on which a feature fires"
    )
    random_rate: float = setting(RANDOM_RATE, "fraction of random rows above which a feature is excluded")
    seed: int = setting(0, "random seed")

    def read(
        self,
        loaded: LoadedModel,
        batches: Mapping[str, Sequence[TokenBatch]],
        source: str,
        target: str,
        autoencoders: Sequence[Autoencoder],
        progress: Progress | None = None,
    ) -> list[LanguageFeatures]:
        of_target = firing(loaded, batches[target], autoencoders, progress)
        at_random = random_batches(loaded, batches[target], self.seed)
        of_random = firing(loaded, at_random, autoencoders, progress)
        return [
            language_features(of_texts, random, sae.decoder, self.target_rate, self.random_rate)
            for sae, of_texts, random in zip(autoencoders, of_target, of_random, strict=True)
        ]

    def estimate_at(self, features: LanguageFeatures, texts: Texts) -> Estimate:
        return Estimate(features.vector)
