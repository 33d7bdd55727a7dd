"""Output of the commands: tables on stdout and progress on stderr, or only one JSON object."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text


class _Rate(ProgressColumn):
    """Column with units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields["unit"]
        return Text(
            "" if speed is None else f"{speed:,.0f} {unit}/s" if speed > 2 else f"{speed:.2f} {unit}/s"
        )


class _Advance:
    """Called with the number of units done.

    ``expect`` adds to their total if that is not known beforehand; ``begin_stage`` starts again with other units.
    """

    def __init__(self, bar: Progress, task: TaskID, grows: bool) -> None:
        self._bar, self._task, self._grows, self._total = bar, task, grows, 0

    def __call__(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def expect(self, count: int) -> None:
        if self._grows:
            self._total += count
            self._bar.update(self._task, total=self._total)

    def begin_stage(self, title: str, total: int, unit: str) -> None:
        self._total = total
        self._bar.reset(self._task, description=title, total=total, unit=unit)


class Screen:
    """The output of one command; with ``as_json`` only one JSON object, at the end."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self._out = Console(highlight=False, emoji=False, soft_wrap=False, width=None)
        if not self._out.is_terminal:
            # A pipe has no width, and folded tables are hard to read in a log.
            self._out = Console(highlight=False, emoji=False, width=250)
        self._err = Console(stderr=True, highlight=False, emoji=False)

    def stage(self, name: str, state: str) -> None:
        """Print that a stage begins or is skipped."""
        if not self.as_json:
            self._err.print(f"{name}: {state}", markup=False)

    @contextmanager
    def copying(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar in bytes; its callback accepts (bytes done, total bytes)."""
        with self._bar([BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def _bar(self, columns: list[ProgressColumn]) -> Progress:
        first = os.environ.get("RANK", "0") == "0"
        quiet = self.as_json or not self._err.is_terminal or not first
        return Progress(
            TextColumn("{task.description}", markup=False),
            *columns,
            console=self._err,
            transient=True,
            disable=quiet,
        )

    @contextmanager
    def progress(self, title: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        """A progress bar with rate and time left on a terminal; nothing in a pipe and with --json.

        Args:
            total: number of units; None: the work announces it (``neurons.recording.text_pass.expect``).
        """
        columns = [BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn(), TimeRemainingColumn()]
        with self._bar(columns) as bar:
            yield _Advance(bar, bar.add_task(title, total=total, unit=unit), total is None)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], words: int = 1
    ) -> None:
        """Print a table whose first ``words`` columns are text and the others numbers."""
        if self.as_json:
            return
        # Table(title=...) would fold the title at the width of the table.
        self._out.print(Text(title, style="bold"), soft_wrap=True)
        table = Table()
        for i, column in enumerate(columns):
            table.add_column(Text(column), justify="left" if i < words else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        self._out.print(table)

    def say(self, text: str) -> None:
        """Print a line of the result."""
        if not self.as_json:
            self._out.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning on stderr, with --json too."""
        click.echo(f"broca: warning: {text}", err=True)

    def note(self, text: str) -> None:
        """Print a note on stderr, with --json too."""
        click.echo(f"broca: note: {text}", err=True)

    def document(self, value: dict[str, Any]) -> None:
        """Print the object, with --json only."""
        if self.as_json:
            from neurons.files.artifact import json_bytes

            print(json_bytes(value).decode(), end="")

    def result(self, shown: Any = None, /, **value: Any) -> None:
        """End a command: print the values as one object with --json, else what is shown, by default the path ``out``."""
        self.document(value)
        path = value.get("out") if shown is None else shown
        if path is not None:
            self.say(str(path))


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def one_line(text: str) -> str:
    """The text with single spaces for all white space."""
    return " ".join(text.split())
