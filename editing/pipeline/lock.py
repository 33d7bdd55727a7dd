"""A language lock: a permanent edit after which an instruct model answers in one language, without an instruction.

The user provides no data:

1. The unedited model answers questions in every language.  It answers those in the source languages again as the
   teacher, with an instruction to answer in the target (``editing.pipeline.lock_text``).
2. Keys of the middle layers' ``down_proj`` are solved on these conversations (``editing.methods.conversation_keys``).
3. Values are learned: the edited model without the instruction learns to answer like the teacher
   (``editing.methods.distilled_values``).

With thoughts (``Lock.thoughts``) a reply is a thought and an answer.  The thought is learned like the answer if the
teacher thinks in the right language; if it does not, thoughts stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editing.evaluation.questions import Questions
from editing.methods.conversation_keys import coefficients, conversation_keys, middle_layers
from editing.methods.distilled_values import PASSES, RATE, Example, distilled_values
from editing.methods.key import EPS
from editing.methods.keyed import has_common_inputs, require_common_inputs
from editing.pipeline.lock_kinds import Lock
from editing.pipeline.lock_prompts import BUILD, CHOOSE, steers_thoughts
from editing.pipeline.lock_text import (
    ANSWER_TOKENS,
    KEPT_ANSWER_TOKENS,
    MAX_EXAMPLES,
    Stage,
    Taught,
    base_conversations,
    base_replies,
    lessons,
    plain_prompts,
    quiet,
    require_obeyed,
    taught,
    thoughts_obey,
)
from editing.plans.plan import Plan, make_plan
from neurons.architectures.anatomy import Anatomy
from neurons.models.source import LoadedModel
from neurons.text.conversation_batches import conversation_batches
from neurons.text.conversations import OPTIONAL, thinking

METHOD = "steer"
MIN_EXAMPLES = 4  # in a language
# Without a target most answers are already right, so little has to be learned.  At ``RATE`` the divergence of
# Qwen2.5-Coder-0.5B-Instruct on held-out questions rises from 0.07 to 0.48 nats a token; at a twelfth it falls to 0.03.
STAY_RATE = 0.004
STAY_PASSES = 2


@dataclass(frozen=True)
class Locked:
    """The edit, and figures of the training.

    Attributes:
        plan: the edit.
        obeyed: source -> fraction of the BUILD questions that the teacher answers in the target.
        thoughts: whether thoughts were learned (True) or kept (False); None without thoughts.
        held_out: divergence (nats a token) on the CHOOSE questions: before training, then after each pass.
        deviations: layer -> standard deviation of the key's coefficient on the conversations it was solved on, and on
            the CHOOSE questions.
    """

    plan: Plan
    obeyed: Mapping[str, float]
    thoughts: bool | None
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
        lock: sources, target and teacher.
        layers: layers whose ``down_proj`` is edited; None: ``locked_layers``.
        eps: ridge of the keys.
        passes: of the training over all examples; None: ``PASSES``, or ``STAY_PASSES`` without a target.
        rate: Adam's learning rate (``distilled_values``); None: ``RATE``, or ``STAY_RATE`` without a target.
        seed: of the order of the examples.
        stage: shows progress.

    Raises:
        UsageError: a lock with or without thoughts that the model cannot have, a mixture of experts, or as ``steers_thoughts``
            and ``role_tokens``.
        BrocaError: quantised weights, a teacher that does not obey, or as ``conversation_keys`` and
            ``distilled_values``.
    """
    steers_thoughts(loaded.name, loaded.tokenizer, lock.thoughts)
    require_common_inputs(loaded.anatomy, ("mlp",), layers)
    loaded.require_exact("an edit")
    if passes is None:
        passes = STAY_PASSES if lock.target is None else PASSES
    if rate is None:
        rate = STAY_RATE if lock.target is None else RATE
    chosen = locked_layers(loaded.anatomy) if layers is None else tuple(layers)
    max_questions = max(MIN_EXAMPLES, MAX_EXAMPLES // len(lock.sources))
    with stage("Asking the teacher", 2, "parts") as advance:
        building = _taught(loaded, questions, lock, BUILD, max_questions)
        advance(1)
        choosing = _taught(loaded, questions, lock, CHOOSE, max(2, max_questions // 2))
        advance(1)
    learns_thoughts = thoughts_obey(building) and thoughts_obey(choosing) if lock.thoughts else None
    conversations = base_conversations(loaded, questions, lock.languages, stage, lock.thoughts)
    text = conversation_batches(loaded, conversations)
    with stage("Solving keys", text.tokens, "tokens") as advance:
        edits = conversation_keys(loaded, text, lock.key_groups, chosen, eps, advance)
    others = conversation_batches(
        loaded, plain_prompts(loaded, questions, lock.languages, CHOOSE, thinks=lock.thoughts)
    )
    on_others = coefficients(loaded, edits, others)
    plan = make_plan(edits, _metadata(loaded, questions, lock, chosen, eps, learns_thoughts))
    examples, held_out = (
        [
            *_examples(loaded, of_part, learns_thoughts),
            *_unchanged(loaded, questions, lock, part, count),
        ]
        for part, of_part, count in (
            (BUILD, building, max_questions),
            (CHOOSE, choosing, max(2, max_questions // 2)),
        )
    )
    predicted = sum(len(example.answer) + 1 for example in examples)
    with stage("Learning", passes * predicted, "tokens") as advance:
        learned = distilled_values(
            loaded, plan, examples, held_out, passes=passes, rate=rate, seed=seed, progress=advance
        )
    return Locked(
        plan=learned,
        obeyed={source: of_source.obeyed for source, of_source in building.items()},
        thoughts=learns_thoughts,
        held_out=tuple(learned.metadata["learning"]["held_out"]),
        deviations={
            edit.layer: (float(edit.notes["spread"]), on_others[edit.layer, edit.block]["deviation"])
            for edit in edits
        },
    )


def locked_layers(anatomy: Anatomy) -> tuple[int, ...]:
    """The middle layers with neurons that every token reaches."""
    return tuple(at for at in middle_layers(anatomy.layers) if has_common_inputs(anatomy, at, "mlp"))


def _taught(
    loaded: LoadedModel, questions: Questions, lock: Lock, part: str, max_questions: int
) -> dict[str, Taught]:
    by_source = lessons(loaded, questions, lock, lock.sources, part, max_questions)
    results = taught(loaded, questions, lock, by_source)
    require_obeyed(loaded, lock, results)
    return results


def _examples(
    loaded: LoadedModel, results: Mapping[str, Taught], learns_thoughts: bool | None
) -> list[Example]:
    if learns_thoughts is not False:
        return [example for of_source in results.values() for example in of_source.examples]
    return [
        example
        for of_source in results.values()
        for example in (*_own_thoughts(loaded, of_source), *of_source.answers.examples)
    ]


def _own_thoughts(loaded: LoadedModel, taught: Taught) -> Sequence[Example]:
    """Examples of the thoughts of the unedited model without the instruction, which must not change."""
    thoughts = base_replies(loaded, {"": taught.students}, True)[""].thoughts
    return () if thoughts is None else thoughts.examples


def _unchanged(
    loaded: LoadedModel, questions: Questions, lock: Lock, part: str, max_questions: int
) -> list[Example]:
    """Examples of answers that must not change, to questions without drift, by the unedited model."""
    prompts = plain_prompts(loaded, questions, lock.own_answers, part, max_questions, lock.thoughts)
    made = base_replies(loaded, prompts, lock.thoughts)
    return [example for of_language in made.values() for example in of_language.examples]


def _metadata(
    loaded: LoadedModel,
    questions: Questions,
    lock: Lock,
    layers: Sequence[int],
    eps: float,
    learns_thoughts: bool | None,
) -> dict[str, Any]:
    thinks = {}
    if lock.thoughts:
        thinks = {"thinks": True, "thoughts": "learned" if learns_thoughts else "kept"}
    elif thinking(loaded.tokenizer) == OPTIONAL:
        thinks = {"thinks": False}
    return {
        "model": loaded.label,
        "fingerprint": loaded.fingerprint,
        "method": METHOD,
        "source": lock.sources[0] if len(lock.sources) == 1 else None,
        "target": lock.target,
        "languages": [*dict.fromkeys([*lock.sources, *filter(None, [lock.target])])],
        **thinks,
        "settings": {
            **lock.as_json(),
            "layers": list(layers),
            "eps": eps,
            "questions": questions.digest,
            "answer_tokens": [KEPT_ANSWER_TOKENS, ANSWER_TOKENS],
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
        },
    }
