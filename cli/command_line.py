"""The command line that repeats the running command, with all defaults written out."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from neurons.models.source import LoadedModel


def command_line(**resolved: Any) -> str:
    """The running command as ``broca NAME ...``, quoted for a shell.

    It includes options at their defaults, which may differ in another version.

    Args:
        resolved: parameter name -> the value that replaced a default which depends on the text, the model or
            the machine.  None omits the option.
    """
    context = click.get_current_context()
    values = {**context.params, **resolved}
    options: list[str] = []
    arguments: list[str] = []
    for parameter in context.command.params:
        value = values.get(parameter.name or "")
        if value is None or parameter.name == "as_json":
            continue
        if isinstance(parameter, click.Option):
            options += _option(parameter, value)
        else:
            arguments += map(str, value if isinstance(value, tuple) else (value,))
    # After "--", words that begin with "-" are not options.
    separate = any(word.startswith("-") for word in arguments)
    words = [*options, "--", *arguments] if separate else [*arguments, *options]
    return shlex.join(["broca", str(context.command.name), *words])


def loaded_as(*models: LoadedModel | None) -> dict[str, str]:
    """The ``device`` and ``dtype`` that "auto" resolved to, for ``command_line``.

    If the models have different dtypes, ``dtype`` is absent, so that the option stays as given.
    """
    loaded = [model for model in models if model is not None]
    dtypes = {str(model.model.dtype).removeprefix("torch.") for model in loaded}
    device = {"device": str(loaded[0].device)}
    return device | {"dtype": dtypes.pop()} if len(dtypes) == 1 else device


def _option(option: click.Option, value: Any) -> list[str]:
    name = max(option.opts, key=len)
    if option.is_flag:
        return [name] if value else option.secondary_opts[:1]
    if option.multiple:
        return [word for item in value for word in (name, str(item))]
    if isinstance(value, tuple):
        return [name, ",".join(map(str, value))] if value else []
    return [name, str(value)]
