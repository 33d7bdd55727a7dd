"""Section on a plan of weight edits: the change of every edited module, and a map of the components."""

from __future__ import annotations

from markupsafe import Markup

from editing.plans.plan import Plan, language_pair
from editing.plans.plan_pictures import plan_figure
from editing.plans.plan_warnings import plan_warnings
from editing.report.inline_svg import drawn, label
from editing.report.lock_section import lock_content
from editing.report.templating import rendered
from neurons.architectures.anatomy import BLOCKS


def edit_content(plan: Plan, name: str) -> Markup:
    """The section of one plan.

    Args:
        plan: the plan.
        name: of the figure, unique in the page.
    """
    method = plan.metadata.get("method", "an edit")
    pair, drawing = language_pair(plan.metadata), None
    if plan.components or any(edit.block in BLOCKS for edit in plan.edits):
        named = Plan(plan.edits, {**plan.metadata, "method": label(str(plan.metadata.get("method", "edit")))})
        drawing = drawn(plan_figure(named), name, "How strongly each component of each layer changes")
    return rendered(
        "edit",
        plan=plan,
        method=method,
        languages=" to ".join(pair) if pair else ", ".join(plan.metadata.get("languages") or []),
        change=plan.relative_change(),
        settings=plan.metadata.get("settings") or {},
        warnings=plan_warnings(plan),
        lock=lock_content(plan.metadata["measured"]) if "measured" in plan.metadata else "",
        drawing=drawing,
    )
