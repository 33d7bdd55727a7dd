"""A model that is loaded for a command: where parts of it wait elsewhere, the person is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cli.screen import Screen
    from neurons.models.source import LoadedModel


def announced(screen: Screen, loaded: LoadedModel) -> LoadedModel:
    """The model, once it is said what makes it slow."""
    if loaded.offload_note is not None:
        screen.warn(loaded.offload_note)
    return loaded
