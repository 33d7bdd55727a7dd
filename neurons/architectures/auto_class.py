"""The auto class of transformers for a config: a model of text, or a wrapper that also has towers for images."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """``AutoModelForImageTextToText`` for the model types in its registry, else ``AutoModelForCausalLM``.

    A few types are in both registries; the second has only their language model.

    Args:
        config: a transformers config.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM
