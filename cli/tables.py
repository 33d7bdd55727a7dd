"""Tables that several commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cli.screen import Screen

if TYPE_CHECKING:
    from editing.plan import Plan
    from editing.report import Report
    from neurons.anatomy import Anatomy


def plan_table(screen: Screen, plan: Plan, anatomy: Anatomy | None = None) -> None:
    """A row a module: what changes and by how much."""
    metadata = plan.metadata
    if "target" in metadata:
        what = f"{metadata['source']} to {metadata['target']}"
    else:
        what = ", ".join(metadata.get("languages", [])) or "no language named"
    spreads = any("spread" in edit.notes for edit in plan.edits)
    biases = any(edit.bias is not None for edit in plan.edits)
    rows = []
    for edit in plan.edits:
        notes = edit.notes
        row = [
            str(edit.layer),
            edit.block if anatomy is None else anatomy.layout.outputs[edit.block],
            len(edit.components),
            edit.rank,
            notes.get("change_norm"),
            edit.relative_change,
        ]
        own = [None if edit.bias is None else float(edit.bias.double().norm())] if biases else []
        rows.append(row + ([notes.get("spread")] if spreads else []) + own)
    change = plan.relative_change()
    share = "" if change is None else f", ||dW||/||W|| {change:.3g}"
    screen.table(
        f"{metadata['method']}, {what}: {plan.components:,} components{share}",
        [
            "layer",
            "module",
            "components",
            "rank",
            "||dW||",
            "||dW||/||W||",
            *(["key spread"] if spreads else []),
            *(["||bias||"] if biases else []),
        ],
        rows,
    )


def report_table(screen: Screen, report: Report) -> None:
    """All ways of steering side by side."""
    screen.table(report.title, report.columns(), report.rows())
    for note in report.notes:
        screen.say(note)
