"""Names of the parts of each family of architectures, in memory and on disk: one entry for each family.

No other code refers to a family by name.  Paths start at a decoder layer unless stated otherwise.
An architecture that is not in the table is examined by its structure (``neurons.architectures.examination``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class StoredForm:
    """A form in which checkpoints store an output weight W [d, n].

    Attributes:
        name: of the tensor after the layer's prefix; ``{expert}`` if every expert has its own.
        transposed: stored [n, d] (of each expert: [I, d]).
        fused: all experts in one tensor, indexed by its first dimension.
    """

    name: str
    transposed: bool = False
    fused: bool = False


@dataclass(frozen=True)
class BiasSwitch:
    """A config setting that adds a bias to an output module in both transformers and vLLM.

    Attributes:
        setting: of the config, usually False.
        modules: paths of all modules that get a bias with it; the file must then have all of them.
    """

    setting: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class ConfigNames:
    """Names of the shapes in a dense family's config.json (transformers' own first).

    Attributes:
        layers: names of the number of layers; if several are present, they must agree (here and below).
        heads: of the number of query heads.
        residual: of the width d.
        width: of the number of neurons I.
        expansion: I / d if config.json omits I; None if it must be present.
        biases: block -> whether its output module has a bias, or the name of the setting; absent: no bias.
        part: the key of the language model's settings in a wrapper's config.json.
    """

    layers: tuple[str, ...] = ("num_hidden_layers",)
    heads: tuple[str, ...] = ("num_attention_heads",)
    residual: tuple[str, ...] = ("hidden_size",)
    width: tuple[str, ...] = ("intermediate_size",)
    expansion: int | None = None
    biases: Mapping[str, bool | str] = field(default_factory=dict)
    part: str | None = None


@dataclass(frozen=True)
class Layout:
    """Names of the parts of one family.

    Attributes:
        layers: path of the list of decoder layers from the causal language model.
        outputs: block -> path of the linear module that writes to the residual; of a mixture, the path
            of the parameter that holds down_proj of all experts.
        gate: the module whose output is the pre-activation; of a mixture, the experts.
        up: the module of the linear branch; None if the MLP is not gated; the same as ``gate`` if one
            module computes both, the gate first.
        prefixes: of the layer's number in names on disk, the current one first, then those of older files.
        stored: block -> forms of its weight in checkpoints, the usual one first.
        activation: the config's attribute that names the activation; None if the family has a fixed one,
            which preserves signs.
        transposed: blocks whose weight is [n, d] in memory (of a mixture: [E, I, d]).
        mixture: the module of a mixture of experts, whose output is added to the residual; else None.
        residual: whether the modules' outputs are added to the residual unchanged (no norm after).
        residual_unless: (attribute of the config, its value that puts a norm after the outputs).
        softcap: the config's attribute of the logits' soft cap; None without one.
        logit_scale: the config's attribute that multiplies the logits.
        logit_divisor: the config's attribute that divides the logits.
        bypassed_by: the config's attribute that, if true, makes the model compute without calling its
            modules, so that hooks see nothing; None without one.
        bias_switches: block -> the setting that adds a bias to its output module, if the family has one.
        examined: found by structure, not in the table: valid only with a self-check.
        names: to read its config.json without transformers; None always uses transformers.
    """

    layers: str
    outputs: Mapping[str, str]
    gate: str
    up: str | None
    prefixes: tuple[str, ...]
    stored: Mapping[str, tuple[StoredForm, ...]]
    activation: str | None = "hidden_act"
    transposed: tuple[str, ...] = ()
    mixture: str | None = None
    residual: bool = True
    residual_unless: tuple[str, bool] | None = None
    softcap: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    bypassed_by: str | None = None
    bias_switches: Mapping[str, BiasSwitch] = field(default_factory=dict)
    examined: bool = False
    names: ConfigNames | None = None

    def for_config(self, text: Any) -> Layout:
        """The layout of one model, with what depends on its (text) config resolved."""
        if self.residual_unless is None:
            return self
        attribute, value = self.residual_unless
        return replace(self, residual=self.residual and getattr(text, attribute) != value)


def _plain(attn: str, mlp: str, transposed: bool = False) -> dict[str, tuple[StoredForm, ...]]:
    return {
        block: (StoredForm(f"{path}.weight", transposed),) for block, path in (("attn", attn), ("mlp", mlp))
    }


def _dense(
    layers: str,
    attn: str,
    mlp: str,
    gate: str,
    up: str | None = None,
    transposed: bool = False,
    prefixes: tuple[str, ...] = (),
    names: ConfigNames = ConfigNames(),
    **rest: Any,
) -> Layout:
    """A dense family; old files may lack the first part of ``layers``, the base model's name."""
    return Layout(
        layers=layers,
        outputs={"attn": attn, "mlp": mlp},
        gate=gate,
        up=up,
        prefixes=prefixes or (f"{layers}.", f"{layers.partition('.')[2]}."),
        stored=_plain(attn, mlp, transposed),
        transposed=("attn", "mlp") if transposed else (),
        names=names,
        **rest,
    )


def _mixture(*down: StoredForm, **rest: Any) -> Layout:
    """A mixture of experts with all experts in one parameter, under ``mlp.experts``."""
    return Layout(
        layers="model.layers",
        outputs={"attn": "self_attn.o_proj", "mlp": "mlp.experts.down_proj"},
        gate="mlp.experts",
        up="mlp.experts",
        prefixes=("model.layers.", "layers."),
        stored={"attn": (StoredForm("self_attn.o_proj.weight"),), "mlp": down},
        mixture="mlp",
        **rest,
    )


_GATED = _dense("model.layers", "self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
_BIAS_IN_ATTENTION = ConfigNames(biases={"attn": "attention_bias"})
_GPT2_NAMES = ConfigNames(
    layers=("num_hidden_layers", "n_layer"),
    heads=("num_attention_heads", "n_head"),
    residual=("hidden_size", "n_embd"),
    width=("n_inner",),
    expansion=4,
    biases={"attn": True, "mlp": True},
)
_EACH_EXPERT = StoredForm("mlp.experts.{expert}.down_proj.weight")
_ALL_EXPERTS = StoredForm("mlp.experts.down_proj", fused=True)
# Gemma 2 and 3 normalise the outputs of attention and MLP before adding them.
_GEMMA = replace(
    _GATED,
    activation="hidden_activation",
    residual=False,
    softcap="final_logit_softcapping",
    names=_BIAS_IN_ATTENTION,
)

# model_type of the config -> layout
LAYOUTS: dict[str, Layout] = {
    # The only gated family whose biases vLLM reads wherever the config sets them.
    "llama": replace(
        _GATED,
        bias_switches={
            "attn": BiasSwitch(
                "attention_bias",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            ),
            "mlp": BiasSwitch("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
        },
        names=ConfigNames(biases={"attn": "attention_bias", "mlp": "mlp_bias"}),
    ),
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": replace(_GATED, names=_BIAS_IN_ATTENTION),
    "gemma": replace(_GATED, names=_BIAS_IN_ATTENTION),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    # The vision-language wrapper, which has no soft cap.
    "gemma3": replace(
        _GEMMA,
        layers="model.language_model.layers",
        prefixes=(
            "language_model.model.layers.",
            "model.language_model.layers.",
            "model.language_model.model.layers.",
            "language_model.model.model.layers.",
        ),
        softcap=None,
        names=replace(_BIAS_IN_ATTENTION, part="text_config"),
    ),
    "phi3": replace(_GATED, gate="mlp.gate_up_proj", up="mlp.gate_up_proj"),
    "phi": _dense(
        "model.layers",
        "self_attn.dense",
        "mlp.fc2",
        "mlp.fc1",
        names=ConfigNames(biases={"attn": True, "mlp": True}),
    ),
    "gpt2": _dense(
        "transformer.h",
        "attn.c_proj",
        "mlp.c_proj",
        "mlp.c_fc",
        transposed=True,
        activation="activation_function",
        names=_GPT2_NAMES,
    ),
    "opt": _dense(
        "model.decoder.layers",
        "self_attn.out_proj",
        "fc2",
        "fc1",
        activation="activation_function",
        residual_unless=("do_layer_norm_before", False),
        names=ConfigNames(width=("ffn_dim",), biases={"attn": "enable_bias", "mlp": "enable_bias"}),
    ),
    "bloom": _dense(
        "transformer.h",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        "mlp.dense_h_to_4h",
        activation=None,
        residual_unless=("apply_residual_connection_post_layernorm", True),
        bypassed_by="slow_but_exact",
        names=replace(_GPT2_NAMES, residual=("hidden_size", "n_embed"), width=()),
    ),
    "gpt_neox": _dense(
        "gpt_neox.layers",
        "attention.dense",
        "mlp.dense_4h_to_h",
        "mlp.dense_h_to_4h",
        names=ConfigNames(biases={"attn": "attention_bias", "mlp": True}),
    ),
    "gptj": _dense(
        "transformer.h",
        "attn.out_proj",
        "mlp.fc_out",
        "mlp.fc_in",
        activation="activation_function",
        names=replace(_GPT2_NAMES, biases={"mlp": True}),
    ),
    "falcon": _dense(
        "transformer.h",
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        "mlp.dense_h_to_4h",
        activation="activation",
        names=ConfigNames(
            residual=("hidden_size", "n_embed"),
            width=("ffn_hidden_size",),
            expansion=4,
            biases={"attn": "bias", "mlp": "bias"},
        ),
    ),
    "olmo2": replace(_GATED, residual=False, names=_BIAS_IN_ATTENTION),
    "cohere": replace(_GATED, logit_scale="logit_scale", names=_BIAS_IN_ATTENTION),
    "mixtral": _mixture(
        StoredForm("block_sparse_moe.experts.{expert}.w2.weight"),
        StoredForm("mlp.experts.{expert}.w2.weight"),
        _ALL_EXPERTS,
    ),
    "qwen3_moe": _mixture(_EACH_EXPERT, _ALL_EXPERTS),
    # A clamped SwiGLU, positive exactly where the gate is.
    "gpt_oss": _mixture(
        StoredForm("mlp.experts.down_proj", transposed=True, fused=True),
        activation=None,
        transposed=("mlp",),
    ),
}
