"""The same continuations by vLLM, where it is installed: it reads checkpoints and knows nothing of plans."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from editing.generation import NEW_TOKENS, TEMPERATURE, Continuation, encoded
from neurons.errors import BrocaError, UsageError, first_line
from neurons.source import locate, pick_device

# vLLM writes its log to standard output, where --json has its one object, and a page of it.
QUIET = {"VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "ERROR"}


def require_vllm() -> Any:
    """The package vllm, which from then on logs errors only, to standard error (unless VLLM_LOGGING_* say else).

    Raises:
        UsageError: it is not installed.
        BrocaError: it is, and cannot be imported.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        # Not a package that Broca asks for: type checkers need not find it.
        return import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise BrocaError(_broken(error)) from error
        raise UsageError(
            "vLLM is not installed here: `pip install vllm`, or leave --engine vllm out to use transformers"
        ) from error
    except (ImportError, RuntimeError, OSError) as error:
        raise BrocaError(_broken(error)) from error


def generate_by_vllm(
    model: str,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    new_tokens: int = NEW_TOKENS,
    temperature: float = TEMPERATURE,
    seed: int = 0,
    dtype: str = "auto",
) -> list[Continuation]:
    """One continuation a prompt; arguments as ``editing.generation.generate``.

    Greedy texts are those of transformers, but for near ties that the two round differently; sampled ones
    are drawn by other random numbers.

    Args:
        model: hub id or directory of a checkpoint.
        tokenizer: its tokenizer; vLLM is given token ids, so that both engines read the same.
        dtype: "auto" is what ``neurons.source.load_model`` takes.

    Raises:
        UsageError: vLLM is not installed, or there is no such model.
        BrocaError: vLLM cannot load the checkpoint, or not with so long a context.
    """
    vllm = require_vllm()
    if not prompts:
        return []
    checkpoint = locate(model)
    ends = _end_tokens(checkpoint, tokenizer)
    rows = encoded(tokenizer, prompts)
    try:
        engine = vllm.LLM(
            model=str(checkpoint),
            dtype=_dtype(checkpoint, dtype),
            seed=seed,
            # Without what the checkpoint's generation_config.json advises, as with transformers.
            generation_config="vllm",
            # Memory for what is asked, not for the longest text that the model could read.
            max_model_len=max(map(len, rows)) + new_tokens,
            # Compiling takes longer than a few texts do, needs a C++ compiler on a CPU, and rounds otherwise.
            enforce_eager=True,
            use_tqdm_on_load=False,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise BrocaError(f"{model}: vLLM cannot load it ({_reason(error)})") from error
    settings = vllm.SamplingParams(
        temperature=temperature, max_tokens=new_tokens, seed=seed, stop_token_ids=ends
    )
    try:
        answers = engine.generate([{"prompt_token_ids": ids} for ids in rows], settings, use_tqdm=False)
    finally:
        _stop(engine)
        del engine
        gc.collect()
    found = []
    # vLLM stops at the tokenizer's own end token too.
    stops = {*ends, tokenizer.eos_token_id}
    for answer in answers:
        ids = list(answer.outputs[0].token_ids)
        if ids and ids[-1] in stops:
            ids.pop()
        found.append(Continuation(tuple(ids), tokenizer.decode(ids, skip_special_tokens=True)))
    return found


def _stop(engine: Any) -> None:
    """End the engine's process: what it holds of the memory is most of it, and another checkpoint may follow."""
    inner = getattr(engine, "llm_engine", None)
    if inner is not None:
        inner.engine_core.shutdown()


def _dtype(checkpoint: Path, dtype: str) -> str:
    """As ``neurons.source.load_model`` has it; vLLM's own "auto" would halve float32 weights."""
    import transformers

    if dtype != "auto":
        return dtype
    if pick_device().type == "cpu":
        return "float32"
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    stored = config.get_text_config().dtype or config.dtype
    return "auto" if stored is None else str(stored).removeprefix("torch.")


def _end_tokens(checkpoint: Path, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, as transformers has them: a chat model's may differ from its tokenizer's."""
    import transformers

    if (checkpoint / "generation_config.json").is_file():
        advised = transformers.GenerationConfig.from_pretrained(checkpoint).eos_token_id
    else:
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        advised = transformers.GenerationConfig.from_model_config(config).eos_token_id
    found = tokenizer.eos_token_id if advised is None else advised
    return sorted(found if isinstance(found, list) else [] if found is None else [found])


def _reason(error: Exception) -> str:
    """What is wrong, in a sentence; a setting that vLLM refuses has it on the second line, advice behind it."""
    said = [line.strip() for line in str(error).splitlines() if line.strip().startswith("Value error, ")]
    return said[0].removeprefix("Value error, ").partition(". ")[0] if said else first_line(error)


def _broken(error: Exception) -> str:
    return f"vLLM is installed here but cannot be imported ({first_line(error)}): mend it, or leave --engine vllm out"
