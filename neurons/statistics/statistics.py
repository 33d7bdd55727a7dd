"""Statistics of a pass over text, per layer, unit and language, in a file that merges exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from neurons.architectures.anatomy import ROUTER_OUT, SITES
from neurons.errors import BrocaError, UsageError
from neurons.files.artifact import Artifact, load_artifact, save_artifact

# The moments of a site's values x [tokens, units], with dtypes.  A text's mean is over its counted tokens; a
# neuron of an expert is 0 at tokens that are not routed to it.
MOMENTS: dict[str, torch.dtype] = {
    "positive": torch.int64,  # tokens with x > 0
    "sum": torch.float64,  # sum over tokens of x
    "square": torch.float64,  # ... of x^2
    "absolute": torch.float64,  # ... of |x|
    "attribution": torch.float64,  # ... of |x * dLoss/dx|; at attn_in of |sum over a head's channels of x * dLoss/dx|
    "text_mean": torch.float64,  # sum over texts of the text's mean m
    "text_square": torch.float64,  # ... of m^2
    "text_absolute": torch.float64,  # ... of |m|
    "worst_rank": torch.int64,  # largest over texts of the neuron's rank in its layer, by its effect on the text
    "answer": torch.float64,  # sum over prompts of CULNIG's score
    "answer_control": torch.float64,  # ... over control prompts, negative scores as 0
    "answer_recognition": torch.float64,  # ... over recognition prompts
    "integrated": torch.float64,  # sum over prompts of the integrated gradient of the answer's probability
    "confusion": torch.float64,  # sum over prompts of the counted rises of a wrong token's log-probability
    "confusion_sibling": torch.float64,  # ... in another model
    "shapley": torch.float64,  # sum over permutations of a head's marginal value (neurons.ablation.shapley)
    "shapley_square": torch.float64,  # ... of its square
}
MERGED_BY_MAXIMUM = ("worst_rank",)


def parse_moment(name: str) -> tuple[str, str]:
    """Split ``site:moment``."""
    site, _, moment = name.partition(":")
    sites = (*SITES, ROUTER_OUT)
    if site not in sites or moment not in MOMENTS:
        raise ValueError(f"{name!r} is not site:moment with a site of {sites} and one of {tuple(MOMENTS)}")
    return site, moment


def moment_dtype(moment: str) -> torch.dtype:
    return MOMENTS[moment]


@dataclass(frozen=True)
class Statistics:
    """Sums over the counted tokens of each language.

    Attributes:
        languages: the K languages.
        tokens: int64 [K].
        texts: int64 [K], number of rows: texts, blocks of packed text, or prompts.
        moments: ``site:moment`` -> [L, width, K], int64 for counts and ranks, float64 for sums.
        fingerprint: of the model; "" if unknown (foreign files).
        routed: int64 [L, E, K], tokens that were routed to each expert; None in a dense model.
        responses: language -> float32 [texts, L, I], each text's mean at ``mlp_in``; empty if not recorded.
        lines: language -> int64 [texts], ascending: the line of the corpus of each response.
        prompts: moment -> int64 [K], number of prompts or permutations, for moments over these.
        metadata: JSON values: model, corpora, settings.
    """

    languages: tuple[str, ...]
    tokens: torch.Tensor
    texts: torch.Tensor
    moments: dict[str, torch.Tensor]
    fingerprint: str
    routed: torch.Tensor | None = None
    responses: dict[str, torch.Tensor] = field(default_factory=dict)
    lines: dict[str, torch.Tensor] = field(default_factory=dict)
    prompts: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        return 1 if self.routed is None else self.routed.shape[1]

    def moment(self, name: str) -> torch.Tensor:
        """A moment [L, width, K].

        Raises:
            UsageError: the moment was not recorded.
        """
        if name not in self.moments:
            held = ", ".join(self.moments) or "no moments"
            raise UsageError(
                f"the statistics have no {name} (they have {held}): record again with the method that needs it"
            )
        return self.moments[name]

    def heads(self) -> list[int]:
        """Number of heads of each layer.

        Raises:
            UsageError: unknown, as of files that were not recorded.
        """
        if "heads" not in self.metadata:
            raise UsageError("the statistics do not hold the numbers of heads: record again")
        return list(self.metadata["heads"])

    def places(self, unit: str, values: torch.Tensor) -> torch.Tensor:
        """bool [L, width]: where a layer has a "neuron" or a "head", for values [L, width, ...] with zeros elsewhere.

        True everywhere if the numbers of neurons are unknown, as of files that were not recorded.

        Raises:
            UsageError: as ``heads``.
        """
        layers, width = values.shape[:2]
        counts = self.heads() if unit == "head" else self.metadata.get("neuron_counts", [width] * layers)
        return torch.arange(width) < torch.tensor(counts)[:, None]

    def seen(self) -> torch.Tensor:
        """Tokens that reached each neuron, int64, [K] or (for experts) [L, I, K].

        Raises:
            UsageError: a mixture of experts without a recorded moment of neurons.
        """
        if self.routed is None:
            return self.tokens
        # Not mlp_out, whose width is that of the residual stream.
        sites = ("mlp_act:", "mlp_up:", "mlp_in:")
        widths = [values.shape[1] for name, values in self.moments.items() if name.startswith(sites)]
        if not widths:
            raise UsageError("the statistics have no moment of neurons, so the width of an expert is unknown")
        return self.routed.repeat_interleave(widths[0] // self.experts, dim=1)

    def routing_fraction(self) -> torch.Tensor:
        """Fraction of each language's tokens that are routed to each expert, float64 [L, E, K].

        Raises:
            UsageError: the model has no experts.
        """
        if self.routed is None:
            raise UsageError("the model has no experts, so tokens are not routed")
        return self.routed.double() / self.tokens

    def token_mean(self, site: str) -> torch.Tensor:
        """Mean over tokens, float64 [L, width, K]."""
        return self.moment(f"{site}:sum") / self.tokens

    def text_mean(self, site: str) -> torch.Tensor:
        """Mean over texts of the mean over a text's tokens, float64 [L, width, K]."""
        return self.moment(f"{site}:text_mean") / self.texts

    def save(self, path: Path | str) -> None:
        tensors = {f"moments.{name}": value for name, value in self.moments.items()}
        tensors |= {f"prompts.{name}": value for name, value in self.prompts.items()}
        tensors |= {"tokens": self.tokens, "texts": self.texts}
        if self.routed is not None:
            tensors["routed"] = self.routed
        for i, language in enumerate(self.languages):
            if language in self.responses:
                tensors[f"responses.{i}"] = self.responses[language]
                tensors[f"lines.{i}"] = self.lines[language]
        fields = {"languages": list(self.languages), "fingerprint": self.fingerprint}
        save_artifact(path, "statistics", tensors, {**self.metadata, **fields})


def load_statistics(path: Path | str) -> Statistics:
    """Read a file of ``Statistics.save``.

    Raises:
        UsageError, BrocaError: as ``load_artifact``, or the file does not hold statistics.
    """
    artifact = load_artifact(path, "statistics")
    fault = _fault(artifact)
    if fault is not None:
        raise BrocaError(f"{path}: not readable statistics ({fault}): record again")
    languages = tuple(artifact.metadata["languages"])
    tensors = artifact.tensors

    def by_language(group: str) -> dict[str, torch.Tensor]:
        return {k: tensors[f"{group}.{i}"] for i, k in enumerate(languages) if f"{group}.{i}" in tensors}

    return Statistics(
        languages=languages,
        tokens=tensors["tokens"],
        texts=tensors["texts"],
        moments=_group(tensors, "moments."),
        fingerprint=artifact.metadata["fingerprint"],
        routed=tensors.get("routed"),
        responses=by_language("responses"),
        lines=by_language("lines"),
        prompts=_group(tensors, "prompts."),
        metadata={
            name: value
            for name, value in artifact.metadata.items()
            if name not in ("kind", "format_version", "packages", "languages", "fingerprint")
        },
    )


def _fault(artifact: Artifact) -> str | None:
    """The first fault in the metadata or tensors of statistics; None without any."""
    metadata, tensors = artifact.metadata, artifact.tensors
    languages, corpora = metadata.get("languages"), metadata.get("corpora", [])
    if not isinstance(languages, list) or not all(isinstance(language, str) for language in languages):
        return f"its languages are {languages!r}"
    if not isinstance(metadata.get("fingerprint"), str):
        return f"its fingerprint is {metadata.get('fingerprint')!r}"
    if not isinstance(metadata.get("settings", {}), dict):
        return f"its settings are {metadata['settings']!r}"
    if not isinstance(corpora, list) or not all(isinstance(one, dict) and "digest" in one for one in corpora):
        return f"its corpora are {corpora!r}"
    depths = set()
    for name in ("tokens", "texts", *tensors):
        group, _, moment = name.partition(".")
        if group in ("responses", "lines"):
            continue
        try:
            dtype = moment_dtype(parse_moment(moment)[1]) if group == "moments" else torch.int64
        except ValueError as error:
            return str(error)
        tensor, dims = tensors.get(name), 3 if group in ("moments", "routed") else 1
        if tensor is None:
            return f"it has no {name}"
        if tensor.ndim != dims or tensor.shape[-1] != len(languages) or tensor.dtype != dtype:
            return f"its {name} are {tensor.dtype} of shape {list(tensor.shape)}"
        depths |= {len(tensor)} if dims == 3 else set()
    if len(depths) > 1:
        return f"its numbers of layers differ: {', '.join(map(str, sorted(depths)))}"
    for i, language in enumerate(languages):
        responses, lines = (tensors.get(f"{group}.{i}", torch.empty(0)) for group in ("responses", "lines"))
        if responses.ndim not in (1, 3) or lines.shape != responses.shape[:1]:
            return f"its responses in {language!r} do not match their lines"
    return None


def _group(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def merge(first: Statistics, second: Statistics) -> Statistics:
    """The sum of two recordings, for the languages of either; of two rates of unknown tokens the larger.

    Raises:
        UsageError: recordings of different models or of different moments, or with text in common.
    """
    _require_alike(first, second)
    common = {c["digest"] for c in _corpora(first)} & {c["digest"] for c in _corpora(second)}
    # A corpus's digest is of all its languages together.
    of_one, of_other = (
        {k for c in _corpora(s) for k in c.get("digests", {}).items()} for s in (first, second)
    )
    if (common and set(first.languages) & set(second.languages)) or of_one & of_other:
        raise UsageError("both statistics were recorded on the same text, which would be counted twice")
    languages = tuple(dict.fromkeys(first.languages + second.languages))

    def joined(
        left: torch.Tensor, right: torch.Tensor, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        columns = []
        for language in languages:
            held = [
                values[..., which.languages.index(language)]
                for which, values in ((first, left), (second, right))
                if language in which.languages
            ]
            columns.append(held[0] if len(held) == 1 else combine(*held))
        return torch.stack(columns, dim=-1)

    rates, others = (which.metadata.get("unknown", {}) for which in (first, second))
    unknown = {k: max(rates.get(k, 0.0), others.get(k, 0.0)) for k in languages if k in {**rates, **others}}
    return Statistics(
        languages=languages,
        tokens=joined(first.tokens, second.tokens, torch.add),
        texts=joined(first.texts, second.texts, torch.add),
        moments={
            name: joined(values, second.moments[name], combine_of(name))
            for name, values in first.moments.items()
        },
        fingerprint=first.fingerprint,
        routed=None
        if first.routed is None or second.routed is None
        else joined(first.routed, second.routed, torch.add),
        responses=_either(languages, first.responses, second.responses),
        lines=_either(languages, first.lines, second.lines),
        prompts={
            name: joined(counts, second.prompts[name], torch.add) for name, counts in first.prompts.items()
        },
        metadata={**first.metadata, "corpora": _corpora(first) + _corpora(second), "unknown": unknown},
    )


def combine_of(moment: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function that combines two values of a moment (``site:moment``)."""
    return torch.maximum if parse_moment(moment)[1] in MERGED_BY_MAXIMUM else torch.add


def subtract(whole: Statistics, prefix: Statistics) -> Statistics:
    """Counts without a prefix: clamp(whole - prefix, 0); tokens at least 1.

    NJUNLP/Language-Neurons-Alignment counts responses without their prompts this way.

    Raises:
        UsageError: different models, languages or moments, or moments that are not counts of tokens.
    """
    _require_alike(whole, prefix)
    if whole.languages != prefix.languages:
        raise UsageError(
            f"the prefix has languages {', '.join(prefix.languages)}, the whole {', '.join(whole.languages)}"
        )
    # A router's scores are not counts, but a sum of |x| over a prefix is part of that over the whole.
    others = [
        name
        for name in whole.moments
        if parse_moment(name)[1] != "positive" and name != f"{ROUTER_OUT}:absolute"
    ]
    if others or whole.responses:
        held = others[0] if others else "responses"
        raise UsageError(f"only counts can be subtracted, and the statistics hold {held}")
    return replace(
        whole,
        tokens=(whole.tokens - prefix.tokens).clamp(min=1),
        routed=None
        if whole.routed is None or prefix.routed is None
        else (whole.routed - prefix.routed).clamp(min=0),
        moments={name: (value - prefix.moments[name]).clamp(min=0) for name, value in whole.moments.items()},
        metadata={**whole.metadata, "subtracted": _corpora(prefix)},
    )


def _require_alike(first: Statistics, second: Statistics) -> None:
    if first.fingerprint != second.fingerprint:
        raise UsageError(
            f"the statistics are of two models, fingerprints {first.fingerprint} and {second.fingerprint}"
        )
    a, b = ([*s.moments] + ["responses"] * bool(s.responses) for s in (first, second))
    if set(a) != set(b):
        raise UsageError(f"the statistics hold different moments: {', '.join(a)}, and {', '.join(b)}")
    if set(first.prompts) != set(second.prompts):
        raise UsageError("the statistics differ in their moments over prompts")
    if first.experts != second.experts or (first.routed is None) != (second.routed is None):
        raise BrocaError(
            f"the statistics are of models with {first.experts} and {second.experts} experts a layer"
        )
    for name, values in first.moments.items():
        if values.shape[:2] != second.moments[name].shape[:2]:
            raise BrocaError(f"the statistics differ in the shape of {name}")


def _corpora(statistics: Statistics) -> list[dict[str, Any]]:
    corpora: list[dict[str, Any]] = statistics.metadata.get("corpora", [])
    return corpora


def _either(
    languages: tuple[str, ...], first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    if any(language in first and language in second for language in languages):
        raise UsageError("responses of the same language cannot be merged: their lines are of two texts")
    return {**first, **second}
