"""Peak memory and time of an edit of a checkpoint that is larger than the memory limit.

    python benchmarks/streaming.py --tokenizer MODEL --corpus DIR --folder DIR [--size 12GB] [--limit 8GB]

Writes a synthetic checkpoint (Llama's layers, normal bfloat16 weights, shards of 1 GB) tensor by tensor, runs `broca
direction`, `edit` and `export` on it, and reads its files once from start to end for comparison, without and with them
in the system's cache.  Reported of each command are seconds, the bytes that it read from the disk (not from the
cache), and the peak of its anonymous memory, read twenty times a second; mapped pages of the checkpoint come on top
(`rss`), but the system takes them back when memory is short.  With `--compare`, edits a second time without a limit
and compares the bytes of direction and plan.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

from cli.options import MemorySize

HIDDEN, INNER, HEADS = 3072, 8192, 24
SHARD = 10**9
POOL = 2**26  # normal values, from which every tensor takes its own at some place
READ_AT_ONCE = 2**24


def tensors(layers: int, vocabulary: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values of every tensor, one at a time."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(POOL, generator=generator)
    pools = {width: (drawn * width**-0.5).bfloat16() for width in (HIDDEN, INNER)}

    def normal(rows: int, columns: int) -> torch.Tensor:
        pool, count = pools[columns], rows * columns
        start = int(torch.randint(max(1, POOL - count), (1,), generator=generator))
        return pool[start:].repeat(-(-count // (POOL - start)))[:count].view(rows, columns)

    yield "model.embed_tokens.weight", normal(vocabulary, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
        for name in "qkvo":
            yield f"{prefix}.self_attn.{name}_proj.weight", normal(HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            yield f"{prefix}.mlp.{name}_proj.weight", normal(INNER, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", normal(HIDDEN, INNER)
    yield "model.norm.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
    yield "lm_head.weight", normal(vocabulary, HIDDEN)


def write_checkpoint(folder: Path, tokenizer: Path, size: int) -> int:
    """Write a checkpoint of about ``size`` bytes; the number of its layers."""
    import transformers

    folder.mkdir(parents=True)
    tokens = transformers.AutoTokenizer.from_pretrained(tokenizer)
    tokens.save_pretrained(folder)
    vocabulary = len(tokens)
    of_layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
    layers = max(1, round((size - 4 * vocabulary * HIDDEN) / of_layer))
    transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = number = 0

    def write() -> None:
        nonlocal number
        number += 1
        file = f"model-{number:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, values in tensors(layers, vocabulary):
        if sum(other.nbytes for other in shard.values()) + values.nbytes > SHARD:
            write()
        shard[name] = values
        total += values.nbytes
    write()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return layers


def drop_from_cache(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(files: list[Path]) -> float:
    begun, into = time.monotonic(), bytearray(READ_AT_ONCE)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(into):
                pass
    return time.monotonic() - begun


def measured(command: list[str], files: list[Path]) -> None:
    """Run a command of broca with the files out of the cache, and print what it took."""
    drop_from_cache(files)
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "cli.main", *command], stdout=subprocess.DEVNULL)
    anonymous = read = 0
    while True:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            io = Path(f"/proc/{process.pid}/io").read_text()
        except OSError:
            break
        fields = dict(line.split(":", 1) for line in (status + io).splitlines())
        anonymous = max(anonymous, 1024 * int(fields.get("RssAnon", "0 kB").split()[0]))
        read = max(read, int(fields["read_bytes"]))
        if fields["State"].split()[0] == "Z":
            break
        time.sleep(0.05)
    _, code, usage = os.wait4(process.pid, 0)
    if code:
        raise SystemExit(f"broca {' '.join(command)}: exit status {os.waitstatus_to_exitcode(code)}")
    print(
        f"| {command[0]} | {time.monotonic() - begun:,.0f} | {usage.ru_utime + usage.ru_stime:,.0f} | {read / 1e9:.1f} | "
        f"{anonymous / 1e9:.2f} | {usage.ru_maxrss * 1024 / 1e9:.2f} |",
        flush=True,
    )


@click.command()
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True, help="Directory of a tokenizer.")
@click.option("--corpus", type=click.Path(path_type=Path), required=True)
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="For everything written.")
@click.option("--size", type=MemorySize(), default="12GB", help="Of the checkpoint.")
@click.option("--limit", type=MemorySize(), default="8GB")
@click.option("--tokens", default=512, help="Of each language.")
@click.option("--layers", help="To edit; default: the last two.")
@click.option("--source", default="en")
@click.option("--target", default="fr")
@click.option("--compare", is_flag=True, help="Also edit without a limit, and compare.")
def main(
    tokenizer: Path,
    corpus: Path,
    folder: Path,
    size: int,
    limit: int,
    tokens: int,
    layers: str | None,
    source: str,
    target: str,
    compare: bool,
) -> None:
    """Print a Markdown table; exit 1 if plans differ."""
    model = folder / "model"
    if not model.exists():
        write_checkpoint(model, tokenizer, size)
    depth = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    files = sorted(model.glob("*.safetensors"))
    print(f"{sum(file.stat().st_size for file in files) / 1e9:.1f} GB in {depth} layers\n")
    drop_from_cache(files)
    print(f"read once: {seconds_to_read(files):.0f} s; again: {seconds_to_read(files):.0f} s\n")
    text = [str(model), "--corpus", str(corpus), "--dtype", "bfloat16", "--tokens", str(tokens)]
    edited = layers or f"{depth - 2}-{depth - 1}"
    plans = []
    for name, most in (("limited", limit), ("unlimited", None))[: 1 + compare]:
        of_limit = [] if most is None else ["--max-memory", f"{most // 10**6}MB"]
        direction, plan = (str(folder / f"{name}-{part}.safetensors") for part in ("direction", "edit"))
        print(f"| {name} | seconds | CPU seconds | GB read | peak, anonymous GB | peak, rss GB |")
        print("|---|---|---|---|---|---|")
        between = ["--source", source, "--target", target]
        measured(["direction", *text, *between, *of_limit, "--out", direction], files)
        edit = ["edit", *text, "--layers", edited, *of_limit, "--direction", direction, "--out", plan]
        measured(edit, files)
        plans.append((Path(direction).read_bytes(), Path(plan).read_bytes()))
        if most is not None:
            exported = folder / "exported"
            measured(["export", str(model), "--edit", plan, "--out", str(exported)], files)
            shutil.rmtree(exported)
        print()
    if compare:
        same = plans[0] == plans[1]
        print(f"direction and plan {'are the same bytes' if same else 'differ'}")
        sys.exit(not same)


if __name__ == "__main__":
    main()
