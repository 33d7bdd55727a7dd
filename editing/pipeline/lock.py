"""A language lock: an instruct model that answers in one language for good, with no instruction and no data to bring.

1. The unedited model answers questions in every language, and those in the source languages again as the teacher: with an
   instruction to answer in the target (``editing.pipeline.lock_text``).
2. Keys of the middle layers' ``down_proj`` are solved on these conversations (``editing.methods.conversation_keys``).
3. What they write is learned: without the instruction the edited model is to answer as with it
   (``editing.methods.distilled_values``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editing.evaluation.questions import Questions
from editing.methods.conversation_keys import coefficients, conversation_keys, middle_layers
from editing.methods.distilled_values import PASSES, RATE, Example, distilled_values
from editing.methods.key import EPS
from editing.methods.keyed import require_common_inputs
from editing.pipeline.lock_kinds import Lock
from editing.pipeline.lock_prompts import BUILD, CHOOSE, require_chat
from editing.pipeline.lock_text import (
    ANSWER_TOKENS,
    KEPT_ANSWER_TOKENS,
    MAX_EXAMPLES,
    Stage,
    Taught,
    lessons,
    own_answers,
    own_conversations,
    plain_prompts,
    quiet,
    require_obeyed,
    taught,
)
from editing.plans.plan import Plan, make_plan
from neurons.models.source import LoadedModel
from neurons.text.conversation_batches import conversation_batches

METHOD = "steer"
# Little is to be learned where most answers stay anyway: at ``RATE`` the divergence on other questions of
# Qwen2.5-Coder-0.5B-Instruct rises from 0.07 to 0.48 nats a token, at a twelfth of it it falls to 0.03.
STAY_RATE = 0.004
STAY_PASSES = 2


@dataclass(frozen=True)
class Locked:
    """The edit and what was seen on the way.

    Attributes:
        plan: the edit.
        obeyed: source -> fraction of the building questions that the teacher answers in the target.
        held_out: divergence (nats a token) on the choosing questions: before, then after each pass.
        deviations: layer -> (standard deviation of the key's coefficient on what it was solved on, on the choosing
            questions).
    """

    plan: Plan
    obeyed: Mapping[str, float]
    held_out: tuple[float, ...]
    deviations: Mapping[int, tuple[float, float]]


def language_lock(
    loaded: LoadedModel,
    questions: Questions,
    lock: Lock,
    *,
    layers: Sequence[int] | None = None,
    eps: float = EPS,
    passes: int | None = None,
    rate: float | None = None,
    seed: int = 0,
    stage: Stage = quiet,
) -> Locked:
    """Make the edit.

    Args:
        loaded: the unedited model, with a chat template; its weights do not change.
        questions: in every language of the lock.
        lock: which.
        layers: whose ``down_proj`` change; None: the middle ones.
        eps: of the keys.
        passes: of learning, over all examples; None: ``PASSES``, and ``STAY_PASSES`` without a target.
        rate: Adam's (``distilled_values``); None: ``RATE``, and ``STAY_RATE`` without a target.
        seed: of the order of the examples.
        stage: tells of the work.

    Raises:
        UsageError: no chat template, a mixture of experts, or as ``role_tokens``.
        BrocaError: quantised weights, a teacher that does not obey, or as keys and learning.
    """
    require_chat(loaded.name, loaded.tokenizer)
    require_common_inputs(loaded.anatomy, ("mlp",))
    loaded.require_exact("an edit")
    if passes is None:
        passes = STAY_PASSES if lock.target is None else PASSES
    if rate is None:
        rate = STAY_RATE if lock.target is None else RATE
    chosen = middle_layers(loaded.anatomy.layers) if layers is None else tuple(layers)
    most = max(8, MAX_EXAMPLES // len(lock.sources))
    with stage("Asking the teacher", 2, "parts") as tell:
        learned_from = _taught(loaded, questions, lock, BUILD, most)
        tell(1)
        held_out = _taught(loaded, questions, lock, CHOOSE, max(2, most // 2))
        tell(1)
    conversations = own_conversations(loaded, questions, lock.languages, stage)
    text = conversation_batches(loaded, conversations)
    with stage("Solving keys", text.tokens, "tokens") as tell:
        edits = conversation_keys(loaded, text, lock.keyed, chosen, eps, tell)
    others = conversation_batches(loaded, plain_prompts(loaded, questions, lock.languages, CHOOSE))
    elsewhere = coefficients(loaded, edits, others)
    plan = make_plan(edits, _metadata(loaded, questions, lock, chosen, eps))
    examples = [*_examples(learned_from), *_unchanged(loaded, questions, lock, BUILD, most)]
    exams = [*_examples(held_out), *_unchanged(loaded, questions, lock, CHOOSE, max(2, most // 2))]
    predicted = sum(len(example.answer) + 1 for example in examples)
    with stage("Learning", passes * predicted, "tokens") as tell:
        learned = distilled_values(
            loaded, plan, examples, exams, passes=passes, rate=rate, seed=seed, progress=tell
        )
    return Locked(
        plan=learned.plan,
        obeyed={source: one.obeyed for source, one in learned_from.items()},
        held_out=learned.held_out,
        deviations={
            edit.layer: (float(edit.notes["spread"]), elsewhere[edit.layer, edit.block]["deviation"])
            for edit in edits
        },
    )


def _taught(loaded: LoadedModel, questions: Questions, lock: Lock, part: str, most: int) -> dict[str, Taught]:
    results = taught(loaded, questions, lock, lessons(loaded, questions, lock, lock.sources, part, most))
    require_obeyed(loaded, lock, results)
    return results


def _examples(results: Mapping[str, Taught]) -> list[Example]:
    return [example for one in results.values() for example in one.examples]


def _unchanged(loaded: LoadedModel, questions: Questions, lock: Lock, part: str, most: int) -> list[Example]:
    """Where a source's own answers stay as they are without drift: questions alone, the model being its own teacher.

    A lock to a target has none: its keys speak on the sources alone, and there every answer is to change.
    """
    if lock.target is not None:
        return []
    prompts = plain_prompts(loaded, questions, lock.sources, part, most)
    return [example for examples, _ in own_answers(loaded, prompts).values() for example in examples]


def _metadata(
    loaded: LoadedModel, questions: Questions, lock: Lock, layers: Sequence[int], eps: float
) -> dict[str, Any]:
    one = lock.sources[0] if len(lock.sources) == 1 else None
    return {
        "model": loaded.label,
        "fingerprint": loaded.fingerprint,
        "method": METHOD,
        "source": one,
        "target": lock.target,
        "languages": [*dict.fromkeys([*lock.sources, *filter(None, [lock.target])])],
        "settings": {
            **lock.as_json(),
            "layers": list(layers),
            "eps": eps,
            "questions": questions.digest,
            "answer_tokens": [KEPT_ANSWER_TOKENS, ANSWER_TOKENS],
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
        },
    }
