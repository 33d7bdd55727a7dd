"""Plans of weight edits: every module that changes and by how much, and a map of the components."""

from __future__ import annotations

from editing.plans.plan import Plan, language_pair
from editing.plans.plan_pictures import plan_figure
from editing.plans.plan_warnings import plan_warnings
from editing.report.formats import count, number, plain
from editing.report.inline_svg import inline_svg, label, picture
from editing.report.markup import Content, Markup, joined, paragraph
from editing.report.tables import table


def edit_content(plan: Plan, name: str) -> Markup:
    """Everything of one plan.

    Args:
        name: tells its picture from another plan's.
    """
    change = plan.relative_change()
    share = "" if change is None else f", ‖ΔW‖/‖W‖ {number(change, '.3g')} over the modules edited"
    settings = plan.metadata.get("settings") or {}
    parts = [
        paragraph(
            f"{plan.metadata.get('method', 'an edit')}{_languages(plan)}: {count(plan.components)} components "
            f"of {count(len(plan.edits))} modules{share}."
        )
    ]
    if settings:
        parts.append(paragraph(f"Settings: {plain(settings)}."))
    parts += [paragraph(warning, class_="warning") for warning in plan_warnings(plan)]
    if plan.edits:
        parts += [_modules(plan), _map(plan, name)]
    return joined(parts)


def _languages(plan: Plan) -> str:
    pair = language_pair(plan.metadata)
    if pair is not None:
        return f", {pair[0]} to {pair[1]}"
    languages = plan.metadata.get("languages") or []
    return f", {', '.join(languages)}" if languages else ""


def _modules(plan: Plan) -> Markup:
    rows: list[list[Content]] = [
        [
            str(edit.layer),
            {"attn": "attention output", "mlp": "MLP output"}.get(edit.block, edit.block),
            count(len(edit.components)),
            count(edit.rank),
            number(edit.notes.get("change_norm"), ".4g"),
            number(edit.relative_change, ".3f"),
        ]
        for edit in plan.edits
    ]
    return table(
        "Modules that change",
        ["layer", "module", "components", "rank", "‖ΔW‖", "‖ΔW‖/‖W‖"],
        rows,
        words=(0, 1),
    )


def _map(plan: Plan, name: str) -> Markup:
    caption = "How strongly each component of each layer changes"
    named = Plan(plan.edits, {**plan.metadata, "method": label(str(plan.metadata.get("method", "edit")))})
    return picture(caption, inline_svg(plan_figure(named), name, caption))
