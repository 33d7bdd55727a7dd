"""What a person sees: tables on stdout, progress on stderr, or one JSON object and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
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
            # A pipe has no width: nothing is folded for it.
            self._out = Console(highlight=False, width=200)
        self._err = Console(stderr=True, highlight=False)

    def stage(self, name: str, skipped: bool) -> None:
        """A stage begins, or is skipped."""
        if not self.as_json:
            self._err.print(f"{name}: {'unchanged' if skipped else '...'}", markup=False)

    @contextmanager
    def progress(self, title: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        """A bar with rate and time left on a terminal; silent in a pipe and with --json."""
        columns: list[ProgressColumn] = [TextColumn("{task.description}")]
        if total is not None:
            columns += [BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()]
        else:
            columns += [_Rate(), TimeElapsedColumn()]
        quiet = self.as_json or not self._err.is_terminal
        with Progress(*columns, console=self._err, transient=True, disable=quiet) as bar:
            task = bar.add_task(title, total=total, unit=unit)
            yield lambda count: bar.advance(task, count)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table; the first column is text, the others are numbers."""
        if self.as_json:
            return
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(Text(column), justify="left" if i == 0 else "right", overflow="fold")
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

    def result(self, value: dict[str, Any], path: Any = None) -> None:
        """The end of a command: the object with --json, else the path of what was written."""
        if self.as_json:
            print(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False))
        elif path is not None:
            self._out.print(str(path), markup=False, soft_wrap=True)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
