"""A small mixture of experts, trained here: routing by language, router steering and keyed edits of its experts.

Trains a Qwen3-MoE model (4 layers of 8 experts, 2 a token, 2.1 million parameters) with a tokenizer of 2,048 tokens in
less than ten CPU minutes, unless OUT has one.  The last lines of each language are kept out of the training: they are
the corpus, whose part "estimate" the edits are made from and whose part "report" they are measured on.  Printed are
the divergence of the languages' routing in each layer, a table of router steering for every strength, beside as many
random experts in each layer, and a table of keyed edits:

    routed   fraction of a language's routed tokens that go to the raised experts, in the edited layers
    answers  fraction of the answers to prompts in the source that are in the target
    gap      nats a token by which the answers are less likely to the unedited model than its own in the target
    NLL      rise of the loss on text, nats a token; "third" is the largest of another language

    python benchmarks/mixture.py --text DIR --languages en,de,fr,es,ar --out build/mixture
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from runpy import run_path

import click
import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from cli.options import CommaSeparated
from editing.directions.diffmean import diffmean_direction
from editing.evaluation.evaluation import Evaluation
from editing.evaluation.likelihood import Steering
from editing.methods.keyed import keyed_plan
from editing.methods.keyed_experts import KeyedExperts
from editing.methods.material import Material
from editing.methods.router_steering import (
    THRESHOLD,
    RouterSteering,
    expert_scores,
    mean_scores,
    middle_layers,
)
from editing.plans.applied import applied
from neurons.models.source import LoadedModel, load_model
from neurons.recording.corpus_recording import record_corpus
from neurons.scorers.method import TEXTS
from neurons.statistics.routing import ROUTING, routed_fraction, routing_divergence
from neurons.statistics.statistics import Statistics
from neurons.text.corpus import Corpus, read_corpus

DEMO = run_path(str(Path(__file__).parents[1] / "artifacts" / "demo" / "train.py"))
HELD_OUT = 400  # lines of each language
VOCABULARY, LAYERS, WIDTH, EXPERTS, CHOSEN = 2048, 4, 128, 8, 2
ROWS, BLOCK, RATE = 16, 256, 3e-3
RANDOM_SETS = 3
KEYED_STRENGTHS = (1.0, 2.0, 3.5)


def trained(text: Path, languages: tuple[str, ...], out: Path, tokens: float) -> None:
    """Write the corpus and the model."""
    lines = DEMO["read_lines"](text, list(languages))
    (out / "corpus").mkdir(parents=True, exist_ok=True)
    for language, of_language in lines.items():
        held_out = "\n".join(of_language[-HELD_OUT:]) + "\n"
        (out / "corpus" / f"{language}.txt").write_text(held_out, encoding="utf-8")
        del of_language[-HELD_OUT:]
    tokenizer = DEMO["train_tokenizer"](lines, VOCABULARY)
    newline = tokenizer.encode("\n", add_special_tokens=False)
    streams = [
        DEMO["blocks"](
            tokenizer(of_language, add_special_tokens=False)["input_ids"],
            newline,
            np.random.default_rng([0, number]),
        )
        for number, of_language in enumerate(lines.values())
    ]
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 64,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.001,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = Qwen3MoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    per_step, begun = ROWS * BLOCK, time.process_time()
    steps = int(tokens // per_step)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * DEMO["rate"](step * per_step, tokens, step)
        rows = [next(streams[(step * ROWS + row) % len(streams)])[:BLOCK] for row in range(ROWS)]
        ids = torch.from_numpy(np.stack(rows))
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            print(
                f"step {step} of {steps}: loss {loss.item():.3f}, {time.process_time() - begun:.0f} CPU seconds",
                flush=True,
            )
    config.output_router_logits = False
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps * per_step:,} tokens", flush=True
    )


def routed_to(statistics: Statistics, language: str, raised: torch.Tensor) -> float:
    """Fraction of a language's routed tokens that go to the raised experts (bool [L, E]), in layers that have some."""
    fraction = routed_fraction(statistics)[..., statistics.languages.index(language)]
    layers = raised.any(1)
    return float((fraction * raised)[layers].sum() / fraction[layers].sum())


def shuffled(scores: torch.Tensor, seed: int) -> torch.Tensor:
    """The scores of each layer given to as many random experts of those without one."""
    generator, given = torch.Generator().manual_seed(seed), torch.zeros_like(scores)
    for layer, row in enumerate(scores):
        raised, others = row.nonzero()[:, 0], (row == 0).nonzero()[:, 0]
        chosen = others[torch.randperm(len(others), generator=generator)[: len(raised)]]
        given[layer, chosen] = row[raised][: len(chosen)]
    return given


def measured(evaluation: Evaluation, steering: Steering) -> dict[str, float]:
    """The figures of answers and text."""
    outcome = evaluation.measure("edited", steering)
    pair = (evaluation.source, evaluation.target)
    return {
        "answers": outcome.target_share,
        "gap": outcome.fluency_gap,
        **{f"NLL {language}": outcome.nll_rise[language] for language in pair},
        "NLL third": max(rise for language, rise in outcome.nll_rise.items() if language not in pair),
    }


def routing(
    loaded: LoadedModel, evaluation: Evaluation, report: Corpus, steering: Steering, raised: torch.Tensor
) -> dict[str, float]:
    """The routing of source and target to the raised experts."""
    with steering():
        statistics = record_corpus(loaded, report, [ROUTING], TEXTS)
    pair = (evaluation.source, evaluation.target)
    return {f"routed {language}": routed_to(statistics, language, raised) for language in pair}


def line(name: str, row: Mapping[str, float]) -> str:
    cells = [f"{value:{'+' * (key[:3] in ('gap', 'NLL'))}.3f}" for key, value in row.items()]
    return f"| {name} | {' | '.join(cells)} |"


def head(name: str, row: Mapping[str, float]) -> str:
    return f"| {name} | {' | '.join(row)} |\n|{'---|' * (1 + len(row))}"


def steering_table(
    loaded: LoadedModel,
    evaluation: Evaluation,
    estimate: Corpus,
    report: Corpus,
    threshold: float,
    strengths: Sequence[float],
) -> None:
    """Router steering and its random control."""
    statistics = record_corpus(loaded, estimate, [ROUTING], TEXTS)
    divergence = routing_divergence(routed_fraction(statistics)).tolist()
    print("divergence of the routing by layer: " + ", ".join(f"{value:.3f}" for value in divergence))
    layers, means = middle_layers(loaded), mean_scores(statistics)
    scores = expert_scores(statistics, [evaluation.target], threshold=threshold)
    in_layers = torch.zeros(len(scores), 1, dtype=torch.bool)
    in_layers[list(layers)] = True
    scores = scores * in_layers
    for layer in layers:
        shown = ", ".join(f"{e} ({scores[layer, e]:.2f})" for e in scores[layer].nonzero()[:, 0].tolist())
        print(f"layer {layer}: experts of {evaluation.target}: {shown or 'none'}")
    sets = [scores, *(shuffled(scores, seed) for seed in range(RANDOM_SETS))]

    material = Material(loaded, estimate)

    def rows(strength: float) -> list[dict[str, float]]:
        made = []
        for own in sets:
            plan = None
            if strength != 0:
                plan = RouterSteering(strength=strength).raised(material, layers, own, means)
            steering = partial(applied, loaded, plan)
            made.append(
                routing(loaded, evaluation, report, steering, own > 0) | measured(evaluation, steering)
            )
        return made

    for strength in (0.0, *strengths):
        steered, *random = rows(strength)
        if strength == 0:
            print(head("experts raised", steered))
        print(line(f"{evaluation.target}'s, strength {strength:g}", steered))
        mean = {name: sum(row[name] for row in random) / len(random) for name in steered}
        print(line(f"random, strength {strength:g}", mean), flush=True)


def keyed_table(loaded: LoadedModel, evaluation: Evaluation, estimate: Corpus) -> None:
    """Keyed edits over heads, and over the neurons of experts."""
    direction = diffmean_direction(loaded, estimate, evaluation.source, evaluation.target)
    material = Material(loaded, estimate, directions=(direction,))
    for number, strength in enumerate(KEYED_STRENGTHS):
        plans = {
            "keyed, heads": keyed_plan(loaded, estimate, direction, strength=strength, blocks=("attn",)),
            "keyed-experts": KeyedExperts(strength=strength).plan_for(material),
        }
        for name, plan in plans.items():
            row = measured(evaluation, partial(applied, loaded, plan))
            row["dW/W"] = plan.relative_change() or 0.0
            if number == 0 and name == next(iter(plans)):
                print(head("edit", row))
            print(line(f"{name}, strength {strength:g}", row), flush=True)


@click.command()
@click.option("--text", type=click.Path(path_type=Path), required=True, help="Directory of <language>.txt.")
@click.option("--languages", type=CommaSeparated(), default="en,de,fr,es,ar", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of model and corpus.")
@click.option("--tokens", default=2.4e6, show_default=True, help="Of the training.")
@click.option("--source", default="en", show_default=True)
@click.option("--target", default="fr", show_default=True)
@click.option("--threshold", default=THRESHOLD, show_default=True, help="Of the raised experts' share.")
@click.option("--strengths", type=CommaSeparated(), default="0.5,1,2,4", show_default=True)
def main(
    text: Path,
    languages: tuple[str, ...],
    out: Path,
    tokens: float,
    source: str,
    target: str,
    threshold: float,
    strengths: tuple[str, ...],
) -> None:
    """Print the tables."""
    if not (out / "model" / "config.json").exists():
        trained(text, languages, out, tokens)
    loaded = load_model(str(out / "model"))
    estimate, report = (read_corpus(out / "corpus", part=part) for part in ("estimate", "report"))
    evaluation = Evaluation(loaded, report, source, target, samples=2)
    print(f"{evaluation.continuations} answers; ceiling {evaluation.ceiling:.3f}")
    steering_table(loaded, evaluation, estimate, report, threshold, list(map(float, strengths)))
    keyed_table(loaded, evaluation, estimate)


if __name__ == "__main__":
    main()
