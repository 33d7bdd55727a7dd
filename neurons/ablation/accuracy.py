"""Accuracy of answers under ablation conditions.

    accuracy     fraction of prompts after which greedy decoding writes the answer: each token of the answer is the
                 most likely one after the prompt and the tokens before it
    answer_nll   mean negative log-likelihood of the whole answer, nats

The answer is read behind its prompt in one pass, so nothing is generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from neurons.ablation.conditions import Condition, InMemory, TextLosses, condition_losses
from neurons.models.next_token import token_hits, token_losses
from neurons.models.source import LoadedModel
from neurons.models.start_tokens import start_tokens
from neurons.recording.answers import prompt_tokens
from neurons.text.batches import TokenBatch, row_batches
from neurons.text.prompts import Prompts

ACCURACY, ANSWER_NLL = MEASURES = ("accuracy", "answer_nll")


class PromptBatches:
    """Prompts with their answers as batches; ``read`` measures the answers.

    Args:
        prompts: by label.
        tokens_a_batch: positions read at once.

    Attributes:
        of: name in the ledger -> batches, one prompt a row.

    Raises:
        UsageError: as ``prompt_tokens``.
    """

    def __init__(self, loaded: LoadedModel, prompts: Prompts, tokens_a_batch: int) -> None:
        self.of: dict[str, list[TokenBatch]] = {}
        self._prompts = prompts
        lengths: list[int] = []
        uncounted = max(1, len(start_tokens(loaded.tokenizer)))
        for label in prompts.of:
            rows, answers = prompt_tokens(loaded, prompts, label, whole=True)
            lines = range(len(lengths), len(lengths) + len(rows))
            lengths += map(len, answers)
            texts = [row + answer for row, answer in zip(rows, answers, strict=True)]
            self.of[self.name(label)] = row_batches(texts, uncounted, tokens_a_batch, lines)
        self._lengths = torch.tensor(lengths)

    @staticmethod
    def name(label: str) -> str:
        """The label's prompts in the ledger, beside its text."""
        return f"{label} prompts"

    def read(self, model: object, hidden: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """float64 [rows, 2]: in the order of ``MEASURES``, 1 for a right answer, else 0; and its NLL."""
        ends = batch.attention.sum(1)[:, None]
        starts = ends - self._lengths[batch.line_numbers].to(ends.device)[:, None]
        at = torch.arange(1, batch.ids.shape[1], device=ends.device)
        mask = (at >= starts) & (at < ends)
        states, targets = hidden[:, :-1][mask], batch.ids[:, 1:][mask]
        # Summed over rows of a dense tensor: index_add has no fixed order on a GPU.
        sums = torch.zeros(*mask.shape, 2, dtype=torch.float64, device=hidden.device)
        sums[mask] = torch.stack(
            [(~token_hits(model, states, targets)).double(), token_losses(model, states, targets).double()],
            -1,
        )
        wrong, nll = sums.sum(1).unbind(-1)
        return torch.stack([(wrong == 0).double(), nll], -1).cpu()

    def measured(
        self,
        loaded: LoadedModel,
        conditions: Sequence[Condition],
        ledger: InMemory | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Mapping[str, TextLosses]:
        """Measure -> the values of each prompt under each condition; arguments as in ``condition_losses``."""
        values = condition_losses(loaded, self.of, conditions, ledger, progress, read=self.read).sums
        one_each = {
            label: torch.ones(len(of_label), dtype=torch.int64)
            for label, of_label in self._prompts.of.items()
        }
        return {
            measure: TextLosses(one_each, {label: values[self.name(label)][..., i] for label in one_each})
            for i, measure in enumerate(MEASURES)
        }
