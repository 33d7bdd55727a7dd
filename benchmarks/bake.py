"""Baked vectors compared with the same vector in a hook: target-language rate, divergence and cost, as a Markdown table.

For each pair of languages, the residual DiffMean vector is estimated on the corpus's part ``estimate``.  Layer and
strength are chosen on ``choose``: those of the best hook (``editing.study.comparison.choose``), and, if the KL of the
rank-1 form to that hook is above .02 nats a token, also those of the best hook for which it is not.  On ``report`` the
hook is compared with the same vector in the weights: the rank-1 form (``editing.methods.bake``), the rank-1 form
corrected by the next layers (``editing.methods.bake_correction``), and, if the architecture supports it, the bias
(``editing.methods.bake_bias``).  The table has a row for each form:

    share    fraction of the continuations of source prompts that are in the target language; and its difference to the
             hook's
    NLL      nats a token of the target's text
    KL       hook || baked, nats a token: mean over the languages' texts, and the largest of any language
    spread   standard deviation of the coefficient, whose target is 1

    python benchmarks/bake.py artifacts/demo/model --corpus artifacts/demo/corpus
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from cli.options import CommaSeparated
from editing.directions.diffmean import diffmean_direction
from editing.directions.direction import Direction
from editing.evaluation.evaluation import Evaluation
from editing.evaluation.likelihood import Steering, mean_kl
from editing.hooks.residual import DiffMean, residual_steering
from editing.methods.bake import EPS, bake_plan
from editing.methods.bake_bias import bake_bias_plan
from editing.methods.bake_correction import corrected_plan
from editing.methods.baked_vector import HOOK_STRENGTHS
from editing.methods.material import Material
from editing.plans.applied import applied
from editing.plans.plan import Plan
from editing.study.candidates import candidate
from editing.study.comparison import choose, measurable, measure_candidate
from neurons.models.source import load_model
from neurons.text.batches import TokenBatch, language_batches
from neurons.text.corpus import Corpus, read_corpus

COLUMNS = ("pair", "dtype", "form", "share", "less hook", "NLL", "KL mean", "KL most", "spread", "dW/W")
RANK_1, CORRECTED, BIAS = "rank 1", "rank 1, corrected", "bias"
CORRECTIONS = 3  # layers
MOST_KL = 0.02  # nats a token
Settings = list[tuple[int, float]]


def kl_between(loaded: Any, batches: Sequence[TokenBatch], one: Steering, other: Steering) -> float:
    """Mean KL(one || other) over the counted tokens, nats, with ``one`` in place of the unedited model."""
    with ExitStack() as first:
        first.enter_context(one())

        @contextmanager
        def instead() -> Iterator[None]:
            first.close()
            with other():
                yield

        return mean_kl(loaded, batches, instead)


def divergence(
    loaded: Any, batches: Mapping[str, Sequence[TokenBatch]], one: Steering, other: Steering
) -> dict[str, float]:
    """``kl_between`` on the text of each language."""
    return {language: kl_between(loaded, some, one, other) for language, some in batches.items()}


def chosen_settings(
    loaded: Any, direction: Direction, estimate: Corpus, chosen_on: Corpus, eps: float
) -> Settings:
    """(layer, strength) of the best hook and, if different, of the best hook that can be baked."""
    material = Material(loaded, estimate, direction.source, direction.target, directions=(direction,))
    candidates = [
        candidate(DiffMean, material, {"layer": layer, "strength": strength})
        for layer in range((loaded.anatomy.layers + 1) // 2)
        for strength in HOOK_STRENGTHS
    ]
    evaluation = Evaluation(loaded, chosen_on, direction.source, direction.target)
    remaining, _ = measurable(candidates, partial(measure_candidate, evaluation))
    batches = language_batches(loaded, chosen_on)
    tried: Settings = []
    while remaining:
        best, outcome = choose(remaining, evaluation.ceiling, direction.source)
        remaining = [pair for pair in remaining if pair[0] is not best]
        layer, strength = best.settings["layer"], best.settings["strength"]
        plan = bake_plan(loaded, estimate, {layer: direction.vectors["block_out"][layer]}, strength, eps)
        kl = divergence(loaded, batches, best.steering, partial(applied, loaded, plan))
        mean = sum(kl.values()) / len(kl)
        tried.append((layer, strength))
        print(
            f"{direction.source}-{direction.target}: hook after layer {layer} x {strength:g}, on the part that it "
            f"is chosen on: share {outcome.target_share:.3f} of ceiling {evaluation.ceiling:.3f}, fluency gap "
            f"{outcome.fluency_gap:.2f}, KL to the rank-1 form {mean:.4f}",
            file=sys.stderr,
            flush=True,
        )
        if mean <= MOST_KL:
            return tried[:1] if len(tried) == 1 else [tried[0], tried[-1]]
    return tried[:1]


def plans_of(
    loaded: Any, estimate: Corpus, vectors: Mapping[int, Any], strength: float, eps: float
) -> dict[str, Plan]:
    """The forms that this architecture supports."""
    found = {RANK_1: bake_plan(loaded, estimate, vectors, strength, eps)}
    found[CORRECTED] = corrected_plan(loaded, estimate, found[RANK_1], CORRECTIONS, eps)
    if loaded.anatomy.supports_bias("mlp"):
        found[BIAS] = bake_bias_plan(loaded, vectors, strength)
    return found


def measure(
    loaded: Any, evaluation: Evaluation, hook: Steering, plans: Mapping[str, Plan], report: Corpus
) -> Iterator[dict[str, Any]]:
    """The hook's row and a row for each plan."""
    batches = language_batches(loaded, report)
    beside = evaluation.measure("hook", hook)
    target = evaluation.target
    yield {"form": "hook", "share": beside.target_share, "NLL": beside.nll[target]}
    for form, plan in plans.items():
        steering = partial(applied, loaded, plan)
        outcome = evaluation.measure(form, steering)
        kl = divergence(loaded, batches, hook, steering)
        yield {
            "form": form,
            "share": outcome.target_share,
            "less hook": outcome.target_share - beside.target_share,
            "NLL": outcome.nll[target],
            "KL": kl,
            "KL mean": sum(kl.values()) / len(kl),
            "KL most": max(kl.values()),
            "spread": plan.edits[-1].notes.get("spread", 0.0),
            "dW/W": plan.relative_change(),
        }


def line(row: Mapping[str, Any]) -> str:
    cells = [row.get(name, "") for name in COLUMNS]
    return "| " + " | ".join(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"


def parsed(settings: Sequence[str]) -> dict[str, Settings]:
    """Pair -> (layer, strength) of its settings, from words such as ``en-fr:0x1``."""
    found: dict[str, Settings] = {}
    for item in settings:
        pair, _, setting = item.partition(":")
        layer, _, strength = setting.partition("x")
        found.setdefault(pair, []).append((int(layer), float(strength)))
    return found


@click.command()
@click.argument("model")
@click.option("--corpus", "directory", type=click.Path(path_type=Path), required=True)
@click.option("--pairs", type=CommaSeparated(), default="en-fr,en-de", show_default=True)
@click.option("--settings", type=CommaSeparated(), default=(), help="As en-fr:0x1,en-de:3x2: do not choose.")
@click.option("--dtypes", type=CommaSeparated(), default="float32,bfloat16", show_default=True)
@click.option("--samples", type=int, default=2, show_default=True, help="Continuations a prompt, reported.")
@click.option("--eps", type=float, default=EPS, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers here.")
def main(
    model: str,
    directory: Path,
    pairs: tuple[str, ...],
    settings: tuple[str, ...],
    dtypes: tuple[str, ...],
    samples: int,
    eps: float,
    device: str,
    json_path: Path | None,
) -> None:
    """Print the table."""
    estimate, chosen_on, report = (
        read_corpus(directory, part=part) for part in ("estimate", "choose", "report")
    )
    loaded = load_model(model, device=device, dtype="float32")
    given = parsed(settings)
    cases = []
    for pair in given or pairs:
        direction = diffmean_direction(loaded, estimate, *pair.split("-"))
        chosen = given.get(pair) or chosen_settings(loaded, direction, estimate, chosen_on, eps)
        for layer, strength in chosen:
            vectors = {layer: direction.vectors["block_out"][layer]}
            cases.append((pair, vectors, strength, plans_of(loaded, estimate, vectors, strength, eps)))
    rows = []
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for dtype in dtypes:
        if dtype != "float32":
            loaded = load_model(model, device=device, dtype=dtype)
        for pair, vectors, strength, plans in cases:
            ((layer, vector),) = vectors.items()
            hook = partial(residual_steering, loaded, vector, layer, strength)
            evaluation = Evaluation(loaded, report, *pair.split("-"), samples=samples)
            for row in measure(loaded, evaluation, hook, plans, report):
                where = {"pair": f"{pair}, layer {layer} x {strength:g}", "dtype": dtype}
                rows.append({**where, **row, "ceiling": evaluation.ceiling})
                print(line(rows[-1]), flush=True)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
