"""A language lock: an instruct model that answers in one language for good, with no instruction and no data to bring.

1. The unedited model answers questions in every language, and those in the source languages again with an instruction
   to answer in the target (``editing.pipeline.lock_text``).
2. Keys of the middle layers' ``down_proj`` are solved on these conversations (``editing.methods.conversation_keys``).
3. What they write is learned: without the instruction the edited model is to answer as with it
   (``editing.methods.distilled_values``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editing.evaluation.language_id import unidentified
from editing.evaluation.questions import Questions, taken
from editing.methods.conversation_keys import coefficients, conversation_keys, middle_layers
from editing.methods.distilled_values import PASSES, RATE, distilled_values
from editing.methods.key import EPS
from editing.methods.keyed import require_common_inputs
from editing.pipeline.lock_text import (
    ANSWER_TOKENS,
    BUILD,
    CHOOSE,
    KEPT,
    KEPT_ANSWER_TOKENS,
    MOST_EXAMPLES,
    Stage,
    instruction_to,
    own_conversations,
    prompt_of,
    quiet,
    require_chat,
    require_obeyed,
    taught,
)
from editing.plans.plan import Plan, make_plan
from neurons.errors import UsageError
from neurons.models.source import LoadedModel
from neurons.text.conversation_batches import conversation_batches

METHOD = "steer"
LEAST_QUESTIONS = 4  # of which a part each to build on, to choose on and to report


@dataclass(frozen=True)
class Lock:
    """From which languages to which, and what stays.

    Attributes:
        target: language of the answers.
        sources: languages of the questions that are to be answered in it.
        keep: languages whose questions are answered as before; the target is always one.
    """

    target: str
    sources: tuple[str, ...]
    keep: tuple[str, ...]

    @property
    def languages(self) -> tuple[str, ...]:
        return (*self.sources, *self.keep)


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


def lock_of(
    questions: Questions, target: str, source: str | None = None, keep: Sequence[str] | None = None
) -> Lock:
    """The lock that was asked for.

    Args:
        questions: by language.
        target: language of the answers.
        source: of the questions; None: every language that there are questions in.
        keep: None: those of ``KEPT`` that there are questions in.

    Raises:
        UsageError: a language without questions or that cannot be identified, or one that is asked for twice.
    """
    named = [target, *([] if source is None else [source]), *(keep or ())]
    if missing := [name for name in named if name not in questions.of]:
        raise UsageError(
            f"there are no questions in {missing[0]!r}: there are some in {', '.join(questions.of)}"
        )
    if unknown := unidentified(named):
        raise UsageError(
            f"the language identifier does not know {unknown[0]!r}, so nothing could be measured in it"
        )
    few = next((name for name in named if len(questions.of[name]) < LEAST_QUESTIONS), None)
    if few is not None:
        raise UsageError(
            f"there are {len(questions.of[few])} questions in {few!r}: give {LEAST_QUESTIONS} or more, to build on, to choose "
            "on and to report"
        )
    if source == target:
        raise UsageError(f"questions in {target!r} are answered in {target!r} already: name another language")
    offered = [name for name in KEPT if len(questions.of.get(name, ())) >= LEAST_QUESTIONS]
    if source is None:
        if keep:
            raise UsageError("from every language nothing but the target is kept: leave --keep out")
        return Lock(target, tuple(name for name in offered if name != target), (target,))
    others = offered if keep is None else keep
    if source in others and keep is not None:
        raise UsageError(f"{source!r} is to be answered in {target!r}, so it cannot be kept: name it once")
    kept = dict.fromkeys([target, *(name for name in others if name != source)])
    return Lock(target, (source,), tuple(kept))


def language_lock(
    loaded: LoadedModel,
    questions: Questions,
    lock: Lock,
    *,
    layers: Sequence[int] | None = None,
    eps: float = EPS,
    passes: int = PASSES,
    rate: float = RATE,
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
        passes: of learning, over all examples.
        rate: Adam's (``distilled_values``).
        seed: of the order of the examples.
        stage: tells of the work.

    Raises:
        UsageError: no chat template, a mixture of experts, or as ``role_tokens``.
        BrocaError: quantised weights, a teacher that does not obey, or as keys and learning.
    """
    require_chat(loaded.name, loaded.tokenizer)
    require_common_inputs(loaded.anatomy, ("mlp",))
    loaded.require_exact("an edit")
    chosen = middle_layers(loaded.anatomy.layers) if layers is None else tuple(layers)
    most = max(8, MOST_EXAMPLES // len(lock.sources))
    with stage("Asking with the instruction", 2, "parts") as tell:
        lessons = taught(loaded, questions, lock.sources, lock.target, BUILD, most)
        tell(1)
        require_obeyed(loaded, lessons, lock.target)
        exams = taught(loaded, questions, lock.sources, lock.target, CHOOSE, max(2, most // 2))
        require_obeyed(loaded, exams, lock.target)
        tell(1)
    conversations = own_conversations(loaded, questions, lock.languages, stage)
    text = conversation_batches(loaded, conversations)
    with stage("Solving keys", text.tokens, "tokens") as tell:
        edits = conversation_keys(loaded, text, [lock.sources], chosen, eps, tell)
    others = conversation_batches(
        loaded,
        {
            name: [prompt_of(loaded, one.text) for one in taken(questions.of[name], CHOOSE)]
            for name in lock.languages
        },
    )
    seen = coefficients(loaded, edits, others)
    plan = make_plan(edits, _metadata(loaded, questions, lock, chosen, eps))
    learned_from = [one for some in lessons.values() for one in some.examples]
    kept_out = [one for some in exams.values() for one in some.examples]
    predicted = sum(len(one.answer) + 1 for one in learned_from)
    with stage("Learning", passes * predicted, "tokens") as tell:
        found = distilled_values(
            loaded, plan, learned_from, kept_out, passes=passes, rate=rate, seed=seed, progress=tell
        )
    return Locked(
        plan=found.plan,
        obeyed={name: one.obeyed for name, one in lessons.items()},
        held_out=found.held_out,
        deviations={
            edit.layer: (float(edit.notes["spread"]), seen[edit.layer, edit.block]["deviation"])
            for edit in edits
        },
    )


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
        "languages": [*lock.sources, lock.target],
        "settings": {
            "sources": list(lock.sources),
            "kept_languages": [name for name in lock.keep if name != lock.target],
            "layers": list(layers),
            "eps": eps,
            "instructions": {name: instruction_to(name, lock.target) for name in lock.sources},
            "questions": questions.digest,
            "answer_tokens": [KEPT_ANSWER_TOKENS, ANSWER_TOKENS],
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
        },
    }
