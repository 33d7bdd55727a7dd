"""All methods: edits, hooks and prompts.  To add a method, write its file and name it here."""

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
from editing.methods.ara import Ara
from editing.methods.austeer import AusteerEdit
from editing.methods.baked_vector import Bake, BakeBias
from editing.methods.clas import ClasEdit
from editing.methods.directional_ablation import Ablate
from editing.methods.keyed_edit import Keyed, KeyedLearned
from editing.methods.keyed_experts import KeyedExperts
from editing.methods.keyed_search import KeyedSearch
from editing.methods.language_arithmetic import ArithmeticEdit
from editing.methods.leace import Leace
from editing.methods.method import Method
from editing.methods.router_steering import RouterSteering
from editing.methods.scale import Scale, ScalePair
from editing.methods.selective_steering import SelectiveSteering
from editing.methods.steer2edit import Steer2Edit, Steer2EditGradient, Steer2EditLape
from editing.methods.subspace_ablation import AblateSubspace
from neurons.errors import UsageError

# In the order of the tables' rows.
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
    KeyedExperts,
    Steer2Edit,
    Steer2EditLape,
    Steer2EditGradient,
    Ablate,
    AblateSubspace,
    Leace,
    SelectiveSteering,
    Ara,
    Bake,
    BakeBias,
    Scale,
    ScalePair,
    ClasEdit,
    AusteerEdit,
    ArithmeticEdit,
    RouterSteering,
)


def edits() -> dict[str, type[Method]]:
    """The methods of ``broca edit``, by name."""
    return {method.name: method for method in METHODS if method.edited}


def compared() -> dict[str, type[Method]]:
    """The methods of ``broca evaluate --methods``, by name."""
    return {method.name: method for method in METHODS if method.title}


def searched() -> dict[str, type[Method]]:
    """The methods of ``broca tune``, by name."""
    return {method.name: method for method in METHODS if method.searched()}


def edit_named(name: str) -> type[Method]:
    """The method of ``broca edit`` with this name.

    Raises:
        UsageError: no such method.
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
    return {name: method for name, method in known.items() if name in names or "all" in names}


def searched_named(names: Sequence[str]) -> dict[str, type[Method]]:
    """Methods by name, in the order of ``names``.

    Raises:
        UsageError: no name, a name twice, or a method that cannot be searched.
    """
    known = searched()
    if not names or len(set(names)) < len(names):
        raise UsageError("methods: name at least one, each once")
    for name in names:
        if name not in known:
            raise UsageError(f"method {name!r} cannot be searched: choose from {', '.join(known)}")
    return {name: known[name] for name in names}


def table() -> str:
    """The table of methods in docs/editing.md: those of ``broca edit``, then those that are only compared."""
    header = ("method", "what it does", "source", "`edit` takes", "row of `evaluate --methods`", "`tune`")
    rows = [header, ("---",) * len(header)]
    # A name may stand for an edit and a hook.  It keeps the edit's place and describes the edit.
    for name, method in (edits() | compared() | edits()).items():
        takes = f"`{method.inputs()}`" if name in edits() else ""
        title = compared()[name].title if name in compared() else ""
        tuned = "yes" if name in searched() else ""
        rows.append((f"`{name}`", method.line, method.source, takes, title, tuned))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
