"""The registered methods that write a steering vector into the weights: with a key (``bake``) or as a bias (``bake-bias``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from editing.directions.vectors import read_vectors
from editing.methods.bake import EPS, bake_plan
from editing.methods.bake_bias import bake_bias_plan
from editing.methods.bake_correction import corrected_plan
from editing.methods.material import Material
from editing.methods.method import Knob, Method, Settings, SolvedOnce
from editing.plans.plan import Plan
from neurons.errors import UsageError
from neurons.setting import Range, setting

# Multiples of the difference of the means.
HOOK_STRENGTHS = (1.0, 2.0)


def hook_grid(depth: int) -> list[dict[str, Any]]:
    """The layers at a quarter, three eighths and half of the depth, without duplicates, with all ``HOOK_STRENGTHS``."""
    layers = sorted({min(round(depth * fraction), depth - 1) for fraction in (1 / 4, 3 / 8, 1 / 2)})
    return [{"layer": layer, "strength": strength} for layer in layers for strength in HOOK_STRENGTHS]


@dataclass(frozen=True, kw_only=True)
class _BakedVector(Method):
    """A vector added at every token; a study adds it after one layer."""

    layer: int | None = None
    strength: float = setting(1.0, search=Range(0.25, 4.0, log=True))

    @classmethod
    def of(cls, material: Material, settings: Settings) -> _BakedVector:
        # A search names the layer by a word.
        return cls(**{**settings, "layer": int(settings["layer"])})

    @classmethod
    def knobs(cls, material: Material) -> dict[str, Knob]:
        return {"layer": Knob(words=tuple(map(str, _allowed(material)))), **super().knobs(material)}

    @classmethod
    def known(cls, material: Material) -> Sequence[Settings]:
        layers = _allowed(material)
        return [{"layer": str(layers[len(layers) // 3]), "strength": strength} for strength in HOOK_STRENGTHS]

    def vectors(self, material: Material) -> tuple[dict[int, torch.Tensor], dict[str, Any]]:
        """The vectors to bake by layer, and their provenance for the plan's metadata."""
        layers = material.layers if self.layer is None else (self.layer,)
        if material.vector is not None:
            if material.directions:
                raise UsageError("--direction and --vector exclude each other: give one")
            return read_vectors(material.vector, material.opened, layers), {"file": material.vector.name}
        if layers is None:
            raise UsageError("name the layer after which the vector is added, for example --layers 3")
        direction = material.direction
        vectors = direction.vectors["block_out"]
        return {layer: vectors[layer] for layer in layers}, {
            "source": direction.source,
            "target": direction.target,
            "languages": [direction.source, direction.target],
            "direction": {"method": direction.metadata.get("method")},
        }


@dataclass(frozen=True, kw_only=True)
class Bake(_BakedVector, SolvedOnce):
    """``editing.methods.bake``."""

    name = "bake"
    title = "baked DiffMean"
    line = "adds a steering vector, of Broca or another library, at every token"
    source = "Broca"
    needs = ("corpus",)
    takes = ("direction", "vector", "layers", "blocks", "strength", "part", "languages", "device", "dtype")

    eps: float = setting(EPS, "ridge, as a fraction of the mean variance")
    shrinkage: bool = setting(False, "ridge by Ledoit and Wolf instead of eps")
    correct_layers: int = setting(0, "number of later layers that correct the key's error")
    constrain_start: bool = setting(True, "also exact on the beginning-of-sequence token")

    @classmethod
    def grid(cls, material: Material) -> Sequence[dict[str, Any]]:
        return hook_grid(material.loaded.anatomy.layers)

    def solved(self, material: Material) -> Plan:
        vectors, provenance = self.vectors(material)
        loaded, text, progress = material.loaded, material.text, material.progress
        plan = bake_plan(
            loaded,
            text,
            vectors,
            self.strength,
            self.eps,
            self.shrinkage,
            _module(material),
            progress,
            self.constrain_start,
            provenance,
        )
        if self.correct_layers == 0:
            return plan
        return corrected_plan(loaded, text, plan, self.correct_layers, self.eps, progress)


@dataclass(frozen=True, kw_only=True)
class BakeBias(_BakedVector):
    """``editing.methods.bake_bias``."""

    name = "bake-bias"
    line = "adds a steering vector exactly, as a bias, if the architecture has one"
    source = "exact fold"
    takes = ("direction", "vector", "layers", "blocks", "strength")

    def prepare(self, material: Material) -> Plan:
        vectors, provenance = self.vectors(material)
        return bake_bias_plan(material.opened, vectors, self.strength, _module(material), provenance)


def _allowed(material: Material) -> list[int]:
    able = material.loaded.anatomy.layers_with((material.blocks or ("mlp",))[0])
    return sorted(able if material.layers is None else material.layers)


def _module(material: Material) -> str:
    if material.blocks is not None and len(material.blocks) != 1:
        raise UsageError("a vector is baked into one module: --blocks attn or --blocks mlp")
    return "mlp" if material.blocks is None else material.blocks[0]
