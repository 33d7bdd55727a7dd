"""Train the demo model: a small Llama with a byte-level BPE tokenizer.

Reads a directory of ``<language>.txt`` (one text a line), trains the tokenizer on an equal number
of bytes of each language, then the model on an equal number of tokens of each.  A sequence holds one
language only.  Lines of a language are shuffled anew each epoch, grouped in documents of eight lines
(``<s>line\\nline\\n...</s>``) and cut into blocks.

    python artifacts/demo/train.py --text DIR --languages en,de,fr,es,zh,ar --out DIR --tokens 40e6

The learning rate is warmed up, held, then brought to zero over the last quarter of ``--tokens``
(warmup-stable-decay), so that a run that was stopped can be resumed with fewer or more tokens.
Hidden matrices are trained by Muon (torch.optim.Muon, torch 2.9 or newer), embeddings and norms by AdamW; matrix products
run in bfloat16 under autocast, the weights are float32 while training and stored in bfloat16.
The state is saved every ten minutes and at Ctrl-C or SIGTERM; the same command resumes from it.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BLOCK = 256
LINES_A_DOCUMENT = 8
WARMUP_STEPS = 60
DECAY_SHARE = 0.25
MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.02, 3e-3, 0.1


def read_lines(text: Path, languages: list[str]) -> dict[str, list[str]]:
    """Lines of every language, stripped, without empty ones and exact repeats."""
    lines = {}
    for language in languages:
        raw = (text / f"{language}.txt").read_text(encoding="utf-8").split("\n")
        lines[language] = list(dict.fromkeys(line.strip() for line in raw if line.strip()))
    return lines


def train_tokenizer(lines: dict[str, list[str]], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that has seen as many bytes of one language as of another."""
    budget = min(sum(len(line.encode()) for line in texts) for texts in lines.values())

    def balanced() -> Iterator[str]:
        for texts in lines.values():
            seen = 0
            for line in texts:
                if seen > budget:
                    break
                seen += len(line.encode())
                yield line

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        balanced(),
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="left",
        model_max_length=BLOCK,
        clean_up_tokenization_spaces=False,
    )


def blocks(encoded: list[list[int]], newline: list[int], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Blocks of BLOCK + 1 tokens of one language, for ever; lines in a new order each epoch."""
    rest: list[int] = []
    while True:
        order = rng.permutation(len(encoded))
        for start in range(0, len(order), LINES_A_DOCUMENT):
            rest.append(0)
            for i in order[start : start + LINES_A_DOCUMENT]:
                rest.extend(encoded[i])
                rest.extend(newline)
            rest.append(1)
            while len(rest) > BLOCK:
                yield np.array(rest[: BLOCK + 1], dtype=np.int64)
                rest = rest[BLOCK:]


def build_model(vocabulary: int, layers: int, width: int, mlp_width: int) -> LlamaForCausalLM:
    """The architecture: heads of dimension 64, tied embeddings, no biases."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        max_position_embeddings=BLOCK,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.div_(math.sqrt(2 * layers))
    return model


def rate(seen: float, total: float, step: int) -> float:
    """Share of the full learning rate after ``seen`` of ``total`` tokens."""
    decay = (total - seen) / (DECAY_SHARE * total)
    return max(0.0, min(1.0, (step + 1) / WARMUP_STEPS, decay))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="directory of <language>.txt")
    parser.add_argument("--languages", default="en,de,fr,es,zh,ar")
    parser.add_argument("--out", type=Path, required=True, help="directory for the model")
    parser.add_argument("--state", type=Path, help="directory for the state [OUT.state]")
    parser.add_argument("--tokens", type=float, default=40e6)
    parser.add_argument("--batch", type=int, default=48, help="sequences of 256 tokens a step")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--mlp-width", type=int, default=704)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="without a C++ compiler (3 x slower)"
    )
    options = parser.parse_args()

    languages = options.languages.split(",")
    state_dir = options.state or options.out.with_name(options.out.name + ".state")
    state_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    lines = read_lines(options.text, languages)
    if (state_dir / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(state_dir)
    else:
        tokenizer = train_tokenizer(lines, options.vocabulary)
        tokenizer.save_pretrained(state_dir)
    newline = tokenizer.encode("\n", add_special_tokens=False)
    encoded = {
        language: tokenizer(texts, add_special_tokens=False)["input_ids"] for language, texts in lines.items()
    }
    for language, texts in encoded.items():
        print(f"{language}: {sum(map(len, texts)):,} tokens, {len(texts):,} lines", flush=True)

    model = build_model(len(tokenizer), options.layers, options.width, options.mlp_width).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    optimizers = [
        torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [MUON_RATE, ADAM_RATE]

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model.lm_head(model.model(batch[:, :-1]).last_hidden_state)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    if options.compile:
        loss_of = torch.compile(loss_of)

    step = 0
    seconds = 0.0
    state_file = state_dir / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
        print(f"resumed at step {step}", flush=True)

    def save_state() -> None:
        torch.save(
            {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "seconds": seconds,
            },
            state_file.with_suffix(".tmp"),
        )
        state_file.with_suffix(".tmp").replace(state_file)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)

    # A resumed run draws another order of lines than an uninterrupted one: the text is the same.
    streams = {
        language: blocks(encoded[language], newline, np.random.default_rng([options.seed, step, i]))
        for i, language in enumerate(languages)
    }
    rng = np.random.default_rng([options.seed, step])
    tokens_a_step = options.batch * BLOCK
    begun, reported, saved = time.monotonic(), time.monotonic(), time.monotonic()
    base_seconds, first = seconds, step
    try:
        while step * tokens_a_step < options.tokens:
            share = rate(step * tokens_a_step, options.tokens, step)
            for optimizer, full in zip(optimizers, rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = full * share
            whole, spare = divmod(options.batch, len(languages))
            picks = languages * whole + list(rng.choice(languages, spare, replace=False))
            batch = torch.from_numpy(np.stack([next(streams[name]) for name in picks])).to(device)
            loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            now = time.monotonic()
            seconds = base_seconds + now - begun
            if now - reported > 20:
                speed = (step - first) * tokens_a_step / (now - begun)
                print(
                    f"step {step} tokens {step * tokens_a_step / 1e6:.2f}M loss {loss.item():.3f} "
                    f"rate {share:.2f} {speed:.0f} tokens/s",
                    flush=True,
                )
                reported = now
            if now - saved > 600:
                save_state()
                saved = now
    finally:
        save_state()

    options.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    # The class by the name that every release of transformers knows, and nothing of this machine.
    written = options.out / "tokenizer_config.json"
    settings = json.loads(written.read_text())
    kept = {k: v for k, v in settings.items() if k not in ("backend", "is_local", "local_files_only")}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    written.write_text(json.dumps(kept, indent=2) + "\n")
    record = {
        "languages": languages,
        "tokens": step * tokens_a_step,
        "hours": round(seconds / 3600, 2),
        "device": device,
        "epochs": {
            name: round(step * tokens_a_step / len(languages) / sum(map(len, encoded[name])), 2)
            for name in languages
        },
        "settings": {k: str(v) for k, v in vars(options).items() if k not in ("text", "out", "state")},
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
