"""The tokenizer of a checkpoint, with the chat template that the processor of a wrapper may hold for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Files of a model's processor.
_PROCESSOR = ("processor_config.json", "preprocessor_config.json")
# Those with its chat template, in order of preference.
_TEMPLATE = ("processor_config.json", "chat_template.json")


def load_tokenizer(checkpoint: Path) -> Any:
    """The tokenizer, with the chat template of the model's processor, which vLLM and transformers prefer.

    Without a processor, ``chat_template.json`` is used only if the tokenizer has no chat template.

    Raises:
        OSError, ValueError, KeyError, RuntimeError: as transformers, for files that are missing or damaged.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    if tokenizer.chat_template is None or any((checkpoint / name).is_file() for name in _PROCESSOR):
        templates = (_template(checkpoint / name) for name in _TEMPLATE)
        tokenizer.chat_template = next(filter(None, templates), tokenizer.chat_template)
    return tokenizer


def _template(path: Path) -> str | None:
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    template = stored.get("chat_template") if isinstance(stored, dict) else None
    return template if isinstance(template, str) else None
