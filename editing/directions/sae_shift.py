"""SAE shift: language features of an autoencoder by selectivity and causal lift, and their shift (Neural FOXP2,
arXiv 2602.00945, stages I and III).

With c_f(x) the activation of feature f of an autoencoder (``editing.directions.autoencoder``) on text x, its mean
over the counted tokens, and means and (population) standard deviations over the texts of a language,

    sel_f = (mean_target c_f - mean_source c_f) / (std_target c_f + std_source c_f + 1e-6)
    S = the candidates of the largest sel with sel_f > 0 and lift_f > 0        (``editing.directions.feature_lift``)
    D [n, S] = c_S(target line) - c_S(source line)        the masked shift of each line that both languages have
    mu_tgt = unit(mean of D's rows),   mu_en = unit(P mean_source c_S),   P the ``low_rank_shift`` subspace of D

Stage III adds lambda mu_tgt W_dec - beta <c_S(h), mu_en> mu_en W_dec to the residual after each layer of a window:

* The first term is a constant: the direction's vector, with the line of mu_tgt W_dec and the length of DiffMean along
  it (``editing.directions.length``).  The measure ``lambda`` is the paper's lambda of strength 1.  ``bake`` and ``keyed``
  write it into weights.
* The second reads c_S(h) through the encoder's ReLU, which the weights of an output module cannot.  With e = mu_en W_dec
  and e^ = unit(e), least squares over the texts of both languages read it as a linear function of the residual,
  <c_S(x), mu_en> ~ a e^^T x + c, with the squared correlation ``readout``.  What is left is the ablation of the line e,
  strength beta a ||e|| (``slope`` is a ||e||), which ``ablate-subspace`` writes, as the direction's subspace is that line;
  and the constant -beta c e (``offset`` is c ||e||), which is like a smaller lambda as far as e has the line of the vector.

The paper takes the last token of each text, and the activation without the factor ||x|| of unit inputs.  Released
code projects mu_tgt by P too; this is the paper's formula.  As in both, mu_en has the features of the target.

``features=random`` takes as many features at random from those outside S that fire on the target's texts: a control.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from editing.directions.autoencoder import Autoencoder, Firing, LanguageFeatures
from editing.directions.feature_lift import feature_lifts, half_texts, language_signs
from editing.directions.length import along, into, unit
from editing.directions.low_rank_shift import BOOTSTRAPS, LowRankShift, low_rank_shift
from editing.directions.method import DirectionMethod
from editing.directions.recorded import common_lines
from editing.directions.sae_recording import firing, text_codes
from editing.directions.texts import Estimate, Texts
from neurons.errors import BrocaError, UsageError
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Progress
from neurons.setting import COUNT, setting
from neurons.text.batches import TokenBatch

ALPHAS = (0.5, 1.0, 2.0, 5.0, 10.0, 15.0)
CHOSEN, RANDOM = "chosen", "random"


@dataclass(frozen=True)
class ShiftFeatures(LanguageFeatures):
    """Language features with what the shift is made of; ``vector`` is mu_tgt W_dec.

    Attributes:
        suppressed: float64 [d], e = mu_en W_dec.
        activity: float64 [n_source + n_target], <c_S, mu_en> on the source's texts and the target's.
        shift: subspace of the masked shift.
    """

    suppressed: torch.Tensor = field(kw_only=True)
    activity: torch.Tensor = field(kw_only=True)
    shift: LowRankShift = field(kw_only=True)


def selectivity(source: Firing, target: Firing) -> torch.Tensor:
    """sel of each feature, float64 [F]."""
    deviations = [(of.square - of.activation.square()).clamp(min=0).sqrt() for of in (target, source)]
    return (target.activation - source.activation) / (deviations[0] + deviations[1] + 1e-6)


def masked_shift(
    rows: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    pairs: tuple[torch.Tensor, torch.Tensor],
    seed: int = 0,
    bootstraps: int = BOOTSTRAPS,
) -> ShiftFeatures:
    """The shift of some features, numbered from 0.

    Args:
        rows: [S, d], their rows of W_dec.
        source: float64 [n_source, S], c_S on each text.
        target: float64 [n_target, S].
        pairs: the rows of source and of target of the lines that both have.
        seed: of the bootstraps.
        bootstraps: at least 2.

    Raises:
        BrocaError: source and target do not differ in these features.
    """
    differences = target[pairs[1]] - source[pairs[0]]
    shift = low_rank_shift(differences, seed, bootstraps)
    mu_target = unit(differences.mean(0))
    mu_source = unit(into(shift.basis, source.mean(0)))
    return ShiftFeatures(
        torch.arange(len(rows)),
        mu_target @ rows.double(),
        suppressed=mu_source @ rows.double(),
        activity=torch.cat([source, target]) @ mu_source,
        shift=shift,
    )


def linear_readout(values: torch.Tensor, activity: torch.Tensor) -> tuple[float, float, float]:
    """(a, c, squared correlation) of the least squares of an activity [n] by a x + c; a 0 if either is constant."""
    deviations, of_activity = values - values.mean(), activity - activity.mean()
    product = float(deviations @ of_activity)
    squares, of_squares = float(deviations.square().sum()), float(of_activity.square().sum())
    slope, correlation = (
        (product / squares, product**2 / squares / of_squares) if squares and of_squares else (0.0, 0.0)
    )
    return slope, float(activity.mean()) - slope * float(values.mean()), correlation


@dataclass(frozen=True)
class SaeShift(DirectionMethod):
    """The registered method."""

    name = "sae-shift"
    line = "shift of an autoencoder's features that are selective for the target and raise its tokens"
    source = "arXiv 2602.00945"
    needs = "parallel text, autoencoder"
    parallel = True
    autoencoders = True

    candidates: int = setting(50, "features of the largest selectivity whose lift is measured", kind=COUNT)
    prompts: int = setting(32, "halves of source texts after which the lift is measured", kind=COUNT)
    alphas: tuple[float, ...] = setting(ALPHAS, "factors of a feature for the lift")
    features: str = setting(CHOSEN, "the chosen features, or as many random ones", words=(CHOSEN, RANDOM))
    seed: int = setting(0, "random seed")
    bootstraps: int = setting(BOOTSTRAPS, "bootstraps for the stability")

    def __post_init__(self) -> None:
        if self.bootstraps < 2:
            raise UsageError(f"{self.name} needs 2 bootstraps or more, not {self.bootstraps}")

    def read(
        self,
        loaded: LoadedModel,
        batches: Mapping[str, Sequence[TokenBatch]],
        source: str,
        target: str,
        autoencoders: Sequence[Autoencoder],
        progress: Progress | None = None,
    ) -> list[ShiftFeatures]:
        on_source = firing(loaded, batches[source], autoencoders, progress)
        on_target = firing(loaded, batches[target], autoencoders, progress)
        signs = language_signs(loaded, batches[source], batches[target])
        prompts = half_texts(batches[source], self.prompts)
        lifts_of = partial(
            feature_lifts, loaded, prompts=prompts, signs=signs, alphas=self.alphas, progress=progress
        )
        chosen = [
            self._chosen(autoencoders[at], on_source[at], on_target[at], lifts_of)
            for at in range(len(autoencoders))
        ]
        features = [of_sae for of_sae, _ in chosen]
        lines, codes = text_codes(loaded, batches[source], autoencoders, features, progress)
        target_lines, target_codes = text_codes(loaded, batches[target], autoencoders, features, progress)
        pairs = common_lines(lines, target_lines)
        results = []
        for at, (of_sae, notes) in enumerate(chosen):
            rows = autoencoders[at].decoder[of_sae]
            shift = masked_shift(rows, codes[at], target_codes[at], pairs, self.seed, self.bootstraps)
            results.append(replace(shift, features=of_sae, notes=notes))
        return results

    def _chosen(
        self,
        sae: Autoencoder,
        on_source: Firing,
        on_target: Firing,
        lifts_of: Callable[[Autoencoder, torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """S, and the selectivity and the lift of each of its features."""
        selective = selectivity(on_source, on_target)
        candidates = selective.argsort(descending=True, stable=True)[: self.candidates].sort().values
        lifts = lifts_of(sae, candidates)
        kept = (selective[candidates] > 0) & (lifts > 0)
        features = candidates[kept]
        if not len(features):
            raise BrocaError(
                f"{sae.name}: none of the {len(candidates)} most selective features raises the target's tokens: use "
                "an autoencoder of another layer, or more candidates"
            )
        if self.features == CHOSEN:
            return features, {"selectivity": selective[features].tolist(), "lift": lifts[kept].tolist()}
        others = on_target.fired > 0
        others[features] = False
        places = others.nonzero().flatten()
        if len(places) < len(features):
            raise BrocaError(
                f"{sae.name}: {len(places)} other features fire on the target's text, fewer than the {len(features)} "
                "chosen ones: lower candidates"
            )
        drawn = torch.randperm(len(places), generator=torch.Generator().manual_seed(self.seed))
        return places[drawn[: len(features)]].sort().values, {}

    def estimate_at(self, features: LanguageFeatures, texts: Texts) -> Estimate:
        assert isinstance(features, ShiftFeatures)
        length = features.suppressed.norm()
        line = unit(features.suppressed)
        slope, offset, readout = linear_readout(
            torch.cat([texts.source, texts.target]) @ line, features.activity
        )
        return Estimate(
            along(unit(features.vector), texts.diffmean),
            line[:, None],
            {
                "features": len(features.features),
                "rank": features.shift.rank,
                "mass": features.shift.mass,
                "stability": features.shift.stability,
                "lambda": float(unit(features.vector) @ texts.diffmean / features.vector.norm()),
                "slope": slope * float(length),
                "offset": offset * float(length),
                "readout": readout,
            },
        )
