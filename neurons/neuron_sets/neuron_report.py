"""Report on one neuron: where it is most active, what it writes, and its activity in each language."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from neurons.architectures.sites import Routed
from neurons.errors import UsageError
from neurons.models.not_finite import not_finite
from neurons.models.source import LoadedModel
from neurons.models.start_tokens import start_tokens
from neurons.recording.lens import lens_logits
from neurons.recording.text_pass import Position, PositionReader, Progress, read_text
from neurons.text.batches import TokenBatch, language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import MEANS

SNIPPETS, TOKENS = 10, 10
BEFORE, AFTER = 24, 12  # tokens of a snippet before and after the marked one


@dataclass(frozen=True)
class Snippet:
    """A position in text where the neuron is active.

    Attributes:
        line: of the corpus.
        value: ``mlp_in`` at the token.
    """

    language: str
    line: int
    value: float
    before: str
    token: str
    after: str


@dataclass(frozen=True)
class Activity:
    """A neuron's activity over the counted tokens of a language.

    Attributes:
        tokens: that reached it (all, in a dense model).
        firing: fraction of them with ``mlp_act`` > 0.
        mean: mean of ``mlp_in``.
        absolute: mean of |``mlp_in``|.
        low: minimum of ``mlp_in``.
        high: maximum of ``mlp_in``.
    """

    tokens: int
    firing: float
    mean: float
    absolute: float
    low: float
    high: float


@dataclass(frozen=True)
class NeuronReport:
    """Report on one neuron.

    Attributes:
        neuron: its number in the layer (expert e, j: e * I + j).
        value_norm: norm of its value vector.
        snippets: by descending |value|, at most one from each text.
        promoted: (token, change of its logit), largest first, from the logit lens of the value vector; a
            negative activation has the opposite effect.
        suppressed: the same, smallest first.
        activity: by language.
    """

    layer: int
    neuron: int
    value_norm: float
    snippets: tuple[Snippet, ...]
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    activity: dict[str, Activity]


def neuron_report(
    loaded: LoadedModel,
    corpus: Corpus,
    layer: int,
    neuron: int,
    snippets: int = SNIPPETS,
    tokens: int = TOKENS,
    max_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> NeuronReport:
    """Read a corpus and report on a neuron.

    Args:
        loaded: the model.
        corpus: text by language.
        layer: 0 to L - 1.
        neuron: 0 to I - 1.
        snippets: number of snippets.
        tokens: number of promoted and of suppressed tokens.
        max_tokens: maximum tokens of a language; None takes all.
        progress: called with the number of tokens of each batch.

    Raises:
        UsageError: a neuron that the model does not have.
        BrocaError: an activation that is not finite.
    """
    anatomy = loaded.anatomy
    width = anatomy.width("mlp_in", layer) if 0 <= layer < anatomy.layers else anatomy.neurons
    if not (0 <= layer < anatomy.layers and 0 <= neuron < width):
        raise UsageError(
            f"there is no neuron {neuron} in layer {layer}: layers are 0-{anatomy.layers - 1}, neurons "
            f"0-{width - 1}"
        )
    activity: dict[str, Activity] = {}
    best: list[Snippet] = []
    for language, batches in language_batches(loaded, corpus, max_tokens, default=MEANS.tokens).items():
        seen = _read(loaded, batches, layer, neuron, progress)
        for batch, values in zip(batches, seen["mlp_in"], strict=True):
            best = _best(best + _strongest(loaded, batch, values, language, snippets), snippets)
        activity[language] = _activity(seen)
        read = sum(int(batch.counted.sum()) for batch in batches)
        if math.isinf(activity[language].absolute) or (
            not anatomy.mixed and activity[language].tokens < read
        ):
            raise not_finite(loaded, f"neuron {neuron} of layer {layer}")
    column = slice(neuron, neuron + 1)
    part = anatomy.part_of(layer, "mlp", neuron)
    value = part.cut(part.values, column)[:, 0].to(loaded.device)
    promoted, suppressed = _tokens(loaded, value, tokens)
    found = tuple(replace(snippet, line=corpus.file_line(snippet.line)) for snippet in best)
    return NeuronReport(layer, neuron, float(value.float().norm()), found, promoted, suppressed, activity)


def _read(
    loaded: LoadedModel, batches: Sequence[TokenBatch], layer: int, neuron: int, progress: Progress | None
) -> dict[str, list[torch.Tensor]]:
    """Site -> a neuron's values on each batch, [rows, length], NaN where not counted or not routed to it."""
    anatomy = loaded.anatomy
    expert, column = divmod(neuron, anatomy.expert_width)
    recorded = {
        site: [torch.full(batch.ids.shape, torch.nan) for batch in batches] for site in ("mlp_in", "mlp_act")
    }

    def keeper(site: str) -> PositionReader:
        def read(values: torch.Tensor, routed: Routed | None, at: Position) -> None:
            kept = recorded[site][at.index]
            if routed is None:
                kept.copy_(values[..., column])
            elif routed.expert == expert:
                kept.view(-1)[routed.tokens.cpu()] = values[:, column].float().cpu()

        return read

    readers = {(site, layer): keeper(site) for site in recorded}
    read_text(loaded, [(0, batch) for batch in batches], readers, progress)
    return {
        site: [
            values.masked_fill(~batch.counted, torch.nan) for values, batch in zip(of, batches, strict=True)
        ]
        for site, of in recorded.items()
    }


def _activity(seen: Mapping[str, Sequence[torch.Tensor]]) -> Activity:
    inside, gate = (
        torch.cat([torch.zeros(0), *(values.flatten() for values in seen[site])])
        for site in ("mlp_in", "mlp_act")
    )
    present = ~torch.isnan(inside)
    values = inside[present].double()
    if not len(values):
        return Activity(0, *[float("nan")] * 5)
    return Activity(
        tokens=len(values),
        firing=float((gate[present] > 0).double().mean()),
        mean=float(values.mean()),
        absolute=float(values.abs().mean()),
        low=float(values.min()),
        high=float(values.max()),
    )


def _strongest(
    loaded: LoadedModel, batch: TokenBatch, values: torch.Tensor, language: str, count: int
) -> list[Snippet]:
    """The position of largest |value| in each of the ``count`` texts where it is largest."""
    strength = values.abs().nan_to_num(-1.0)
    strongest, places = strength.max(dim=1)
    rows = strongest.argsort(descending=True, stable=True)[:count]
    return [
        _snippet(loaded, batch, language, row, int(places[row]), float(values[row, places[row]]))
        for row in rows.tolist()
        if strongest[row] >= 0
    ]


def _snippet(
    loaded: LoadedModel, batch: TokenBatch, language: str, row: int, place: int, value: float
) -> Snippet:
    length = int(batch.attention[row].sum())
    ids = batch.ids[row, :length].tolist()
    start = max(len(start_tokens(loaded.tokenizer)), place - BEFORE)
    # Cut from longer decoded texts: a character may span tokens, and decoding one token may drop its space.
    before = _text(loaded, ids[start:place])
    upto = _text(loaded, ids[start : place + 1])
    whole = _text(loaded, ids[start : place + 1 + AFTER])
    common = _common(before, upto)
    end = _common(upto, whole)
    return Snippet(
        language=language,
        line=int(batch.line_numbers[row]),
        value=value,
        before=upto[:common],
        token=whole[common:end],
        after=whole[end:],
    )


def _common(first: str, second: str) -> int:
    """Length of the common prefix of two texts."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


def _best(snippets: Sequence[Snippet], count: int) -> list[Snippet]:
    return sorted(snippets, key=lambda snippet: -abs(snippet.value))[:count]


def _tokens(
    loaded: LoadedModel, value: torch.Tensor, count: int
) -> tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]:
    """The tokens that a value promotes and suppresses; ties in the order of the vocabulary."""
    known = min(len(loaded.tokenizer), loaded.model.get_output_embeddings().weight.shape[0])
    changes = lens_logits(loaded.model, loaded.anatomy, value[None])[0, :known]

    def named(order: torch.Tensor) -> tuple[tuple[str, float], ...]:
        ids = order[:count].tolist()
        return tuple((_text(loaded, [token]), float(changes[token])) for token in ids)

    return named(changes.argsort(descending=True, stable=True)), named(changes.argsort(stable=True))


def _text(loaded: LoadedModel, ids: Sequence[int]) -> str:
    text: str = loaded.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text
