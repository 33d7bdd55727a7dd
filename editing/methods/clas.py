"""CLAS in the weights: scales shared neurons up and language-specific neurons down (arXiv 2601.16390).

CLAS changes the input h of ``down_proj`` in the last layers by the class of each neuron
(``neurons.scorers.clas``), and interpolates between h and the result:

    h2 = h (1 + b)  partial-shared        h2 = h (1 - g)  specific        h2 = h  all-shared, dead
    h' = (1 - a) h + a h2

Thus h'_j = h_j (1 + a b) for a partial-shared neuron and h_j (1 - a g) for a specific one, a scale of column j of
``down_proj`` without approximation.  Published: b .4, g .2, a from -5 to 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from editing.methods.material import Material
from editing.methods.method import Method
from editing.methods.scale import column_scaling
from editing.methods.scope import chosen_layers, require_neurons, require_strength
from editing.plans.plan import Plan, make_plan, plan_metadata
from neurons.errors import BrocaError, UsageError
from neurons.models.source import ModelSource
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.recording.corpus_recording import record_corpus
from neurons.scorers.clas import CLASSES, clas_classes
from neurons.scorers.method import TEXTS
from neurons.scorers.selection import KINDS
from neurons.setting import Range, setting
from neurons.statistics.statistics import Statistics

SHARED_GAIN, SPECIFIC_LOSS, STRENGTH = 0.4, 0.2, 1.0
# Fraction of the layers that are "the last layers".  The paper searches it for each model; this is Broca's choice.
LAST_LAYERS = 0.25
_SPECIFIC, _SHARED = CLASSES.index("specific"), CLASSES.index("partial-shared")


def clas_factors(
    classes: torch.Tensor,
    strength: float = STRENGTH,
    shared_gain: float = SHARED_GAIN,
    specific_loss: float = SPECIFIC_LOSS,
) -> torch.Tensor:
    """The factor of each neuron.

    Args:
        classes: int64 of any shape, indices into ``neurons.scorers.clas.CLASSES``.
        strength: a.
        shared_gain: b, for partial-shared neurons.
        specific_loss: g, for specific neurons.

    Returns:
        float64 of the same shape.

    Raises:
        UsageError: a setting that is not finite, a strength of 0, or no gain and no loss.
    """
    require_strength(strength)
    for name, value in (("gain", shared_gain), ("loss", specific_loss)):
        if not abs(value) < float("inf"):
            raise UsageError(f"the {name} is {value}: give a finite number")
    if shared_gain == 0 and specific_loss == 0:
        raise UsageError("gain and loss are 0, which changes nothing: give one of them")
    factors = torch.ones(classes.shape, dtype=torch.float64)
    factors[classes == _SHARED] = 1 + strength * shared_gain
    factors[classes == _SPECIFIC] = 1 - strength * specific_loss
    return factors


def last_layers(layers: int) -> tuple[int, ...]:
    """The last quarter of a model's layers, at least one."""
    return tuple(range(layers - max(1, round(LAST_LAYERS * layers)), layers))


def classes_of_set(neurons: NeuronSet) -> torch.Tensor:
    """The class of every neuron by its kind in a set, int64 [L, I]; neurons outside the set are dead.

    Raises:
        BrocaError: a neuron with different kinds for different languages.
    """
    classes = torch.zeros(neurons.layers, neurons.neurons, dtype=torch.int64)
    class_of = {"specific": _SPECIFIC, "related": _SHARED, "general": CLASSES.index("all-shared")}
    of_kind = torch.tensor([class_of[kind] for kind in KINDS])
    for language, rows in neurons.members.items():
        of_language = of_kind[neurons.kinds[language]]
        before = classes[rows[:, 0], rows[:, 1]]
        conflicts = ((before != 0) & (before != of_language)).nonzero()[:, 0]
        if len(conflicts):
            layer, neuron = rows[conflicts[0]].tolist()
            raise BrocaError(
                f"neuron {neuron} of layer {layer} has two kinds in the neuron set: identify neurons again"
            )
        classes[rows[:, 0], rows[:, 1]] = of_language
    return classes


def _classes(
    source: ModelSource, classified: NeuronSet | Statistics, languages: Sequence[str] | None
) -> tuple[torch.Tensor, tuple[str, ...], torch.Tensor]:
    """Classes int64 [L, I], the available languages, and the neurons that may change, bool [L, I]."""
    available = classified.languages
    unknown = [language for language in languages or () if language not in available]
    if unknown:
        raise UsageError(f"no language {unknown[0]!r}: the languages are {', '.join(available)}")
    if languages is not None and not languages:
        raise UsageError("the list of languages is empty: name at least one language, or leave it out")
    shape = (source.anatomy.layers, source.anatomy.neurons)
    if isinstance(classified, NeuronSet):
        require_neurons(source, classified)
        allowed = torch.zeros(shape, dtype=torch.bool)
        for language in available if languages is None else languages:
            rows = classified.of(language)
            allowed[rows[:, 0], rows[:, 1]] = True
        return classes_of_set(classified), available, allowed
    if classified.fingerprint:
        source.require_fingerprint({"fingerprint": classified.fingerprint}, "the statistics")
    mean = classified.text_mean("mlp_in")
    if mean.shape[:2] != shape:
        raise BrocaError(
            f"the statistics have {mean.shape[0]} x {mean.shape[1]} neurons, but the model has "
            f"{shape[0]} x {shape[1]}: record them from this model"
        )
    chosen = [available.index(language) for language in (available if languages is None else languages)]
    return clas_classes(mean), available, (mean[..., chosen] > 0).any(-1)


def text_means(material: Material) -> Statistics:
    """The means of a study's texts, which determine the classes."""
    statistics: Statistics = material.once(
        "text means",
        lambda: record_corpus(material.loaded, material.text, ["mlp_in:text_mean"], TEXTS),
    )
    return statistics


@dataclass(frozen=True, kw_only=True)
class ClasEdit(Method):
    """The registered method."""

    name = "clas"
    line = "scales neurons of several languages up and neurons of one language down"
    source = "arXiv 2601.16390"
    takes = ("statistics", "neurons", "languages", "layers", "strength")

    strength: float = setting(STRENGTH, search=Range(-5.0, 5.0))
    shared_gain: float = setting(SHARED_GAIN, "b, for partial-shared neurons")
    specific_loss: float = setting(SPECIFIC_LOSS, "g, for specific neurons")

    def prepare(self, material: Material) -> Plan:
        """The plan at this strength; a negative one scales shared neurons down and specific ones up.

        Neurons are those active in one of the material's languages (or members of one of these in its neuron set), of the
        last quarter of the layers if it names none.

        Raises:
            UsageError: settings as ``clas_factors``, an unknown language or layer, or neither statistics nor neurons.
            BrocaError: neurons or statistics of another model, or no neuron of a class that should be scaled.
        """
        if material.statistics is not None and material.neurons is not None:
            raise UsageError("--statistics and --neurons exclude each other: give one")
        classified = material.statistics or material.neurons
        if classified is None and material.studied:
            classified = text_means(material)
        if classified is None:
            raise UsageError(
                "--method clas needs --statistics (broca record ... --for clas) or --neurons (broca identify "
                "--method clas --kinds specific,related)"
            )
        source, languages, layers = material.opened, material.languages, material.layers
        in_layers = torch.zeros(source.anatomy.layers, dtype=torch.bool)
        chosen = last_layers(source.anatomy.layers) if layers is None else chosen_layers(source, layers)
        in_layers[list(chosen)] = True
        classes, available, allowed = _classes(source, classified, languages)
        scaled = allowed & in_layers[:, None]
        factors = clas_factors(classes, self.strength, self.shared_gain, self.specific_loss)
        factors[~scaled] = 1.0
        counts = {}
        for name, index, setting_name, value in (
            ("partial-shared", _SHARED, "gain", self.shared_gain),
            ("specific", _SPECIFIC, "loss", self.specific_loss),
        ):
            counts[name] = int((scaled & (classes == index)).sum())
            if value and not counts[name]:
                raise BrocaError(
                    f"no {name} neuron in layers {', '.join(map(str, chosen))}: identify with the method clas and "
                    f"the kinds specific and related, choose other layers, or set its {setting_name} to 0"
                )
        settings = {
            "layers": list(chosen),
            "strength": self.strength,
            "shared_gain": self.shared_gain,
            "specific_loss": self.specific_loss,
            "neurons": classified.metadata.get("method") if isinstance(classified, NeuronSet) else "clas",
            "scaled": counts,
        }
        named = list(available if languages is None else languages)
        metadata = plan_metadata(source, self.name, settings, {"languages": named})
        return make_plan(column_scaling(source, "mlp", factors), metadata)
