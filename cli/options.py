"""Options that several commands share, and checks of paths before any work.

Errors in the command line exit with status 2: a path that does not exist, a directory instead of a file, an output
that cannot be written.  Errors inside a file exit with status 1, when the file is read.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Sequence, Set
from functools import reduce, wraps
from itertools import combinations, product
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from neurons.setting import DTYPES

LIST = "list"  # the value of --method that prints all methods
PARTS = ("all", "estimate", "choose", "report")
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class CommaSeparated(click.ParamType[tuple[str, ...]]):
    """``a,b,c`` to a tuple of strings."""

    name = "list"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        items = tuple(item.strip() for item in str(value).split(","))
        if not all(items):
            self.fail(f"{value!r} has an empty item: write it as en,fr,de", param, ctx)
        return items


class Language(click.ParamType[str]):
    """A language code, normalised as in a corpus: EN, eng and eng_Latn are en."""

    name = "language"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        from neurons.text.corpus_files import language_label

        return language_label(str(value))


LANGUAGE = Language()


class Fractions(click.ParamType[tuple[float, ...]]):
    """``5%,10%`` or ``0.05,0.1`` to distinct fractions in ascending order."""

    name = "list"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        fractions = set()
        for item in str(value).split(","):
            number, percent, rest = item.strip().partition("%")
            try:
                fraction = float(number) / (100 if percent else 1)
            except ValueError:
                fraction = math.nan
            if rest or not math.isfinite(fraction):
                self.fail(f"{item!r} is not a fraction: write fractions as 1%,5% or 0.01,0.05", param, ctx)
            fractions.add(fraction)
        return tuple(sorted(fractions))


class Finite(click.ParamType[float]):
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
    """A finite number in a range; click's FloatRange accepts NaN."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        return float(super().convert(FINITE.convert(value, param, ctx), param, ctx))


class InPath(click.ParamType[Path]):
    """An input path: it must exist and be a file or a directory, as configured."""

    name = "path"

    def __init__(self, file: bool = True, directory: bool = True) -> None:
        self.file, self.directory = file, directory

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        path = Path(value)
        if fault := self.fault(path):
            self.fail(fault, param, ctx)
        return path

    def fault(self, path: Path) -> str | None:
        """The error of a path with its fix; None if the path is valid."""
        try:
            exists, is_directory = path.exists(), path.is_dir()
        except OSError as error:
            # For example a name that is too long.
            return f"{path} cannot be read ({error.strerror}): name another path"
        if not exists:
            kind = (
                "file or directory" if self.file and self.directory else "file" if self.file else "directory"
            )
            return f"{path}: there is no such {kind}"
        if is_directory and not self.directory:
            return f"{path} is a directory: name a file"
        if not is_directory and not self.file:
            return f"{path} is a file: name a directory"
        return None if os.access(path, os.R_OK) else f"{path} cannot be read: fix its permissions"


class OutPath(click.ParamType[Path]):
    """An output path: it must be possible to write it."""

    name = "path"

    def __init__(self, directory: bool = False) -> None:
        self.directory = directory

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        path = Path(value)
        try:
            exists, is_directory, is_a_file = path.exists(), path.is_dir(), path.is_file()
            parent = next(parent for parent in path.absolute().parents if parent.exists())
        except OSError as error:
            # For example a name that is too long.
            self.fail(f"{path} cannot be written ({error.strerror}): name another path", param, ctx)
        if is_directory and not self.directory:
            self.fail(f"{path} is a directory: name a file", param, ctx)
        if is_a_file and self.directory:
            self.fail(f"{path} is a file: name a directory", param, ctx)
        if exists and not (is_directory or is_a_file):
            self.fail(f"{path} is a device or a pipe: name another path", param, ctx)
        if not parent.is_dir():
            self.fail(f"{parent} is a file, so {path} cannot be created: choose another path", param, ctx)
        if not os.access(parent, os.W_OK | os.X_OK):
            self.fail(f"{parent} is not writable: choose another path than {path}", param, ctx)
        return path


IN_FILE, IN_DIRECTORY, IN_PATH = InPath(directory=False), InPath(file=False), InPath()
OUT_FILE, OUT_DIRECTORY = OutPath(), OutPath(directory=True)


def keeping_inputs(callback: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a command, after a check that no file that it writes is an input, in a model or written twice."""

    def given(wanted: Callable[[Any], bool]) -> list[tuple[str, Any]]:
        context = click.get_current_context()
        names = [item.name or "" for item in context.command.params if wanted(item.type)]
        values = {name: context.params[name] for name in names}
        every = [(k, value) for k, v in values.items() for value in (v if isinstance(v, tuple) else (v,))]
        return [(option_name(name), value) for name, value in every if value is not None]

    @wraps(callback)
    def checked(**values: Any) -> Any:
        outputs = given(lambda kind: isinstance(kind, OutPath) and not kind.directory)
        # A string may be a path, or LANGUAGE=FILE.
        inputs = [
            (name, Path(text))
            for name, value in given(lambda kind: isinstance(kind, InPath | click.types.StringParamType))
            for text in (str(value), str(value).partition("=")[2])
            if text
        ]
        for (name, path), (other, read) in product(outputs, inputs):
            if is_file(path) and is_file(read) and path.samefile(read):
                raise click.UsageError(f"{name} {path} is the input of {other}: give another file")
            if is_file(read / "config.json") and path.resolve().parent == read.resolve():
                raise click.UsageError(f"{name} {path} is in the model of {other}: give another place")
        for (name, path), (other, second) in combinations(outputs, 2):
            if path.resolve() == second.resolve():
                raise click.UsageError(f"{name} and {other} are both {path}: give two files")
        return callback(**values)

    return checked


def is_file(path: Path) -> bool:
    """Whether it is a file; a text that is longer than a path can be is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def option_name(name: str) -> str:
    """A parameter of the running command as users write it: MODEL, or --direction for ``directions``."""
    item = next(item for item in click.get_current_context().command.params if item.name == name)
    return item.opts[0] if isinstance(item, click.Option) else item.human_readable_name


def is_given(arguments: Any, name: str) -> bool:
    """Whether the user gave an option of the running command, even with its default value."""
    source = click.get_current_context().get_parameter_source(name)
    return getattr(arguments, name) not in (None, ()) and source is ParameterSource.COMMANDLINE


def refuse_options(arguments: Any, names: Set[str], by: str) -> None:
    """
    Raises:
        UsageError: the user gave one of the options, which ``by`` does not support.
    """
    from neurons.errors import UsageError

    for name in vars(arguments):
        if name in names and is_given(arguments, name):
            raise UsageError(f"{option_name(name)} is not supported by {by}: leave it out")


class MultiValueCommand(click.Command):
    """A command whose repeatable options accept several values at once: ``--compose a b --out c``.

    Click requires the option's name before each value.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        repeatable = {
            name
            for option in self.params
            if isinstance(option, click.Option) and option.multiple
            for name in option.opts
        }
        expanded: list[str] = []
        option_name = None  # of the repeatable option whose values follow
        value_expected = False  # directly after an option's name, even "--x" is its value
        for i, argument in enumerate(args):
            if value_expected:
                value_expected = False
            elif argument == "--":
                expanded += args[i:]
                break
            elif argument.startswith("-"):
                option_name = argument if argument in repeatable else None
                value_expected = option_name is not None
            elif option_name is not None:
                expanded.append(option_name)
            expanded.append(argument)
        return super().parse_args(ctx, expanded)


class MemorySize(click.ParamType[int]):
    """``8GB``, ``24GiB`` or a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", str(value), re.IGNORECASE)
        try:
            number = float(match.group(1)) if match else math.nan
        except ValueError:
            number = math.nan
        if match is None or not math.isfinite(number) or number <= 0:
            self.fail(f"{value!r} is not a size: write it as 8GB or 24GiB", param, ctx)
        power = "kmgt".find(match.group(2).lower()) + 1 if match.group(2) else 0
        return int(number * (1024 if match.group(3) else 1000) ** power)


def together(*decorators: Decorator) -> Decorator:
    """One decorator for several, as if written one below the other."""
    return lambda command: reduce(lambda inner, add: add(inner), reversed(decorators), command)


def count(name: str, text: str, default: int | None = None, minimum: int = 1) -> Decorator:
    kind = click.IntRange(min=minimum)
    return click.option(name, type=kind, default=default, show_default=default is not None, help=text)


def choice(name: str, words: Sequence[str], text: str) -> Decorator:
    """One of some words, by default the first."""
    return click.option(name, type=click.Choice(words), default=words[0], show_default=True, help=text)


def seed(text: str) -> Decorator:
    return click.option("--seed", type=int, default=0, show_default=True, help=text)


def out(text: str, directory: bool = False) -> Decorator:
    return click.option("--out", type=OUT_DIRECTORY if directory else OUT_FILE, required=True, help=text)


pair = together(
    click.option("--source", type=LANGUAGE, required=True, help="Language of the prompts."),
    click.option("--target", type=LANGUAGE, required=True, help="Language of the answers."),
)


def method(name: str, default: str) -> Decorator:
    """``method`` and ``assignments`` of ``broca NAME``, which lists its methods."""
    text = f"One of `broca {name} --method list`."
    return together(
        click.option("--method", default=default, show_default=True, help=text),
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="NAME=VALUE",
            help="A setting of the method; may be repeated.  --method list shows all.",
        ),
    )


model = click.argument("model")
languages = click.option(
    "--languages",
    type=CommaSeparated(),
    help="Languages of the corpus to read, as en,fr,de.  [default: all]",
)
roles = click.option(
    "--roles",
    type=CommaSeparated(),
    help="Tokens of conversations to count: system, user, header, answer, thought, template or before-answer.  "
    "[default: system,user,header,answer,thought]",
)
json = click.option("--json", "as_json", is_flag=True, help="Print only one JSON object.")


def corpus(command: Callable[..., Any], required: bool = True) -> Callable[..., Any]:
    """``corpus``, ``languages``, ``roles`` and ``part``."""
    text = (
        "Directory of <language>.txt, .jsonl or .parquet, with one text or (in .jsonl and .parquet) one conversation per "
        "line or row; or a .jsonl whose rows have a language, from `broca ask`."
    )
    part = (
        "Lines to read, by line number: half to estimate, a quarter to choose settings, a quarter to report."
    )
    options = (
        click.option("--corpus", type=IN_PATH, required=required, help=text),
        languages,
        roles,
        choice("--part", PARTS, part),
    )
    return together(*options)(command)


def _limit(_: Any, __: Any, value: int | None) -> None:
    # Import torch only if necessary; without a value, reset the limit of an earlier command in this process.
    if value is not None or "neurons.models.memory" in sys.modules:
        from neurons.models.memory import limit_memory

        limit_memory(value)


max_memory = click.option(
    "--max-memory",
    type=MemorySize(),
    expose_value=False,
    callback=_limit,
    help="Maximum memory of the process, weights included, as 8GB.  [default: 90 % of the free memory]",
)


def device(
    command: Callable[..., Any], auto: str = "float32 on a CPU, else the checkpoint's dtype"
) -> Callable[..., Any]:
    """``device`` and ``dtype``, and the limit of ``max_memory``."""
    options = (
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ... or auto."),
        choice("--dtype", DTYPES, f"Dtype of the activations; auto: {auto}."),
        max_memory,
    )
    return together(*options)(command)


def served_device(command: Callable[..., Any]) -> Callable[..., Any]:
    """``device`` of a command that computes in the dtype of serving (``neurons.models.own_dtype``)."""
    return device(command, "the checkpoint's dtype, or float32 on a CPU that lacks it")


# For commands that only read activations; see ``quantised_bits``.
quantised = together(
    *(
        click.option(
            f"--load-in-{bits}bit",
            is_flag=True,
            help=f"Quantise the weights of linear modules to {bits} bits when loading (bitsandbytes).",
        )
        for bits in (4, 8)
    )
)


def quantised_bits(arguments: Any) -> int | None:
    """The argument ``bits`` of ``load_model``, from the values of ``quantised`` if it has them.

    Raises:
        UsageError: both options are given.
    """
    from neurons.errors import UsageError

    in_4bit, in_8bit = (getattr(arguments, f"load_in_{bits}bit", False) for bits in (4, 8))
    if in_4bit and in_8bit:
        raise UsageError("--load-in-4bit and --load-in-8bit exclude each other: give one")
    return 4 if in_4bit else 8 if in_8bit else None


def new_tokens(default: int) -> Decorator:
    return count("--new-tokens", "Maximum number of tokens to generate.", default)


def writing(tokens: int, temperature: float = 0.0) -> Decorator:
    """``new_tokens`` and ``temperature``."""
    return together(
        new_tokens(tokens),
        click.option(
            "--temperature",
            type=FiniteRange(min=0),
            default=temperature,
            show_default=True,
            help="Sampling temperature; 0 is greedy decoding.",
        ),
    )


classifier = click.option(
    "--classifier",
    metavar="FILE|MODEL",
    help="What labels the answers: a .json or .toml file with keywords or regular expressions of each label, or a "
    "text-classification model (hub id or directory).  [default: language identification]",
)
ENGINES = ("transformers", "vllm")
engine = choice(
    "--engine", ENGINES, "What runs the model; vllm needs the package vllm and reads checkpoints only."
)
batch_tokens = count("--batch-tokens", "Tokens per forward pass.  [default: what memory allows]")
tokens = count(
    "--tokens",
    "Maximum number of tokens to read per language, spread over the whole text.  [default: as the method needs]",
)
dry_run = click.option("--dry-run", is_flag=True, help="Print the memory that each stage needs, and exit.")
