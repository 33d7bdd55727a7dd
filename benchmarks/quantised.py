"""Whether a language lock survives quantisation: base and edited model with the weights of their layers quantised.

Every linear weight of the layers is quantised and dequantised; embeddings, norms and the LM head stay as they are, and
activations are float32:

    Q8_0, Q4_0   blocks of 32 values with one scale, by the package gguf, as llama.cpp does it
    int8         a scale for each output, the largest absolute value over 127
    fp8          E4M3, a scale for each output, the largest absolute value over 448

The edited weights are those of an export.  Columns: answers to the REPORT questions that are in the target (whole text /
every line / first words); answers in kept languages that are in the language of the question; and the negative
log-likelihood of the unquantised base's answers in kept languages, nats a token.

    python benchmarks/quantised.py MODEL --edit steered/broca/edit.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click
import gguf
import torch
from torch.nn.functional import cross_entropy

from cli.shipped import QUESTIONS, shipped
from editing.evaluation.answer_language import answer_language
from editing.evaluation.questions import read_questions
from editing.pipeline.lock_kinds import lock_of
from editing.pipeline.lock_prompts import REPORT, answered_by_language
from editing.pipeline.lock_text import ANSWER_TOKENS, base_answers, plain_prompts
from editing.plans.applied import applied
from editing.plans.plan import load_plan
from neurons.models.freed_memory import keep_freed_memory
from neurons.models.source import LoadedModel, load_model

KEPT = 3
INT8, FP8 = 127, 448


def by_gguf(kind: gguf.GGMLQuantizationType) -> Callable[[torch.Tensor], torch.Tensor]:
    def round_trip(weight: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))

    return round_trip


def int8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / INT8
    return (weight / scale).round() * scale


def fp8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / FP8
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


FORMATS: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
    "bfloat16": None,
    "Q8_0": by_gguf(gguf.GGMLQuantizationType.Q8_0),
    "int8": int8,
    "fp8": fp8,
    "Q4_0": by_gguf(gguf.GGMLQuantizationType.Q4_0),
}


@torch.no_grad()
def quantise(loaded: LoadedModel, round_trip: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for block in loaded.anatomy.blocks:
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(round_trip(module.weight.detach()))


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


@click.command()
@click.argument("model")
@click.option("--edit", type=click.Path(path_type=Path), required=True, help="The edit of `broca steer`.")
@click.option("--formats", default=",".join(FORMATS), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
def main(model: str, edit: Path, formats: str, json_path: Path | None) -> None:
    """Print a table."""
    keep_freed_memory()
    plan = load_plan(edit)
    questions = read_questions(shipped(QUESTIONS))
    lock = lock_of(questions, plan.metadata["target"], plan.metadata["source"])
    assert lock.target is not None
    kept = [name for name in lock.unchanged if name != lock.target][:KEPT]
    loaded = load_model(model, dtype="float32")
    prompts = plain_prompts(loaded, questions, [*lock.sources, *kept], REPORT)
    answers = {
        language: [(example.student, example.answer) for example in examples]
        for language, (examples, _) in base_answers(loaded, {name: prompts[name] for name in kept}).items()
    }
    unquantised = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    candidates = tuple(questions.of)

    def row() -> Mapping[str, object]:
        texts = {
            language: [answer.text for answer in of_language]
            for language, of_language in answered_by_language(loaded, prompts, ANSWER_TOKENS).items()
        }
        (source,) = lock.sources
        in_target = answer_language(texts[source], lock.target, candidates, source)
        return {
            "target": [in_target.whole, in_target.lines, in_target.begins],
            "kept": [answer_language(texts[name], name, candidates).whole for name in kept],
            "likelihood": [likelihood(loaded, answers[name]) for name in kept],
        }

    result: dict[str, Mapping[str, object]] = {}
    print(f"{loaded.label}, {lock.sources[0]} to {lock.target}; kept: {', '.join(kept)}\n")
    print(
        f"| | in {lock.target} | kept: in the question's language | NLL of the base's answers |\n|---|---|---|---|"
    )
    for name in formats.split(","):
        for title, edited in (("base", None), ("edited", plan)):
            with applied(loaded, edited):
                edited_weights = {key: value.clone() for key, value in loaded.model.state_dict().items()}
                round_trip = FORMATS[name]
                if round_trip is not None:
                    quantise(loaded, round_trip)
                found = row()
                loaded.model.load_state_dict(edited_weights)
            result[f"{title}, {name}"] = found
            cells = [" / ".join(f"{value:.2f}" for value in values) for values in found.values()]
            print(f"| {title}, {name} | {' | '.join(cells)} |", flush=True)
        loaded.model.load_state_dict(unquantised)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
