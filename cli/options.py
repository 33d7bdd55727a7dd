"""Options that several commands share, and what a path must be before any work is done.

What is wrong in the command line itself is refused here, with status 2: a path that is not there, a directory
in place of a file, a place that cannot be written to.  What is wrong inside a file shows when it is read:
status 1.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PARTS = ("all", "estimate", "choose", "report")


class CommaSeparated(click.ParamType[tuple[str, ...]]):
    """``a,b,c`` to a tuple of strings."""

    name = "list"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        items = tuple(item.strip() for item in str(value).split(","))
        if not all(items):
            self.fail(f"{value!r} has an empty item: write en,fr,de", param, ctx)
        return items


class Language(click.ParamType[str]):
    """A language as a corpus names it: EN, eng and eng_Latn are en."""

    name = "language"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        from neurons.text.corpus_files import language_label

        return language_label(str(value))


LANGUAGE = Language()


class Shares(click.ParamType[tuple[float, ...]]):
    """``5%,10%`` or ``0.05,0.1`` to shares, each once, in ascending order."""

    name = "list"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        found = set()
        for item in str(value).split(","):
            number, percent, rest = item.strip().partition("%")
            try:
                share = float(number) / (100 if percent else 1)
            except ValueError:
                share = math.nan
            if rest or not math.isfinite(share):
                self.fail(f"{item!r} is no share: write shares as 1%,5% or 0.01,0.05", param, ctx)
            found.add(share)
        return tuple(sorted(found))


class Finite(click.ParamType[float]):
    """A number, not NaN and not infinite."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


FINITE = Finite()


class FiniteRange(click.FloatRange):
    """A number in a range; click's own takes NaN to lie in every range."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        return float(super().convert(FINITE.convert(value, param, ctx), param, ctx))


class InPath(click.ParamType[Path]):
    """What a command reads: refused before any work where it is not there or not of this kind."""

    name = "path"

    def __init__(self, file: bool = True, directory: bool = True) -> None:
        self.file, self.directory = file, directory

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        path = Path(value)
        if fault := self.fault(path):
            self.fail(fault, param, ctx)
        return path

    def fault(self, path: Path) -> str | None:
        """What is wrong with a path and the mend; None where nothing is."""
        try:
            there, folder = path.exists(), path.is_dir()
        except OSError as error:
            # A name longer than any file's, for one.
            return f"{path} cannot be read ({error.strerror}): name another"
        if not there:
            kind = (
                "file or directory" if self.file and self.directory else "file" if self.file else "directory"
            )
            return f"{path}: there is no such {kind}"
        if folder and not self.directory:
            return f"{path} is a directory: name a file"
        if not folder and not self.file:
            return f"{path} is a file: name a directory"
        return None if os.access(path, os.R_OK) else f"{path} cannot be read: mend its permissions"


class OutPath(click.ParamType[Path]):
    """What a command is to write: refused before any work where it could not be."""

    name = "path"

    def __init__(self, directory: bool = False) -> None:
        self.directory = directory

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        path = Path(value)
        if path.is_dir() and not self.directory:
            self.fail(f"{path} is a directory: name a file", param, ctx)
        if path.is_file() and self.directory:
            self.fail(f"{path} is a file: name a directory", param, ctx)
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if not folder.is_dir():
            self.fail(f"{folder} is a file, so {path} cannot be made in it: choose another place", param, ctx)
        if not os.access(folder, os.W_OK | os.X_OK):
            self.fail(f"{folder} cannot be written to: choose another place than {path}", param, ctx)
        return path


IN_FILE, IN_DIRECTORY, IN_PATH = InPath(directory=False), InPath(file=False), InPath()
OUT_FILE, OUT_DIRECTORY = OutPath(), OutPath(directory=True)


class Many(click.Command):
    """A command whose repeatable options take several values at once: ``--compose a b --out c``.

    Click itself wants the option's name before each value.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        many = {
            name
            for option in self.params
            if isinstance(option, click.Option) and option.multiple
            for name in option.opts
        }
        spread: list[str] = []
        repeated = None  # the option whose further values come next
        named = False  # whether its name has just been read: what follows is a value, whatever it looks like
        for i, argument in enumerate(args):
            if named:
                named = False
            elif argument == "--":
                spread += args[i:]
                break
            elif argument.startswith("-"):
                repeated = argument if argument in many else None
                named = repeated is not None
            elif repeated is not None:
                spread.append(repeated)
            spread.append(argument)
        return super().parse_args(ctx, spread)


model_argument = click.argument("model")


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")(
        command
    )


def corpus_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option(
                "--corpus",
                "corpus_path",
                type=IN_DIRECTORY,
                required=True,
                help="Directory of <language>.txt, .jsonl or .parquet, one text a line or row.",
            ),
            click.option(
                "--languages",
                type=CommaSeparated(),
                help="Which of the corpus, as en,fr,de.  [default: all]",
            ),
            click.option(
                "--part",
                type=click.Choice(PARTS),
                default="all",
                show_default=True,
                help="Lines to read: half to estimate from, a quarter to choose settings on, a quarter "
                "to report, by line number.",
            ),
        ]
    ):
        command = option(command)
    return command


def device_options(
    command: Callable[..., Any], auto: str = "float32 on a CPU, else the checkpoint's own"
) -> Callable[..., Any]:
    command = max_memory_option(command)
    command = click.option(
        "--dtype",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        help=f"Of the activations; auto is {auto}.",
    )(command)
    return click.option(
        "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ... or auto."
    )(command)


def served_device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``device_options`` of a command that computes as the checkpoint is served (``neurons.models.own_dtype``)."""
    return device_options(command, "the checkpoint's own, but float32 on a CPU without instructions for it")


def quantised_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``load_in_4bit`` and ``load_in_8bit``, for commands that only read activations (``bits_asked``)."""
    for bits in (8, 4):
        command = click.option(
            f"--load-in-{bits}bit",
            is_flag=True,
            help=f"Quantise the linear modules' weights to {bits} bits on loading (bitsandbytes).",
        )(command)
    return command


def bits_asked(asked: Any) -> int | None:
    """What ``load_model`` takes as ``bits``, from the values of ``quantised_options``.

    Raises:
        UsageError: both were asked for.
    """
    from neurons.errors import UsageError

    if asked.load_in_4bit and asked.load_in_8bit:
        raise UsageError("--load-in-4bit and --load-in-8bit cannot both be: give one")
    return 4 if asked.load_in_4bit else 8 if asked.load_in_8bit else None


def writing_options(new_tokens: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``new_tokens`` and ``temperature``."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        command = click.option(
            "--temperature",
            type=FiniteRange(min=0),
            default=0.0,
            show_default=True,
            help="0 takes the likeliest token always.",
        )(command)
        return click.option(
            "--new-tokens", type=click.IntRange(min=1), default=new_tokens, show_default=True
        )(command)

    return add


engine_option = click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="What runs the model; vllm must be installed beside Broca, and reads checkpoints only.",
)


class MemorySize(click.ParamType[int]):
    """``8GB``, ``24GiB`` or a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", str(value), re.IGNORECASE)
        try:
            number = float(found.group(1)) if found else math.nan
        except ValueError:
            number = math.nan
        if found is None or not math.isfinite(number) or number <= 0:
            self.fail(f"{value!r} is no size: write it as 8GB or 24GiB", param, ctx)
        power = "kmgt".find(found.group(2).lower()) + 1 if found.group(2) else 0
        return int(number * (1024 if found.group(3) else 1000) ** power)


def max_memory_option(command: Callable[..., Any]) -> Callable[..., Any]:
    def limit(_: Any, __: Any, value: int | None) -> None:
        # torch is not imported for nothing; what an earlier command of the same process allowed is over.
        if value is not None or "neurons.models.memory" in sys.modules:
            from neurons.models.memory import limit_memory

            limit_memory(value)

    return click.option(
        "--max-memory",
        type=MemorySize(),
        expose_value=False,
        callback=limit,
        help="Most that the process may take, weights and all, as 8GB.  [default: what is free, less a tenth]",
    )(command)


def tokens_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--tokens",
        type=click.IntRange(min=1),
        help="Most tokens of a language to read, evenly from the whole text.  [default: what the method needs]",
    )(command)


def dry_run_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--dry-run", is_flag=True, help="Say what memory each stage needs, and do nothing.")(
        command
    )


def out_option(what: str, directory: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option("--out", type=OUT_DIRECTORY if directory else OUT_FILE, required=True, help=what)
