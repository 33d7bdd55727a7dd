"""The keyed edit as ``broca tune`` searches it: any layers, any share of the heads, any strength, from keys solved once.

A trial's plan is made by multiplying what modules write, without a forward pass and without reading weights; only a
norm after the output (Gemma 2 and 3, OLMo 2) has its value solved anew at each strength, on tokens that are kept.
Other settings of the method made no difference or were worse (docs/keyed.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from editing.methods.keyed import LEARNED, MEANS, VALUES
from editing.methods.keyed_edit import Keyed
from editing.methods.learned_values import enough_text
from editing.methods.material import Material
from editing.methods.method import Knob, Method, Settings
from editing.methods.norm_value import value_through_norm
from editing.methods.output_norm import OutputNorm, output_norm, source_tokens
from editing.plans.plan import ModuleEdit, Plan, make_plan
from neurons.architectures.anatomy import BLOCKS
from neurons.errors import UsageError
from neurons.scorers.setting import Range, setting
from neurons.text.batches import language_batches

# Layers that write, as shares of the depth.
LAYERS = {"all": (0.0, 1.0), "lower half": (0.0, 0.5), "lower 3/4": (0.0, 0.75), "upper 3/4": (0.25, 1.0)}


@dataclass(frozen=True)
class _Through:
    """A module before a norm, on tokens of the source: outputs [T, d] and the key's coefficients [T]."""

    norm: OutputNorm
    outputs: torch.Tensor
    coefficients: torch.Tensor


@dataclass(frozen=True)
class Solved:
    """Every module at the same share of strength 1, its values those of the trial."""

    material: Material
    whole: Plan

    @property
    def scales(self) -> bool:
        return self.material.loaded.anatomy.residual_output

    def written(self, edit: ModuleEdit, strength: float) -> ModuleEdit:
        """The module's edit at a strength of its own."""
        if self.scales:
            return edit.scaled(strength * len(self.whole.edits))
        assert edit.right is not None
        key = edit.right[:, 0].double()
        at: _Through = self.material.once(
            ("through", edit.layer, edit.block), lambda: self._through(edit.layer, edit.block, key)
        )
        value = self.material.direction.vectors["block_out"][edit.layer] * strength
        found = value_through_norm(at.outputs, at.norm.gain, at.norm.eps, value, at.coefficients)
        notes = {
            **edit.notes,
            "change_norm": float(found.vector.norm() * key.norm()),
            "value_through_norm": found.through,
            "value_error": found.error,
        }
        return replace(edit, left=found.vector[:, None].float(), notes=notes)

    def _through(self, layer: int, block: str, key: torch.Tensor) -> _Through:
        loaded = self.material.loaded
        batches = language_batches(loaded, self.material.text)[self.material.direction.source]
        tokens = source_tokens(loaded, layer, block, batches)
        return _Through(output_norm(loaded, layer, block, batches[0]), tokens.outputs, tokens.inputs @ key)


@dataclass(frozen=True, kw_only=True)
class KeyedSearch(Method):
    """What the keyed edit writes, where and how much.

    Attributes:
        values: the direction, or learned once for all settings (``editing.methods.learned_values``).
        heads: share of the strength that ``o_proj`` writes, in [0, 1]; ``down_proj`` writes the rest.
            ``keyed_plan`` knows 0, 1/2 and 1.
        layers: that write, evenly.
        strength: of all together.
    """

    name = "keyed"
    line = Keyed.line
    source = Keyed.source
    edited = False

    values: str = setting(MEANS, words=VALUES, search_words=True)
    heads: float = setting(0.0, search=Range(0.0, 1.0))
    layers: tuple[int, ...] = ()
    strength: float = setting(2.0, search=Range(1.0, 4.5))

    @classmethod
    def of(cls, material: Material, settings: Settings) -> KeyedSearch:
        return cls(**{**settings, "layers": windows(material)[settings["layers"]]})

    @classmethod
    def knobs(cls, material: Material) -> dict[str, Knob]:
        found = super().knobs(material)
        values = Knob(words=VALUES if can_learn(material) else VALUES[:1])
        layers = Knob(words=tuple(windows(material)))
        return {"values": values, "heads": found["heads"], "layers": layers, "strength": found["strength"]}

    @classmethod
    def known(cls, material: Material) -> Sequence[Settings]:
        tried = (
            (LEARNED, 0.5, "all", 2.0),
            (LEARNED, 0.5, "all", 1.5),
            (MEANS, 0.5, "all", 2.0),
            (MEANS, 0.25, "upper 3/4", 2.25),
            (LEARNED, 0.5, "all", 2.5),
            (MEANS, 0.5, "all", 2.5),
            (MEANS, 0.25, "all", 1.75),
            (MEANS, 0.0, "all", 3.0),
        )
        names, learns = windows(material), can_learn(material)
        return [
            {"values": values, "heads": heads, "layers": layers, "strength": strength}
            for values, heads, layers, strength in tried
            if layers in names and (learns or values == MEANS)
        ]

    def prepare(self, material: Material) -> Solved:
        """
        Raises:
            UsageError: values learned for a model with a norm behind its modules, which do not scale.
        """
        learn = self.values == LEARNED
        if learn and not material.loaded.anatomy.residual_output:
            raise UsageError(
                "values behind a norm are learned at one strength: --method keyed --set learn=yes"
            )
        return Solved(material, Keyed(strength=1.0, blocks=BLOCKS, learn=learn).made(material))

    def plan(self, prepared: Solved) -> Plan:
        """What ``keyed_plan`` makes of the same layers, up to the last bits of float32."""
        whole, of_block = prepared.whole, {"attn": self.heads, "mlp": 1 - self.heads}
        edits = []
        for edit in whole.edits:
            share = of_block[edit.block] / len(self.layers)
            if edit.layer in self.layers and share:
                made = prepared.written(edit, share * self.strength)
                edits.append(replace(made, notes={**made.notes, "value_share": share}))
        settings = {
            **whole.metadata["settings"],
            "layers": list(self.layers),
            "blocks": [block for block in BLOCKS if of_block[block]],
            "heads": self.heads,
            "strength": self.strength,
        }
        return make_plan(edits, {**whole.metadata, "settings": settings})


def windows(material: Material) -> dict[str, tuple[int, ...]]:
    """The layers by the names of ``LAYERS``; of a model of few layers several windows are the same."""
    layers = sorted(range(material.loaded.anatomy.layers) if material.layers is None else material.layers)
    found: dict[str, tuple[int, ...]] = {}
    for name, (first, last) in LAYERS.items():
        own = tuple(layers[round(first * len(layers)) : round(last * len(layers))])
        if own and own not in found.values():
            found[name] = own
    return found


def can_learn(material: Material) -> bool:
    """Whether values learned once hold for all strengths, and there is text enough to learn from."""
    texts, direction = material.text.texts, material.direction
    return material.loaded.anatomy.residual_output and enough_text(
        texts[direction.source], texts[direction.target]
    )
