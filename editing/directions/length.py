"""The length and sign of directions, and the projection that removes the neutral mean.

A method that estimates only a line, with unit vector u, gets its length and sign from DiffMean delta:

    v = (u . delta) u                                     so v . delta = (u . delta)^2 >= 0

A method that estimates a subspace, with orthonormal basis B [d, r], projects DiffMean into it: v = B B^T delta.
Strength 1 is then comparable between methods: the part of the languages' difference along the direction.  With
unit length, v / ||v|| replaces v.

The neutral mean m = (mean_source + mean_target) / 2 is common to both languages; projecting it out,

    v' = v - (m^ . v) m^,   m^ = m / ||m||

is the first step of biprojected ablation (after arXiv 2406.11717): an edit along v' does not change the
common component.  With both options, the length is set to 1 last.
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
    """v - (m^ . v) m^, float64 [d]; v if m is 0."""
    length = neutral.norm()
    if not length > 0:
        return vector
    along_neutral: torch.Tensor = (neutral @ vector) / length**2 * neutral
    return vector - along_neutral


def unit(vector: torch.Tensor) -> torch.Tensor:
    """v / ||v||; 0 if v is 0."""
    length = vector.norm()
    return vector / length if length > 0 else vector
