"""``--dry-run``: the memory that each stage needs, and the limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from cli.options import option_name

if TYPE_CHECKING:
    from cli.screen import Screen
    from neurons.models.memory import Need
    from neurons.models.source import LoadedModel
    from neurons.recording.needs import Text
    from neurons.text.corpus import Corpus


def dry_run(
    screen: Screen,
    arguments: Any,
    needs: Callable[[LoadedModel], Sequence[Need]],
    judge: LoadedModel | None = None,
) -> None:
    """Print the memory needs in GB, in bytes with --json, without loading the model.

    Args:
        arguments: with ``model``, ``device`` and ``dtype``.
        needs: of the planned model.
        judge: a planned model that stays in memory in every stage.

    Raises:
        UsageError: quantised weights, whose size is not estimated.
    """
    from neurons.errors import UsageError
    from neurons.models.memory import memory_limit, sizes_of
    from neurons.models.source import plan_model

    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(arguments, name, False):
            raise UsageError(f"{option_name(name)} is not supported by --dry-run: leave one out")
    planned = plan_model(arguments.model, arguments.device, arguments.dtype)
    beside = {} if judge is None else {"judge": sizes_of(judge).weights}
    stages = [replace(need, parts={**need.parts, **beside}) for need in needs(planned)]
    limit = memory_limit()
    parts = list(dict.fromkeys(part for need in stages for part in need.parts))
    screen.table(
        f"{planned.label}: memory in GB, limit {limit / 1e9:.1f}",
        ["stage", *parts, "peak", "tokens per pass", "recomputed", "fits"],
        [
            [
                need.stage,
                *(need.parts[part] / 1e9 if part in need.parts else None for part in parts),
                need.total / 1e9,
                need.tokens or None,
                "-" if not need.tokens else "yes" if need.recomputes else "no",
                "yes" if need.total <= limit else "no",
            ]
            for need in stages
        ],
    )
    screen.result(
        limit=limit,
        stages={
            need.stage: {
                "parts": dict(need.parts),
                "peak": need.total,
                "tokens_at_once": need.tokens,
                "recomputes": need.recomputes,
                "fits": need.total <= limit,
            }
            for need in stages
        },
    )


def dry_run_of_text(
    screen: Screen,
    arguments: SimpleNamespace,
    corpus: Corpus,
    need: Callable[[LoadedModel, Text], Need],
    default: int,
) -> None:
    """``dry_run`` for a command with one stage, which reads a corpus, without --tokens ``default`` tokens of a language."""
    from neurons.recording.needs import text_of

    batch_tokens = getattr(arguments, "batch_tokens", None)

    def needs(planned: LoadedModel) -> list[Need]:
        return [need(planned, text_of(planned, corpus, arguments.tokens, default, batch_tokens))]

    dry_run(screen, arguments, needs)
