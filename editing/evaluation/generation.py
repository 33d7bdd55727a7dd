"""Continuations of prompts, batched and sampled with a seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from neurons.errors import BrocaError, NotFiniteError, UsageError
from neurons.models.embedded import require_embedded
from neurons.models.memory import Sizes, forward_bytes, max_room, sizes_of
from neurons.models.not_finite import explained
from neurons.models.source import LoadedModel
from neurons.models.start_tokens import start_tokens

PROMPTS_A_BATCH = 64
TEMPERATURE = 0.7
NEW_TOKENS = 40


@contextmanager
def _plain_settings(model: Any) -> Iterator[None]:
    """Ignore the checkpoint's generation_config.json, whose sampling settings would make models incomparable."""
    advised = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=advised.bos_token_id,
        eos_token_id=advised.eos_token_id,
        pad_token_id=advised.pad_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = advised


@contextmanager
def _whole_rows(model: Any) -> Iterator[None]:
    """Make the input of the output embeddings contiguous.

    transformers passes the last position of each prompt, a strided view.  torch multiplies such a view row by row,
    with a copy of the weight for each: 17 GB for 64 prompts and 152k tokens, and most of the time.
    """

    def before(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].contiguous(), *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def writing(loaded: LoadedModel, temperature: float) -> Iterator[dict[str, Any]]:
    """Arguments for transformers' ``generate``, to be called inside the ``with`` block.

    Args:
        loaded: the model.
        temperature: 0 always takes the most likely token.

    Raises:
        BrocaError: inside the block: a likelihood that is not finite.
    """
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature > 0
        else {"do_sample": False}
    )
    with explained(loaded), torch.no_grad(), _plain_settings(loaded.model), _whole_rows(loaded.model):
        yield {
            "pad_token_id": _padding_token(loaded) or 0,
            "logits_processor": [_require_numbers],
            **sampling,
        }


def _padding_token(loaded: LoadedModel) -> int | None:
    """A token that the model has an embedding of: a fine-tune may lack one of an added padding token.

    The attention mask covers the padding, so any token is as good as another.
    """
    candidates = (loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None and token < loaded.embedding_rows), None)


@dataclass(frozen=True)
class Continuation:
    """The text after a prompt: token ids without prompt, padding and end token, and the decoded text."""

    ids: tuple[int, ...]
    text: str


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str | Sequence[int]],
    new_tokens: int = NEW_TOKENS,
    temperature: float = TEMPERATURE,
    seed: int = 0,
) -> list[Continuation]:
    """One continuation a prompt, in batches.

    Args:
        loaded: the model, which the caller may have edited or steered.
        prompts: texts, which follow the tokenizer's start tokens if it adds any; or token ids, which are
            read unchanged (a chat template adds start tokens itself).
        new_tokens: maximum tokens of a continuation.
        temperature: 0 always takes the most likely token.
        seed: of the sampling; the same seed, prompts and weights give the same text, unless memory allows fewer than
            ``PROMPTS_A_BATCH`` prompts at once.

    Raises:
        UsageError: as ``prompt_rows``.
        BrocaError: a likelihood that is not finite.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    padding = _padding_token(loaded)
    rows = prompt_rows(loaded.name, tokenizer, prompts, loaded.embedding_rows)
    continuations: list[Continuation] = []
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    # The caller's random number generator keeps its state.
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        at_once = prompts_at_once(loaded, max(map(len, rows), default=1), new_tokens)
        for first in range(0, len(rows), at_once):
            batch = rows[first : first + at_once]
            longest = max(map(len, batch))
            ids = torch.full((len(batch), longest), padding or 0, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(batch):
                ids[i, longest - len(row) :] = torch.tensor(row)
                mask[i, longest - len(row) :] = 1
            with writing(loaded, temperature) as settings:
                output = model.generate(
                    input_ids=ids.to(loaded.device),
                    attention_mask=mask.to(loaded.device),
                    max_new_tokens=new_tokens,
                    **settings,
                )
            ends = model.generation_config.eos_token_id
            end_ids = set(ends if isinstance(ends, list) else [ends]) | {padding}
            for row in output[:, longest:].tolist():
                kept = row[: next((i for i, token in enumerate(row) if token in end_ids), len(row))]
                text = tokenizer.decode(kept, skip_special_tokens=True)
                continuations.append(Continuation(tuple(kept), text))
    return continuations


def writing_bytes(sizes: Sizes, prompts: int, prompt: int, new_tokens: int) -> int:
    """Bytes for a batch of continuations: the pass over the prompts, keys and values of all tokens, and logits.

    Args:
        sizes: of the model.
        prompts: in the batch.
        prompt: tokens of the longest prompt.
        new_tokens: maximum tokens of a continuation.
    """
    cache = 2 * sizes.keys * sizes.value * sizes.layers * prompts * (prompt + new_tokens)
    return forward_bytes(sizes, prompts * prompt) + cache + 3 * 4 * sizes.vocabulary * prompts


def prompts_at_once(loaded: LoadedModel, prompt: int, new_tokens: int) -> int:
    """Prompts of a batch: ``PROMPTS_A_BATCH``, or halves of it until ``writing_bytes`` fit; 1 always."""
    sizes, fitting = sizes_of(loaded), PROMPTS_A_BATCH
    try:
        room = max_room(loaded)
    except BrocaError:  # a model that is loaded may still write a line at a time
        return 1
    while fitting > 1 and writing_bytes(sizes, fitting, prompt, new_tokens) > room:
        fitting //= 2
    return fitting


def _require_numbers(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Refuse NaN logits, of which sampling and argmax would still return a token."""
    if bool(logits.isnan().any()):
        raise NotFiniteError("the likelihood of the next token")
    return logits


def check_samples(samples: int, temperature: float) -> None:
    """Refuse several samples a prompt under greedy decoding: they would be identical.

    Raises:
        UsageError: more than one sample at temperature 0.
    """
    if samples > 1 and temperature == 0:
        raise UsageError(
            f"{samples} samples a prompt at temperature 0 are the same answer {samples} times: use 1 sample, or a "
            f"temperature above 0 such as {TEMPERATURE}"
        )


def generate_by_language(
    loaded: LoadedModel, prompts: Mapping[str, Sequence[Sequence[int]]], new_tokens: int
) -> dict[str, list[Continuation]]:
    """Greedy continuations of several languages, whose prompts share batches: a step costs about the same for any size.

    Args:
        loaded: as in ``generate``.
        prompts: language -> token ids.
        new_tokens: as in ``generate``.
    """
    rows = [prompt for of_language in prompts.values() for prompt in of_language]
    continuations = iter(generate(loaded, rows, new_tokens, temperature=0))
    return {language: [next(continuations) for _ in of_language] for language, of_language in prompts.items()}


def prompt_rows(
    name: str, tokenizer: Any, prompts: Sequence[str | Sequence[int]], embedding_rows: int
) -> list[list[int]]:
    """The checked tokens of each prompt.

    Args:
        name: of the model.
        tokenizer: its tokenizer.
        prompts: as in ``generate``.
        embedding_rows: tokens that the model has an embedding of.

    Raises:
        UsageError: a prompt without tokens, or with one that the model has no embedding of.
    """
    rows = encoded(tokenizer, prompts)
    if not all(rows):
        raise UsageError(
            f"{name}: prompt {rows.index([]) + 1} of {len(rows)} is empty, and the tokenizer adds no start token: "
            "give the prompt at least one word"
        )
    require_embedded(name, tokenizer, max(map(max, rows), default=0), embedding_rows)
    return rows


def encoded(tokenizer: Any, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """The tokens of each prompt: start tokens and the text's, or the given ids."""
    start = [*start_tokens(tokenizer)]
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    of_texts = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    return [start + next(of_texts) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
