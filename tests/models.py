"""Tiny models, a tokenizer and a corpus for the tests, and a llama written out by hand to check against."""

import math
import random
from contextlib import contextmanager
from functools import cache

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

# Three invented languages (ISO 639's private-use codes) that share no letter.
WORDS = {
    "qaa": ["abe", "bead", "cab", "cafe", "dab", "deaf", "decaf", "fade", "face", "bed", "ebb", "add", "beef", "feed"],
    "qab": ["high", "him", "ilk", "jig", "kill", "glim", "hill", "lim", "mig", "milk", "hik", "jim", "gill", "ikki"],
    "qac": ["nut", "pop", "spout", "trust", "pours", "sport", "stop", "runt", "turns", "opus", "tosu", "quot", "root", "un"],
}  # fmt: skip
LETTERS = {"qaa": "abcdef", "qab": "ghijklm", "qac": "nopqrstu"}
LANGUAGES = tuple(WORDS)

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
_MIXTURE = {"num_experts_per_tok": 2}
# The sizes in the names of GPT-2 and GPT-J.
_OLD = {"n_embd": 64, "n_inner": 48, "n_layer": 3, "n_head": 2, "n_positions": 128}
# family -> (config class, model class, what differs from _SMALL); head_dim 48 is not hidden / heads.  A
# family's name is its model_type, but for a "-variant".
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "mistral": (
        transformers.MistralConfig,
        transformers.MistralForCausalLM,
        {"head_dim": 48, "num_key_value_heads": 2, "sliding_window": None},
    ),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 48}),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM, {"head_dim": 32}),
    "gemma2": (
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        _GEMMA | {"final_logit_softcapping": 3.0},
    ),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, _GEMMA),
    "gemma3": (transformers.Gemma3Config, transformers.Gemma3ForConditionalGeneration, _GEMMA),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM, {}),
    "phi": (transformers.PhiConfig, transformers.PhiForCausalLM, {}),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, _OLD),
    "opt": (transformers.OPTConfig, transformers.OPTForCausalLM, {"ffn_dim": 48, "word_embed_proj_dim": 64}),
    "opt-post_norm": (
        transformers.OPTConfig,
        transformers.OPTForCausalLM,
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "bloom": (transformers.BloomConfig, transformers.BloomForCausalLM, {"n_layer": 3, "n_head": 2}),
    "gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM, {}),
    "gptj": (transformers.GPTJConfig, transformers.GPTJForCausalLM, _OLD | {"rotary_dim": 16}),
    "falcon": (
        transformers.FalconConfig,
        transformers.FalconForCausalLM,
        {"ffn_hidden_size": 48, "alibi": False, "bias": True},
    ),
    "falcon-new": (
        transformers.FalconConfig,
        transformers.FalconForCausalLM,
        {"ffn_hidden_size": 48, "new_decoder_architecture": True, "num_kv_heads": 1},
    ),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM, {}),
    "cohere": (transformers.CohereConfig, transformers.CohereForCausalLM, {"logit_scale": 0.25}),
    "mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        _MIXTURE | {"num_local_experts": 3},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        _MIXTURE | {"num_experts": 3, "moe_intermediate_size": 40, "head_dim": 48},
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        transformers.GptOssForCausalLM,
        _MIXTURE | {"num_local_experts": 3, "head_dim": 48, "swiglu_limit": 1.5},
    ),
}


def sentences(language, count, seed=0, words=(4, 12)):
    """Random sentences of a language, the same for the same seed."""
    chooser = random.Random(f"{language} {seed}")
    return [" ".join(chooser.choices(WORDS[language], k=chooser.randint(*words))) for _ in range(count)]


def write_corpus(directory, languages=LANGUAGES, lines=60, seed=0):
    """``<language>.txt`` for each language; gives the directory back."""
    directory.mkdir(parents=True, exist_ok=True)
    for language in languages:
        text = "\n".join(sentences(language, lines, seed)) + "\n"
        (directory / f"{language}.txt").write_text(text, encoding="utf-8")
    return directory


@cache
def tiny_tokenizer(adds_start=True):
    """Byte-level BPE with <s> and </s>, about 300 entries; it puts <s> before a text, unless it only has it."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [line for language in LANGUAGES for line in sentences(language, 20)]
    tokenizer.train_from_iterator(lines, trainer)
    if adds_start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def token_languages():
    """For each token id the language whose letters it has, or None (newline, space, bytes, specials)."""
    tokenizer = tiny_tokenizer()
    found = []
    for index in range(len(tokenizer)):
        text = "" if index in tokenizer.all_special_ids else tokenizer.decode([index])
        owners = [language for language in LANGUAGES if set(text) & set(LETTERS[language])]
        found.append(owners[0] if owners else None)
    return found


def tiny_model(model_type="llama", tied=False, dtype="float32", seed=0, **config):
    """A random model; every weight is big enough to matter, norms and biases included."""
    config_class, model_class, differs = FAMILIES[model_type]
    tokenizer = tiny_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "tie_word_embeddings": tied,
        **(_SMALL | differs | config),
    }
    if config_class is transformers.Gemma3Config:
        made = config_class(text_config=settings, vision_config=_VISION, tie_word_embeddings=tied)
    else:
        made = config_class(**settings)
    model = model_class(made).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter += 0.1 * noise
            else:
                parameter.copy_(0.2 * noise)
    return model.to(getattr(torch, dtype))


def save_checkpoint(model, directory, **options):
    """Model and tokenizer as a checkpoint directory; gives the directory back."""
    model.save_pretrained(directory, **options)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def build_checkpoint(directory, model_type="llama", tied=False, dtype="float32", seed=0, **config):
    """A random checkpoint directory."""
    return save_checkpoint(tiny_model(model_type, tied, dtype, seed, **config), directory)


def build_wrapper(directory, model_type, **overrides):
    """A random checkpoint of a type that is not among ``FAMILIES``, as of one with a tower for images, with its
    tokenizer."""
    from tiny_models import tiny_config
    from tiny_models import tiny_model as tiny_model_of

    config, tokenizer = tiny_config(model_type, overrides=overrides), tiny_tokenizer()
    text = config.get_text_config()
    text.vocab_size, text.max_position_embeddings = len(tokenizer), 512
    text.eos_token_id = text.pad_token_id = tokenizer.eos_token_id
    return save_checkpoint(tiny_model_of(config), directory)


def naive_llama(model, ids, bump=None):
    """A llama's forward pass on one row of tokens, straight from its definition, in float64.

    ``bump`` adds a number to one activation: {(layer, position, neuron): number} at down_proj's input.
    Gives (logits [t, vocab], one dict a layer: site -> values [t, width]).
    """
    config = model.config
    weight = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    length, width = len(ids), config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // config.num_key_value_heads
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=1)

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight[name]

    def rotate(x):
        half = torch.cat([-x[:, width // 2 :], x[:, : width // 2]], dim=1)
        return x * angles.cos() + half * angles.sin()

    future = torch.ones(length, length).triu(1).bool()
    x = weight["model.embed_tokens.weight"][torch.as_tensor(ids)]
    layers = []
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        normed = norm(x, name + "input_layernorm.weight")
        query, key, value = (normed @ weight[f"{name}self_attn.{p}_proj.weight"].T for p in "qkv")
        heads = []
        for head in range(config.num_attention_heads):
            own = slice(head * width, (head + 1) * width)
            theirs = slice(head // shared * width, (head // shared + 1) * width)
            scores = rotate(query[:, own]) @ rotate(key[:, theirs]).T / math.sqrt(width)
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value[:, theirs])
        attn_in = torch.cat(heads, dim=1).requires_grad_(True)
        attn_out = attn_in @ weight[name + "self_attn.o_proj.weight"].T
        x = x + attn_out
        normed = norm(x, name + "post_attention_layernorm.weight")
        gate = normed @ weight[name + "mlp.gate_proj.weight"].T
        up = normed @ weight[name + "mlp.up_proj.weight"].T
        mlp_in = gate * torch.sigmoid(gate) * up
        for (at, position, neuron), number in (bump or {}).items():
            if at == layer:
                mlp_in = mlp_in.clone()
                mlp_in[position, neuron] += number
        mlp_in.requires_grad_(True)
        mlp_out = mlp_in @ weight[name + "mlp.down_proj.weight"].T
        x = x + mlp_out
        layers.append(
            {
                "mlp_act": gate,
                "mlp_up": up,
                "mlp_in": mlp_in,
                "attn_in": attn_in,
                "mlp_out": mlp_out,
                "attn_out": attn_out,
                "block_out": x,
            }
        )
    return norm(x, "model.norm.weight") @ weight["lm_head.weight"].T, layers


def naive_loss(logits, ids):
    """Sum over positions of -ln p(next token), in nats."""
    logp = logits.log_softmax(-1)
    return -sum(logp[position, ids[position + 1]] for position in range(len(ids) - 1))


@contextmanager
def shifted(model):
    """The residual stream of a llama's first layer moved."""
    handle = model.model.layers[0].register_forward_hook(lambda _, __, hidden: hidden + 0.3)
    try:
        yield
    finally:
        handle.remove()
