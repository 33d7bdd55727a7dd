"""Check that two checkpoints differ only in weights, so that one model can compute with the other's weights."""

from __future__ import annotations

from typing import Any

from neurons.errors import BrocaError
from neurons.models.fingerprint import VOLATILE
from neurons.models.source import LoadedModel, ModelSource
from neurons.models.start_tokens import start_tokens

# Settings without effect on what a trained model computes.
DROPOUT = ("dropout", "pdrop", "layerdrop")
INERT = frozenset(
    (
        *VOLATILE, "architectures", "chunk_size_feed_forward", "id2label", "initializer_range", "label2id",
        "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
        "return_dict", "use_cache",
    )
)  # fmt: skip
SHOWN = 3  # maximum settings in a message
SAMPLE = "A small café in 1999; Straße, ¿qué?, 你好, привет, مرحبا"  # for the comparison of tokenizers


def require_same_settings(ours: ModelSource, theirs: ModelSource) -> None:
    """Reject a model whose config changes its computation.

    Settings of bias switches may differ, since biases are weights.

    Raises:
        BrocaError: names the settings and both values.
    """
    of_ours, of_theirs = _settings(ours), _settings(theirs)
    switched = _switched(ours, of_ours, of_theirs)
    differing = [
        key for key in sorted({*of_ours, *of_theirs}, key=lambda key: (key != "model_type", key))
        if of_ours.get(key) != of_theirs.get(key) and key not in switched
    ]  # fmt: skip
    if differing:
        changes = [f"{key} is {of_theirs.get(key)!r}, not {of_ours.get(key)!r}" for key in differing[:SHOWN]]
        more = f", and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise BrocaError(
            f"{theirs.name}: its config.json changes its computation compared with {ours.name} "
            f"({', '.join(changes)}{more}): evaluate each separately"
        )


def require_same_tokens(ours: LoadedModel, theirs: LoadedModel) -> None:
    """Reject a model with another tokenizer or other end tokens.

    Raises:
        BrocaError: names the difference.
    """
    of_ours, of_theirs = _token_settings(ours), _token_settings(theirs)
    differing = [what for what in of_ours if of_ours[what] != of_theirs[what]]
    if differing:
        raise BrocaError(
            f"{theirs.name}: not the same {', '.join(differing)} as {ours.name}, so exchanging weights is not "
            "enough: evaluate each separately"
        )


def _token_settings(loaded: LoadedModel) -> dict[str, Any]:
    tokenizer, ends = loaded.tokenizer, loaded.model.generation_config.eos_token_id
    return {
        "vocabulary": tokenizer.get_vocab(),
        "tokens of a text": tokenizer(SAMPLE, add_special_tokens=False)["input_ids"],
        "start tokens": start_tokens(tokenizer),
        "chat template": tokenizer.chat_template,
        "end tokens (generation_config.json)": {ends} if ends is None or isinstance(ends, int) else {*ends},
    }


def _settings(source: ModelSource) -> dict[str, Any]:
    """The settings that affect the computation, with the defaults of transformers."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source.checkpoint).get_text_config()
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in INERT and not any(word in key for word in DROPOUT)
    }  # fmt: skip


def _switched(source: ModelSource, of_ours: dict[str, Any], of_theirs: dict[str, Any]) -> dict[str, str]:
    """Setting -> block, of the bias switches that are on only in the other."""
    switches = source.anatomy.layout.bias_switches
    return {
        switch.setting: block
        for block, switch in switches.items()
        if not of_ours.get(switch.setting) and of_theirs.get(switch.setting)
    }
