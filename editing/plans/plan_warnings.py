"""Warnings about possibly unintended effects of a plan."""

from __future__ import annotations

from editing.plans.plan import Plan

# Changes above this fraction of a weight's norm tend to harm more than the language.
LARGE_CHANGE = 1.0


def plan_warnings(plan: Plan) -> list[str]:
    """A sentence for every module with a reversed direction, or a change larger than its weight's norm."""
    warnings = []
    for edit in plan.edits:
        turned = 0 if "c" not in edit.details else int((edit.details["c"] < -1).sum())
        if turned:
            warnings.append(
                f"{edit.where}: {turned} of {len(edit.components)} components have c < -1: the direction is reversed "
                "there, not removed"
            )
        if edit.relative_change is not None and edit.relative_change > LARGE_CHANGE:
            warnings.append(
                f"{edit.where}: ||dW|| is {edit.relative_change:.2f} times ||W||, more than {LARGE_CHANGE:g}: evaluate "
                "other languages before deployment"
            )
    return warnings
