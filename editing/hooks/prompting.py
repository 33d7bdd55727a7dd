"""Prompting baseline: an instruction to answer in the target language, in the source or the target language."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from editing.hooks.instructions import instructions
from editing.methods.material import Material
from editing.methods.method import Hook, Steering


@dataclass(frozen=True, kw_only=True)
class _Prompt(Hook):
    """An instruction added to every prompt.

    Attributes:
        language: of the instruction.
        instruction: its text.
    """

    source = "arXiv 2601.08331"
    strength_setting = None
    in_target: ClassVar[bool]

    language: str
    instruction: str

    @classmethod
    def grid(cls, material: Material) -> Sequence[dict[str, Any]]:
        texts = instructions(*material.pair)
        chosen = [k for k in texts if (k == material.target) == cls.in_target]
        return [{"language": k, "instruction": texts[k]} for k in chosen]

    def prepare(self, material: Material) -> None:
        return None

    def hooks(self, prepared: None) -> Steering:
        return nullcontext


class PromptSource(_Prompt):
    name = "prompt-source"
    title = "prompt, source language"
    line = "an instruction in the source language"
    in_target = False


class PromptTarget(_Prompt):
    name = "prompt-target"
    title = "prompt, target language"
    line = "an instruction in the target language"
    in_target = True
