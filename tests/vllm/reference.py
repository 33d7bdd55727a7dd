"""Greedy tokens of transformers, in float32, for the base model and for the exported one, as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 24
PROMPTS = [
    "After dinner my father",
    "The kitchen window has been broken since",
    "Yesterday we went to the market and",
    "Nach dem Abendessen geht mein Vater",
    "Après le dîner, mon père",
    "La ventana de la cocina está",
    "吃完晚饭以后，我们",
    "بعد العشاء ذهبنا إلى",
]


@torch.inference_mode()
def answers(checkpoint: Path) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:  # one at a time: padding would change the sums
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
        )
        found.append({"prompt": ids[0].tolist(), "answer": out[0, ids.shape[1] :].tolist()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--exported", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    reference = {
        "new_tokens": NEW_TOKENS,
        "prompts": PROMPTS,
        "base": answers(arguments.base),
        "exported": answers(arguments.exported),
    }
    arguments.out.write_text(json.dumps(reference, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
