"""The tokenizer of a checkpoint, with the chat template that the processor of a wrapper may hold for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_OF_PROCESSOR = "chat_template.json"


def load_tokenizer(checkpoint: Path) -> Any:
    """The tokenizer; if it has no chat template, with that of ``chat_template.json``.

    Raises:
        OSError, ValueError, KeyError, RuntimeError: as transformers, for files that are missing or damaged.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    path = checkpoint / _OF_PROCESSOR
    if tokenizer.chat_template is None and path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        template = stored.get("chat_template") if isinstance(stored, dict) else None
        if isinstance(template, str):
            tokenizer.chat_template = template
    return tokenizer
