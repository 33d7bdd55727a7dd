"""The same continuations by vLLM, where it is installed: it reads checkpoints and knows nothing of plans."""

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

# vLLM writes its log to standard output, where --json has its one object, and a page of it.
QUIET = {"VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "ERROR"}
# A copy of a process that has computed with threads, as this one does between two engines, may wait for them forever.
FRESH = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
ROOM = 512  # tokens
SHARE_OF_FREE_MEMORY = 0.8


def require_vllm() -> Any:
    """The package vllm, which from then on logs errors only, to standard error (unless VLLM_LOGGING_* say else).

    Raises:
        UsageError: it is not installed.
        BrocaError: it is, and cannot be imported.
    """
    for name, value in (QUIET | FRESH).items():
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
    """One continuation a prompt, by an engine that is started for them; as ``VllmWriter`` says.

    Raises:
        UsageError: vLLM is not installed, or there is no such model.
        BrocaError: vLLM cannot load the checkpoint, or not with so long a context.
    """
    with VllmWriter(model, tokenizer, dtype) as write:
        return write(prompts, new_tokens, temperature, seed)


@dataclass(frozen=True)
class _Running:
    """An engine: of which model, for texts of how many tokens, and which tokens end an answer."""

    model: str
    engine: Any
    room: int
    ends: list[int]


class VllmWriter:
    """Writes by vLLM, with one checkpoint at a time, until the ``with`` block ends.

    Called like ``editing.evaluation.generation.generate`` on a model.  An engine starts when a checkpoint's first text
    is wanted; it stops when another checkpoint is to write, and starts anew if a text comes that is too long
    for it.

    Greedy texts are those of transformers, but for near ties that the two round differently; sampled ones
    are drawn by other random numbers: of a seed of its own for each place among the prompts.

    Args:
        model: hub id or directory of the checkpoint that writes.
        tokenizer: its tokenizer; vLLM is given token ids, so that both engines read the same.
        dtype: "auto" is what ``neurons.models.source.load_model`` takes.

    Raises:
        UsageError: vLLM is not installed; when called: or there is no such model.
        BrocaError: when called: vLLM cannot load the checkpoint, or not with so long a context.
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
        """vLLM's."""
        return str(self._vllm.__version__)

    @contextmanager
    def writing_with(self, model: str) -> Iterator[None]:
        """Another checkpoint of the same tokenizer writes inside the block, and the one before after it."""
        before, self._model = self._model, model
        try:
            yield
        finally:
            self._model = before

    def __call__(
        self,
        prompts: Sequence[str | Sequence[int]],
        new_tokens: int = NEW_TOKENS,
        temperature: float = TEMPERATURE,
        seed: int = 0,
    ) -> list[Continuation]:
        """One continuation a prompt; arguments as ``editing.evaluation.generation.generate``."""
        if not prompts:
            return []
        embedded = _text_config(locate(self._model)).vocab_size
        rows = prompt_rows(self._model, self._tokenizer, prompts, embedded)
        running = self._with_room(max(map(len, rows)) + new_tokens)
        settings = [
            self._vllm.SamplingParams(
                temperature=temperature,
                max_tokens=new_tokens,
                seed=_seed_at(seed, place),
                stop_token_ids=running.ends,
            )
            for place in range(len(rows))
        ]
        answers = running.engine.generate(
            [{"prompt_token_ids": ids} for ids in rows], settings, use_tqdm=False
        )
        # vLLM stops at the tokenizer's own end token too.
        stops = {*running.ends, self._tokenizer.eos_token_id}
        found = []
        for answer in answers:
            ids = list(answer.outputs[0].token_ids)
            if ids and ids[-1] in stops:
                ids.pop()
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
            found.append(Continuation(tuple(ids), text))
        return found

    def _with_room(self, tokens: int) -> _Running:
        """The engine of the checkpoint that is to write, started where none runs that can read so many tokens."""
        running = self._running
        if running is None or running.model != self._model or running.room < tokens:
            self._stop()
            running = self._running = self._started(tokens)
        return running

    def _started(self, tokens: int) -> _Running:
        checkpoint = locate(self._model)
        room = _room(checkpoint, self._tokenizer, tokens)
        ends = _end_tokens(checkpoint, self._tokenizer)
        try:
            with _interruptible():
                engine = self._vllm.LLM(
                    model=str(checkpoint),
                    dtype=_dtype(checkpoint, self._dtype),
                    # Without what the checkpoint's generation_config.json advises, as with transformers.
                    generation_config="vllm",
                    max_model_len=room,
                    # Compiling takes longer than a few texts do, needs a C++ compiler on a CPU, and rounds otherwise.
                    enforce_eager=True,
                    use_tqdm_on_load=False,
                    **_memory(),
                )
        except (RuntimeError, ValueError, OSError) as error:
            raise BrocaError(f"{self._model}: vLLM cannot load it ({_reason(error)})") from error
        return _Running(self._model, engine, room, ends)

    def _stop(self) -> None:
        """End the engine's process: what it holds of the memory is most of it, and another may follow."""
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
    """A KeyboardInterrupt ends the block: vLLM drops the first one where it waits for a process that starts (its
    ``zmq_socket_ctx``), and then waits on for one that has ended."""
    before = signal.getsignal(signal.SIGINT)
    # Another is set where interrupts are ignored, or somebody's own; and none may be set outside the main thread.
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


def _seed_at(seed: int, place: int) -> int:
    """The seed of one prompt: with one in common, a prompt that is asked twice would get one answer twice."""
    return Random(f"{seed} {place}").getrandbits(63)


def _text_config(checkpoint: Path) -> Any:
    import transformers

    return transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False).get_text_config()


def _room(checkpoint: Path, tokenizer: Any, tokens: int) -> int:
    """For texts of how many tokens an engine starts: memory for those asked, and some for longer ones to come."""
    config = _text_config(checkpoint)
    # A model that does not say how much it reads may read no more than is asked.
    longest: int = getattr(config, "max_position_embeddings", None) or tokens
    return max(tokens, min(max(ROOM, 2 * tokens), longest, int(tokenizer.model_max_length)))


def _memory() -> dict[str, float]:
    """The setting by which an engine takes a share of the memory that is free: by default it wants nearly all that
    there is, and this process has a model in it."""
    if pick_device().type == "cpu":
        # Comes with vLLM.
        found = import_module("psutil").virtual_memory()
        free, total = found.available, found.total
    elif torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info(0)
    else:
        return {}
    return {"gpu_memory_utilization": SHARE_OF_FREE_MEMORY * free / total}


def _dtype(checkpoint: Path, dtype: str) -> str:
    """As ``neurons.models.source.load_model`` has it; vLLM's own "auto" would halve float32 weights."""
    import transformers

    if dtype != "auto":
        return dtype
    if pick_device().type == "cpu":
        return "float32"
    config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    stored = config.get_text_config().dtype or config.dtype
    return "auto" if stored is None else str(stored).removeprefix("torch.")


def _end_tokens(checkpoint: Path, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, as transformers has them: a chat model's may differ from its tokenizer's."""
    import transformers

    if (checkpoint / "generation_config.json").is_file():
        advised = transformers.GenerationConfig.from_pretrained(checkpoint).eos_token_id
    else:
        config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        advised = transformers.GenerationConfig.from_model_config(config).eos_token_id
    found = tokenizer.eos_token_id if advised is None else advised
    return sorted(found if isinstance(found, list) else [] if found is None else [found])


def _reason(error: Exception) -> str:
    """What is wrong, in a sentence; a setting that vLLM refuses has it on the second line, advice behind it."""
    said = [line.strip() for line in str(error).splitlines() if line.strip().startswith("Value error, ")]
    return said[0].removeprefix("Value error, ").partition(". ")[0] if said else first_line(error)


def _broken(error: Exception) -> str:
    return f"vLLM is installed here but cannot be imported ({first_line(error)}): mend it, or leave --engine vllm out"
