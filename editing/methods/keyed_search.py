"""The search space of the keyed edit in ``broca tune``: layers, fraction of the heads and strength, for fixed keys.

A trial scales the values of modules, without a forward pass and without reading weights.  Only with a norm after the
output (Gemma 2 and 3, OLMo 2) values are solved for each strength, on kept tokens.  Other settings of the method
made no difference or were worse (docs/keyed.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from editing.methods.keyed import LEARNED, MEANS, VALUES, keyed_blocks, layers_with_common_inputs
from editing.methods.keyed_edit import Keyed
from editing.methods.learned_values import enough_text
from editing.methods.material import Material
from editing.methods.method import Knob, Method, Settings
from editing.methods.norm_value import value_through_norm
from editing.methods.output_norm import OutputNorm, output_norm, source_tokens
from editing.plans.plan import ModuleEdit, Plan, make_plan
from neurons.architectures.anatomy import BLOCKS, Anatomy
from neurons.errors import UsageError
from neurons.setting import Range, setting
from neurons.text.batches import language_batches
from neurons.text.token_budget import KEYS

# Edited layers, as fractions of the depth.
LAYERS = {"all": (0.0, 1.0), "lower half": (0.0, 0.5), "lower 3/4": (0.0, 0.75), "upper 3/4": (0.25, 1.0)}


@dataclass(frozen=True)
class _Normed:
    """A module before a norm, on tokens of the source: outputs [T, d] in the model's dtype, which they were computed in,
    and the key's coefficients [T]."""

    norm: OutputNorm
    outputs: torch.Tensor
    coefficients: torch.Tensor


@dataclass(frozen=True)
class Solved:
    """The plan of all modules at strength 1, from which a trial takes and scales edits."""

    material: Material
    whole: Plan

    @property
    def scales(self) -> bool:
        return self.material.loaded.anatomy.residual_output

    def at_strength(self, edit: ModuleEdit, strength: float) -> ModuleEdit:
        """The module's edit at a strength of the module."""
        if self.scales:
            return edit.scaled(strength / edit.notes["value_share"])
        assert edit.right is not None
        key = edit.right[:, 0].double()
        normed: _Normed = self.material.once(
            ("through", edit.layer, edit.block), lambda: self._normed(edit.layer, edit.block, key)
        )
        value = self.material.direction.vectors["block_out"][edit.layer] * strength
        solved = value_through_norm(
            normed.outputs.double(), normed.norm.gain, normed.norm.eps, value, normed.coefficients
        )
        notes = {
            **edit.notes,
            "change_norm": float(solved.vector.norm() * key.norm()),
            "value_through_norm": solved.through,
            "value_error": solved.error,
        }
        return replace(edit, left=solved.vector[:, None].float(), notes=notes)

    def _normed(self, layer: int, module: str, key: torch.Tensor) -> _Normed:
        loaded, source = self.material.loaded, self.material.direction.source
        text = self.material.text.only(source)
        batches = self.material.once(
            ("text of keys", source), lambda: language_batches(loaded, text, default=KEYS.tokens)[source]
        )
        tokens = source_tokens(loaded, layer, module, batches)
        norm = output_norm(loaded, layer, module, batches[0])
        return _Normed(norm, tokens.outputs.to(loaded.model.dtype), tokens.inputs @ key)


@dataclass(frozen=True, kw_only=True)
class KeyedSearch(Method):
    """The keyed edit with the settings of a search.

    Attributes:
        values: "means" (the direction) or "learned", once for all settings (``editing.methods.learned_values``).
        heads: fraction of the strength in ``o_proj``, in [0, 1]; the rest is in ``down_proj``.  ``keyed_plan``
            supports 0, 1/2 and 1.  A layer with keys in only one of them has its whole strength there.
        layers: edited layers, with equal strengths.
        strength: total strength.
    """

    name = "keyed"
    line = Keyed.line
    source = Keyed.source
    edited = False
    solves_keys = True

    values: str = setting(MEANS, words=VALUES, search_words=True)
    heads: float = setting(0.0, search=Range(0.0, 1.0))
    layers: tuple[int, ...] = ()
    strength: float = setting(2.0, search=Range(1.0, 4.5))

    @classmethod
    def of(cls, material: Material, settings: Settings) -> KeyedSearch:
        return cls(**{**settings, "layers": windows(material)[settings["layers"]]})

    @classmethod
    def knobs(cls, material: Material) -> dict[str, Knob]:
        declared = super().knobs(material)
        values = Knob(words=VALUES if can_learn(material) else VALUES[:1])
        layers = Knob(words=tuple(windows(material)))
        return {
            "values": values,
            "heads": declared["heads"],
            "layers": layers,
            "strength": declared["strength"],
        }

    @classmethod
    def known(cls, material: Material) -> Sequence[Settings]:
        candidates = (
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
            for values, heads, layers, strength in candidates
            if layers in names and (learns or values == MEANS)
        ]

    @classmethod
    def largest(cls, anatomy: Anatomy) -> Keyed:
        return replace(Keyed.largest(anatomy), learn=anatomy.residual_output)

    def prepare(self, material: Material) -> Solved:
        """The plan of all modules at strength 1.

        Raises:
            UsageError: learned values for a model with a norm after its modules, which do not scale.
        """
        learn = self.values == LEARNED
        if learn and not material.loaded.anatomy.residual_output:
            raise UsageError(
                "with a norm after the module values are learned at one strength: use --method keyed --set learn=yes"
            )
        blocks = keyed_blocks(material.loaded.anatomy, BLOCKS)
        return Solved(material, Keyed(strength=1.0, blocks=blocks, learn=learn).plan_for(material))

    def plan(self, prepared: Solved) -> Plan:
        """The plan of ``keyed_plan`` for the same layers, up to the last bits of float32."""
        whole, of_module = prepared.whole, {"attn": self.heads, "mlp": 1 - self.heads}
        chosen = [edit for edit in whole.edits if edit.layer in self.layers]
        modules = Counter(edit.layer for edit in chosen)
        edits = []
        for edit in chosen:
            fraction = (of_module[edit.block] if modules[edit.layer] > 1 else 1) / len(self.layers)
            if fraction:
                scaled = prepared.at_strength(edit, fraction * self.strength)
                edits.append(replace(scaled, notes={**scaled.notes, "value_share": fraction}))
        settings = {
            **whole.metadata["settings"],
            "layers": list(self.layers),
            "blocks": [module for module in BLOCKS if any(edit.block == module for edit in edits)],
            "heads": self.heads,
            "strength": self.strength,
        }
        return make_plan(edits, {**whole.metadata, "settings": settings})


def windows(material: Material) -> dict[str, tuple[int, ...]]:
    """The layers by the names of ``LAYERS``, without windows that are equal in a model of few layers."""
    able = layers_with_common_inputs(material.loaded.anatomy, BLOCKS)
    layers = sorted(able if material.layers is None else material.layers)
    of_name: dict[str, tuple[int, ...]] = {}
    for name, (first, last) in LAYERS.items():
        window = tuple(layers[round(first * len(layers)) : round(last * len(layers))])
        if window and window not in of_name.values():
            of_name[name] = window
    return of_name


def can_learn(material: Material) -> bool:
    """Whether learned values scale with the strength, and there is enough text to learn from."""
    text, direction = material.text, material.direction
    return material.loaded.anatomy.residual_output and enough_text(
        text.lines(direction.source), text.lines(direction.target)
    )
