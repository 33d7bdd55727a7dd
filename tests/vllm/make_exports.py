"""Base models, plans, and the checkpoints and adapters exported from them, for vLLM; run in the main environment.

OUT/<name>/base, OUT/<name>/<plan>-exported and, of some, OUT/<name>/<plan>-adapter, which must equal the
checkpoint of the same plan; OUT/cases.json lists them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from editing.checkpoints.adapter import export_adapter
from editing.checkpoints.export import export
from editing.directions.diffmean import diffmean_direction
from editing.methods.keyed import keyed_plan
from editing.plans.plan import ModuleEdit, Plan, make_plan
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS, anatomy_of
from neurons.models.source import ModelSource, load_model, open_model
from neurons.text.corpus import read_corpus

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
_OLD = {"n_embd": 64, "n_inner": 96, "n_layer": 3, "n_head": 2, "n_positions": 128}
# Only where the architecture has it: vLLM believes the config.
_GROUPED = {"num_key_value_heads": 1}
_EXPERTS = _GROUPED | {"num_experts_per_tok": 2}
# name -> (config class, what differs from _SIZES); vLLM's CPU kernels want heads of 32 or 64.
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, _GROUPED),
    "qwen3": (transformers.Qwen3Config, _GROUPED | {"head_dim": 64}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        _GROUPED | {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16},
    ),
    "mistral": (transformers.MistralConfig, _GROUPED | {"head_dim": 64, "sliding_window": None}),
    "phi3": (transformers.Phi3Config, _GROUPED),
    "gpt2": (transformers.GPT2Config, _OLD),
    "opt": (transformers.OPTConfig, {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": (transformers.BloomConfig, {"n_layer": 3, "n_head": 2}),
    "gpt_neox": (transformers.GPTNeoXConfig, {}),
    "mixtral": (transformers.MixtralConfig, _EXPERTS | {"num_local_experts": 3, "head_dim": 32}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        _EXPERTS | {"num_experts": 3, "moe_intermediate_size": 64, "head_dim": 64},
    ),
}
SOURCE, TARGET = "en", "fr"


def make_base(name: str, tokenizer: Any, directory: Path) -> None:
    """A random model whose greedy text is varied: what the layers write outweighs the embedding.

    A tied head would otherwise name the token that was just read, again and again.
    """
    config_class, differs = FAMILIES[name]
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = config_class(**{**_SIZES, **differs, **ids, "vocab_size": len(tokenizer)})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                # Gemma normalises what a layer writes, to 1 + weight.
                parameter += 0.1 * noise + (2 if name == "gemma3" else 0)
            else:
                parameter.copy_((0.1 if parameter is embedding else 0.25) * noise)
        anatomy = anatomy_of(model)
        for layer in range(anatomy.layers):
            for block in BLOCKS:
                anatomy.output_weight(layer, block).mul_(4)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def random_plan(source: ModelSource, low_rank_only: bool = False) -> Plan:
    """Left and right factors in the first layers, column scales of neurons in the second and heads in the last."""
    anatomy = source.anatomy
    generator = torch.Generator().manual_seed(1)
    weights = Weights(source)
    last = anatomy.layers - 1

    def low_rank(layer: int, block: str, rank: int) -> ModuleEdit:
        weight = weights.read(layer, block)
        left = torch.randn(anatomy.residual, rank, generator=generator)
        right = torch.randn(weight.shape[1], rank, generator=generator)
        # Half as large as W: enough to be heard.
        right *= 0.5 * float(weight.norm()) / float((left @ right.T).norm())
        notes = {"change_norm": 0.5 * float(weight.norm()), "weight_norm": float(weight.norm())}
        return ModuleEdit(layer, block, (0, 1), left=left, right=right, notes=notes)

    def scale(layer: int, block: str) -> torch.Tensor:
        width = anatomy.width(f"{block}_in")
        chosen = torch.randperm(width, generator=generator)[: width // 4]
        made = torch.ones(width)
        made[chosen] = torch.randn(len(chosen), generator=generator)
        return made

    if low_rank_only:
        edits = [low_rank(0, "attn", 1), low_rank(1, "mlp", 1)]
    else:
        one, other = scale(1, "mlp"), scale(last, "attn")
        edits = [
            low_rank(0, "attn", 2),
            low_rank(0, "mlp", 1),
            replace(low_rank(1, "mlp", 1), column_scale=one),
            ModuleEdit(
                last, "attn", (0, 1), column_scale=other, notes=_scaled(weights.read(last, "attn"), other)
            ),
        ]
    return make_plan(edits, _about(source, "random"))


def _scaled(weight: torch.Tensor, scale: torch.Tensor) -> dict[str, float]:
    return {"change_norm": float((weight * (scale - 1)).norm()), "weight_norm": float(weight.norm())}


def _about(source: ModelSource, method: str) -> dict[str, Any]:
    return {
        "model": source.label,
        "fingerprint": source.fingerprint,
        "method": method,
        "languages": [],
        "settings": {},
    }


def demo_plan(model: Path, corpus: Path) -> Plan:
    """The keyed edit from English to French, of rank 1 in every layer."""
    loaded = load_model(str(model), device="cpu")
    # The smallest part: this is about loading, not about the edit.
    text = read_corpus(corpus, part="report")
    return keyed_plan(loaded, text, diffmean_direction(loaded, text, SOURCE, TARGET))


def with_scales(plan: Plan, width: int, fingerprint: str) -> Plan:
    """The plan with some neurons of two layers scaled as well, for the model of that fingerprint."""
    column_scale = torch.ones(width)
    column_scale[::40] = 0.5
    edits = [
        replace(edit, column_scale=column_scale) if edit.layer in (2, 5) else edit for edit in plan.edits
    ]
    return make_plan(edits, {**plan.metadata, "fingerprint": fingerprint})


def write(case: dict[str, Any], plan_name: str, plan: Plan, adapter: bool) -> None:
    """The checkpoint of a plan and, where wanted, its adapter."""
    base = Path(case["base"])
    source = open_model(str(base))
    checkpoint = base.parent / f"{plan_name}-exported"
    export(source, plan, checkpoint)
    case["exported"].append(str(checkpoint))
    if adapter:
        found = export_adapter(source, plan, base.parent / f"{plan_name}-adapter")
        case["adapters"].append(
            {"path": str(found.path), "checkpoint": str(checkpoint), "rank": found.served_rank}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the demo's model")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--exported", type=Path, help="test only this checkpoint, made from --model")
    parser.add_argument("--real", type=Path, help="test what `make test-real` left there too")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    cases = {}

    def case(name: str, base: Path) -> dict[str, Any]:
        cases[name] = {"base": str(base), "exported": [], "adapters": []}
        return cases[name]

    if arguments.exported is not None:
        case("own", arguments.model)["exported"].append(str(arguments.exported))
    else:
        base, wide = (arguments.out / name / "base" for name in ("demo", "demo-float32"))
        shutil.copytree(arguments.model, base)
        # In float32: a bfloat16 checkpoint holds the edited weights rounded, an adapter beside it does not.
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(wide)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        tokenizer.save_pretrained(wide)
        plan = demo_plan(wide, arguments.corpus)
        write(case("demo-float32", wide), "rank-1", plan, adapter=True)
        source = open_model(str(base))
        mixed = with_scales(plan, source.anatomy.neurons, source.fingerprint)
        write(case("demo", base), "mixed", mixed, adapter=False)
        for name in FAMILIES:
            directory = arguments.out / name / "base"
            make_base(name, tokenizer, directory)
            source = open_model(str(directory))
            made = case(name, directory)
            write(made, "mixed", random_plan(source), adapter=name == "llama")
            if name == "llama":
                write(made, "rank-1", random_plan(source, low_rank_only=True), adapter=True)
        if arguments.real is not None:
            made = case("smollm2", arguments.real / "model")
            made["exported"] += [str(arguments.real / "made" / name) for name in ("steered", "locked")]
    (arguments.out / "cases.json").write_text(json.dumps(cases, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
