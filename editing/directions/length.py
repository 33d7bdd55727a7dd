"""How long a direction is and which way it points; and what of it is no language: the neutral mean.

A method that finds a line only, with unit vector u, takes its length and its sign from DiffMean delta:

    v = (u . delta) u                                     so v . delta = (u . delta)^2 >= 0

One that finds a subspace, with orthonormal basis B [d, r], projects DiffMean into it: v = B B^T delta.
Strength 1 then means the same for every method: the languages' difference, as far as the method's
direction holds it.  With unit length, v / ||v|| in place of v.

The neutral mean m = (mean_source + mean_target) / 2 is what both languages share; projecting it off,

    v' = v - (m^ . v) m^,   m^ = m / ||m||

is the first step of biprojected ablation (after arXiv 2406.11717): an edit along v' leaves alone what every
text has.  Where both are asked for, the length is made 1 last.
"""

from __future__ import annotations

import torch


def along(unit: torch.Tensor, diffmean: torch.Tensor) -> torch.Tensor:
    """(u . delta) u, float64 [d]."""
    line: torch.Tensor = (unit @ diffmean) * unit
    return line


def into(basis: torch.Tensor, diffmean: torch.Tensor) -> torch.Tensor:
    """B B^T delta, float64 [d], of an orthonormal basis [d, r]."""
    inside: torch.Tensor = basis @ (basis.T @ diffmean)
    return inside


def without_neutral(vector: torch.Tensor, neutral: torch.Tensor) -> torch.Tensor:
    """v - (m^ . v) m^, float64 [d]; v itself where m is 0."""
    length = neutral.norm()
    if not length > 0:
        return vector
    along_neutral: torch.Tensor = (neutral @ vector) / length**2 * neutral
    return vector - along_neutral


def unit(vector: torch.Tensor) -> torch.Tensor:
    """v / ||v||; 0 where v is 0."""
    length = vector.norm()
    return vector / length if length > 0 else vector
