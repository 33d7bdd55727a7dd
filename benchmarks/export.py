"""Time and memory of an export, as ratios to copying the checkpoint with `cp -r` in the same run.

    export      `editing.checkpoints.export.export` of a plan that edits o_proj and down_proj of every layer (rank 1 and
                column scales)
    usual way   load the model with transformers, edit it in memory, `save_pretrained`

Each runs in its own process, starts with an idle disk and the source in the page cache, and ends with every file on the
disk (fsync).  They run alternately, in reverse order every other time; the ratio is the median over the repeats.  Peak
memory is the process's highest resident set (VmHWM), next to its value before the work, after all imports.

The checkpoint is synthetic: Llama shapes (d 2048, 8192 neurons), bfloat16, shards of a gigabyte.

    python benchmarks/export.py artifacts/demo/model --gigabytes 6
"""

from __future__ import annotations

import cProfile
import json
import multiprocessing
import os
import pstats
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from editing.checkpoints.export import export
from editing.plans.plan import ModuleEdit, Plan, load_plan, make_plan
from neurons.models.source import open_model

HIDDEN, INNER, KEYS, VOCABULARY = 2048, 8192, 512, 32000
SHARD_BYTES = 10**9
LIMITS = {"wall time": 1.25, "peak MB": 400}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
# The source, the copies of one turn and what the file system itself needs.
COPIES_AT_ONCE = 2.2


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}."
    return {
        f"{prefix}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}self_attn.k_proj.weight": (KEYS, HIDDEN),
        f"{prefix}self_attn.v_proj.weight": (KEYS, HIDDEN),
        f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}mlp.gate_proj.weight": (INNER, HIDDEN),
        f"{prefix}mlp.up_proj.weight": (INNER, HIDDEN),
        f"{prefix}mlp.down_proj.weight": (HIDDEN, INNER),
        f"{prefix}input_layernorm.weight": (HIDDEN,),
        f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
    }


def synthetic(folder: Path, gigabytes: float, tokenizer: Path) -> Path:
    """A sharded checkpoint of about this size; an earlier one is used again if it is complete."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    fixed, each = (2 * sum(map(numbers, some.values())) for some in (shapes, layer_shapes(0)))
    layers = max(1, round((gigabytes * 1e9 - fixed) / each))
    for layer in range(layers):
        shapes |= layer_shapes(layer)
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(VOCABULARY * HIDDEN, generator=generator) * 0.02).bfloat16()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if 2 * sum(map(numbers, shards[-1].values())) + 2 * numbers(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        # Each tensor starts elsewhere in the same random numbers: drawing billions would take minutes.
        tensors = {
            name: drawn.roll(997 * place)[: numbers(shape)].reshape(shape).clone()
            for place, (name, shape) in enumerate(shard.items())
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN // 64,
        "num_key_value_heads": KEYS // 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)
    total = 2 * sum(map(numbers, shapes.values()))
    # Last, so that it stands for a checkpoint that is whole.
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return folder


def numbers(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def every_layer(checkpoint: Path) -> Plan:
    """Rank 1 and column scales in o_proj and down_proj of every layer."""
    source = open_model(str(checkpoint))
    generator = torch.Generator().manual_seed(1)
    edits = []
    for layer in range(source.anatomy.layers):
        for block, inputs in (("attn", HIDDEN), ("mlp", INNER)):
            edits.append(
                ModuleEdit(
                    layer=layer,
                    block=block,
                    components=tuple(range(source.anatomy.heads if block == "attn" else INNER)),
                    column_scale=1 + 0.05 * torch.randn(inputs, generator=generator),
                    left=torch.randn(HIDDEN, 1, generator=generator) / HIDDEN**0.5,
                    right=torch.randn(inputs, 1, generator=generator) / inputs**0.5,
                    notes={"change_norm": 1.0, "weight_norm": 10.0},
                )
            )
    metadata = {
        "model": source.label,
        "fingerprint": source.fingerprint,
        "method": "synthetic",
        "source": "a",
        "target": "b",
        "languages": ["a", "b"],
        "settings": {"strength": 1.0},
    }
    return make_plan(edits, metadata)


# ---- the three ways ----------------------------------------------------------------------------------


def on_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def copied(checkpoint: Path, plan: Path, out: Path) -> Callable[[], Any]:
    def work() -> None:
        subprocess.run(["cp", "-r", str(checkpoint), str(out)], check=True)
        on_disk(out)

    return work


def exported(checkpoint: Path, plan: Path, out: Path) -> Callable[[], Any]:
    source, edit = open_model(str(checkpoint)), load_plan(plan)
    # It waits for the disk itself.
    return partial(export, source, edit, out)


def edited_in_memory(checkpoint: Path, plan: Path, out: Path) -> Callable[[], Any]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer, edits = transformers.AutoTokenizer.from_pretrained(checkpoint), load_plan(plan).edits

    def work() -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        with torch.no_grad():
            for edit in edits:
                part = model.model.layers[edit.layer]
                weight = (part.self_attn.o_proj if edit.block == "attn" else part.mlp.down_proj).weight
                assert edit.column_scale is not None
                assert edit.left is not None
                assert edit.right is not None
                weight.copy_(torch.addmm(weight.float() * edit.column_scale, edit.left, edit.right.T))
        model.save_pretrained(out, max_shard_size="1GB")
        tokenizer.save_pretrained(out)
        on_disk(out)

    return work


# Each makes ready what its process needs once, imports and all, and gives the work to be timed.
WAYS: dict[str, Callable[[Path, Path, Path], Callable[[], Any]]] = {
    "cp -r": copied,
    "export": exported,
    "usual way": edited_in_memory,
}


def peak_megabytes() -> float:
    """The highest resident set of this process so far, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise click.ClickException("/proc/self/status has no VmHWM: this benchmark needs Linux")


def child(way: str, checkpoint: Path, plan: Path, out: Path, profiled: bool, answer: Connection) -> None:
    work = WAYS[way](checkpoint, plan, out)
    ready = peak_megabytes()
    profile = cProfile.Profile()
    begin, cpu = time.perf_counter(), time.process_time()
    if profiled:
        profile.runcall(work)
    else:
        work()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    if profiled:
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)
    answer.send({"seconds": seconds, "cpu": cpu, "peak MB": peak_megabytes(), "ready MB": ready})


def measured(way: str, checkpoint: Path, plan: Path, out: Path, profiled: bool = False) -> dict[str, float]:
    """Seconds and memory in MB of an entry of ``WAYS``, in its own process."""
    os.sync()
    # A fresh interpreter: a fork would begin with this one's memory.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(way, checkpoint, plan, out, profiled, sender))
    process.start()
    sender.close()
    try:
        found: dict[str, float] = receiver.recv()
    except EOFError as error:
        raise click.ClickException(f"{way} failed") from error
    finally:
        process.join()
        shutil.rmtree(out, ignore_errors=True)
    return found


@click.command()
@click.argument("tokenizer", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--gigabytes", type=float, default=6.0, show_default=True, help="Size of the checkpoint.")
@click.option("--repeats", type=int, default=5, show_default=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where to work; the checkpoint is kept there."
)
@click.option("--usual/--no-usual", default=True, show_default=True, help="Measure the usual way too.")
@click.option("--profile", is_flag=True, help="Only run the export once and say where its time goes.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers here.")
def main(
    tokenizer: Path,
    gigabytes: float,
    repeats: int,
    folder: Path | None,
    usual: bool,
    profile: bool,
    json_path: Path | None,
) -> None:
    """Print the costs as a Markdown table."""
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place).free / 1e9
        if free < COPIES_AT_ONCE * gigabytes:
            raise click.ClickException(
                f"{place} has {free:.1f} GB free and this needs {COPIES_AT_ONCE * gigabytes:.1f}: use --gigabytes"
            )
        checkpoint = synthetic(place / f"llama-{gigabytes:g}GB", gigabytes, tokenizer)
        plan, out = place / "edit.safetensors", place / "out"
        every_layer(checkpoint).save(plan)
        if profile:
            print(measured("export", checkpoint, plan, out, profiled=True))
            return
        ways = [way for way in WAYS if usual or way != "usual way"]
        # Not counted: it brings the source into the page cache, where the disk is no part of reading.
        measured("cp -r", checkpoint, plan, out)
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for repeat in range(repeats):
            for way in ways if repeat % 2 == 0 else ways[::-1]:
                runs[way].append(measured(way, checkpoint, plan, out))
        found = summary(runs)
    print(table(found))
    print(f"\nlimits of the export: {LIMITS['wall time']} x cp -r, {LIMITS['peak MB']} MB; {gigabytes:g} GB")
    if json_path is not None:
        json_path.write_text(json.dumps({"gigabytes": gigabytes, "runs": runs, **found}, indent=2) + "\n")


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    found = {}
    for way, results in runs.items():
        ratios = [
            mine["seconds"] / copy["seconds"] for mine, copy in zip(results, runs["cp -r"], strict=True)
        ]
        found[way] = {
            "seconds": statistics.median(result["seconds"] for result in results),
            "cpu": statistics.median(result["cpu"] for result in results),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "peak MB": max(result["peak MB"] for result in results),
            "ready MB": max(result["ready MB"] for result in results),
        }
    return found


def table(found: dict[str, Any]) -> str:
    lines = [
        "| way | seconds | of cp -r | least to most | CPU s | peak MB | of it before |",
        "|---|" + "---|" * 6,
    ]
    for way, row in found.items():
        # What cp itself holds is not this process's memory.
        memory = "" if way == "cp -r" else f"{row['peak MB']:,.0f} | {row['ready MB']:,.0f}"
        lines.append(
            f"| {way} | {row['seconds']:.1f} | {row['ratio']:.2f} | {row['least']:.2f} to {row['most']:.2f} | "
            f"{row['cpu']:.1f} | {memory or ' | '} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
