"""The result of a run for people: a Markdown table, a plot, and the numbers as JSON."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from editing.evaluation.evaluation import Outcome, measured
from editing.study.comparison import KEYED
from editing.study.doses import costs, harm
from editing.study.origin import origin_of
from neurons.files.artifact import json_bytes


@dataclass(frozen=True)
class Report:
    """All ways of steering from one language to another, on the report part of the text.

    Attributes:
        model: as the user named it.
        source, target: languages.
        ceiling: share of the target that the unedited model reaches on target prompts.
        continuations: how many each share is over.
        outcomes: the base first.
        notes: what a reader should know beside the numbers.
        origin: what the figures were made of and by which command (``editing.study.origin``), as JSON values.
        curves: title -> the outcomes of a way's doses, ascending (``editing.study.doses``); empty where none were
            asked for.
    """

    model: str
    source: str
    target: str
    ceiling: float
    continuations: int
    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, tuple[Outcome, ...]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return (
            f"{self.source} to {self.target}, {self.continuations} continuations, ceiling {self.ceiling:.2f}"
        )

    @property
    def third_languages(self) -> list[str]:
        return [k for k in self.outcomes[0].nll_rise if k not in (self.source, self.target)]

    @property
    def _languages(self) -> list[str]:
        """The source last: that its own text becomes less likely is what the edit is for."""
        return [self.target, *self.third_languages, self.source]

    def columns(self) -> list[str]:
        rises = [f"NLL {language}" for language in self._languages]
        return [
            "",
            f"share {self.target}",
            f"share {self.source}",
            "distinct words",
            "fluency gap",
            *rises,
            "KL",
            "components",
            "||dW||/||W||",
        ]

    def rows(self) -> list[list[str]]:
        """A row an outcome, formatted; the NLL columns are rises in nats a token, KL the largest."""
        found = []
        for outcome in self.outcomes:
            rises = [f"{outcome.nll_rise[language]:+.2f}" for language in self._languages]
            kl = f"{max(outcome.kl.values()):.3f}" if outcome.kl else "-"
            components = outcome.details.get("components", 0)
            change = outcome.details.get("relative_change", 0.0)
            found.append(
                [
                    outcome.name,
                    f"{outcome.target_share:.2f}",
                    f"{outcome.source_share:.2f}",
                    f"{outcome.distinct:.2f}",
                    "-" if math.isnan(outcome.fluency_gap) else f"{outcome.fluency_gap:+.2f}",
                    *rises,
                    kl,
                    str(components) if components else "-",
                    f"{change:.2f}" if change else "-",
                ]
            )
        return found

    def method_columns(self) -> list[str]:
        """Of the table that compares many ways: one figure for all third languages."""
        relevance = self._scorer
        return [
            "",
            f"share {self.target}",
            "fluency gap",
            f"NLL {self.target}",
            "NLL third, largest",
            "KL, largest",
            *([f"relevance ({relevance})", "steering score"] if relevance else []),
            "effectiveness",
            "entanglement",
            "failures",
            "||dW||/||W||",
            "settings",
        ]

    def method_rows(self) -> list[list[str]]:
        """A row an outcome, formatted; the ceiling is in the title."""
        found = []
        for outcome in self.outcomes:
            third = [outcome.nll_rise[language] for language in self.third_languages]
            scores = outcome.relevance
            change = outcome.details.get("relative_change")
            settings = outcome.details.get("settings", {})
            found.append(
                [
                    outcome.name,
                    f"{outcome.target_share:.2f}",
                    _number(outcome.fluency_gap, "+.2f"),
                    f"{outcome.nll_rise[self.target]:+.3f}",
                    f"{max(third):+.3f}" if third else "-",
                    f"{max(outcome.kl.values()):.3f}" if outcome.kl else "-",
                    *([f"{scores['mean']:.2f}", f"{scores['steering_score']:.2f}"] if scores else []),
                    _number(outcome.effectiveness, ".2f"),
                    _number(outcome.entanglement, ".3f"),
                    str(sum(outcome.failures.values())),
                    f"{change:.2f}" if change else "-",
                    ", ".join(f"{name} {_word(value)}" for name, value in settings.items()) or "-",
                ]
            )
        return found

    def dose_columns(self) -> list[str]:
        return [
            "",
            "dose",
            f"share {self.target}",
            "fluency gap",
            "NLL third, largest",
            *([f"{KEYED}'s at that share"] if KEYED in self.curves else []),
        ]

    def dose_rows(self) -> list[list[str]]:
        """A row a dose of each way, formatted; of the keyed edit, the least harm that steers at least as far."""
        beside: dict[tuple[str, float], float | None] = {}
        if KEYED in self.curves:
            found = costs(self.curves, KEYED, self.source, self.target, self.outcomes[0].target_share)
            beside = {(cost.way, cost.dose): cost.other for cost in found}
        return [
            [
                title,
                f"{one.details['dose']:g}",
                f"{one.target_share:.2f}",
                _number(one.fluency_gap, "+.2f"),
                f"{harm(one, self.source, self.target):+.3f}",
                *(
                    [_number(beside.get((title, one.details["dose"])), "+.3f")]
                    if KEYED in self.curves
                    else []
                ),
            ]
            for title in dict.fromkeys([*(one.name for one in self.outcomes), *self.curves])
            for one in self.curves.get(title, ())
        ]

    def details_of(self, outcome: Outcome) -> list[str]:
        """What the table has no room for, a line each."""
        lines = [
            f"{outcome.name}: sentences in {self.target} {outcome.sentence_share:.2f}, second detector agrees "
            f"{outcome.agreement:.2f}, empty {outcome.failures.get('empty', 0)}, looping "
            f"{outcome.failures.get('looping', 0)}, {outcome.answer_words:.0f} words an answer"
        ]
        if outcome.relevance:
            found = outcome.relevance
            lines.append(
                f"relevance ({found['scorer']}) {found['mean']:.2f}, steering score {found['steering_score']:.2f} "
                f"(by item {found['item_score']:.2f})"
            )
        if outcome.others:
            lines.append(
                f"effectiveness {_number(outcome.effectiveness, '.2f')}, entanglement "
                f"{_number(outcome.entanglement, '.3f')}"
            )
        for language, own in outcome.others.items():
            lines.append(
                f"on {language} prompts: share {language} {own['share']:.2f} (unedited {own['ceiling']:.2f}), "
                f"fluency gap {_number(own['fluency_gap'], '+.2f')}, longest repeat "
                f"{own['longest_repeat']:.2f}, {own['answer_words']:.0f} words"
            )
        return lines

    @property
    def _scorer(self) -> str | None:
        named = [outcome.relevance["scorer"] for outcome in self.outcomes if outcome.relevance]
        return named[0] if named else None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _word(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def methods_markdown(report: Report) -> str:
    """The table that compares many ways, with what its columns mean."""
    columns = [name.replace("|", "\\|") for name in report.method_columns()]
    return "\n".join(
        [
            f"# {report.title}\n",
            f"Model {report.model}. Everything was estimated on one part of the text, each way's settings chosen on "
            "another and reported here on a third, all ways on the same prompts.\n",
            "| " + " | ".join(columns) + " |",
            "|---|" + "---:|" * (len(columns) - 2) + "---|",
            *("| " + " | ".join(row) + " |" for row in report.method_rows()),
            "",
            *_doses_markdown(report),
            *(f"{note}\n" for note in report.notes),
            "Share: answers identified as the target; empty and looping ones are failures and do not count. "
            "Ceiling: that share for the unedited model on target prompts. Fluency gap: nats a token by which "
            "the answers are less likely to the unedited model than its own in the target language. NLL: rise on "
            "held-out text, nats a token; third: of the languages that are neither source nor target. KL: of "
            "next-token distributions, the largest of the third languages. Effectiveness: the part of the "
            "possible rise in share that was reached; entanglement: root mean square change of the shares of "
            "all languages but the source on their own prompts.\n",
        ]
    )


def _doses_markdown(report: Report) -> list[str]:
    if not report.curves:
        return []
    columns = report.dose_columns()
    return [
        "Each way at parts of its chosen strength:\n",
        "| " + " | ".join(columns) + " |",
        "|---|" + "---:|" * (len(columns) - 1),
        *("| " + " | ".join(row) + " |" for row in report.dose_rows()),
        "",
    ]


def report_from_json(value: Mapping[str, Any]) -> Report:
    """What a run's measured-*.json, an entry of its report.json, or a file of ``broca evaluate`` holds.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: something else.
    """
    source, target = str(value["source"]), str(value["target"])
    outcomes = tuple(map(Outcome.from_json, value["outcomes"]))
    curves = value.get("curves") or {}
    # JSON has its keys in the alphabet's order.
    titles = sorted(curves, key=[*(one.name for one in outcomes), *curves].index)
    return Report(
        model=str(value.get("model") or ""),
        source=source,
        target=target,
        ceiling=measured(value["ceiling"]),
        continuations=int(value["continuations"]),
        outcomes=outcomes,
        notes=tuple(map(str, value.get("notes") or ())),
        origin=origin_of(value),
        curves={title: tuple(map(_dose_from_json, curves[title])) for title in titles},
    )


def _dose_from_json(value: Mapping[str, Any]) -> Outcome:
    found = Outcome.from_json(value)
    return replace(found, details={**found.details, "dose": float(found.details["dose"])})


def report_files(reports: Sequence[Report]) -> dict[str, bytes]:
    """report.json, report.md, report.png and report.svg, by name; equal reports give equal bytes."""
    return {
        "report.json": json_bytes(list(map(_as_json, reports))),
        "report.md": markdown(reports).encode(),
        **plots(reports),
    }


def _as_json(report: Report) -> dict[str, Any]:
    value = asdict(report)
    return {**value.pop("origin"), **value}


def markdown(reports: Sequence[Report]) -> str:
    """The tables, with what their columns mean and some text that was written."""
    parts = ["# Steering, measured\n"]
    for report in reports:
        parts.append(f"## {report.title}\n")
        parts.append("| " + " | ".join(name.replace("|", "\\|") for name in report.columns()) + " |")
        parts.append("|" + "---|" * len(report.columns()))
        parts += ["| " + " | ".join(row) + " |" for row in report.rows()]
        parts += ["", *(f"{note}\n" for note in report.notes)]
        for outcome in (report.outcomes[0], report.outcomes[-1]):
            parts.append(f"What the {outcome.name} writes:\n")
            for sample in outcome.samples[:3]:
                text = " ".join(sample["continuation"].split())
                parts.append(f"- **{sample['prompt']}** {text} ({sample['language']})")
            parts.append("")
    parts.append(
        "Settings were chosen on one part of the text and are reported on another. Share: continuations "
        "identified as the language, those that go round in circles counting to none. Ceiling: that share for the unedited model on target prompts. Fluency "
        "gap: nats a token by which the continuations are less likely to the unedited model than its own "
        "in the target language. NLL: rise on held-out text, nats a token; the source's own is last. KL: the largest of the third "
        "languages. The keyed edit is measured on the exported checkpoint, loaded again.\n"
    )
    return "\n".join(parts)


def plots(reports: Sequence[Report]) -> dict[str, bytes]:
    """Target share, fluency gap and NLL rises of every way, a row of panels a target; PNG and SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4 * len(reports)), layout="constrained")
    axes = figure.subplots(len(reports), 3, squeeze=False, width_ratios=[1, 1, 2])
    for (share, gap, rise), report in zip(axes, reports, strict=True):
        outcomes = report.outcomes
        names = [outcome.name for outcome in outcomes]
        colours = [f"C{i}" for i in range(len(outcomes))]
        share.barh(names, [outcome.target_share for outcome in outcomes], color=colours)
        share.axvline(report.ceiling, color="black", linestyle="--", linewidth=1)
        share.set(xlim=(0, 1.02), title=f"share {report.target} (dashed: ceiling)")
        gap.barh(names, [outcome.fluency_gap for outcome in outcomes], color=colours)
        gap.axvline(0, color="black", linewidth=0.8)
        gap.set(title="fluency gap, nats a token", yticklabels=[])
        languages = [report.target, *report.third_languages]
        height = 0.8 / max(1, len(outcomes) - 1)
        for i, outcome in enumerate(outcomes[1:]):
            places = [k + (i - (len(outcomes) - 2) / 2) * height for k in range(len(languages))]
            values = [outcome.nll_rise[language] for language in languages]
            rise.barh(places, values, height, label=outcome.name, color=colours[i + 1])
        rise.set_yticks(range(len(languages)), languages)
        rise.axvline(0, color="black", linewidth=0.8)
        rise.set(title="NLL rise on held-out text of all but the source, nats a token")
        rise.legend(fontsize=8)
        for axis in (share, gap, rise):
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
        share.set_ylabel(f"{report.source} to {report.target}")
    found = {}
    # Without a fixed salt and date the same numbers would give other bytes.
    with matplotlib.rc_context({"svg.hashsalt": "broca"}):
        for kind in ("png", "svg"):
            buffer = io.BytesIO()
            empty = {"Software": None} if kind == "png" else {"Date": None}
            figure.savefig(buffer, format=kind, dpi=150, metadata=empty)
            found[f"report.{kind}"] = buffer.getvalue()
    return found
