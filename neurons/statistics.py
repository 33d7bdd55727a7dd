"""What a pass over the text leaves behind: sums per layer, unit and language that merge by adding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neurons.anatomy import SITES

MOMENTS = {
    "positive": torch.int64,
    "sum": torch.float64,
    "text_mean": torch.float64,
    "attribution": torch.float64,
}


def parse_moment(name: str) -> tuple[str, str]:
    """``site:moment`` to its two halves."""
    site, _, moment = name.partition(":")
    if site not in SITES or moment not in MOMENTS:
        raise ValueError(f"{name!r} is not site:moment with a site of {SITES} and one of {tuple(MOMENTS)}")
    return site, moment


def moment_dtype(moment: str) -> torch.dtype:
    return MOMENTS[moment]


@dataclass(frozen=True)
class Statistics:
    """Sums over the counted tokens of each language.

    Attributes:
        languages: the K names.
        tokens: int64 [K].
        texts: int64 [K], rows: texts, or blocks where the text was packed.
        moments: ``site:moment`` -> [layers, width, K], int64 for counts, float64 for sums.
        fingerprint: of the model.
    """

    languages: tuple[str, ...]
    tokens: torch.Tensor
    texts: torch.Tensor
    moments: dict[str, torch.Tensor]
    fingerprint: str

    def token_mean(self, site: str) -> torch.Tensor:
        """Mean over tokens, float64 [layers, width, K]."""
        return self.moments[f"{site}:sum"] / self.tokens

    def text_mean(self, site: str) -> torch.Tensor:
        """Mean over texts of the mean over a text's tokens, float64 [layers, width, K]."""
        return self.moments[f"{site}:text_mean"] / self.texts
