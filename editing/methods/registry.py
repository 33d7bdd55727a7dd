"""The edit methods by name: what each takes, and the plan that it makes of a request."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from editing.directions.direction import Direction
from editing.directions.vectors import read_vectors
from editing.methods import austeer, bake, keyed, steer2edit
from editing.methods.bake_bias import bake_bias_plan
from editing.methods.bake_correction import corrected_plan
from editing.methods.clas import SHARED_GAIN, SPECIFIC_LOSS, clas_plan
from editing.methods.directional_ablation import FORMS, directional_ablation_plan
from editing.methods.key import EPS, SOFT_WEIGHT
from editing.methods.language_arithmetic import MODES, language_arithmetic_plan
from editing.methods.learned_values import learned_values
from editing.methods.neutral_mean import neutral_means
from editing.methods.reach import site_of
from editing.methods.scale import scale_plan
from editing.methods.subspace_ablation import subspace_ablation_plan
from editing.plans.plan import Plan
from neurons.architectures.anatomy import BLOCKS
from neurons.errors import UsageError
from neurons.models.source import LoadedModel, ModelSource, load_model, open_model
from neurons.neuron_sets.neuron_set import NeuronSet
from neurons.recording.text_pass import Progress
from neurons.statistics.statistics import Statistics
from neurons.text.corpus import Corpus

# What a setting's text is read as.
NUMBER, WHOLE, YES_NO, WORD, WORDS = (
    "a finite number",
    "a whole number",
    "yes or no",
    "a word",
    "words as a,b",
)


@dataclass(frozen=True)
class Setting:
    """What a method can be told by ``--set name=value``.

    Attributes:
        kind: NUMBER, WHOLE, YES_NO, WORD or WORDS.
        default: None where the method decides.
        line: what it does.
        words: the words that are allowed; empty allows any.
    """

    kind: str
    default: Any
    line: str
    words: tuple[str, ...] = ()

    def read(self, name: str, text: str) -> Any:
        """The value in a text.

        Raises:
            UsageError: not of this kind.
        """
        refused = UsageError(f"--set {name}={text}: give {', '.join(self.words) or self.kind}")
        if self.kind == WORDS:
            found = tuple(word.strip() for word in text.split(","))
            if not all(found):
                raise refused
            return found
        if self.kind == WORD:
            if self.words and text not in self.words:
                raise refused
            return text
        if self.kind == YES_NO:
            if text.lower() not in ("yes", "no", "true", "false", "1", "0"):
                raise refused
            return text.lower() in ("yes", "true", "1")
        try:
            value = float(text)
        except ValueError as error:
            raise refused from error
        if not math.isfinite(value):
            raise refused
        if self.kind == WHOLE:
            if value != int(value):
                raise refused
            return int(value)
        return value


@dataclass
class Request:
    """What a user gives to a method; what a method does not take is None or empty.

    Attributes:
        model: hub id or directory.
        device, dtype: for methods that run the model.
        directions: of this model.
        vector: somebody's steering vectors.
        neurons: restricts the edit, or says what it scales.
        statistics: of a recording.
        corpus: text.
        languages: whose neurons; None takes all of the set.
        layers: None is the method's default.
        blocks: of "attn" and "mlp"; None is the method's default.
        strength: None is the method's default.
        settings: by name, all of the method's.
        progress: called with the number of tokens done.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    directions: tuple[Direction, ...] = ()
    vector: Path | None = None
    neurons: NeuronSet | None = None
    statistics: Statistics | None = None
    corpus: Corpus | None = None
    languages: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    blocks: tuple[str, ...] | None = None
    strength: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress | None = None

    @cached_property
    def source(self) -> ModelSource:
        return open_model(self.model)

    @cached_property
    def loaded(self) -> LoadedModel:
        return load_model(self.model, self.device, self.dtype)

    @property
    def direction(self) -> Direction:
        if len(self.directions) != 1:
            raise UsageError(f"give one --direction (there are {len(self.directions)})")
        return self.directions[0]

    @property
    def text(self) -> Corpus:
        assert self.corpus is not None
        return self.corpus

    @property
    def neuron_set(self) -> NeuronSet:
        assert self.neurons is not None
        return self.neurons


@dataclass(frozen=True)
class EditMethod:
    """One way of turning what was found into changed weights.

    Attributes:
        line: what it does, in a line.
        source: where it was published.
        needs: options that must be given.
        takes: further options that mean something.
        make: the plan.
        settings: by name.
        least_languages: how many a corpus must have.
    """

    line: str
    source: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    make: Callable[[Request], Plan]
    settings: Mapping[str, Setting] = field(default_factory=dict)
    least_languages: int = 2

    def read_settings(self, given: Mapping[str, str]) -> dict[str, Any]:
        """All settings, those given in place of the defaults.

        Raises:
            UsageError: one that the method does not have, or a value of the wrong kind.
        """
        for name in given:
            if name not in self.settings:
                known = ", ".join(self.settings) or "none"
                raise UsageError(f"--set {name}: this method has no such setting (it has {known})")
        return {
            name: setting.read(name, given[name]) if name in given else setting.default
            for name, setting in self.settings.items()
        }


def _strength(request: Request, default: float = 1.0) -> float:
    return default if request.strength is None else request.strength


def _keyed(request: Request) -> Plan:
    own = request.settings
    plan = keyed.keyed_plan(
        request.loaded,
        request.text,
        request.direction,
        request.layers,
        _strength(request, keyed.STRENGTH),
        request.neurons,
        own["eps"],
        request.progress,
        sources=own["sources"],
        keep=own["keep"],
        keep_softly=own["keep_softly"],
        soft_weight=own["soft_weight"],
        blocks=request.blocks or ("mlp",),
        sparse=own["sparse"],
        jointly=own["jointly"],
    )
    if not own["learn"]:
        return plan
    sources = own["sources"] or (request.direction.source,)
    return learned_values(
        request.loaded,
        plan,
        [
            text
            for lines in zip_longest(*(request.text.texts[name] for name in sources))
            for text in lines
            if text
        ],
        request.text.texts[request.direction.target],
        progress=request.progress,
    ).plan


def _steer2edit(request: Request) -> Plan:
    own = request.settings
    heads, neurons = own["heads_rho"], own["neurons_rho"]
    if heads is None and neurons is None:
        heads, neurons = steer2edit.HEADS_RHO, steer2edit.NEURONS_RHO
    layers = range(request.source.anatomy.layers) if request.layers is None else request.layers
    return steer2edit.steer2edit_plan(
        request.source,
        request.direction,
        layers,
        heads,
        neurons,
        own["alpha"],
        _strength(request),
        request.neurons,
        request.languages,
        own["weigh"],
    )


def _ablate(request: Request) -> Plan:
    own = request.settings
    form, site, blocks = own["form"], own["site"], request.blocks or BLOCKS
    _, biprojected = FORMS[form]
    corpus, neutral = request.corpus, None
    if corpus is None and request.languages is not None:
        raise UsageError("--languages chooses the neutral text from --corpus, which is not given")
    if corpus is not None:
        if not biprojected:
            raise UsageError(
                f"--corpus is neutral text, which form {form} does not use: leave it out, or give --set "
                "form=biprojected"
            )
        sites = tuple(dict.fromkeys(site_of(site, block) for block in blocks))
        neutral = neutral_means(request.loaded, corpus, sites, request.progress)
    plan = directional_ablation_plan(
        request.source,
        request.direction,
        request.layers,
        blocks,
        form,
        site,
        _strength(request),
        own["from_layer"],
        neutral,
    )
    if corpus is None:
        return plan
    origin = {"languages": list(corpus.languages), "corpus": {"digest": corpus.digest, "part": corpus.part}}
    return Plan(plan.edits, {**plan.metadata, "neutral": origin})


def _ablate_subspace(request: Request) -> Plan:
    own = request.settings
    return subspace_ablation_plan(
        request.source,
        request.directions,
        request.layers,
        request.blocks or BLOCKS,
        own["site"],
        _strength(request),
        own["from_layer"],
        own["rank"],
    )


def _scale(request: Request) -> Plan:
    factor = request.settings["factor"]
    if factor is None:
        raise UsageError("--method scale needs --factor (0 ablates, 2 doubles)")
    if request.languages is None:
        raise UsageError("--method scale needs --languages: whose neurons?")
    plan = scale_plan(request.source, request.neuron_set, request.languages, factor, request.layers)
    return plan if request.strength is None else plan.scaled(request.strength)


def _clas(request: Request) -> Plan:
    classified = request.statistics or request.neurons
    if classified is None:
        raise UsageError(
            "--method clas needs --statistics (broca record ... --for clas) or --neurons (broca identify "
            "--method clas --kinds specific,related)"
        )
    return clas_plan(
        request.source,
        classified,
        request.languages,
        request.layers,
        _strength(request),
        request.settings["shared_gain"],
        request.settings["specific_loss"],
    )


def _austeer(request: Request) -> Plan:
    pair = request.languages
    if pair is None or len(pair) != 2:
        raise UsageError("--method austeer needs --languages SOURCE,TARGET")
    if request.statistics is not None:
        if request.blocks not in (None, ("mlp",)):
            raise UsageError(
                "--statistics know neurons only: leave --blocks out, or give --corpus in place of --statistics"
            )
        rates = {"mlp": austeer.neuron_rates(request.source, request.statistics, pair[0], pair[1])}
    elif request.corpus is not None:
        rates = austeer.corpus_rates(
            request.loaded, request.text, *pair, request.blocks or BLOCKS, request.progress
        )
    else:
        raise UsageError("--method austeer needs --corpus (parallel text), or --statistics of one")
    return austeer.austeer_plan(
        request.source,
        rates,
        (pair[0], pair[1]),
        request.settings["channels"],
        request.settings["alpha"] * _strength(request),
        request.layers,
    )


def _vectors(request: Request) -> tuple[dict[int, Any], dict[str, Any]]:
    """The vectors to bake by layer, and what the plan says of where they are from."""
    if request.vector is not None:
        if request.directions:
            raise UsageError("--direction and --vector exclude each other: give one")
        found = read_vectors(request.vector, request.source, request.layers)
        return found, {"file": request.vector.name}
    if request.layers is None:
        raise UsageError("name the layer that the vector is added after: --layers 3")
    direction = request.direction
    vectors = direction.vectors["block_out"]
    return {layer: vectors[layer] for layer in request.layers}, {
        "source": direction.source,
        "target": direction.target,
        "languages": [direction.source, direction.target],
        "direction": {"method": direction.metadata.get("method")},
    }


def _block(request: Request) -> str:
    if request.blocks is not None and len(request.blocks) != 1:
        raise UsageError("a vector is baked into one block: --blocks attn or --blocks mlp")
    return "mlp" if request.blocks is None else request.blocks[0]


def _bake(request: Request) -> Plan:
    vectors, origin = _vectors(request)
    own = request.settings
    plan = bake.bake_plan(
        request.loaded,
        request.text,
        vectors,
        _strength(request),
        own["eps"],
        own["shrinkage"],
        _block(request),
        request.progress,
        own["constrain_start"],
        origin,
    )
    if own["correct_layers"] == 0:
        return plan
    return corrected_plan(
        request.loaded, request.text, plan, own["correct_layers"], own["eps"], request.progress
    )


def _bake_bias(request: Request) -> Plan:
    vectors, origin = _vectors(request)
    return bake_bias_plan(request.source, vectors, _strength(request), _block(request), origin)


def _language_arithmetic(request: Request) -> Plan:
    own = request.settings
    return language_arithmetic_plan(
        request.loaded,
        request.text,
        request.neuron_set,
        own["target"],
        own["deactivate"],
        own["mode"],
        own["other"],
        _strength(request),
        own["fill"],
        own["as_bias"],
        own["eps"],
        request.progress,
    )


_EPS = Setting(NUMBER, EPS, "ridge, as a share of the mean variance")
_SITE = Setting(
    WORD,
    "block_out",
    "whose direction: block_out, or own (of the block that is edited)",
    ("block_out", "own"),
)
_FROM = Setting(
    WHOLE, None, "the layer whose direction is used in all layers; each layer's own where not given"
)
DEFAULT_METHOD = "keyed"
METHODS: dict[str, EditMethod] = {
    "keyed": EditMethod(
        "speaks only where the source language is read",
        "Broca",
        ("direction", "corpus"),
        ("neurons", "layers", "blocks", "strength", "device", "dtype", "part", "languages"),
        _keyed,
        {
            "eps": _EPS,
            "sources": Setting(WORDS, None, "languages that it speaks in; the direction's source"),
            "keep": Setting(WORDS, None, "languages kept exactly as they are on average; all others"),
            "keep_softly": Setting(WORDS, (), "languages kept by a penalty instead"),
            "soft_weight": Setting(NUMBER, SOFT_WEIGHT, "weight of that penalty"),
            "sparse": Setting(NUMBER, None, "share of the neurons that a key may use"),
            "jointly": Setting(YES_NO, False, "layers see the edits below them"),
            "learn": Setting(
                YES_NO, False, "values by gradient: the target's text is to follow the source's"
            ),
        },
    ),
    "steer2edit": EditMethod(
        "a rank-1 edit of every head and neuron that the direction concerns",
        "arXiv 2602.09870",
        ("direction",),
        ("neurons", "languages", "layers", "strength"),
        _steer2edit,
        {
            "heads_rho": Setting(NUMBER, None, "penalty on heads; off if only the neurons' is given"),
            "neurons_rho": Setting(NUMBER, None, "penalty on neurons; off if only the heads' is given"),
            "alpha": Setting(NUMBER, steer2edit.ALPHA, "sparsity in [0, 1)"),
            "weigh": Setting(
                WORD, "sign", "a neuron by its mean's sign, or by its activity", steer2edit.WEIGHTINGS
            ),
        },
    ),
    "ablate": EditMethod(
        "the direction is taken out of what blocks write",
        "arXiv 2406.11717",
        ("direction",),
        ("layers", "blocks", "strength", "corpus", "languages", "part", "device", "dtype"),
        _ablate,
        {
            "form": Setting(
                WORD,
                "plain",
                "which form; the biprojected spare the mean of neutral text, --corpus and --languages",
                tuple(FORMS),
            ),
            "site": _SITE,
            "from_layer": _FROM,
        },
        least_languages=1,
    ),
    "ablate-subspace": EditMethod(
        "several directions are taken out; a strength below 0 amplifies",
        "arXiv 2505.15257",
        ("direction",),
        ("layers", "blocks", "strength"),
        _ablate_subspace,
        {
            "site": _SITE,
            "from_layer": _FROM,
            "rank": Setting(WHOLE, None, "how many of the subspace's directions; all"),
        },
    ),
    "scale": EditMethod(
        "neurons times a factor: 0 ablates, 2 doubles; no forward pass",
        "exact fold",
        ("neurons", "languages"),
        ("layers", "strength"),
        _scale,
        {"factor": Setting(NUMBER, None, "0 ablates, 2 doubles")},
    ),
    "clas": EditMethod(
        "neurons that languages share up, those of one language down",
        "arXiv 2601.16390",
        (),
        ("statistics", "neurons", "languages", "layers", "strength"),
        _clas,
        {
            "shared_gain": Setting(NUMBER, SHARED_GAIN, "b, for partial-shared neurons"),
            "specific_loss": Setting(NUMBER, SPECIFIC_LOSS, "g, for specific neurons"),
        },
    ),
    "austeer": EditMethod(
        "the input channels that tell translations apart most often, scaled",
        "AUSteer",
        ("languages",),
        ("corpus", "statistics", "part", "layers", "blocks", "strength", "device", "dtype"),
        _austeer,
        {
            "channels": Setting(WHOLE, austeer.CHANNELS, "how many"),
            "alpha": Setting(NUMBER, austeer.ALPHA, "times the rate, added to 1"),
        },
    ),
    "bake": EditMethod(
        "a steering vector, ours or another library's, at every token",
        "Broca",
        ("corpus",),
        ("direction", "vector", "layers", "blocks", "strength", "part", "languages", "device", "dtype"),
        _bake,
        {
            "eps": _EPS,
            "shrinkage": Setting(YES_NO, False, "Ledoit-Wolf's ridge in place of eps"),
            "correct_layers": Setting(WHOLE, 0, "so many later layers write what the key missed"),
            "constrain_start": Setting(YES_NO, True, "the beginning-of-sequence token too"),
        },
    ),
    "bake-bias": EditMethod(
        "the same as a bias, exact, where the architecture has one",
        "exact fold",
        (),
        ("direction", "vector", "layers", "blocks", "strength"),
        _bake_bias,
    ),
    "language-arithmetic": EditMethod(
        "one language's neurons off, another's raised by its mean",
        "arXiv 2507.22608",
        ("neurons", "corpus"),
        ("part", "strength", "device", "dtype"),
        _language_arithmetic,
        {
            "target": Setting(WORD, None, "the language whose neurons are raised"),
            "deactivate": Setting(WORDS, (), "languages whose neurons are switched off"),
            "mode": Setting(WORD, "additive", "how they are raised", MODES),
            "other": Setting(WORD, None, "difference: whose mean is subtracted; the deactivated one's"),
            "fill": Setting(NUMBER, 0.0, "value of neurons that are off; below 0 holds them harder"),
            "as_bias": Setting(YES_NO, False, "the constant as a bias, where the architecture has one"),
            "eps": _EPS,
        },
    ),
}


def method_of(name: str) -> EditMethod:
    """A method by name.

    Raises:
        UsageError: an unknown one.
    """
    if name not in METHODS:
        raise UsageError(f"method {name!r} is unknown: choose from {', '.join(METHODS)}")
    return METHODS[name]
