"""What a plan does that its user may not expect, in sentences."""

from __future__ import annotations

from editing.plans.plan import Plan

# Beyond this share of a weight's length, what the model knows apart from the language tends to go too.
LARGE_CHANGE = 1.0


def plan_warnings(plan: Plan) -> list[str]:
    """A sentence for every module whose direction is reversed, or whose weight changes by more than its length."""
    found = []
    for edit in plan.edits:
        where = f"layer {edit.layer}, {edit.block}"
        turned = 0 if "c" not in edit.details else int((edit.details["c"] < -1).sum())
        if turned:
            found.append(
                f"{where}: {turned} of {len(edit.components)} components have c < -1: the direction is reversed "
                "there, not removed"
            )
        if edit.relative_change is not None and edit.relative_change > LARGE_CHANGE:
            found.append(
                f"{where}: ||dW|| is {edit.relative_change:.2f} times ||W||, more than {LARGE_CHANGE:g}: measure "
                "other languages before it is served"
            )
    return found
