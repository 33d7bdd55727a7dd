"""A steering vector written into the weights, as methods: by a key (``bake``) or as a bias (``bake-bias``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from editing.directions.vectors import read_vectors
from editing.methods.bake import EPS, bake_plan
from editing.methods.bake_bias import bake_bias_plan
from editing.methods.bake_correction import corrected_plan
from editing.methods.material import Material
from editing.methods.method import Knob, Method, Settings
from editing.plans.plan import Plan
from neurons.errors import UsageError
from neurons.scorers.setting import Range, setting

# Multiples of the difference of the means, once and twice, as a hook adds them.
HOOK_STRENGTHS = (1.0, 2.0)


def hook_grid(depth: int) -> list[dict[str, Any]]:
    """After the layers at a quarter, three eighths and half of the depth, each once; once or twice the vector."""
    layers = sorted({min(round(depth * share), depth - 1) for share in (1 / 4, 3 / 8, 1 / 2)})
    return [{"layer": layer, "strength": strength} for layer in layers for strength in HOOK_STRENGTHS]


@dataclass(frozen=True, kw_only=True)
class _BakedVector(Method):
    """A vector at every token; a study adds it after one layer."""

    layer: int | None = None
    strength: float = setting(1.0, search=Range(0.25, 4.0, log=True))

    @classmethod
    def of(cls, material: Material, settings: Settings) -> _BakedVector:
        # A search has the layer as a word.
        return cls(**{**settings, "layer": int(settings["layer"])})

    @classmethod
    def knobs(cls, material: Material) -> dict[str, Knob]:
        return {"layer": Knob(words=tuple(map(str, _allowed(material)))), **super().knobs(material)}

    @classmethod
    def known(cls, material: Material) -> Sequence[Settings]:
        layers = _allowed(material)
        return [{"layer": str(layers[len(layers) // 3]), "strength": strength} for strength in HOOK_STRENGTHS]

    def vectors(self, material: Material) -> tuple[dict[int, torch.Tensor], dict[str, Any]]:
        """The vectors to bake by layer, and what the plan says of where they are from."""
        layers = material.layers if self.layer is None else (self.layer,)
        if material.vector is not None:
            if material.directions:
                raise UsageError("--direction and --vector exclude each other: give one")
            return read_vectors(material.vector, material.opened, layers), {"file": material.vector.name}
        if layers is None:
            raise UsageError("name the layer that the vector is added after: --layers 3")
        direction = material.direction
        vectors = direction.vectors["block_out"]
        return {layer: vectors[layer] for layer in layers}, {
            "source": direction.source,
            "target": direction.target,
            "languages": [direction.source, direction.target],
            "direction": {"method": direction.metadata.get("method")},
        }


@dataclass(frozen=True, kw_only=True)
class Bake(_BakedVector):
    """``editing.methods.bake``."""

    name = "bake"
    title = "baked DiffMean"
    line = "a steering vector, ours or another library's, at every token"
    source = "Broca"
    needs = ("corpus",)
    takes = ("direction", "vector", "layers", "blocks", "strength", "part", "languages", "device", "dtype")

    eps: float = setting(EPS, "ridge, as a share of the mean variance")
    shrinkage: bool = setting(False, "Ledoit-Wolf's ridge in place of eps")
    correct_layers: int = setting(0, "so many later layers write what the key missed")
    constrain_start: bool = setting(True, "the beginning-of-sequence token too")

    @classmethod
    def grid(cls, material: Material) -> Sequence[dict[str, Any]]:
        return hook_grid(material.loaded.anatomy.layers)

    def prepare(self, material: Material) -> Plan:
        """The plan at this strength, or in a study at 1, of which all others are multiples."""
        one = replace(self, strength=1.0) if material.studied else self
        found: Plan = material.once(one, lambda: one._solved(material))
        return found

    def _solved(self, material: Material) -> Plan:
        vectors, origin = self.vectors(material)
        loaded, text, progress = material.loaded, material.text, material.progress
        plan = bake_plan(
            loaded,
            text,
            vectors,
            self.strength,
            self.eps,
            self.shrinkage,
            _block(material),
            progress,
            self.constrain_start,
            origin,
        )
        if self.correct_layers == 0:
            return plan
        return corrected_plan(loaded, text, plan, self.correct_layers, self.eps, progress)


@dataclass(frozen=True, kw_only=True)
class BakeBias(_BakedVector):
    """``editing.methods.bake_bias``."""

    name = "bake-bias"
    line = "the same as a bias, exact, where the architecture has one"
    source = "exact fold"
    takes = ("direction", "vector", "layers", "blocks", "strength")

    def prepare(self, material: Material) -> Plan:
        vectors, origin = self.vectors(material)
        return bake_bias_plan(material.opened, vectors, self.strength, _block(material), origin)


def _allowed(material: Material) -> list[int]:
    return sorted(range(material.loaded.anatomy.layers) if material.layers is None else material.layers)


def _block(material: Material) -> str:
    if material.blocks is not None and len(material.blocks) != 1:
        raise UsageError("a vector is baked into one block: --blocks attn or --blocks mlp")
    return "mlp" if material.blocks is None else material.blocks[0]
