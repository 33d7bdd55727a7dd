"""One key for messages and headers together, or one for each: both locks on the same conversations and questions.

Printed are the divergence from the teacher on the CHOOSE questions after every pass and on the REPORT questions, nats a
token, and the divergence from the unedited model on its own answers in languages that are kept.

    python benchmarks/lock_keys.py MODEL --target de --dtype bfloat16
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from cli.shipped import QUESTIONS, shipped
from editing.evaluation.questions import Questions, read_questions
from editing.methods.conversation_keys import conversation_keys, middle_layers
from editing.methods.distilled_values import Example, distilled_values, mean_divergence
from editing.pipeline.lock_kinds import Lock, lock_of
from editing.pipeline.lock_prompts import BUILD, CHOOSE, REPORT
from editing.pipeline.lock_text import base_conversations, base_replies, lessons, plain_prompts, taught
from editing.plans.plan import make_plan
from neurons.models.freed_memory import keep_freed_memory
from neurons.models.source import LoadedModel, load_model
from neurons.text.conversation_batches import conversation_batches, groups_of


def of_part(loaded: LoadedModel, questions: Questions, lock: Lock, part: str) -> list[Example]:
    by_source = taught(loaded, questions, lock, lessons(loaded, questions, lock, lock.sources, part))
    return [example for of_source in by_source.values() for example in of_source.examples]


def numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


@click.command()
@click.argument("model")
@click.option("--source", default="en")
@click.option("--target", required=True)
@click.option("--kept", default="es", help="Languages to measure besides the target, separated by commas.")
@click.option("--dtype", default="auto")
def main(model: str, source: str, target: str, kept: str, dtype: str) -> None:
    """Print a table."""
    keep_freed_memory()
    questions = read_questions(shipped(QUESTIONS))
    lock = lock_of(questions, target, source)
    loaded = load_model(model, dtype=dtype)
    text = conversation_batches(loaded, base_conversations(loaded, questions, lock.languages))
    building, choosing, reporting = (
        of_part(loaded, questions, lock, part) for part in (BUILD, CHOOSE, REPORT)
    )
    others = [target, *kept.split(",")]
    own = base_replies(loaded, plain_prompts(loaded, questions, others, REPORT))
    print(f"{loaded.label}, {source} to {target}; base: {mean_divergence(loaded, reporting):.3f} on REPORT\n")
    print(f"| keys | CHOOSE: before, after each pass | REPORT | {' | '.join(others)} |")
    print("|---" * (3 + len(others)) + "|", flush=True)
    for name, groups in {"one": [groups_of(source)], "two": lock.key_groups}.items():
        keys = conversation_keys(loaded, text, groups, middle_layers(loaded.anatomy.layers))
        learned = distilled_values(
            loaded, make_plan(keys, {"fingerprint": loaded.fingerprint, "settings": {}}), building, choosing
        )
        changed = [mean_divergence(loaded, own[language].examples, learned) for language in others]
        reached = mean_divergence(loaded, reporting, learned)
        row = [
            name,
            numbers(learned.metadata["learning"]["held_out"]),
            f"{reached:.3f}",
            *(f"{value:.3f}" for value in changed),
        ]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
