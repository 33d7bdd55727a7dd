"""Models of the commands, with warnings about what makes them slow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from cli.options import quantised_bits

if TYPE_CHECKING:
    from cli.screen import Screen
    from neurons.models.source import LoadedModel


def require_models(*models: str | None) -> None:
    """Find, or download, further models before the first one is loaded.

    Raises:
        UsageError: as ``neurons.models.source.locate``.
    """
    from neurons.models.source import locate

    for model in models:
        if model is not None:
            locate(model)


def announced(screen: Screen, loaded: LoadedModel) -> LoadedModel:
    """Warn if the model is offloaded, and return it."""
    if loaded.offload_note is not None:
        screen.warn(loaded.offload_note)
    return loaded


def loaded_model(screen: Screen, arguments: SimpleNamespace, model: str | None = None) -> LoadedModel:
    """The model of a command with ``options.device``, or another one as it is loaded."""
    from neurons.models.source import load_model

    bits = quantised_bits(arguments)
    return announced(
        screen, load_model(model or arguments.model, arguments.device, arguments.dtype, bits=bits)
    )
