"""The same continuations by vLLM, where it is installed: it reads checkpoints and knows nothing of plans."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from editing.generation import NEW_TOKENS, TEMPERATURE, Continuation, encoded
from neurons.errors import BrocaError, UsageError, first_line
from neurons.source import locate


def require_vllm() -> Any:
    """The package vllm.

    Raises:
        UsageError: it is not installed.
    """
    try:
        # Not a package that Broca asks for: type checkers need not find it.
        return import_module("vllm")
    except ImportError as error:
        raise UsageError(
            "vLLM is not installed here: `pip install vllm`, or leave --engine vllm out to use transformers"
        ) from error


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

    Args:
        model: hub id or directory of a checkpoint.
        tokenizer: its tokenizer; vLLM is given token ids, so that both engines read the same.

    Raises:
        UsageError: vLLM is not installed, or there is no such model.
        BrocaError: vLLM cannot load the checkpoint.
    """
    vllm = require_vllm()
    if not prompts:
        return []
    ends = _end_tokens(model, tokenizer)
    try:
        # Without what the checkpoint's generation_config.json advises, as with transformers.
        engine = vllm.LLM(model=str(locate(model)), dtype=dtype, seed=seed, generation_config="vllm")
    except (RuntimeError, ValueError, OSError) as error:
        raise BrocaError(f"{model}: vLLM cannot load it ({first_line(error)})") from error
    settings = vllm.SamplingParams(
        temperature=temperature, max_tokens=new_tokens, seed=seed, stop_token_ids=ends
    )
    rows = [{"prompt_token_ids": ids} for ids in encoded(tokenizer, prompts)]
    found = []
    for answer in engine.generate(rows, settings, use_tqdm=False):
        ids = list(answer.outputs[0].token_ids)
        if ids and ids[-1] in ends:
            ids.pop()
        found.append(Continuation(tuple(ids), tokenizer.decode(ids, skip_special_tokens=True)))
    return found


def _end_tokens(model: str, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, as transformers has them: a chat model's may differ from its tokenizer's."""
    import transformers

    checkpoint = locate(model)
    found = tokenizer.eos_token_id
    if (checkpoint / "generation_config.json").is_file():
        advised = transformers.GenerationConfig.from_pretrained(checkpoint).eos_token_id
        found = found if advised is None else advised
    return sorted(found if isinstance(found, list) else [] if found is None else [found])
