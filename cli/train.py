"""``broca train``: trains the neurons of a language on its text, and measures every language before and after."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from cli import options as opt
from cli.corpora import note_files, read_table
from cli.loading import loaded_model
from cli.screen import Screen
from cli.tables import plan_table

if TYPE_CHECKING:
    from editing.plans.plan import Plan
    from neurons.models.memory import Need
    from neurons.models.source import LoadedModel


@click.command("train")
@opt.model
@click.option("--neurons", type=opt.IN_FILE, required=True, help="Neuron set, from `broca identify`.")
@click.option(
    "--languages",
    type=opt.CommaSeparated(),
    required=True,
    help="Languages whose neurons are trained, on their text; all others of the corpus are only measured.",
)
@click.option(
    "--corpus",
    type=opt.IN_PATH,
    required=True,
    help="Directory of <language>.txt, .jsonl or .parquet; of the trained languages only plain text, no conversations.",
)
@click.option(
    "--control",
    "controls",
    type=opt.CommaSeparated(),
    default=(),
    help="Also train and measure: random (as many other neurons in each layer), all (all neurons), lora (a LoRA of the "
    "same modules with as many numbers).  [default: none]",
)
@opt.count("--passes", "Passes over the training text.", 1)
@click.option(
    "--rate",
    type=opt.FiniteRange(min=0, min_open=True),
    default=1e-4,
    show_default=True,
    help="AdamW's learning rate.",
)
@opt.count("--block", "Tokens in a block.  [default: the context, up to 512]", minimum=2)
@opt.seed("Seed of all draws.")
@opt.tokens
@opt.device
@opt.dry_run
@opt.out("File for the plan (.safetensors).")
@opt.json
def command(**options: Any) -> None:
    """Train only the gate and up rows and the down columns of a language's neurons in MODEL (hub id or directory).

    Half of the corpus is trained on, a quarter chooses the best pass, and the loss of every language is measured on the
    last quarter.  `broca export` writes the checkpoint.  With `accelerate launch --num-processes N -m cli.main train ...`,
    N processes share the blocks of text.

    \b
    Example:
      broca train artifacts/demo/model --neurons neurons.safetensors --languages fr \\
          --corpus artifacts/demo/corpus --control random --out enhanced.safetensors
    """
    from editing.evaluation.likelihood import language_losses
    from editing.methods.subnetwork import (
        CONTROLS,
        SET,
        Training,
        chosen_neurons,
        control_neurons,
        subnetwork_plan,
    )
    from editing.pipeline.needs import measuring_need, subnetwork_need
    from neurons.errors import UsageError
    from neurons.models.processes import is_first
    from neurons.neuron_sets.neuron_set import load_neuron_set
    from neurons.recording.corpus_recording import remove_unfinished
    from neurons.text.corpus import read_corpus
    from neurons.text.corpus_files import language_label
    from neurons.text.token_budget import GRADIENTS, LOSSES

    arguments = SimpleNamespace(**options)
    screen = Screen(arguments.as_json)
    if unknown := [control for control in arguments.controls if control not in CONTROLS]:
        raise UsageError(f"--control {unknown[0]!r} is unknown: choose from {', '.join(CONTROLS)}")
    languages = [*dict.fromkeys(map(language_label, arguments.languages))]
    neurons = load_neuron_set(arguments.neurons)
    text, held_out, report = (
        read_corpus(arguments.corpus, part=part, min_languages=1) for part in ("estimate", "choose", "report")
    )
    note_files(screen, arguments.corpus, None)
    text.require(*languages)
    for trained in (text, held_out):
        trained.require_plain(*languages, remedy="train on plain text")
    training = Training(arguments.passes, arguments.rate, arguments.block, arguments.tokens, arguments.seed)
    runs = [SET, *dict.fromkeys(arguments.controls)]
    rows = chosen_neurons(neurons, languages)
    if arguments.dry_run:
        from cli.dry_run import dry_run

        def needs(planned: LoadedModel) -> list[Need]:
            trained = {run: control_neurons(planned, rows, run, 0) for run in runs}
            training = [
                subnetwork_need(planned, run, len(of_run), arguments.block) for run, of_run in trained.items()
            ]
            return [*training, measuring_need(planned, trained.values())]

        dry_run(screen, arguments, needs)
        return
    loaded = loaded_model(screen, arguments)
    for run in runs:  # raises before any work
        control_neurons(loaded, rows, run, training.seed)
    # A run whose training has ended resumes at its end, until the command has.
    states = {run: arguments.out.with_name(f"{arguments.out.name}.{run}") for run in runs}
    plans: dict[str, Plan] = {}
    for run in runs:
        with screen.progress(f"Training: {run}", None, "tokens") as advance:
            plans[run] = subnetwork_plan(
                loaded, neurons, languages, text, held_out, training, run, advance, states[run]
            )
        if run == SET and is_first():
            plans[run].save(arguments.out)
    if not is_first():
        return
    plan = plans[SET]
    read_table(screen, plan.metadata["read"], GRADIENTS.minimum, "text trained on")
    plan_table(screen, plan, loaded.anatomy)
    with screen.progress("Measuring", 1 + len(runs), "models") as advance:
        tokens = min(arguments.tokens or LOSSES.tokens, LOSSES.tokens)
        losses = language_losses(loaded, replace(report, tokens=tokens), plans, advance)
    screen.table(
        "NLL on held-out text, nats a token, and its change",
        ["language", "base", *runs],
        [
            [language, of_runs["base"], *(f"{of_runs[run] - of_runs['base']:+.4f}" for run in runs)]
            for language, of_runs in losses.items()
        ],
    )
    for state in states.values():
        remove_unfinished(state)
    screen.result(
        out=arguments.out,
        languages=languages,
        read=plan.metadata["read"],
        nll=losses,
        learning={run: of_run.metadata["learning"] for run, of_run in plans.items()},
        relative_change={run: of_run.relative_change() for run, of_run in plans.items()},
        components={run: of_run.components for run, of_run in plans.items()},
    )
