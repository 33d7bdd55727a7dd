"""Time of the keys of a keyed edit, as a ratio to a bare forward pass over the same tokens in the same run.

The keys of all layers' neurons: covariances of every down_proj input, and the solution of the keys.  The forward pass,
without logits, is timed before and after them.  Limit: 2.5.

    python benchmarks/keys.py MODEL --corpus DIR --dtype bfloat16
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import click
import torch

from editing.methods.key import key
from neurons.models.freed_memory import keep_freed_memory
from neurons.models.source import load_model
from neurons.recording.covariance import each_moments
from neurons.recording.text_pass import forward
from neurons.text.batches import language_batches
from neurons.text.corpus import read_corpus
from neurons.text.token_budget import KEYS

LIMIT = 2.5


@click.command()
@click.argument("model")
@click.option("--corpus", type=click.Path(path_type=Path), required=True)
@click.option("--part", default="all")
@click.option("--tokens", type=int, help="Maximum number of tokens in a language.")
@click.option("--dtype", default="auto")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers here.")
def main(model: str, corpus: Path, part: str, tokens: int | None, dtype: str, json_path: Path | None) -> None:
    """Print seconds and their ratio."""
    keep_freed_memory()
    loaded = load_model(model, dtype=dtype)
    batches = language_batches(loaded, read_corpus(corpus, part=part), tokens, default=KEYS.tokens)
    source = next(iter(batches))
    units = {
        ("mlp_in", layer): torch.arange(loaded.anatomy.neurons) for layer in range(loaded.anatomy.layers)
    }

    def bare() -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            for some in batches.values():
                for batch in some:
                    forward(loaded.model, batch.to(loaded.device))
        return time.perf_counter() - begin

    def keys() -> float:
        begin = time.perf_counter()
        for _, moments in each_moments(loaded, batches, units):
            key(moments, source)
        return time.perf_counter() - begin

    first, solved, last = bare(), keys(), bare()
    counted = sum(int(batch.counted.sum()) for some in batches.values() for batch in some)
    passed = (first + last) / 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{loaded.label}: {counted:,} tokens of {len(batches)} languages, {loaded.anatomy.layers} keys")
    print(f"bare forward pass: {first:.1f} s before, {last:.1f} s after; keys: {solved:.1f} s")
    print(f"ratio {solved / passed:.2f} (limit {LIMIT}); peak memory {peak:,.0f} MiB")
    if json_path is not None:
        found = {"tokens": counted, "bare": [first, last], "keys": solved, "ratio": solved / passed}
        json_path.write_text(json.dumps({**found, "peak_mib": peak}, indent=2) + "\n")


if __name__ == "__main__":
    main()
