"""What transformers answers, greedily and in float32: token ids and their log-probabilities, as JSON."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
import transformers

NEW_TOKENS = 16
PROMPTS = [
    "After dinner my father",
    "The kitchen window has been broken since",
    "Nach dem Abendessen geht mein Vater",
    "La ventana de la cocina está",
    "吃完晚饭以后，我们",
    "بعد العشاء ذهبنا إلى",
]


CHAT_TOKENS = 24
CHATS = [
    [{"role": "user", "content": "How do I keep bread fresh?"}],
    [
        {
            "role": "system",
            "content": "You are the support assistant of an online shop. Be brief and polite.",
        },
        {"role": "user", "content": "My parcel is late."},
        {"role": "assistant", "content": "Je suis désolé. Quel est votre numéro de commande ?"},
        {"role": "user", "content": "I do not have it here. What can I do?"},
    ],
]


@torch.inference_mode()
def chat_answers(checkpoint: str) -> list[str]:
    """What is answered to each chat through the checkpoint's template; nothing where it has none."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    if not tokenizer.chat_template:
        return []
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    texts = []
    for chat in CHATS:
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(**prompt, do_sample=False, max_new_tokens=CHAT_TOKENS)[0]
        texts.append(tokenizer.decode(out[prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


@torch.inference_mode()
def answers(checkpoint: str) -> list[dict[str, Any]]:
    """Each prompt's ids, the ids of the answer, its log-probabilities (nats) and its text.

    ``margins``: by how many nats each token of the answer is likelier than the next best.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as vLLM's ignore_eos: more tokens to compare
    found = []
    for prompt in PROMPTS:  # one at a time: padding would change the sums
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
        )[0]
        first = ids.shape[1]
        logp = model(out[None]).logits[0, first - 1 : -1].double().log_softmax(-1)
        answer = out[first:]
        best = logp.topk(2).values
        found.append(
            {
                "prompt": ids[0].tolist(),
                "answer": answer.tolist(),
                "logprobs": logp.gather(1, answer[:, None])[:, 0].tolist(),
                "margins": (best[:, 0] - best[:, 1]).tolist(),
                "text": tokenizer.decode(answer, skip_special_tokens=True),
            }
        )
    return found


def one_quiet_thread() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    cases = json.loads(arguments.cases.read_text(encoding="utf-8"))
    paths = [path for case in cases.values() for path in (case["base"], *case["exported"])]
    # Two at a time, each with one thread: the models are small.
    with multiprocessing.get_context("spawn").Pool(2, one_quiet_thread) as pool:
        found = pool.map_async(answers, paths, chunksize=1)
        chats = pool.map_async(chat_answers, paths, chunksize=1)
        written, told = found.get(), chats.get()
    reference = {
        "new_tokens": NEW_TOKENS,
        "prompts": PROMPTS,
        "cases": cases,
        "answers": dict(zip(paths, written, strict=True)),
        "chats": CHATS,
        "chat_tokens": CHAT_TOKENS,
        "chat_answers": {path: texts for path, texts in zip(paths, told, strict=True) if texts},
    }
    arguments.out.write_text(json.dumps(reference, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
