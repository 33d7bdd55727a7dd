"""How each family of architectures names its parts, in memory and on disk: one entry a family.

Nothing else in Broca knows a family by name.  Paths lead from a decoder layer unless said otherwise.
An architecture that is not in the table is examined by its structure (``neurons.architectures.examination``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class StoredForm:
    """One way in which checkpoints hold an output weight W [d, n].

    Attributes:
        name: of the tensor behind the layer's prefix; ``{expert}`` where every expert has its own.
        transposed: stored [n, d] (of each expert: [I, d]).
        fused: all experts in one tensor, the expert being its first dimension.
    """

    name: str
    transposed: bool = False
    fused: bool = False


@dataclass(frozen=True)
class BiasSwitch:
    """A setting that gives an output module a bias which transformers and vLLM both read.

    Attributes:
        setting: of the config, False in the usual checkpoint.
        modules: paths of all modules that get a bias with it: each must then be in the file.
    """

    setting: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class ConfigNames:
    """What a dense family's config.json says of its shapes, and under which names (transformers' own first).

    Attributes:
        layers: names of the number of layers; where several are there, they must agree (here and below).
        heads: of the number of query heads.
        residual: of the width d.
        width: of the number of neurons I.
        widening: I / d where config.json leaves I open; None where it must say it.
        biases: block -> whether its output module has a bias, or the setting that says so; no entry: none.
        part: the key that the language model's settings lie under in a wrapper's config.json.
    """

    layers: tuple[str, ...] = ("num_hidden_layers",)
    heads: tuple[str, ...] = ("num_attention_heads",)
    residual: tuple[str, ...] = ("hidden_size",)
    width: tuple[str, ...] = ("intermediate_size",)
    widening: int | None = None
    biases: Mapping[str, bool | str] = field(default_factory=dict)
    part: str | None = None


@dataclass(frozen=True)
class Layout:
    """How one family names its parts.

    Attributes:
        layers: path of the list of decoder layers from the causal language model.
        outputs: block -> path of the linear module that writes to the residual; of a mixture, the path
            of the parameter that holds down_proj of all experts.
        gate: the module whose output is the pre-activation; of a mixture, the experts.
        up: the module of the linear branch; None where the MLP is not gated; the same as ``gate`` where
            one module computes both, the gate first.
        prefixes: what stands before the layer's number in names on disk, the present one first, then
            those of older files.
        stored: block -> the ways in which checkpoints hold its weight, the usual one first.
        activation: the config's attribute that names the activation; None where the family has a fixed
            one, whose sign is its input's.
        transposed: blocks whose weight is [n, d] in memory (of a mixture: [E, I, d]).
        mixture: the block of a mixture of experts, whose output is added to the residual; else None.
        residual: whether the modules' outputs are added to the residual as they are (no norm after).
        residual_unless: (attribute of the config, its value that puts a norm after the outputs).
        softcap: the config's attribute with the logits' soft cap, None where the head has none.
        logit_scale: the config's attribute that the logits are multiplied with.
        logit_divisor: the config's attribute that the logits are divided by.
        bypassed_by: the config's attribute that, where it is true, lets the model compute without calling
            its modules, so that hooks see nothing; None where there is none.
        bias_switches: block -> the setting that gives its output module a bias, where the family has one.
        examined: found by structure, not from the table: accepted only with a self-check.
        names: how its config.json is read where transformers is not asked; None: it always is.
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
        """The layout of one model: what depends on its (text) config is settled."""
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
    """A family without experts; old files may lack the first part of ``layers``, the base model's name."""
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
    """A family whose layers hold all experts in one parameter, under ``mlp.experts``."""
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
    widening=4,
    biases={"attn": True, "mlp": True},
)
_EACH_EXPERT = StoredForm("mlp.experts.{expert}.down_proj.weight")
_ALL_EXPERTS = StoredForm("mlp.experts.down_proj", fused=True)
# Gemma 2 and 3 normalise what attention and MLP return before they add it.
_GEMMA = replace(
    _GATED,
    activation="hidden_activation",
    residual=False,
    softcap="final_logit_softcapping",
    names=_BIAS_IN_ATTENTION,
)

# model_type of the config -> layout
LAYOUTS: dict[str, Layout] = {
    # Of the gated families, the only one whose biases vLLM reads wherever the config asks for them.
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
    # The vision-language wrapper, which leaves the soft cap out.
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
            widening=4,
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
    # A clamped SwiGLU of its own, positive exactly where the gate is.
    "gpt_oss": _mixture(
        StoredForm("mlp.experts.down_proj", transposed=True, fused=True),
        activation=None,
        transposed=("mlp",),
    ),
}
