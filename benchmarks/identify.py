"""Time of recording, as ratios to bare passes over the same text in the same run, and its memory.

    recording   counts, sums and squares at every MLP, to the forward pass without logits
    gradients   |h * dLoss/dh| at every MLP, to the forward and backward pass

The two passes over three batches are timed alternately, and each is first in half of the turns, so that a busy machine
slows both.  The ratio is the mean over the middle half of all turns, with its bootstrapped 95 % interval.  Freed memory
stays with the process, as in every command.  Two models are measured: the given one on its corpus, and a random Llama
with the widths of a billion-parameter model and few layers (``--layers 0`` omits it).  The memory that recording adds
must not grow with the text.

    python benchmarks/identify.py artifacts/demo/model --corpus artifacts/demo/corpus
    python benchmarks/identify.py build/real/qwen2.5-coder-0.5b-instruct --corpus CORPUS --dtype bfloat16 \
        --tokens 1024 --repeats 9 --layers 0
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import transformers
from scipy import stats

from neurons.architectures.sites import site_hooks
from neurons.models.freed_memory import keep_freed_memory
from neurons.models.source import LoadedModel, load_model
from neurons.recording.record import loss_sum, record
from neurons.recording.text_pass import forward
from neurons.text.batches import TokenBatch, packed_corpus
from neurons.text.corpus import read_corpus

MOMENTS = ("mlp_act:positive", "mlp_in:sum", "mlp_in:square")
BATCHES_A_TURN = 3
LIMITS = {"recording": 1.05, "gradients": 1.15}


def seconds(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def middle_mean(values: Any, axis: int = -1) -> Any:
    """The mean without the lowest and the highest quarter."""
    return stats.trim_mean(values, 0.25, axis=axis)


def bare_forward(loaded: LoadedModel, batches: list[TokenBatch]) -> None:
    with torch.no_grad():
        for batch in batches:
            forward(loaded.model, batch.to(loaded.device))


def bare_backward(loaded: LoadedModel, batches: list[TokenBatch]) -> None:
    """Forward and backward passes down to the first MLP's hidden values, as far as recording needs them."""

    def ask(values: torch.Tensor, _: Any) -> None:
        values.requires_grad_(True)

    with site_hooks(loaded.anatomy, {("mlp_in", 0): ask}), torch.enable_grad():
        for batch in batches:
            loss_sum(loaded.model, batch.to(loaded.device)).backward()


def measure(loaded: LoadedModel, batches: list[TokenBatch], repeats: int) -> dict[str, Any]:
    """Ratios of recording to bare passes, and tokens a second of the bare passes."""
    pairs: dict[str, tuple[Callable[[list[TokenBatch]], Any], Callable[[list[TokenBatch]], Any]]] = {
        "recording": (
            lambda some: bare_forward(loaded, some),
            lambda some: record(loaded, {"all": some}, MOMENTS),
        ),
        "gradients": (
            lambda some: bare_backward(loaded, some),
            lambda some: record(loaded, {"all": some}, ["mlp_in:attribution"]),
        ),
    }
    found: dict[str, Any] = {"tokens": sum(int(batch.counted.sum()) for batch in batches)}
    for name, (bare, recorded) in pairs.items():
        bare(batches[:1]), recorded(batches[:1])
        ratios, rates = [], []
        parts = [batches[i : i + BATCHES_A_TURN] for i in range(0, len(batches), BATCHES_A_TURN)]
        for turn, some in enumerate(parts * (repeats if name == "recording" else max(3, repeats // 3))):
            order = (bare, recorded) if (turn + turn // len(parts)) % 2 == 0 else (recorded, bare)
            times = {work: seconds(lambda work=work, some=some: work(some)) for work in order}
            ratios.append(np.log(times[recorded] / times[bare]))
            rates.append(sum(int(batch.counted.sum()) for batch in some) / times[bare])
        interval = stats.bootstrap((ratios,), middle_mean, method="percentile", rng=0).confidence_interval
        found[name] = {
            "ratio": np.exp(middle_mean(ratios)).item(),
            "interval": np.exp([interval.low, interval.high]).tolist(),
            "bare tokens a second": statistics.median(rates),
        }
    return found


def random_llama(folder: Path, hidden: int, inner: int, layers: int, tokenizer: Path) -> Path:
    """A checkpoint with random weights and these sizes."""
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=8,
        vocab_size=8192,
        max_position_embeddings=2048,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def memory_growth(loaded: LoadedModel, batches: list[TokenBatch]) -> tuple[float, float]:
    """Peak memory in MiB after recording the batches, and after eight times as many."""
    for _ in range(2):  # the first pass warms the allocator
        record(loaded, {"all": batches}, MOMENTS)
    once = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    record(loaded, {"all": batches * 8}, MOMENTS)
    return once, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def random_text() -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(0)
    everywhere = torch.ones(2, 1024, dtype=torch.bool)
    counted = everywhere.clone()
    counted[:, 0] = False
    return [
        TokenBatch(torch.randint(0, 5000, (2, 1024), generator=generator), everywhere, counted)
        for _ in range(2)
    ]


@click.command()
@click.argument("model")
@click.option("--corpus", type=click.Path(path_type=Path), required=True)
@click.option(
    "--repeats", type=click.IntRange(3), default=36, help="Rounds over the batches; for gradients a third."
)
@click.option("--hidden", type=int, default=2048)
@click.option("--inner", type=int, default=8192)
@click.option("--layers", type=int, default=2)
@click.option("--dtype", default="auto")
@click.option("--tokens", type=click.IntRange(1), help="Of a batch; the default is recording's own.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers here.")
def main(
    model: str,
    corpus: Path,
    repeats: int,
    hidden: int,
    inner: int,
    layers: int,
    dtype: str,
    tokens: int | None,
    json_path: Path | None,
) -> None:
    """Print the ratios as a Markdown table."""
    keep_freed_memory()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_model(model, dtype=dtype)
        block = None if tokens is None else min(tokens, 512)
        read = packed_corpus(loaded, read_corpus(corpus), block, tokens_a_batch=tokens)
        batches = [batch for some in read.values() for batch in some][: 2 * BATCHES_A_TURN]
        growth = memory_growth(loaded, batches)
        found[loaded.label] = measure(loaded, batches, repeats)
        if layers:
            del loaded
            large = load_model(str(random_llama(Path(folder), hidden, inner, layers, Path(model))))
            name = f"random Llama, d {hidden}, {inner} neurons, {layers} layers"
            found[name] = measure(large, random_text(), repeats)
    print("| model | pass | ratio | 95 % | bare tokens/s | limit |\n|---|---|---|---|---|---|")
    for name, numbers in found.items():
        for what, limit in LIMITS.items():
            row = numbers[what]
            print(
                f"| {name} | {what} | {row['ratio']:.3f} | {row['interval'][0]:.3f} to {row['interval'][1]:.3f} | "
                f"{row['bare tokens a second']:,.0f} | {limit} |"
            )
    print(f"\npeak memory: {growth[0]:,.0f} MiB, with eight times the text {growth[1]:,.0f} MiB")
    if json_path is not None:
        json_path.write_text(json.dumps({**found, "peak_mib": growth}, indent=2) + "\n")


if __name__ == "__main__":
    main()
