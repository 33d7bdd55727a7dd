"""The command ``broca``: its commands, one in each file, and its error messages."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

from cli.encodings import escaping
from cli.options import keeping_inputs
from cli.termination import Terminated, terminable
from neurons.models.compiled_products import keep_few_products
from neurons.models.freed_memory import keep_freed_memory

COMMANDS = {
    "demo": "Run the whole pipeline on the included demo model.",
    "steer": "Make an instruct model answer in a given language.",
    "run": "Run the whole pipeline from one recipe.",
    "record": "Record activation statistics of a model on text.",
    "identify": "Identify the neurons of each language.",
    "sae": "Train sparse autoencoders on a model's activations.",
    "direction": "Estimate the direction from one language to another.",
    "edit": "Make a plan of weight edits from a direction or a neuron set.",
    "train": "Train only a language's neurons on its text.",
    "export": "Write the edited checkpoint or an adapter.",
    "diff": "Recover the edit between two checkpoints.",
    "ablate": "Ablate neurons and measure the loss of every language.",
    "neuron": "Report on one neuron: its most active text and promoted tokens.",
    "evaluate": "Compare a steered model with the unedited model.",
    "ability": "Measure what a model can still do after an edit.",
    "tune": "Search for the best edit.",
    "generate": "Generate text with the unedited and the edited model.",
    "ask": "Answer questions in many languages and save the conversations.",
    "score": "Score answers as published benchmarks do.",
    "chat": "Chat with a model, or with two side by side.",
    "report": "Write one HTML page with all results of a directory.",
    "inspect": "Show the content of a Broca file or a checkpoint.",
    "compare": "Compare neuron sets or edits.",
    "plot": "Plot a neuron set, statistics or an edit.",
    "merge": "Add up the statistics of several recordings.",
    "convert": "Convert masks and counts of other projects.",
}
# Their text is shared by the processes of a launcher.
SHARING = ("record", "identify", "direction", "train")


class Commands(click.Group):
    """The group of all commands; it imports a command only when needed, so that ``broca --help`` is fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"cli.{name}").command
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(_debug())
            assert command.callback is not None
            if name != "merge":  # which may add to a file
                command.callback = keeping_inputs(command.callback)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _debug() -> click.Option:
    """The option ``--debug``, which every command and the group accept."""

    def set_debug(context: click.Context, _: click.Parameter, debug: bool) -> None:
        if debug:
            context.ensure_object(dict)["debug"] = True

    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=set_debug,
        help="Show a traceback on errors.",
    )


@click.command(cls=Commands, params=[_debug()], context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="broca", message="broca %(version)s")
@click.pass_context
def broca(context: click.Context) -> None:
    """Identify the neurons of a language, and steer a checkpoint permanently by editing its weights.

    \b
    Example:
      broca demo --source en --target fr --out demo
    """
    processes = os.environ.get("WORLD_SIZE") or "1"
    if processes != "1" and context.invoked_subcommand not in SHARING:
        raise click.UsageError(
            f"`broca {context.invoked_subcommand}` runs in one process, and a launcher has started {processes} (WORLD_SIZE): "
            f"start it without the launcher; {', '.join(SHARING[:-1])} and {SHARING[-1]} share their text"
        )


def main() -> None:
    """Run the command; exit with 0, 1 (failure), 2 (usage), 130 (interrupted) or 143 (terminated).

    Usage errors are in the command line or in the user's own text: options, names, paths, lines of a corpus.
    Failures are in files written by programs, or occur during the work.
    """
    state: dict[str, bool] = {}
    # Silence torch and transformers; this must be set before their import.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    keep_freed_memory()
    keep_few_products()
    try:
        with escaping(), terminable():
            broca.main(args=sys.argv[1:], prog_name="broca", standalone_mode=False, obj=state)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _print_stopped()
        sys.exit(130)
    except Terminated as error:
        _print_stopped()
        sys.exit(error.code)
    except click.ClickException as error:
        if state.get("debug"):
            raise
        _print_usage_error(error)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of the pipe has closed it; discard further output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if state.get("debug"):
            raise
        sys.exit(_print_error(error))


def _print_stopped() -> None:
    click.echo("broca: stopped; finished work is kept and no file is incomplete", err=True)


def _print_usage_error(error: click.ClickException) -> None:
    """Print one sentence instead of click's three lines."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return
    context = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split()).rstrip(".").replace(". (", " (")
    hint = "" if context is None else f" (see `{context.command_path} --help`)"
    click.echo(f"broca: {message[:1].lower()}{message[1:]}{hint}", err=True)


def _print_error(error: Exception) -> int:
    """Print the error in one line and return the exit status."""
    from neurons.errors import BrocaError, UsageError

    if isinstance(error, BrocaError):
        click.echo(f"broca: {error}", err=True)
        return 2 if isinstance(error, UsageError) else 1
    if isinstance(error, OSError) and error.strerror and error.filename:
        click.echo(f"broca: {error.filename}: {error.strerror}", err=True)
        return 1
    lines = str(error).strip().splitlines()
    summary = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    click.echo(f"broca: unexpected {summary} (run with --debug for a traceback)", err=True)
    return 1


if __name__ == "__main__":
    main()
