"""A small mixture of experts, trained here, and what router steering does to it, beside random experts.

Trains a Qwen3-MoE model (4 layers of 8 experts, 2 a token, 2.1 million parameters) with a tokenizer of 2,048 tokens in
less than ten CPU minutes, unless OUT has one.  The last lines of each language are kept out of the training: they are
the corpus, whose part "estimate" the edits are made from and whose part "report" they are measured on.  Printed are
the divergence of the languages' routing in each layer, and for every strength of router steering and as many random
experts in each layer:

    routed   fraction of the source's routed tokens that go to the raised experts, in the edited layers
    answers  fraction of the answers to prompts in the source that are in the target
    gap      nats a token by which the answers are less likely to the unedited model than its own in the target
    NLL      rise of the loss on text, nats a token; "third" is the largest of another language

    python benchmarks/mixture.py --text DIR --languages en,de,fr,es,ar --out build/mixture
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from runpy import run_path
from typing import Any

import click
import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from cli.options import CommaSeparated
from editing.evaluation.evaluation import Evaluation
from editing.methods.router_steering import expert_scores, mean_scores, middle_layers, router_plan
from editing.plans.applied import applied
from editing.plans.plan import Plan
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
        router_aux_loss_coef=0.01,
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
    """The scores of each layer given to random experts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([row[torch.randperm(len(row), generator=generator)] for row in scores])


def measured(
    loaded: LoadedModel, evaluation: Evaluation, report: Corpus, plan: Plan | None, raised: torch.Tensor
) -> dict[str, Any]:
    """The figures of one row."""
    steering = partial(applied, loaded, plan)
    outcome = evaluation.measure("edited", steering)
    with steering():
        statistics = record_corpus(loaded, report, [ROUTING], TEXTS)
    pair = (evaluation.source, evaluation.target)
    return {
        "routed": routed_to(statistics, evaluation.source, raised),
        "answers": outcome.target_share,
        "gap": outcome.fluency_gap,
        **{f"NLL {language}": outcome.nll_rise[language] for language in pair},
        "NLL third": max(rise for language, rise in outcome.nll_rise.items() if language not in pair),
    }


def line(name: str, row: Mapping[str, float]) -> str:
    cells = [
        f"{value:.3f}" if key in ("routed", "answers") else f"{value:+.3f}" for key, value in row.items()
    ]
    return f"| {name} | {' | '.join(cells)} |"


@click.command()
@click.option("--text", type=click.Path(path_type=Path), required=True, help="Directory of <language>.txt.")
@click.option("--languages", type=CommaSeparated(), default="en,de,fr,es,ar", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of model and corpus.")
@click.option("--tokens", default=2.4e6, show_default=True, help="Of the training.")
@click.option("--source", default="en", show_default=True)
@click.option("--target", default="fr", show_default=True)
@click.option("--strengths", type=CommaSeparated(), default="0.25,0.5,1,2", show_default=True)
def main(
    text: Path,
    languages: tuple[str, ...],
    out: Path,
    tokens: float,
    source: str,
    target: str,
    strengths: tuple[str, ...],
) -> None:
    """Print the tables."""
    if not (out / "model" / "config.json").exists():
        trained(text, languages, out, tokens)
    loaded = load_model(str(out / "model"))
    estimate, report = (read_corpus(out / "corpus", part=part) for part in ("estimate", "report"))
    statistics = record_corpus(loaded, estimate, [ROUTING], TEXTS)
    divergence = routing_divergence(routed_fraction(statistics)).tolist()
    print("divergence of the routing by layer: " + ", ".join(f"{value:.3f}" for value in divergence))
    layers = middle_layers(loaded)
    scores, means = expert_scores(statistics, [target]), mean_scores(statistics)
    for layer in layers:
        shown = ", ".join(f"{e}: {scores[layer, e]:.2f}" for e in scores[layer].nonzero()[:, 0].tolist())
        print(f"layer {layer}: experts of {target} {shown or 'none'}")
    evaluation = Evaluation(loaded, report, source, target, samples=2)
    in_layers = torch.zeros(len(scores), 1, dtype=torch.bool)
    in_layers[list(layers)] = True
    base = measured(loaded, evaluation, report, None, (scores > 0) & in_layers)
    print(f"ceiling {evaluation.ceiling:.3f}, {evaluation.continuations} answers")
    print("| experts raised | " + " | ".join(base) + " |\n|" + "---|" * (1 + len(base)))
    print(line("none", base), flush=True)
    for strength in map(float, strengths):
        rows = []
        for seed in range(-1, RANDOM_SETS):
            own = scores if seed < 0 else shuffled(scores, seed)
            plan = router_plan(loaded, estimate, own, means, layers, strength)
            rows.append(measured(loaded, evaluation, report, plan, (own > 0) & in_layers))
        spread = max(edit.notes.get("spread", 0.0) for edit in plan.edits)
        print(line(f"{target}'s, strength {strength:g} (spread {spread:.2f})", rows[0]))
        mean = {name: sum(row[name] for row in rows[1:]) / RANDOM_SETS for name in base}
        print(line(f"random, strength {strength:g}", mean), flush=True)


if __name__ == "__main__":
    main()
