"""Tiny random models of transformers' causal language model types, from each type's config class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from neurons.architectures.attention import LAYER_KINDS

LAYERS, WIDTH, VOCABULARY = 4, 64, 96
MAX_PARAMETERS = 60_000_000

# Sizes by the names that configs have for them; a config takes those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dim_ff"), 96),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "global_head_dim", "v_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "swa_head_dim", "swa_v_head_dim"), 16),
    **dict.fromkeys(("swa_num_attention_heads",), 4),
    **dict.fromkeys(("swa_num_key_value_heads",), 2),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 24),
    **dict.fromkeys(
        ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32
    ),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_selected_experts", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_attention"), 8),
    **dict.fromkeys(
        ("linear_num_key_heads", "linear_num_value_heads", "mamba_num_heads", "mamba_n_heads"), 4
    ),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "index_head_dim"), 16),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(("index_n_heads",), 4),
    **dict.fromkeys(("index_topk",), 64),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index"), 1),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    "num_nextn_predict_layers": 0,
}
# In a part of a config that is not the language model's.
TOWER_SIZES: dict[str, Any] = {
    **SIZES,
    **dict.fromkeys(("num_hidden_layers", "depth"), 2),
    **dict.fromkeys(("num_heads", "num_attention_heads"), 4),
    **dict.fromkeys(("embed_dim", "out_hidden_size"), WIDTH),
    "image_size": 64,
    "patch_size": 16,
}
# What a type needs beside SIZES; of nested configs as {"text_config": {...}}.
_MAMBA = {"mamba_expand": 1}
_DECODER = {
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "decoder_layers"), 4),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 96),
}


def _positions(*section: int, **rest: Any) -> dict[str, Any]:
    """Positions in time, height and width, which need their numbers of pairs."""
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": list(section),
            **rest,
        }
    }


_GLM = {"text_config": _positions(2, 3, 3)}
_FEW_DEEP = {"vision_config": {"deepstack_visual_indexes": [0, 1]}}
_ONE_SIZE = {"image_grid_pinpoints": [[64, 64]]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"text_config": _positions(2, 3, 3)},
    "qwen2_5_vl": {"text_config": _positions(2, 3, 3), "vision_config": {"fullatt_block_indexes": [1]}},
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), _FEW_DEEP),
    **dict.fromkeys(("glm4v", "glm46v", "glmga", "glm_ocr"), _GLM),
    "glm4v_moe": {"text_config": _positions(1, 1, 2, partial_rotary_factor=0.5)},
    "internvl": {"vision_config": {"image_size": [64, 64], "patch_size": [16, 16]}},
    "cohere2_vision": {"alignment_intermediate_size": 64},
    "gemma3": {"mm_tokens_per_image": 4},
    **dict.fromkeys(("llava_next", "llava_onevision"), _ONE_SIZE),
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {
        **_MAMBA,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "num_local_experts": 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "n_groups": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 32, "moe_top_k": 2},
    },
    # Padded output embeddings.
    "inkling_text": {"vocab_size": VOCABULARY + 6, "unpadded_vocab_size": VOCABULARY},
    "bigbird_pegasus": {"tie_word_embeddings": False},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [96, 96, 48, 48],
    },
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "full_attention": None,
        },
    },
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "kimi_linear": {
        "linear_attn_config": {
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
            "kda_layers": [1, 2],
            "full_attn_layers": [3, 4],
        }
    },
    "gemma4": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
        },
        # By default it has no tower.
        "vision_config": {
            **dict.fromkeys(("hidden_size", "intermediate_size"), WIDTH),
            **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
            **dict.fromkeys(("head_dim", "global_head_dim", "patch_size"), 16),
            "num_hidden_layers": 2,
            "position_embedding_size": 16,
        },
    },
    "gemma4_unified": {
        "text_config": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
    },
    "gemma4_unified_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "whisper": _DECODER,
    "plbart": _DECODER,
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"] * 2, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
}


def tiny_config(
    model_type: str, sizes: Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None
) -> Any:
    """The config of a type with small sizes, also in its parts.

    Args:
        sizes: replace or add to SIZES.
        overrides: the same for OVERRIDES of the type.
    """
    import transformers

    made = transformers.CONFIG_MAPPING[model_type]
    return _small(made, {**OVERRIDES.get(model_type, {}), **(overrides or {})}, {**SIZES, **(sizes or {})})


def _small(config_class: Any, overrides: dict[str, Any], sizes: dict[str, Any]) -> Any:
    default = config_class()
    if hasattr(default, "allow_global_per_layer_attribute_access"):
        default.allow_global_per_layer_attribute_access = True
    parts = getattr(config_class, "sub_configs", {})
    settings: dict[str, Any] = {
        name: value
        for name, value in sizes.items()
        if type(getattr(default, name, None)) in (int, float)
        and not isinstance(_attribute(config_class, name), property)
    }
    for part in parts:
        of_part = getattr(default, part, None)
        if of_part is None and part in overrides:
            settings[part] = overrides[part]
        elif of_part is not None:
            of_part_sizes = sizes if of_part is default.get_text_config() else TOWER_SIZES
            settings[part] = _small(type(of_part), overrides.get(part, {}), of_part_sizes).to_dict()
    if getattr(default, "head_dim", None) == getattr(default, "qk_rope_head_dim", 0):
        settings["head_dim"] = sizes["qk_rope_head_dim"]
    if getattr(default, "kv_lora_rank", None) and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = sizes["num_attention_heads"]
    # Not a second name for one of them.
    others = getattr(config_class, "attribute_map", {})
    for name in set(LAYER_KINDS) - others.keys():
        kinds = getattr(default, name, None)
        if isinstance(kinds, list) and kinds and not isinstance(_attribute(config_class, name), property):
            settings[name] = _representative(kinds, settings.get("num_hidden_layers", LAYERS))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(default, name, None) is not None:
            settings[name] = 1
    settings |= {name: value for name, value in overrides.items() if name not in parts}
    return config_class(**settings)


def _attribute(config_class: Any, name: str) -> Any:
    """A class attribute, under its own name if the config has two for it."""
    return getattr(config_class, getattr(config_class, "attribute_map", {}).get(name, name), None)


def _representative(kinds: list[str], layers: int) -> list[str]:
    """Kinds of layers, all that occur if there is room, in the order of their first occurrence."""
    distinct = list(dict.fromkeys(kinds))
    places = [distinct[at * len(distinct) // layers] for at in range(layers)]
    return places if len(distinct) <= layers else distinct[:layers]


def tiny_model(config: Any) -> Any:
    """A random model in which every weight matters."""
    from neurons.architectures.auto_class import auto_class

    with torch.device("meta"):
        size = sum(p.numel() for p in auto_class(config).from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f}M parameters")
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.requires_grad_(False)
