"""Totals: the running sums of a recording, each on the device of its layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from neurons.errors import NotFiniteError


@dataclass
class Totals:
    """Sums by name, layer and language.

    Attributes:
        languages: how many, K.
        layers: how many, L.
        widths: name -> units.
        dtypes: name -> of its sums.
    """

    languages: int
    layers: int
    widths: Mapping[str, int]
    dtypes: Mapping[str, torch.dtype]
    _sums: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def of(self, name: str, layer: int, device: torch.device) -> torch.Tensor:
        """[K, width] to add to, first zeros; the same tensor until another device asks, or a ``restore``."""
        key = (name, layer)
        if key not in self._sums:
            shape = (self.languages, self.widths[name])
            self._sums[key] = torch.zeros(shape, dtype=self.dtypes[name], device=device)
        elif self._sums[key].device != device:
            self._sums[key] = self._sums[key].to(device)
        return self._sums[key]

    def stacked(self, name: str) -> torch.Tensor:
        """[L, width, K] on the CPU."""
        nothing = torch.zeros(self.languages, self.widths[name], dtype=self.dtypes[name])
        sums = [self._sums.get((name, layer), nothing).cpu() for layer in range(self.layers)]
        return torch.stack(sums).transpose(1, 2).contiguous()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything, for a file."""
        return {f"{name}@{layer}": values for (name, layer), values in self._sums.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what ``state`` gave."""
        for key, values in state.items():
            name, _, layer = key.rpartition("@")
            self._sums[name, int(layer)] = values

    def require_finite(self) -> None:
        """
        Raises:
            NotFiniteError: a sum that is not finite, by layer and name.
        """
        for (name, layer), values in sorted(self._sums.items(), key=lambda item: (item[0][1], item[0][0])):
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise NotFiniteError(f"{name} in layer {layer}")
