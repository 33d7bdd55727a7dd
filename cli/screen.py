"""What a person sees: tables on stdout, progress on stderr, or one JSON object and nothing else."""

from __future__ import annotations

import math
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
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text


class _Rate(ProgressColumn):
    """Work done a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields["unit"]
        return Text(
            "" if speed is None else f"{speed:,.0f} {unit}/s" if speed > 2 else f"{speed:.2f} {unit}/s"
        )


class Screen:
    """Prints for people, or collects for machines.

    Args:
        as_json: print nothing but one JSON object, at the end.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self._out = Console(highlight=False, soft_wrap=False, width=None)
        if not self._out.is_terminal:
            # A pipe has no width, and a table that is folded is hard to read by program or in a log.
            self._out = Console(highlight=False, width=250)
        self._err = Console(stderr=True, highlight=False)

    def stage(self, name: str, state: str) -> None:
        """A stage begins, or is skipped."""
        if not self.as_json:
            self._err.print(f"{name}: {state}", markup=False)

    @contextmanager
    def copying(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for a writer that tells (bytes done, bytes in all)."""
        with self._bar([BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def _bar(self, columns: list[ProgressColumn]) -> Progress:
        quiet = self.as_json or not self._err.is_terminal
        return Progress(
            TextColumn("{task.description}"), *columns, console=self._err, transient=True, disable=quiet
        )

    @contextmanager
    def progress(self, title: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        """A bar with rate and time left on a terminal; silent in a pipe and with --json."""
        columns: list[ProgressColumn] = [_Rate(), TimeElapsedColumn()]
        if total is not None:
            columns = [BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()]
        with self._bar(columns) as bar:
            task = bar.add_task(title, total=total, unit=unit)
            yield lambda count: bar.advance(task, count)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], words: int = 1
    ) -> None:
        """Print a table; the first ``words`` columns are text, the others are numbers."""
        if self.as_json:
            return
        # Not as the table's own title, which is folded at the width of the table.
        self._out.print(Text(title, style="bold"), soft_wrap=True)
        table = Table()
        for i, column in enumerate(columns):
            table.add_column(Text(column), justify="left" if i < words else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        self._out.print(table)

    def say(self, text: str) -> None:
        """A line of the result."""
        if not self.as_json:
            self._out.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line on stderr that the user should not miss."""
        click.echo(f"broca: warning: {text}", err=True)

    def note(self, text: str) -> None:
        """A line on stderr that explains what was done, with --json too."""
        click.echo(f"broca: note: {text}", err=True)

    def result(self, value: dict[str, Any], path: Any = None) -> None:
        """The end of a command: the object with --json, else the path of what was written."""
        if self.as_json:
            from neurons.files.artifact import json_bytes

            print(json_bytes(value).decode(), end="")
        elif path is not None:
            self._out.print(str(path), markup=False, soft_wrap=True)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
