"""All methods: edits, hooks and prompts.  A method is added by its own file and its name here."""

from __future__ import annotations

from collections.abc import Sequence

from editing.hooks.austeer import AusteerHook
from editing.hooks.clas import ClasHook
from editing.hooks.language_arithmetic import (
    AdditiveArithmetic,
    DifferenceArithmetic,
    ReplacementArithmetic,
)
from editing.hooks.prompting import PromptSource, PromptTarget
from editing.hooks.residual import DiffMean
from editing.hooks.subspace_removal import Removal
from editing.methods.austeer import AusteerEdit
from editing.methods.baked_vector import Bake, BakeBias
from editing.methods.clas import ClasEdit
from editing.methods.directional_ablation import Ablate
from editing.methods.keyed_edit import Keyed, KeyedLearned
from editing.methods.keyed_search import KeyedSearch
from editing.methods.language_arithmetic import ArithmeticEdit
from editing.methods.method import Method
from editing.methods.scale import Scale, ScalePair
from editing.methods.steer2edit import Steer2Edit, Steer2EditGradient, Steer2EditLape
from editing.methods.subspace_ablation import AblateSubspace
from neurons.errors import UsageError

# In the order of the tables.
METHODS: tuple[type[Method], ...] = (
    PromptSource,
    PromptTarget,
    DiffMean,
    AdditiveArithmetic,
    ReplacementArithmetic,
    DifferenceArithmetic,
    ClasHook,
    AusteerHook,
    Removal,
    Keyed,
    KeyedLearned,
    KeyedSearch,
    Steer2Edit,
    Steer2EditLape,
    Steer2EditGradient,
    Ablate,
    AblateSubspace,
    Bake,
    BakeBias,
    Scale,
    ScalePair,
    ClasEdit,
    AusteerEdit,
    ArithmeticEdit,
)


def edits() -> dict[str, type[Method]]:
    """What ``broca edit`` offers, by name."""
    return {one.name: one for one in METHODS if one.edited}


def compared() -> dict[str, type[Method]]:
    """What ``broca evaluate --methods`` compares, by name."""
    return {one.name: one for one in METHODS if one.title}


def searched() -> dict[str, type[Method]]:
    """What ``broca tune`` searches, by name."""
    return {one.name: one for one in METHODS if one.searched()}


def edit_named(name: str) -> type[Method]:
    """
    Raises:
        UsageError: no such edit.
    """
    if name not in edits():
        raise UsageError(f"method {name!r} is unknown: choose from {', '.join(edits())}")
    return edits()[name]


def compared_named(names: Sequence[str]) -> dict[str, type[Method]]:
    """Methods by name, in the order of ``METHODS``; "all" is all of them.

    Raises:
        UsageError: an unknown name.
    """
    known = compared()
    unknown = [name for name in names if name not in known and name != "all"]
    if unknown:
        raise UsageError(f"method {unknown[0]!r} is unknown: choose from all, {', '.join(known)}")
    return {name: one for name, one in known.items() if name in names or "all" in names}


def searched_named(names: Sequence[str]) -> dict[str, type[Method]]:
    """Methods by name, in the order of ``names``.

    Raises:
        UsageError: no method, one that cannot be searched or that is named twice.
    """
    known = searched()
    if not names or len(set(names)) < len(names):
        raise UsageError("methods: name at least one, each once")
    for name in names:
        if name not in known:
            raise UsageError(f"method {name!r} cannot be searched: choose from {', '.join(known)}")
    return {name: known[name] for name in names}


def table() -> str:
    """The table of methods in docs/editing.md: those of ``broca edit``, then what is only compared."""
    header = ("method", "what it does", "source", "`edit` takes", "row of `evaluate --methods`", "`tune`")
    rows = [header, ("---",) * len(header)]
    # The last says what a name that is in both does, the first where it stands.
    for name, one in (edits() | compared() | edits()).items():
        takes = f"`{one.inputs()}`" if name in edits() else ""
        title = compared()[name].title if name in compared() else ""
        rows.append((f"`{name}`", one.line, one.source, takes, title, "yes" if name in searched() else ""))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
