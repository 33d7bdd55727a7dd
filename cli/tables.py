"""Tables that several commands print."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cli.screen import Screen

if TYPE_CHECKING:
    from editing.directions.direction import Direction
    from editing.evaluation.outcome import Outcome
    from editing.plans.plan import Plan
    from editing.study.results import Report
    from neurons.architectures.anatomy import Anatomy


SHOWN_SITE = "block_out"


def direction_table(screen: Screen, direction: Direction) -> dict[str, list[float]]:
    """Print the norm of the direction at each site and the measures of its method, one row per layer.

    Returns:
        Site -> norms by layer.
    """
    from editing.directions.diffmean import OUTPUT_SITES

    # The order must not depend on the order in the file.
    sites = [site for site in OUTPUT_SITES if site in direction.vectors]
    norms = {site: direction.vectors[site].norm(dim=1).tolist() for site in sites}
    measures = dict(sorted(direction.metadata.get("measures", {}).get(SHOWN_SITE, {}).items()))
    method = direction.metadata.get("method") or "direction"
    title = "DiffMean" if method == "diffmean" else method
    screen.table(
        f"{title}, {direction.source} to {direction.target}: norm of the direction"
        + (f", measures at {SHOWN_SITE}" if measures else ""),
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
    for autoencoder in direction.metadata.get("autoencoders", []):
        features = autoencoder["features"]
        screen.say(f"{autoencoder['name']}: {len(features)} features for {direction.target}: {features[:20]}")
    return norms


def plan_table(screen: Screen, plan: Plan, anatomy: Anatomy | None = None) -> None:
    """Print the changes of a plan, one row per module."""
    from editing.plans.plan import language_pair

    metadata = plan.metadata
    pair = language_pair(metadata)
    languages = ", ".join(metadata.get("languages", [])) if pair is None else " to ".join(pair)
    stds = any("spread" in edit.notes for edit in plan.edits)
    biases = any(edit.bias is not None for edit in plan.edits)
    dense = any(edit.dense for edit in plan.edits)
    rows = []
    for edit in plan.edits:
        notes = edit.notes
        row = [
            str(edit.layer) if edit.layer >= 0 else "-",
            edit.block if anatomy is None else anatomy.parts(edit.layer, edit.block)[0].path,
            len(edit.components),
            edit.rank,
            *([edit.dense] if dense else []),
            notes.get("change_norm"),
            edit.relative_change,
        ]
        bias_norm = [None if edit.bias is None else float(edit.bias.double().norm())] if biases else []
        rows.append(row + ([notes.get("spread")] if stds else []) + bias_norm)
    change = plan.relative_change()
    relative = "" if change is None else f", ||dW||/||W|| {change:.3g}"
    screen.table(
        f"{metadata['method']}, {languages or 'no language named'}: {plan.components:,} components{relative}",
        [
            "layer",
            "module",
            "components",
            "rank",
            *(["rows, columns"] if dense else []),
            "||dW||",
            "||dW||/||W||",
            *(["key std"] if stds else []),
            *(["||bias||"] if biases else []),
        ],
        rows,
        words=2,
    )


def modules_as_json(plan: Plan) -> list[dict[str, Any]]:
    """The rows of ``plan_table`` for --json."""
    return [
        {
            "layer": edit.layer,
            "block": edit.block,
            "components": len(edit.components),
            "rank": edit.rank,
            **edit.notes,
        }
        for edit in plan.edits
    ]


def list_methods(
    screen: Screen,
    methods: Mapping[str, Any],
    columns: Mapping[str, Callable[[Any], Any]],
    more: Mapping[str, Callable[[Any], Any]] | None = None,
) -> None:
    """Print methods and their settings.

    Args:
        methods: name -> class of the method.
        columns: title of a further column -> its text for a class.
        more: key of a value that only --json prints, in place of a column of this name -> the value for a class.
    """
    from neurons.setting import defaults

    screen.table(
        "methods",
        ["method", "description", "source", *columns],
        [
            [name, method.line, method.source, *(text(method) for text in columns.values())]
            for name, method in methods.items()
        ],
        words=3 + len(columns),
    )
    screen.table(
        "settings (--set name=value)",
        ["method", "setting", "description", "default"],
        [
            [name, key, setting.line, "-" if setting.default in (None, ()) else str(setting.default)]
            for name, method in methods.items()
            for key, setting in method.settings().items()
        ],
        words=4,
    )
    screen.document(
        {
            name: {
                "line": method.line,
                "source": method.source,
                "settings": defaults(method.settings()),
                **{key: value(method) for key, value in {**columns, **(more or {})}.items()},
            }
            for name, method in methods.items()
        }
    )


def report_table(screen: Screen, report: Report) -> None:
    """Print the outcomes of a report side by side."""
    from editing.report.tables import outcomes_table

    screen.table(report.title, *outcomes_table(report))
    for note in report.notes or ():
        screen.say(note)


def say_samples(screen: Screen, outcome: Outcome) -> None:
    """Print three prompts with the generated text."""
    for sample in outcome.samples[:3]:
        screen.say(f"  {sample.prompt} | {sample.line}")
