"""The command line that does again what a command did, with what it took by default written out."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from neurons.models.source import LoadedModel

PRINTING = ("as_json",)


def command_line(**taken: Any) -> str:
    """``broca NAME ...`` of the command that is running, as a shell reads it.

    Every option stands in it, those that were left at their defaults too: another version may have others.

    Args:
        taken: by the name of the parameter, what took the place of a default that depends on the text, the
            model or the machine.  None leaves the option out.
    """
    context = click.get_current_context()
    values = {**context.params, **taken}
    named: list[str] = []
    placed: list[str] = []
    for parameter in context.command.params:
        value = values.get(parameter.name or "")
        if value is None or parameter.name in PRINTING:
            continue
        if isinstance(parameter, click.Option):
            named += _option(parameter, value)
        else:
            placed += map(str, value if isinstance(value, tuple) else (value,))
    # Behind "--" nothing is taken for an option.
    odd = any(word.startswith("-") for word in placed)
    words = [*named, "--", *placed] if odd else [*placed, *named]
    return shlex.join(["broca", str(context.command.name), *words])


def loaded_as(*models: LoadedModel | None) -> dict[str, str]:
    """``device`` and ``dtype`` that "auto" came to, for ``command_line``.

    Models that are read in dtypes of their own have no dtype in common: then it stays as it was asked for.
    """
    read = [model for model in models if model is not None]
    dtypes = {str(model.model.dtype).removeprefix("torch.") for model in read}
    found = {"device": str(read[0].device)}
    return found | {"dtype": dtypes.pop()} if len(dtypes) == 1 else found


def _option(option: click.Option, value: Any) -> list[str]:
    name = max(option.opts, key=len)
    if option.is_flag:
        return [name] if value else option.secondary_opts[:1]
    if option.multiple:
        return [word for one in value for word in (name, str(one))]
    if isinstance(value, tuple):
        return [name, ",".join(map(str, value))] if value else []
    return [name, str(value)]
