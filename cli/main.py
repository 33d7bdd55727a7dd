"""The command ``broca``: one file a command, and one place that turns errors into sentences."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

from cli.encodings import escaping
from cli.termination import Terminated, terminable
from neurons.models.freed_memory import keep_freed_memory

COMMANDS = {
    "demo": "Find neurons, edit, export and measure on the model that Broca ships.",
    "steer": "Make an instruct model answer in a language, for good.",
    "run": "Do a whole job from one recipe.",
    "record": "Record what a model does with text, to find neurons in it later.",
    "identify": "Find the neurons that carry each language.",
    "direction": "Take the direction from one language to another.",
    "edit": "Turn a direction or a neuron set into a plan of weight edits.",
    "export": "Write the permanently steered checkpoint, or an adapter.",
    "diff": "Recover the edit between two checkpoints.",
    "ablate": "Study what a language loses without its neurons.",
    "neuron": "Explain one neuron: texts that excite it, tokens it promotes.",
    "evaluate": "Measure a steered model beside the unedited one.",
    "tune": "Search for the best edit.",
    "generate": "Let a model write, unedited and edited side by side.",
    "ask": "Let a model answer questions in many languages, as a file of conversations.",
    "chat": "Talk to a model in the terminal, with another beside it.",
    "report": "Show all results of a directory on one HTML page.",
    "inspect": "Show what a Broca file or a checkpoint holds.",
    "compare": "Show how far neuron sets, or edits, agree.",
    "plot": "Draw a neuron set, statistics or an edit.",
    "merge": "Add up statistics of several recordings.",
    "convert": "Read or write other projects' masks and counts.",
}


class Commands(click.Group):
    """Imports a command's file when it is called: ``broca --help`` need not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"cli.{name}").command
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(_debug())
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _debug() -> click.Option:
    """Of every command: it may stand wherever an option may."""

    def note(context: click.Context, _: click.Parameter, given: bool) -> None:
        if given:
            context.ensure_object(dict)["debug"] = True

    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=note,
        help="Show a traceback where something fails.",
    )


@click.command(cls=Commands, params=[_debug()], context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="broca", message="broca %(version)s")
def broca() -> None:
    """Find the neurons that carry a language and steer a checkpoint for good by editing its weights.

    \b
    Example:
      broca demo --source en --target fr --out demo
    """


def main() -> None:
    """Run the command; exit 0, 1 for failure, 2 for usage, 130 when interrupted, 143 when terminated.

    Usage is what a user can see in the command line, or wrote himself: options, names, paths that are not
    there, lines of a corpus.  Failure is what lies in a file that a program wrote, or happens on the way.
    """
    asked: dict[str, bool] = {}
    # Before torch and transformers are imported: what they say is not what the user asked for.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    keep_freed_memory()
    try:
        with escaping(), terminable():
            broca.main(args=sys.argv[1:], prog_name="broca", standalone_mode=False, obj=asked)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _stopped()
        sys.exit(130)
    except Terminated as error:
        _stopped()
        sys.exit(error.code)
    except click.ClickException as error:
        if asked.get("debug"):
            raise
        _refused(error)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe has left; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if asked.get("debug"):
            raise
        sys.exit(_failed(error))


def _stopped() -> None:
    click.echo("broca: stopped; what was finished is kept, nothing is left half written", err=True)


def _refused(error: click.ClickException) -> None:
    """One sentence like every other, in place of click's three lines."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return
    context = getattr(error, "ctx", None)
    said = " ".join(error.format_message().split()).rstrip(".").replace(". (", " (")
    hint = "" if context is None else f" (`{context.command_path} --help` shows how)"
    click.echo(f"broca: {said[:1].lower()}{said[1:]}{hint}", err=True)


def _failed(error: Exception) -> int:
    from neurons.errors import BrocaError, UsageError

    if isinstance(error, BrocaError):
        click.echo(f"broca: {error}", err=True)
        return 2 if isinstance(error, UsageError) else 1
    if isinstance(error, OSError) and error.strerror and error.filename:
        click.echo(f"broca: {error.filename}: {error.strerror}", err=True)
        return 1
    text = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    click.echo(f"broca: unexpected {what} (--debug shows where)", err=True)
    return 1


if __name__ == "__main__":
    main()
