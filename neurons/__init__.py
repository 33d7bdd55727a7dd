"""Identify neurons: reads models and text, never changes a model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neurons.errors import BrocaError as BrocaError
    from neurons.errors import UsageError as UsageError
    from neurons.models.source import load_model as load_model
    from neurons.models.source import open_model as open_model
    from neurons.neuron_sets.identify import identify as identify
    from neurons.neuron_sets.neuron_report import neuron_report as neuron_report
    from neurons.neuron_sets.neuron_set import NeuronSet as NeuronSet
    from neurons.neuron_sets.neuron_set import load_neuron_set as load_neuron_set
    from neurons.recording.corpus_recording import record_corpus as record_corpus
    from neurons.statistics.statistics import Statistics as Statistics
    from neurons.statistics.statistics import load_statistics as load_statistics
    from neurons.text.corpus import Corpus as Corpus
    from neurons.text.corpus import read_corpus as read_corpus

# Name -> its module, imported on first access, because torch takes seconds to import.
_PUBLIC = {
    "load_model": "neurons.models.source",
    "open_model": "neurons.models.source",
    "read_corpus": "neurons.text.corpus",
    "Corpus": "neurons.text.corpus",
    "record_corpus": "neurons.recording.corpus_recording",
    "Statistics": "neurons.statistics.statistics",
    "load_statistics": "neurons.statistics.statistics",
    "identify": "neurons.neuron_sets.identify",
    "NeuronSet": "neurons.neuron_sets.neuron_set",
    "load_neuron_set": "neurons.neuron_sets.neuron_set",
    "neuron_report": "neurons.neuron_sets.neuron_report",
    "BrocaError": "neurons.errors",
    "UsageError": "neurons.errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
