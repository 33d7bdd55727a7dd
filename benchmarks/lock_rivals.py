"""A language lock and its rivals in one table: a LoRA of the same size trained by PEFT, and edits of other methods.

PEFT trains a rank-1 adapter of the same layers' ``down_proj``, with the lock's teacher, examples, passes and choice of
the pass.  Its rate is the one with the least divergence on the CHOOSE questions:

    lora            on the lock's examples
    lora + kept     also on questions in the kept languages, with the unedited model as the teacher

    python benchmarks/lock_rivals.py MODEL --edit steered/broca/edit.safetensors --dtype bfloat16 \\
        --also "baked vector=baked.safetensors"

A merged adapter is an edit like any other, so all are measured by the figures of ``broca steer``.  With ``--questions`` they
are measured on all of these questions, the same in every language, in place of Broca's reporting quarter:

    python benchmarks/lock_rivals.py MODEL --edit steered/broca/edit.safetensors --no-lora --questions DIR
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from lock_keys import of_part
from peft import LoraConfig, get_peft_model

from cli.shipped import QUESTIONS, shipped
from editing.evaluation.answer_language import AnswerLanguage
from editing.evaluation.questions import Questions, read_questions
from editing.methods.conversation_keys import middle_layers
from editing.methods.distilled_values import PASSES, TeacherAnswers
from editing.pipeline.lock_kinds import Lock, lock_of
from editing.pipeline.lock_measures import LockFigures, lock_figures
from editing.pipeline.lock_prompts import BUILD, CHOOSE, REPORT
from editing.pipeline.lock_text import base_replies, plain_prompts
from editing.plans.plan import ModuleEdit, Plan, load_plan, make_plan
from neurons.models.freed_memory import keep_freed_memory
from neurons.models.source import LoadedModel, load_model

RATES = (0.002, 0.005)
KEPT_QUESTIONS = 8  # of each kept language


def lora(
    loaded: LoadedModel, objective: TeacherAnswers, rate: float, passes: int, seed: int = 0
) -> tuple[Plan, float]:
    """The adapter after its best pass, as a plan, and its divergence on the held-out examples."""
    layers = middle_layers(loaded.anatomy.layers)
    torch.manual_seed(seed)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["down_proj"], layers_to_transform=list(layers))
    adapted = get_peft_model(loaded.model, config)
    optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    best: tuple[Plan, float] | None = None
    for _ in range(passes):
        for batches in objective.steps(generator):
            tokens = sum(map(objective.tokens, batches))
            optimizer.zero_grad()
            for batch in batches:
                (objective.loss(batch) / tokens).backward()
            optimizer.step()
        with torch.no_grad():
            sums = [float(objective.loss(batch)) for batch in objective.held_out]
        reached = sum(sums) / sum(map(objective.tokens, objective.held_out))
        click.echo(f"rate {rate}: {reached:.3f} nats a token on held-out questions", err=True)
        if best is None or reached < best[1]:
            best = (merged(loaded, adapted, layers), reached)
    adapted.unload()
    assert best is not None
    return best


def loras(
    loaded: LoadedModel, questions: Questions, lock: Lock, rates: Sequence[float], passes: int
) -> dict[str, Plan]:
    examples, held_out = (of_part(loaded, questions, lock, part) for part in (BUILD, CHOOSE))
    prompts = plain_prompts(loaded, questions, lock.unchanged, BUILD, KEPT_QUESTIONS)
    kept = [
        example for of_language in base_replies(loaded, prompts).values() for example in of_language.examples
    ]
    objective = TeacherAnswers(loaded, examples, held_out)
    tried = [(*lora(loaded, objective, rate, passes), rate) for rate in rates]
    best, _, rate = min(tried, key=lambda result: result[1])
    both, _ = lora(loaded, TeacherAnswers(loaded, [*examples, *kept], held_out), rate, passes)
    return {f"lora, rate {rate:g}": best, f"lora + kept, rate {rate:g}": both}


def merged(loaded: LoadedModel, adapted: torch.nn.Module, layers: Sequence[int]) -> Plan:
    """The adapter as a plan: its scale is 1, so the factors are B and A^T."""
    parameters = dict(adapted.named_parameters())
    edits = []
    for layer in layers:
        (down,) = (name for name in parameters if f".{layer}.mlp.down_proj.lora_A" in name)
        left = parameters[down.replace("lora_A", "lora_B")].detach().float().clone()
        right = parameters[down].detach().float().T.clone()
        edits.append(ModuleEdit(layer, "mlp", tuple(range(len(right))), left=left, right=right))
    return make_plan(edits, {"model": loaded.label, "fingerprint": loaded.fingerprint, "method": "lora"})


def fractions(language: AnswerLanguage) -> str:
    """Of answers in the target: whole text, every line, first words."""
    return " / ".join(f"{rate:.2f}" for rate in (language.whole, language.lines, language.begins or 0))


def row(name: str, figures: LockFigures, kept: Sequence[str]) -> str:
    (of_source,) = figures.sources.values()
    cells = [
        fractions(of_source.language["steered"]),
        f"{of_source.chrf['steered']:.2f}",
        f"{of_source.divergence['steered']:.3f}",
    ]
    cells += [
        f"{figures.kept[language].steered.whole:.2f} / {figures.kept[language].divergence:.3f}"
        for language in kept
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


@click.command()
@click.argument("model")
@click.option("--edit", type=click.Path(path_type=Path), required=True, help="The edit of `broca steer`.")
@click.option("--dtype", default="auto")
@click.option(
    "--rate", "rates", type=float, multiple=True, default=RATES, show_default=True, help="Of the LoRA."
)
@click.option("--lora/--no-lora", "trains", default=True, show_default=True)
@click.option("--also", multiple=True, metavar="NAME=EDIT", help="Another edit to measure.")
@click.option("--questions", "others", type=click.Path(path_type=Path), help="[default: Broca's, to report]")
@click.option("--passes", default=PASSES, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
def main(
    model: str,
    edit: Path,
    dtype: str,
    rates: Sequence[float],
    trains: bool,
    also: Sequence[str],
    others: Path | None,
    passes: int,
    json_path: Path | None,
) -> None:
    """Print a table."""
    keep_freed_memory()
    plan = load_plan(edit)
    questions = read_questions(shipped(QUESTIONS))
    lock = lock_of(questions, plan.metadata["target"], plan.metadata["source"])
    loaded = load_model(model, dtype=dtype)
    plans = {"steer": plan} | {name: load_plan(path) for name, path in (text.split("=", 1) for text in also)}
    if trains:
        plans |= loras(loaded, questions, lock, rates, passes)
    figures = {}
    if others is not None:
        questions = read_questions(others)
        lock = lock_of(questions, lock.target, lock.sources[0])
    part = REPORT if others is None else "all"
    for name, of_name in plans.items():
        figures[name] = lock_figures(loaded, questions, lock, of_name, part=part)
        click.echo(row(name, figures[name], list(figures[name].kept)), err=True)
    languages = list(next(iter(figures.values())).kept)
    (of_source,) = figures["steer"].sources.values()
    print(f"{loaded.label}, {lock.sources[0]} to {lock.target}, {len(figures['steer'].examples)} questions\n")
    titles = [
        f"in {lock.target}: whole text / every line / first words",
        "chrF to prompted",
        "KL to prompted",
        *(f"{name}: in it / KL" for name in languages),
    ]
    print(f"| | {' | '.join(titles)} |\n{'|---' * (1 + len(titles))}|")
    empty = " | -" * len(languages)
    divergence = f"{of_source.divergence['base']:.3f}"
    print(
        f"| base | {fractions(of_source.language['base'])} | {of_source.chrf['base']:.2f} | {divergence}{empty} |"
    )
    print(f"| prompted | {fractions(of_source.language['prompted'])} | - | -{empty} |")
    for name, of_name in figures.items():
        print(row(name, of_name, languages))
    if json_path is not None:
        content = {name: of_name.as_json() for name, of_name in figures.items()}
        json_path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
