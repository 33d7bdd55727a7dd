"""The registered keyed edit: values from the direction or learned; solved once for all strengths unless a norm follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from editing.methods.key import EPS, SOFT_WEIGHT
from editing.methods.keyed import STRENGTH, keyed_blocks, keyed_plan
from editing.methods.learned_values import LEARNED_AT, learned_values
from editing.methods.material import Material
from editing.methods.method import Method, Settings
from editing.plans.plan import Plan
from neurons.architectures.anatomy import BLOCKS, Anatomy
from neurons.setting import setting

KEYED = "keyed edit"


@dataclass(frozen=True, kw_only=True)
class Keyed(Method):
    """``editing.methods.keyed``."""

    name = "keyed"
    title = KEYED
    line = "a direction that is added only on the source language"
    source = "Broca"
    needs = ("direction", "corpus")
    solves_keys = True
    takes = ("neurons", "layers", "blocks", "strength", "device", "dtype", "part", "languages")

    strength: float = STRENGTH
    eps: float = setting(EPS, "ridge, as a fraction of the mean variance")
    sources: tuple[str, ...] | None = setting(None, "languages on which it acts; the direction's source")
    keep: tuple[str, ...] | None = setting(None, "languages that do not change on average; all others")
    keep_softly: tuple[str, ...] = setting((), "languages kept by a penalty instead")
    soft_weight: float = setting(SOFT_WEIGHT, "weight of that penalty")
    sparse: float | None = setting(None, "fraction of the neurons that a key may use")
    jointly: bool = setting(False, "solve each layer with the edits below it")
    learn: bool = setting(False, "learn values by gradient descent: target text after source text")
    blocks: tuple[str, ...] | None = None

    @classmethod
    def grid(cls, material: Material) -> Sequence[dict[str, Any]]:
        # Keys over heads and neurons need less strength than keys over neurons alone.
        candidates = ((3.5, ("mlp",)), (2.0, BLOCKS), (2.5, BLOCKS))
        anatomy = material.loaded.anatomy
        return [{"strength": s, "blocks": list(keyed_blocks(anatomy, blocks))} for s, blocks in candidates]

    @classmethod
    def largest(cls, anatomy: Anatomy) -> Keyed:
        return cls(blocks=keyed_blocks(anatomy, BLOCKS))

    def prepare(self, material: Material) -> Plan:
        """The plan at this strength, or in a study at a strength from which ``plan`` scales to all others."""
        strength = self.strength
        if material.studied and material.loaded.anatomy.residual_output:
            strength = LEARNED_AT if self.learn else 1.0
        method = replace(self, strength=strength)
        plan: Plan = material.once(
            method, lambda: method._learned(material) if self.learn else method._solved(material)
        )
        return plan

    def _solved(self, material: Material) -> Plan:
        return keyed_plan(
            material.loaded,
            material.text,
            material.direction,
            material.layers,
            self.strength,
            material.neurons,
            self.eps,
            material.progress,
            sources=self.sources,
            keep=self.keep,
            keep_softly=self.keep_softly,
            soft_weight=self.soft_weight,
            blocks=self.blocks or material.blocks or ("mlp",),
            sparse=self.sparse,
            jointly=self.jointly,
        )

    def _learned(self, material: Material) -> Plan:
        text, direction = material.text, material.direction
        # Interleaved, because learning reads a limited number of lines.
        of_sources = zip_longest(*(text.lines(name) for name in self.sources or (direction.source,)))
        openings = [line for lines in of_sources for line in lines if line]
        plan = replace(self, learn=False).plan_for(material)
        return learned_values(
            material.loaded, plan, openings, text.lines(direction.target), progress=material.progress
        )


@dataclass(frozen=True, kw_only=True)
class KeyedLearned(Keyed):
    """The keyed edit over heads and neurons with learned values, for comparisons."""

    name = "keyed-learned"
    title = "keyed edit, learned values"
    line = "values learned so that target text follows source text"
    edited = False

    @classmethod
    def grid(cls, material: Material) -> Sequence[dict[str, Any]]:
        return [{"strength": strength} for strength in (1.5, 2.0, 2.5)]

    @classmethod
    def of(cls, material: Material, settings: Settings) -> Keyed:
        blocks = keyed_blocks(material.loaded.anatomy, BLOCKS)
        return Keyed(learn=True, blocks=blocks, **settings)

    @classmethod
    def largest(cls, anatomy: Anatomy) -> Keyed:
        return replace(super().largest(anatomy), learn=True)
