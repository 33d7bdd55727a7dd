"""What vLLM answers with every checkpoint, and with adapters on top of a base model, as JSON.

A process for each checkpoint, two at a time.  They are forked from one that has imported vLLM, which takes
longer than what each has to do.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

# A small function for log-probabilities would be compiled in every process, for longer than the model loads.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import vllm
import vllm.v1.engine.llm_engine
import vllm.v1.worker.cpu_worker
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import registry, transformers

# Imported here once instead of in every process.
PRELOADED = (vllm.LLM, vllm.v1.engine.llm_engine, vllm.v1.worker.cpu_worker, transformers)
# vLLM looks at each model class in a new process, which imports vllm again, for more than half of the time.
registry._run_in_subprocess = lambda inspect: inspect()

SECONDS = 900
KV_CACHE_BYTES = 1 << 27


def jobs(cases: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """What is loaded: each checkpoint by itself, and base models with their adapters; with BASES=all, every base model."""
    loaded = []
    every = os.environ.get("BASES") == "all"
    for case in cases.values():
        beside = [adapter["checkpoint"] for adapter in case["adapters"]]
        if case["adapters"] or every:
            loaded.append((case["base"], case["adapters"]))
        # One checkpoint of a case is enough: where there are several, the adapters show what the others are.
        alone = [path for path in case["exported"] if path not in beside] or case["exported"][:1]
        loaded += [(path, []) for path in alone]
    return loaded


def answers(model: Any, reference: dict[str, Any], lora: LoRARequest | None) -> list[dict[str, Any]]:
    """Each prompt's ids, the ids of the greedy answer and its log-probabilities (nats)."""
    settings = vllm.SamplingParams(
        temperature=0, max_tokens=reference["new_tokens"], ignore_eos=True, logprobs=0
    )
    found = []
    for output in model.generate(reference["prompts"], settings, lora_request=lora, use_tqdm=False):
        (answer,) = output.outputs
        ids = list(answer.token_ids)
        logprobs = [at[token].logprob for at, token in zip(answer.logprobs, ids, strict=True)]
        found.append({"prompt": list(output.prompt_token_ids), "answer": ids, "logprobs": logprobs})
    return found


def load_and_answer(reference: dict[str, Any], job: tuple[str, list[dict[str, Any]]], out: Path) -> None:
    """In a process of its own: ``out`` gets path -> answers; ``out.log`` what vLLM says."""
    with out.with_suffix(".log").open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    checkpoint, adapters = job
    lora = (
        {"enable_lora": True, "max_lora_rank": max(adapter["rank"] for adapter in adapters)}
        if adapters
        else {}
    )
    model = vllm.LLM(
        model=checkpoint,
        dtype="float32",  # in bfloat16 the two libraries already differ by rounding
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=len(reference["prompts"]),
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        **lora,
    )
    found = {checkpoint: answers(model, reference, None)}
    for number, adapter in enumerate(adapters, 1):
        path = adapter["path"]
        found[path] = answers(model, reference, LoRARequest(path, number, path))
    out.write_text(json.dumps(found), encoding="utf-8")


def ask(
    reference: dict[str, Any], directory: Path, numbered: tuple[int, tuple[str, list[dict[str, Any]]]]
) -> dict[str, Any]:
    """Path -> answers, or the end of the log of a process that failed."""
    number, job = numbered
    out = directory / f"{number}.json"
    process = multiprocessing.get_context("fork").Process(target=load_and_answer, args=(reference, job, out))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    print(f"  {job[0]}: {'answered' if out.exists() else 'FAILED'}", flush=True)
    if out.exists():
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found
    error = out.with_suffix(".log").read_text(encoding="utf-8", errors="replace")[-12000:]
    return dict.fromkeys((job[0], *(adapter["path"] for adapter in job[1])), error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="from reference.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="only paths that contain this")
    parser.add_argument("--at-once", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    reference = json.loads(arguments.reference.read_text(encoding="utf-8"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = [job for job in jobs(reference["cases"]) if (arguments.only or "") in job[0]]
    gc.collect = lambda generation=2: 0  # vLLM calls it eight times, for half of the time that a model takes
    with ThreadPoolExecutor(arguments.at_once) as pool:
        found = list(pool.map(partial(ask, reference, arguments.out), enumerate(chosen)))
    merged = {path: answer for one in found for path, answer in one.items()}
    (arguments.out / "answers.json").write_text(json.dumps(merged), encoding="utf-8")


if __name__ == "__main__":
    main()
