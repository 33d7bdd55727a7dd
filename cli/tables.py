"""Tables that several commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cli.screen import Screen

if TYPE_CHECKING:
    from editing.directions.direction import Direction
    from editing.evaluation.outcome import Outcome
    from editing.plans.plan import Plan
    from editing.study.results import Report
    from neurons.architectures.anatomy import Anatomy


SHOWN_SITE = "block_out"


def direction_table(screen: Screen, direction: Direction) -> dict[str, list[float]]:
    """A row a layer: how long the direction is at each site, and what its method measured.

    Returns:
        Site -> the lengths.
    """
    from editing.directions.diffmean import OUTPUT_SITES

    # A file has its tensors and its metadata by name: one order for both.
    sites = [site for site in OUTPUT_SITES if site in direction.vectors]
    norms = {site: direction.vectors[site].norm(dim=1).tolist() for site in sites}
    measures = dict(sorted(direction.metadata.get("measures", {}).get(SHOWN_SITE, {}).items()))
    method = direction.metadata.get("method") or "direction"
    title = "DiffMean" if method == "diffmean" else method
    screen.table(
        f"{title}, {direction.source} to {direction.target}: length of the direction"
        + (f", and its measures at {SHOWN_SITE}" if measures else ""),
        ["layer", *norms, *measures],
        [
            [str(layer), *values]
            for layer, values in enumerate(zip(*norms.values(), *measures.values(), strict=True))
        ],
    )
    windows = direction.metadata.get("window", {})
    for site in [site for site in sites if site in windows]:
        first, last = windows[site]
        screen.say(f"{site}: strongest and most stable in layers {first}-{last}")
    for one in direction.metadata.get("autoencoders", []):
        screen.say(
            f"{one['name']}: {len(one['features'])} features are {direction.target}'s own: {one['features'][:20]}"
        )
    return norms


def plan_table(screen: Screen, plan: Plan, anatomy: Anatomy | None = None) -> None:
    """A row a module: what changes and by how much."""
    from editing.plans.plan import language_pair

    metadata = plan.metadata
    pair = language_pair(metadata)
    if pair is not None:
        what = f"{pair[0]} to {pair[1]}"
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
        words=2,
    )


def report_table(screen: Screen, report: Report) -> None:
    """All ways of steering side by side."""
    from editing.report.tables import outcomes_table

    screen.table(report.title, *outcomes_table(report))
    for note in report.notes or ():
        screen.say(note)


def say_samples(screen: Screen, outcome: Outcome) -> None:
    """The first few prompts, and what was written after them."""
    for sample in outcome.samples[:3]:
        screen.say(f"  {sample.prompt} | {sample.line}")
