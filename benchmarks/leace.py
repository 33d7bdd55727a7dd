"""What a linear probe tells of the language after LEACE, beside a random subspace of the same rank.

A logistic regression is fitted on the outputs of one layer's modules on the part "estimate", whose text also fits the
edit, and asked on the part "report".  Printed are its accuracies, of the unedited model and of the edited ones.

    python benchmarks/leace.py MODEL --corpus DIR --layer 15 --dtype bfloat16
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from sklearn.linear_model import LogisticRegression

from editing.methods.leace import Leace
from editing.methods.material import Material
from editing.plans.applied import applied
from editing.plans.plan import ModuleEdit, Plan, make_plan
from editing.plans.weights import Weights
from neurons.models.source import LoadedModel, load_model
from neurons.recording.text_pass import Position, PositionReader, numbered, read_text
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus, read_corpus

EVERY = 3  # tokens, of which one is kept


def outputs(
    loaded: LoadedModel, corpus: Corpus, sites: list[tuple[str, int]], tokens: int
) -> tuple[dict[tuple[str, int], torch.Tensor], list[int]]:
    """(site, layer) -> float32 [n, d], and the language of each row."""
    rows: dict[tuple[str, int], list[torch.Tensor]] = {site: [] for site in sites}
    labels: list[int] = []

    def reader(site: tuple[str, int]) -> PositionReader:
        def read(values: torch.Tensor, _: object, at: Position) -> None:
            rows[site].append(at.rows(values)[::EVERY].float())
            if site == sites[0]:
                labels.extend([at.language] * len(rows[site][-1]))

        return read

    batches = language_batches(loaded, corpus, tokens)
    read_text(loaded, numbered(batches), {site: reader(site) for site in sites})
    return {site: torch.cat(of_site) for site, of_site in rows.items()}, labels


def random_plan(loaded: LoadedModel, plan: Plan) -> Plan:
    """Random subspaces, removed from the outputs of the same modules."""
    generator, edits = torch.Generator().manual_seed(0), []
    for edit in plan.edits:
        drawn = torch.randn(loaded.anatomy.residual, edit.rank, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(drawn).Q
        right = Weights(loaded).read(edit.layer, edit.block).T @ basis
        edits.append(
            ModuleEdit(edit.layer, edit.block, edit.components, left=-basis.float(), right=right.float())
        )
    return make_plan(edits, {**plan.metadata, "method": "random"})


@click.command()
@click.argument("model")
@click.option("--corpus", type=click.Path(path_type=Path), required=True)
@click.option("--layer", type=int, required=True)
@click.option("--tokens", default=2000, show_default=True, help="Maximum number of tokens in a language.")
@click.option("--dtype", default="auto")
def main(model: str, corpus: Path, layer: int, tokens: int, dtype: str) -> None:
    """Print a table."""
    loaded = load_model(model, dtype=dtype)
    fitted, asked = (read_corpus(corpus, part=part) for part in ("estimate", "report"))
    print("| output of | languages | unedited | leace | random subspace |")
    print("|---|---|---|---|---|", flush=True)
    for module, name in (("attn", "attention"), ("mlp", "MLP")):
        plan = Leace().plan_for(Material(loaded, fitted, layers=(layer,), blocks=(module,)))
        site = (f"{module}_out", layer)
        accuracies = []
        for steering in (None, plan, random_plan(loaded, plan)):
            with applied(loaded, steering):
                (train, labels), (test, expected) = (
                    outputs(loaded, text, [site], tokens) for text in (fitted, asked)
                )
            scale = train[site].std(0) + 1e-6
            probe = LogisticRegression(max_iter=300, C=0.01).fit(train[site] / scale, labels)
            accuracies.append(probe.score(test[site] / scale, expected))
        print(
            f"| {name} | {len(fitted.languages)} | {' | '.join(f'{a:.2f}' for a in accuracies)} |", flush=True
        )


if __name__ == "__main__":
    main()
