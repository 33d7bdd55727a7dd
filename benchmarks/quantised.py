"""Whether edits survive quantisation: base and edited models with the weights of their layers quantised.

Every linear weight of the layers is quantised and dequantised; embeddings, norms and the LM head stay as they are, and
activations are float32:

    stored       as in the export
    Q8_0, Q4_0   blocks of 32 values with one scale, by the package gguf, as llama.cpp does it
    int8         a scale for each output, the largest absolute value over 127
    fp8          E4M3, a scale for each output, the largest absolute value over 448

With ``--corpus``, of any edits of one pair of languages, as in ``broca evaluate``: fraction of answers in the target,
fluency gap to the unquantised base, and rise of the NLL of text over the unquantised base's; "third" is the largest of
another language.

Without, of an edit of ``broca steer``: answers to the REPORT questions that are in the target (whole text / every line /
first words); answers in kept languages that are in the language of the question; and the negative log-likelihood of the
unquantised base's answers in kept languages.  All likelihoods are in nats a token.

    python benchmarks/quantised.py MODEL --edit edit.safetensors --corpus DIR
    python benchmarks/quantised.py MODEL --edit steered/broca/edit.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click
import gguf
import torch
from torch.nn.functional import cross_entropy

from cli.options import CommaSeparated
from cli.shipped import QUESTIONS, shipped
from editing.evaluation.answer_language import answer_language
from editing.evaluation.evaluation import Evaluation
from editing.evaluation.likelihood import Steering
from editing.evaluation.questions import read_questions
from editing.pipeline.lock_kinds import lock_of
from editing.pipeline.lock_prompts import REPORT
from editing.pipeline.lock_replies import answered_by_language
from editing.pipeline.lock_text import ANSWER_TOKENS, base_replies, plain_prompts
from editing.plans.applied import applied
from editing.plans.plan import Plan, load_plan
from neurons.models.freed_memory import keep_freed_memory
from neurons.models.source import LoadedModel, load_model
from neurons.text.corpus import read_corpus

KEPT = 3
INT8, FP8 = 127, 448

RoundTrip = Callable[[torch.Tensor], torch.Tensor]
Row = dict[str, list[float]]


def by_gguf(kind: gguf.GGMLQuantizationType) -> RoundTrip:
    def round_trip(weight: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))

    return round_trip


def int8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / INT8
    return (weight / scale).round() * scale


def fp8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / FP8
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


FORMATS: dict[str, RoundTrip | None] = {
    "stored": None,
    "Q8_0": by_gguf(gguf.GGMLQuantizationType.Q8_0),
    "int8": int8,
    "fp8": fp8,
    "Q4_0": by_gguf(gguf.GGMLQuantizationType.Q4_0),
}


def quantising(loaded: LoadedModel, plan: Plan | None, round_trip: RoundTrip | None) -> Steering:
    """Makes contexts in which the model computes with the edited, quantised weights."""
    linear = [m for block in loaded.anatomy.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    quantised: list[torch.Tensor] = []

    @contextmanager
    def context() -> Iterator[None]:
        with applied(loaded, plan):
            kept = [module.weight.data for module in linear]
            if round_trip is not None and not quantised:
                quantised.extend(round_trip(weight) for weight in kept)
            for module, weight in zip(linear, quantised, strict=False):
                module.weight.data = weight
            try:
                yield
            finally:
                for module, weight in zip(linear, kept, strict=True):
                    module.weight.data = weight

    return context


@torch.no_grad()
def likelihood(loaded: LoadedModel, examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """Nats a token of answers after their prompts."""
    total = count = 0.0
    for prompt, answer in examples:
        ids = torch.tensor([[*prompt, *answer]])
        logits = loaded.model(ids[:, :-1]).logits[0, len(prompt) - 1 :]
        total += float(cross_entropy(logits.float(), torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count


def on_corpus(evaluation: Evaluation, steering: Steering) -> Row:
    outcome = evaluation.measure("", steering)
    pair = (evaluation.source, evaluation.target)
    return {
        f"answers in {evaluation.target}": [outcome.target_share],
        "fluency gap": [outcome.fluency_gap],
        **{f"NLL {language}": [outcome.nll_rise[language]] for language in reversed(pair)},
        "NLL third": [max(rise for language, rise in outcome.nll_rise.items() if language not in pair)],
    }


def on_questions(loaded: LoadedModel, plan: Plan) -> Callable[[Steering], Row]:
    questions = read_questions(shipped(QUESTIONS))
    lock = lock_of(questions, plan.metadata["target"], plan.metadata["source"])
    target, (source,) = lock.target, lock.sources
    assert target is not None
    kept = [name for name in lock.unchanged if name != target][:KEPT]
    prompts = plain_prompts(loaded, questions, [source, *kept], REPORT)
    answers = {
        language: [(example.student, example.answer) for example in of_language.examples]
        for language, of_language in base_replies(loaded, {name: prompts[name] for name in kept}).items()
    }
    candidates = tuple(questions.of)

    def row(steering: Steering) -> Row:
        with steering():
            texts = {
                language: [answer.text for answer in of_language]
                for language, of_language in answered_by_language(loaded, prompts, ANSWER_TOKENS).items()
            }
            likelihoods = [likelihood(loaded, answers[name]) for name in kept]
        in_target = answer_language(texts[source], target, candidates, source)
        return {
            f"in {target}": [in_target.whole, in_target.lines, in_target.begins],
            f"{', '.join(kept)}: in the question's language": [
                answer_language(texts[name], name, candidates).whole for name in kept
            ],
            "base's answers, NLL": likelihoods,
        }

    return row


@click.command()
@click.argument("model")
@click.option("--edit", "edits", type=click.Path(path_type=Path), required=True, multiple=True)
@click.option("--corpus", type=click.Path(path_type=Path), help="Directory of <language>.txt.")
@click.option("--languages", type=CommaSeparated(), help="Languages of the corpus to read.")
@click.option("--prompts", default=100, show_default=True, help="Maximum number of prompts, with --corpus.")
@click.option("--samples", default=1, show_default=True, help="Answers a prompt, with --corpus.")
@click.option("--formats", type=CommaSeparated(), default=",".join(FORMATS), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
def main(
    model: str,
    edits: tuple[Path, ...],
    corpus: Path | None,
    languages: tuple[str, ...] | None,
    prompts: int,
    samples: int,
    formats: tuple[str, ...],
    json_path: Path | None,
) -> None:
    """Print a table."""
    keep_freed_memory()
    plans, loaded = {path.stem: load_plan(path) for path in edits}, load_model(model, dtype="float32")
    plan = next(iter(plans.values()))
    if corpus is None:
        measure = on_questions(loaded, plan)
    else:
        text = read_corpus(corpus, languages, part="report")
        pair = plan.metadata["source"], plan.metadata["target"]
        evaluation = Evaluation(loaded, text, *pair, max_prompts=prompts, samples=samples)
        print(f"{evaluation.continuations} answers, ceiling {evaluation.ceiling:.2f}\n")
        measure = partial(on_corpus, evaluation)
    result: dict[str, Row] = {}
    for name in formats:
        for title, edited in {"base": None, **plans}.items():
            row = measure(quantising(loaded, edited, FORMATS[name]))
            if not result:
                print(f"| {loaded.label} | {' | '.join(row)} |\n|---|{'---|' * len(row)}")
            result[f"{title}, {name}"] = row
            cells = [
                " / ".join(f"{value:{'+' * key.startswith('NLL ')}.2f}" for value in values)
                for key, values in row.items()
            ]
            print(f"| {title}, {name} | {' | '.join(cells)} |", flush=True)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
