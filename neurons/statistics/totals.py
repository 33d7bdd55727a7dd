"""Running sums of a recording, each on the device of its layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from neurons.errors import NotFiniteError


@dataclass
class Totals:
    """Sums by name, layer and language.

    Attributes:
        languages: number of languages K.
        layers: number of layers L.
        widths: name -> number of units.
        dtypes: name -> dtype of its sums.
    """

    languages: int
    layers: int
    widths: Mapping[str, int]
    dtypes: Mapping[str, torch.dtype]
    _sums: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def of(self, name: str, layer: int, device: torch.device) -> torch.Tensor:
        """The sum [K, width] to add to, initially 0; the same tensor until ``restore`` or another device."""
        key = (name, layer)
        if key not in self._sums:
            shape = (self.languages, self.widths[name])
            self._sums[key] = torch.zeros(shape, dtype=self.dtypes[name], device=device)
        elif self._sums[key].device != device:
            self._sums[key] = self._sums[key].to(device)
        return self._sums[key]

    def stacked(self, name: str) -> torch.Tensor:
        """[L, width, K] on the CPU."""
        zeros = torch.zeros(self.languages, self.widths[name], dtype=self.dtypes[name])
        sums = [self._sums.get((name, layer), zeros).cpu() for layer in range(self.layers)]
        return torch.stack(sums).transpose(1, 2).contiguous()

    def state(self) -> dict[str, torch.Tensor]:
        """All sums, for a file."""
        return {f"{name}@{layer}": values for (name, layer), values in self._sums.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a saved ``state``."""
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
