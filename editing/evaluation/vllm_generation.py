"""Continuations by vLLM, if it is installed: it reads checkpoints, and cannot apply plans."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random
from threading import current_thread, main_thread
from typing import Any

import torch

from editing.evaluation.generation import NEW_TOKENS, TEMPERATURE, Continuation, prompt_rows
from neurons.errors import BrocaError, UsageError, first_line
from neurons.models.source import locate, pick_device

# vLLM logs to standard output, which belongs to --json.
QUIET = {"VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "ERROR"}
# This process computes with threads between two engines; a fork of it may deadlock.
SPAWN = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
MIN_CONTEXT = 512  # tokens
FREE_MEMORY_FRACTION = 0.8


def require_vllm() -> Any:
    """Import vllm, which then logs only errors, to standard error (unless VLLM_LOGGING_* are set).

    Raises:
        UsageError: vLLM is not installed.
        BrocaError: vLLM is installed and cannot be imported.
    """
    for name, value in (QUIET | SPAWN).items():
        os.environ.setdefault(name, value)
    try:
        # Not a dependency of Broca, so type checkers may not find it.
        return import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise BrocaError(_import_failed(error)) from error
        raise UsageError(
            "vLLM is not installed: `pip install vllm`, or leave out --engine vllm to use transformers"
        ) from error
    except (ImportError, RuntimeError, OSError) as error:
        raise BrocaError(_import_failed(error)) from error


@dataclass(frozen=True)
class _Running:
    """A running engine.

    Attributes:
        model: hub id or directory of its checkpoint.
        engine: ``vllm.LLM``.
        context: maximum tokens of a prompt and its answer.
        end_tokens: tokens that end an answer.
    """

    model: str
    engine: Any
    context: int
    end_tokens: list[int]


class VllmWriter:
    """Writes by vLLM, with one checkpoint at a time, until the ``with`` block ends.

    It is called like ``editing.evaluation.generation.generate`` on a model.  The first call for a checkpoint starts an
    engine.  The engine stops if another checkpoint is called for, and restarts if a text exceeds its context length.

    Greedy texts equal those of transformers, except for near ties that the two round differently.  Sampled texts
    differ: each prompt index has its own seed.

    Args:
        model: hub id or directory of the checkpoint.
        tokenizer: its tokenizer; vLLM gets token ids, so that both engines read the same.
        dtype: "auto" is the dtype that ``neurons.models.source.load_model`` chooses.

    Raises:
        UsageError: vLLM is not installed; when called: there is no such model.
        BrocaError: when called: vLLM cannot load the checkpoint with the necessary context length.
    """

    def __init__(self, model: str, tokenizer: Any, dtype: str = "auto") -> None:
        self._vllm = require_vllm()
        self._model, self._tokenizer, self._dtype = model, tokenizer, dtype
        self._running: _Running | None = None

    def __enter__(self) -> VllmWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def version(self) -> str:
        """Version of vLLM."""
        return str(self._vllm.__version__)

    @contextmanager
    def writing_with(self, model: str) -> Iterator[None]:
        """Use another checkpoint with the same tokenizer inside the ``with`` block."""
        previous, self._model = self._model, model
        try:
            yield
        finally:
            self._model = previous

    def __call__(
        self,
        prompts: Sequence[str | Sequence[int]],
        new_tokens: int = NEW_TOKENS,
        temperature: float = TEMPERATURE,
        seed: int = 0,
    ) -> list[Continuation]:
        """One continuation a prompt; arguments as those of ``editing.evaluation.generation.generate``."""
        if not prompts:
            return []
        embedding_rows = _text_config(locate(self._model)).vocab_size
        rows = prompt_rows(self._model, self._tokenizer, prompts, embedding_rows)
        running = self._engine_for(max(map(len, rows)) + new_tokens)
        settings = [
            self._vllm.SamplingParams(
                temperature=temperature,
                max_tokens=new_tokens,
                seed=_prompt_seed(seed, index),
                stop_token_ids=running.end_tokens,
            )
            for index in range(len(rows))
        ]
        answers = running.engine.generate(
            [{"prompt_token_ids": ids} for ids in rows], settings, use_tqdm=False
        )
        # vLLM also stops at the tokenizer's end token.
        stops = {*running.end_tokens, self._tokenizer.eos_token_id}
        continuations = []
        for answer in answers:
            ids = list(answer.outputs[0].token_ids)
            if ids and ids[-1] in stops:
                ids.pop()
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
            continuations.append(Continuation(tuple(ids), text))
        return continuations

    def _engine_for(self, tokens: int) -> _Running:
        """The checkpoint's engine for texts of ``tokens`` tokens, started if none is running."""
        running = self._running
        if running is None or running.model != self._model or running.context < tokens:
            self._stop()
            running = self._running = self._started(tokens)
        return running

    def _started(self, tokens: int) -> _Running:
        checkpoint = locate(self._model)
        context = _context_length(checkpoint, self._tokenizer, tokens)
        end_tokens = _end_tokens(checkpoint, self._tokenizer)
        try:
            with _interruptible():
                engine = self._vllm.LLM(
                    model=str(checkpoint),
                    dtype=_dtype(checkpoint, self._dtype),
                    # Ignore the checkpoint's generation_config.json, as with transformers.
                    generation_config="vllm",
                    max_model_len=context,
                    # Compilation takes longer than a few texts, needs a C++ compiler on a CPU, and rounds differently.
                    enforce_eager=True,
                    use_tqdm_on_load=False,
                    **_memory(),
                )
        except (RuntimeError, ValueError, OSError) as error:
            raise BrocaError(f"{self._model}: vLLM cannot load it ({_reason(error)})") from error
        return _Running(self._model, engine, context, end_tokens)

    def _stop(self) -> None:
        """End the engine's process, which holds most of the memory."""
        running, self._running = self._running, None
        inner = None if running is None else getattr(running.engine, "llm_engine", None)
        if inner is not None:
            inner.engine_core.shutdown()
        del running, inner
        gc.collect()


class _Interrupted(BaseException):
    """An interrupt from the keyboard."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let a KeyboardInterrupt end the ``with`` block.

    While vLLM waits for a new process, its ``zmq_socket_ctx`` drops the first interrupt; vLLM then waits forever for a
    process that has ended.
    """
    before = signal.getsignal(signal.SIGINT)
    # Keep a caller's handler, also one that ignores interrupts; only the main thread may set one.
    if before is not signal.default_int_handler or current_thread() is not main_thread():
        yield
        return

    def interrupted(*_: object) -> None:
        raise _Interrupted

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    except _Interrupted:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def _prompt_seed(seed: int, index: int) -> int:
    """The seed of one prompt: with a common seed, a repeated prompt would get the same answer again."""
    return Random(f"{seed} {index}").getrandbits(63)


def _text_config(checkpoint: Path) -> Any:
    import transformers

    return transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False).get_text_config()


def _context_length(checkpoint: Path, tokenizer: Any, tokens: int) -> int:
    """The context length of a new engine: ``tokens``, and more for longer texts later if the model allows it."""
    config = _text_config(checkpoint)
    # Without a declared maximum, the model may not read more than ``tokens``.
    longest: int = getattr(config, "max_position_embeddings", None) or tokens
    return max(tokens, min(max(MIN_CONTEXT, 2 * tokens), longest, int(tokenizer.model_max_length)))


def _memory() -> dict[str, float]:
    """The engine's memory limit: a fraction of the free memory.

    vLLM's default is a fraction of all memory, part of which this process uses for its model.
    """
    if pick_device().type == "cpu":
        # psutil is a dependency of vLLM.
        memory = import_module("psutil").virtual_memory()
        free, total = memory.available, memory.total
    elif torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info(0)
    else:
        return {}
    return {"gpu_memory_utilization": FREE_MEMORY_FRACTION * free / total}


def _dtype(checkpoint: Path, dtype: str) -> str:
    """The dtype that ``neurons.models.source.load_model`` chooses; vLLM's "auto" would load float32 as 16 bits."""
    import transformers

    if dtype != "auto":
        return dtype
    if pick_device().type == "cpu":
        return "float32"
    config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    stored = config.get_text_config().dtype or config.dtype
    return "auto" if stored is None else str(stored).removeprefix("torch.")


def _end_tokens(checkpoint: Path, tokenizer: Any) -> list[int]:
    """The tokens that end an answer in transformers; a chat model's may differ from its tokenizer's."""
    import transformers

    if (checkpoint / "generation_config.json").is_file():
        advised = transformers.GenerationConfig.from_pretrained(checkpoint).eos_token_id
    else:
        config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        advised = transformers.GenerationConfig.from_model_config(config).eos_token_id
    ends = tokenizer.eos_token_id if advised is None else advised
    return sorted(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _reason(error: Exception) -> str:
    """The error in one sentence: of a refused setting, the line that begins "Value error", without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip().startswith("Value error, ")]
    return lines[0].removeprefix("Value error, ").partition(". ")[0] if lines else first_line(error)


def _import_failed(error: Exception) -> str:
    return f"vLLM is installed but cannot be imported ({first_line(error)}): install it again, or leave out --engine vllm"
