"""Tiny models of the families, in sizes that vLLM's CPU kernels have, and edits of all that they can be edited in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import tiny_config

from editing.plans.plan import ModuleEdit, Plan, make_plan
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS, anatomy_of
from neurons.models.source import ModelSource

WIDTH, HEADS, LENGTH = 128, 4, 128
# vLLM's CPU kernels have heads of 32 and more, and latent attention of 512 + 64 only.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("head_dim", "attention_head_dim", "global_head_dim", "v_head_dim", "kv_channels"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "swa_head_dim", "swa_v_head_dim"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), LENGTH),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    "mamba_d_ssm": WIDTH,
    "index_head_dim": 128,
    "decoder_layers": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}
# What vLLM reads from the config that transformers' class does not have by default.
OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {"topk_method": "noaux_tc"},
    "cohere": {"logit_scale": 1.0},
    # vLLM sees one token more than transformers at the edge of the window: no text is that long.
    "cohere2": {"logit_scale": 1.0, "sliding_window": LENGTH},
    "cohere2_moe": {"logit_scale": 1.0, "sliding_window": LENGTH},
    "falcon": {"ffn_hidden_size": 4 * WIDTH},
    # vLLM goes by the layers' numbers.
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "lfm2": {
        "block_dim": WIDTH,
        "conv_dim": WIDTH,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    "axk1": {"first_k_dense_replace": 2},
    "hy_v3": {"first_k_dense_replace": 2},
    "glm4_moe_lite": {"first_k_dense_replace": 2, "topk_method": "noaux_tc"},
    "glm4_moe": {"head_dim": 32},
    "llama4_text": {"num_experts_per_tok": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32},
    "ministral": {"head_dim": 32},
}


def make_base(model_type: str, tokenizer: Any, directory: Path) -> None:
    """A random model whose greedy text is varied: what the layers write outweighs the embedding.

    A tied head would otherwise name the token that was just read, again and again.
    """
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vocabulary = dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), len(tokenizer)
    )
    config = tiny_config(model_type, {**SIZES, **vocabulary}, OVERRIDES.get(model_type))
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in ids.items():
            setattr(part, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.numel() == 1:
                continue  # vLLM rounds those of xIELU to bfloat16
            if parameter.ndim == 1:
                # Gemma normalises what a layer writes, to 1 + weight.
                parameter += 0.1 * noise + (2 if model_type.startswith(("gemma2", "gemma3")) else 0)
            else:
                gain = 0.1 if parameter is embedding else 2 * parameter.shape[-1] ** -0.5
                parameter.copy_(gain * noise)
        anatomy = anatomy_of(model)
        for layer in range(anatomy.layers):
            for block in BLOCKS:
                for part in anatomy.parts(layer, block):
                    part.weight.mul_(4)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def plan_of_all(source: ModelSource) -> Plan:
    """Every module edited: by left and right factors, by column scales of neurons or heads, and by both, in turn."""
    edits: list[ModuleEdit] = []
    draw = Draw(source)
    for block in BLOCKS:
        for number, layer in enumerate(source.anatomy.layers_with(block)):
            kind = number % 4
            if kind == 3:
                edits.append(draw.scale(layer, block))
            else:
                edit = draw.low_rank(layer, block, rank=2 if kind == 1 else 1)
                if kind == 2:
                    edit = replace(edit, column_scale=draw.scale(layer, block).column_scale)
                edits.append(edit)
    return make_plan(edits, about(source, "random"))


def rank_one_plan(source: ModelSource) -> Plan:
    """Left and right factors in the attention of the first layer and the MLP of the second."""
    draw = Draw(source)
    return make_plan([draw.low_rank(0, "attn", 1), draw.low_rank(1, "mlp", 1)], about(source, "random"))


class Draw:
    """Random edits of a model's modules, large enough to be heard; every time the same."""

    def __init__(self, source: ModelSource) -> None:
        self._weights = Weights(source)
        self._generator = torch.Generator().manual_seed(1)

    def low_rank(self, layer: int, block: str, rank: int) -> ModuleEdit:
        """A change half as large as W."""
        weight = self._weights.read(layer, block)
        left, right = (torch.randn(size, rank, generator=self._generator) for size in weight.shape)
        norm = float(weight.norm())
        right *= 0.5 * norm / float((left @ right.T).norm())
        notes = {"change_norm": 0.5 * norm, "weight_norm": norm}
        return ModuleEdit(layer, block, (0, 1), left=left, right=right, notes=notes)

    def scale(self, layer: int, block: str) -> ModuleEdit:
        """A quarter of the columns scaled."""
        weight = self._weights.read(layer, block)
        width = weight.shape[1]
        chosen = torch.randperm(width, generator=self._generator)[: width // 4]
        scale = torch.ones(width)
        scale[chosen] = torch.randn(len(chosen), generator=self._generator)
        notes = {
            "change_norm": float((weight * (scale - 1)).norm()),
            "weight_norm": float(weight.norm()),
        }
        return ModuleEdit(layer, block, (0, 1), column_scale=scale, notes=notes)


def about(source: ModelSource, method: str) -> dict[str, Any]:
    return {
        "model": source.label,
        "fingerprint": source.fingerprint,
        "method": method,
        "languages": [],
        "settings": {},
    }
