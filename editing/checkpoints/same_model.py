"""Whether two checkpoints differ in their weights alone, config, tokenizer and end tokens alike, so that the one model can compute with the other's."""

from __future__ import annotations

from typing import Any

from neurons.errors import BrocaError
from neurons.models.fingerprint import VOLATILE
from neurons.models.source import LoadedModel, ModelSource
from neurons.models.start_tokens import start_tokens

# Settings that say nothing of what a trained model computes, those of dropout besides.
DROPOUT = ("dropout", "pdrop", "layerdrop")
INERT = frozenset(
    (
        *VOLATILE, "architectures", "chunk_size_feed_forward", "id2label", "initializer_range", "label2id",
        "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
        "return_dict", "use_cache",
    )
)  # fmt: skip
SHOWN = 3  # settings that are named of many
SAMPLE = "A small café in 1999; Straße, ¿qué?, 你好, привет, مرحبا"  # that tokenizers are compared on


def require_same_settings(ours: ModelSource, theirs: ModelSource) -> None:
    """Refuse a model whose config has it compute otherwise, whatever its weights are.

    Biases that its config asks for and ours does not are weights, where the family has a switch for them.

    Raises:
        BrocaError: by setting, with both values.
    """
    own, other = _settings(ours), _settings(theirs)
    switched = _switched(ours, own, other)
    differing = [
        key for key in sorted({*own, *other}, key=lambda key: (key != "model_type", key))
        if own.get(key) != other.get(key) and key not in switched
    ]  # fmt: skip
    if differing:
        told = [f"{key} is {other.get(key)!r} and not {own.get(key)!r}" for key in differing[:SHOWN]]
        more = f", and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise BrocaError(
            f"{theirs.name}: its config.json has it compute otherwise than {ours.name}, whatever its weights are "
            f"({', '.join(told)}{more}): measure each by itself"
        )


def require_same_reading(ours: LoadedModel, theirs: LoadedModel) -> None:
    """Refuse a model that reads text, or ends an answer, otherwise than ours: its weights alone would not be it.

    Raises:
        BrocaError: by what differs.
    """
    own, other = _reading(ours), _reading(theirs)
    differing = [what for what in own if own[what] != other[what]]
    if differing:
        raise BrocaError(
            f"{theirs.name}: not the same {', '.join(differing)} as {ours.name}, so its weights alone would not "
            "answer as it does: measure each by itself"
        )


def _reading(loaded: LoadedModel) -> dict[str, Any]:
    tokenizer, ends = loaded.tokenizer, loaded.model.generation_config.eos_token_id
    return {
        "vocabulary": tokenizer.get_vocab(),
        "tokens of a text": tokenizer(SAMPLE, add_special_tokens=False)["input_ids"],
        "start tokens": start_tokens(tokenizer),
        "chat template": tokenizer.chat_template,
        "end tokens (generation_config.json)": {ends} if ends is None or isinstance(ends, int) else {*ends},
    }


def _settings(source: ModelSource) -> dict[str, Any]:
    """What decides over the computation, defaults of transformers' filled in."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source.checkpoint).get_text_config()
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in INERT and not any(word in key for word in DROPOUT)
    }  # fmt: skip


def _switched(source: ModelSource, own: dict[str, Any], other: dict[str, Any]) -> dict[str, str]:
    """Setting -> block, of the bias switches that are on in the other alone."""
    switches = source.anatomy.layout.bias_switches
    return {
        switch.setting: block
        for block, switch in switches.items()
        if not own.get(switch.setting) and other.get(switch.setting)
    }
