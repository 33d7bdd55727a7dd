"""Evaluations as Markdown, with the meaning of the columns, and as a figure."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from editing.report.tables import dose_response_table, methods_table, outcomes_table
from editing.study.results import Report


def methods_markdown(report: Report) -> str:
    """The table that compares many methods, with the meaning of its columns."""
    head, rows = methods_table(report)
    return "\n".join(
        [
            f"# {report.title}\n",
            f"Model {report.model}. Methods are estimated on one part of the text, their settings are chosen on "
            "another, and the results on a third are reported here; all methods have the same prompts.\n",
            *_table(head, rows, "---|" + "---:|" * (len(head) - 2) + "---|"),
            *_dose_response_markdown(report),
            *(f"{note}\n" for note in report.notes or ()),
            "Share: the fraction of answers identified as the target; empty answers and loops are failures and do "
            "not count. Ceiling: the share of the unedited model on target prompts. Fluency gap: the mean negative "
            "log-likelihood of the answers minus that of the unedited model's answers to target prompts, nats a "
            "token, both by the unedited model. NLL: rise on held-out text, nats a token; third: of the languages "
            "that are neither source nor target. KL: of next-token distributions, the largest of the third "
            "languages. Effectiveness: the fraction of the possible rise in share that was achieved; entanglement: "
            "the root mean square change of the shares of all languages but the source, each on prompts in that "
            "language.\n",
        ]
    )


def _dose_response_markdown(report: Report) -> list[str]:
    if not report.curves:
        return []
    head, rows = dose_response_table(report)
    table = _table(head, rows, "---|" + "---:|" * (len(head) - 1))
    return ["Each method at parts of its chosen strength:\n", *table]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], rule: str) -> list[str]:
    columns = [name.replace("|", "\\|") for name in head]
    first, *others = ("| " + " | ".join(row) + " |" for row in (columns, *rows))
    return [first, f"|{rule}", *others, ""]


def markdown(reports: Sequence[Report]) -> str:
    """The tables of a run, with the meaning of their columns and some samples."""
    parts = ["# Steering, measured\n"]
    for report in reports:
        parts.append(f"## {report.title}\n")
        head, rows = outcomes_table(report)
        parts += _table(head, rows, "---|" * len(head))
        parts += [f"{note}\n" for note in report.notes or ()]
        for outcome in (report.outcomes[0], report.outcomes[-1]):
            parts.append(f"Samples, {outcome.name}:\n")
            for sample in outcome.samples[:3]:
                parts.append(f"- **{sample.prompt}** {sample.line} ({sample.language})")
            parts.append("")
    parts.append(
        "Settings are chosen on one part of the text and reported on another. Share: the fraction of continuations "
        "identified as the language; loops count for no language. Ceiling: the share of the unedited model on "
        "target prompts. Fluency gap: the mean negative log-likelihood of the continuations minus that of the "
        "unedited model's continuations of target prompts, nats a token, both by the unedited model. NLL: rise on "
        "held-out text, nats a token; the source's is last. KL: the largest of the third languages. The keyed edit "
        "is measured on the exported checkpoint, loaded from disk.\n"
    )
    return "\n".join(parts)


def report_figure(reports: Sequence[Report]) -> Figure:
    """Target-language rate, fluency gap and NLL rises of every method; one row of panels for each target."""
    figure = Figure(figsize=(12, 3.4 * len(reports)), layout="constrained")
    axes = figure.subplots(len(reports), 3, squeeze=False, width_ratios=[1, 1, 2])
    for (rate, gap, rise), report in zip(axes, reports, strict=True):
        outcomes = report.outcomes
        names = [outcome.name for outcome in outcomes]
        colours = [f"C{i}" for i in range(len(outcomes))]
        rate.barh(names, [outcome.target_share for outcome in outcomes], color=colours)
        rate.axvline(report.ceiling, color="black", linestyle="--", linewidth=1)
        rate.set(xlim=(0, 1.02), title=f"share {report.target} (dashed: ceiling)")
        gap.barh(names, [outcome.fluency_gap for outcome in outcomes], color=colours)
        gap.axvline(0, color="black", linewidth=0.8)
        gap.set(title="fluency gap, nats a token", yticklabels=[])
        languages = [report.target, *report.third_languages]
        height = 0.8 / max(1, len(outcomes) - 1)
        for i, outcome in enumerate(outcomes[1:]):
            positions = [k + (i - (len(outcomes) - 2) / 2) * height for k in range(len(languages))]
            values = [outcome.nll_rise[language] for language in languages]
            rise.barh(positions, values, height, label=outcome.name, color=colours[i + 1])
        rise.set_yticks(range(len(languages)), languages)
        rise.axvline(0, color="black", linewidth=0.8)
        rise.set(title="NLL rise on held-out text of all but the source, nats a token")
        rise.legend(fontsize=8)
        for axis in (rate, gap, rise):
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
        rate.set_ylabel(f"{report.source} to {report.target}")
    return figure
