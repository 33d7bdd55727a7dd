"""Time of an ablation condition, as ratios to the layers that it runs and to a whole forward pass in the same run.

For sets of neurons whose first layer is early, in the middle and late: the time of another condition of
`neurons.ablation.conditions.condition_losses`, compared with a model of only the layers from that first layer up, its
head and its loss, on the hidden states that enter that layer.  The two are timed alternately; the ratio is the median
over the repeats.

    python benchmarks/ablate.py
    python benchmarks/ablate.py artifacts/demo/model --corpus artifacts/demo/corpus

Without MODEL: a random Llama of a billion-parameter model's widths with few layers.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from neurons.ablation.conditions import Condition, batch_losses
from neurons.architectures.anatomy import anatomy_of
from neurons.models.source import LoadedModel, load_model
from neurons.recording.partial_forward import forward_from, forward_keeping
from neurons.recording.text_losses import text_losses
from neurons.recording.text_pass import forward
from neurons.text.batches import TokenBatch, language_batches
from neurons.text.corpus import read_corpus

LIMIT = 1.05
MOST_REPEATS = 10_000
WIDE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}


def random_model(layers: int, vocabulary: int) -> LoadedModel:
    config = transformers.LlamaConfig(**WIDE, num_hidden_layers=layers, vocab_size=vocabulary)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    model = model.to(torch.bfloat16) if device == "cuda" else model
    return LoadedModel("random", Path(), "", anatomy_of(model), model, None)


def random_batch(vocabulary: int, rows: int, length: int) -> TokenBatch:
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(ids, dtype=torch.bool)
    counted = seen.clone()
    counted[:, 0] = False
    return TokenBatch(ids, seen, counted, torch.arange(rows))


def seconds(work: Callable[[], Any]) -> float:
    """Seconds of ``work``; on a CPU processor time, which excludes other processes."""
    if not torch.cuda.is_available():
        begin = time.process_time()
        work()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def rows_from(loaded: LoadedModel, first: int, share: float) -> torch.Tensor:
    """A fraction ``share`` of the neurons of every layer from ``first`` up, as rows (layer, neuron)."""
    width = loaded.anatomy.neurons
    count = max(1, round(share * width))
    picked = torch.arange(count) * (width // count)
    layers = range(first, loaded.anatomy.layers)
    return torch.cat([torch.stack([torch.full_like(picked, layer), picked], dim=1) for layer in layers])


def bare(loaded: LoadedModel, batch: TokenBatch, first: int) -> Callable[[], Any]:
    """The layers from ``first`` up, head and loss, without code of Broca around the layers."""
    base = loaded.model.base_model
    with torch.no_grad():
        on_device = batch.to(loaded.device)
        _, kept = forward_keeping(loaded.model, loaded.anatomy, on_device, [first] if first else [])
        entering = kept.entering[first] if first else loaded.model.get_input_embeddings()(on_device.ids)
    mask = on_device.attention.long() if batch.padded else None
    whole = base.layers

    def work() -> None:
        base.layers = whole[first:]
        try:
            with torch.no_grad():
                hidden = base(inputs_embeds=entering, attention_mask=mask, use_cache=False)
            text_losses(loaded.model, hidden.last_hidden_state, on_device)
        finally:
            base.layers = whole

    return work


def one_more(loaded: LoadedModel, batch: TokenBatch, first: int, share: float) -> Callable[[], Any]:
    """The work of ``condition_losses`` for another condition, after the states of the batch are kept."""
    condition = Condition(rows_from(loaded, first, share))
    running = batch_losses(loaded, batch, [condition] * MOST_REPEATS, "benchmark", True)

    def work() -> None:
        next(running)

    work()
    return work


def measure(
    loaded: LoadedModel, batch: TokenBatch, first: int, share: float, repeats: int
) -> dict[str, float]:
    condition, remaining = one_more(loaded, batch, first, share), bare(loaded, batch, first)
    on_device = batch.to(loaded.device)

    def whole_pass() -> None:
        with torch.no_grad():
            text_losses(loaded.model, forward(loaded.model, on_device), on_device)

    remaining()
    whole_pass()
    pairs = []
    for _ in range(repeats):
        pairs.append((seconds(condition), seconds(remaining), seconds(whole_pass)))
    ratios = sorted(a / b for a, b, _ in pairs)
    return {
        "ratio": statistics.median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
        "of_whole": statistics.median(a / c for a, _, c in pairs),
        "seconds": statistics.median(a for a, _, _ in pairs),
    }


def same_bits(loaded: LoadedModel, batch: TokenBatch, firsts: Sequence[int]) -> bool:
    """Whether passes from a middle layer are bit-identical to the whole pass on this device."""
    on_device = batch.to(loaded.device)
    layers = [first for first in firsts if first]
    hidden, kept = forward_keeping(loaded.model, loaded.anatomy, on_device, layers)
    return all(
        torch.equal(forward_from(loaded.model, loaded.anatomy, on_device, layer, kept), hidden)
        for layer in layers
    )


@click.command()
@click.argument("model", required=False)
@click.option("--corpus", type=click.Path(path_type=Path), help="Text for MODEL.")
@click.option("--layers", type=int, default=8, help="Of the random model.")
@click.option("--vocabulary", type=int, default=32000, help="Of the random model.")
@click.option("--rows", type=int, default=4, help="Of the random batch.")
@click.option("--length", type=int, default=256, help="Of the random batch.")
@click.option("--share", type=float, default=0.01, help="Of each layer's neurons.")
@click.option("--repeats", type=int, default=9)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers here.")
def main(
    model: str | None,
    corpus: Path | None,
    layers: int,
    vocabulary: int,
    rows: int,
    length: int,
    share: float,
    repeats: int,
    json_path: Path | None,
) -> None:
    """Print the ratios as a Markdown table."""
    if model is None:
        loaded, batch = random_model(layers, vocabulary), random_batch(vocabulary, rows, length)
    else:
        if corpus is None:
            raise click.UsageError("MODEL needs --corpus")
        loaded = load_model(model)
        batch = max(
            (b for some in language_batches(loaded, read_corpus(corpus)).values() for b in some),
            key=lambda one: one.ids.numel(),
        )
    depth = loaded.anatomy.layers
    firsts = sorted({0, depth // 4, depth // 2, depth - 1})
    print(f"{batch.ids.numel():,} tokens at once; same bits: {same_bits(loaded, batch, firsts)}\n")
    print("| first layer | condition / bare work that remains | range | of a whole pass | limit |")
    print("|---|---|---|---|---|")
    found = {}
    for first in firsts:
        found[first] = measure(loaded, batch, first, share, repeats)
        row = found[first]
        print(
            f"| {first} of {depth} | {row['ratio']:.3f} | {row['least']:.3f} to {row['most']:.3f} | "
            f"{row['of_whole']:.3f} | {LIMIT} |",
            flush=True,
        )
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
