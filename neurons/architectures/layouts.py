"""Names of the parts of each family of architectures, in memory and on disk: one entry for each family.

No other code refers to a family by name.  Paths start at a decoder layer unless stated otherwise.
An architecture that is not in the table is examined by its structure (``neurons.architectures.examination``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# Activations that are positive exactly where their input is, so that LAPE can count the sign of the input.
SIGN_PRESERVING = (
    "silu", "swish", "relu", "relu2", "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh",
    "quick_gelu",
)  # fmt: skip


@dataclass(frozen=True)
class StoredForm:
    """A form in which checkpoints store an output weight W [d, n].

    Attributes:
        name: of the tensor after the layer's prefix; ``{expert}`` if every expert has its own.
        transposed: stored [n, d] (of each expert: [I, d]).
        fused: all experts in one tensor, indexed by its first dimension.
        either: the tensor may also have the other orientation, if its shape is that one's.
    """

    name: str
    transposed: bool = False
    fused: bool = False
    either: bool = False


@dataclass(frozen=True)
class Mlp:
    """Names of an MLP without experts, in a layer of a family that has other MLPs too.

    Attributes:
        output: path of the linear module that writes to the residual.
        gate: the module whose output is the pre-activation.
        up: the module of the linear branch; None if the MLP is not gated; the same as ``gate`` if one module
            computes both, the gate first.
        names: of the output's weight on disk, after the layer's prefix; empty if as in memory.
        factor: of a shared expert, the linear module [1, d] whose sigmoid multiplies its output; None without one.
        added: of a shared expert, whether its output, times the factor, is added to the residual as the mixture's is.
    """

    output: str
    gate: str
    up: str | None
    names: tuple[str, ...] = ()
    factor: str | None = None
    added: bool = True

    @property
    def stored(self) -> tuple[StoredForm, ...]:
        """The forms of the output's weight in checkpoints."""
        return tuple(StoredForm(name) for name in self.names or (f"{self.output}.weight",))


@dataclass(frozen=True)
class Router:
    """Names of the module that scores the experts of a mixture.

    Attributes:
        path: of the module with the weight [E, d] of the scores.
        names: of that weight on disk, after the layer's prefix; empty if as in memory.
        bias: path of the parameter or buffer [E] that is added to the scores; None, or no such tensor in the module:
            there is none.
        bias_names: of the bias on disk; empty if as in memory.
        sigmoid: the bias is added to the sigmoids of the scores, and only to choose experts (DeepSeek-V3).
    """

    path: str
    names: tuple[str, ...] = ()
    bias: str | None = None
    bias_names: tuple[str, ...] = ()
    sigmoid: bool = False

    @property
    def stored(self) -> tuple[StoredForm, ...]:
        """The forms of the weight in checkpoints."""
        return tuple(StoredForm(name) for name in self.names or (f"{self.path}.weight",))


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
        gate_rows: the linear module that computes the gate's input, where the gate is an activation; None: the gate.
        prefixes: of the layer's number in names on disk, the current one first, then those of older files.
        stored: block -> forms of its weight in checkpoints, the usual one first.
        activation: the config's attribute that names the activation; None if the family has a fixed one,
            which preserves signs.
        transposed: blocks whose weight is [n, d] in memory (of a mixture: [E, I, d]).
        mixture: the module of a mixture of experts, whose output is added to the residual; else None.
        router: the module that scores the experts of a mixture.
        dense: the MLP of layers without the mixture, in a family of mixtures.
        shared: the MLP that every token reaches, beside the experts of a mixture.
        residual: whether the modules' outputs are added to the residual unchanged (no norm after), but for a multiplier.
        residual_scale: block -> the config's attribute that multiplies its output, of a list the last number.
        multipliers: block -> the number that multiplies its output; 1 if absent (resolved by ``for_config``).
        residual_unless: (attribute of the config, its value that puts a norm after the outputs).
        head_transform: the module between the last hidden states and the output embeddings, from the causal language model;
            None without one.
        softcap: the config's attribute of the logits' soft cap; None without one.
        logit_scale: the config's attribute that multiplies the logits.
        logit_divisor: the config's attribute that divides the logits.
        vocabulary: the config's attribute of the number of logits, if the output embeddings are padded.
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
    gate_rows: str | None = None
    activation: str | None = "hidden_act"
    transposed: tuple[str, ...] = ()
    mixture: str | None = None
    router: Router | None = None
    dense: Mlp | None = None
    shared: Mlp | None = None
    residual: bool = True
    residual_scale: Mapping[str, str] = field(default_factory=dict)
    multipliers: Mapping[str, float] = field(default_factory=dict)
    residual_unless: tuple[str, bool] | None = None
    head_transform: str | None = None
    softcap: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    vocabulary: str | None = None
    bypassed_by: str | None = None
    bias_switches: Mapping[str, BiasSwitch] = field(default_factory=dict)
    examined: bool = False
    names: ConfigNames | None = None

    def for_config(self, text: Any) -> Layout:
        """The layout of one model, with what depends on its (text) config resolved."""
        unchanged = self.residual
        if self.residual_unless is not None:
            attribute, value = self.residual_unless
            unchanged &= getattr(text, attribute) != value
        scales = {block: getattr(text, name, 1.0) for block, name in self.residual_scale.items()}
        multipliers = {
            block: scale[-1] if isinstance(scale, Sequence) else scale for block, scale in scales.items()
        }
        return replace(self, residual=unchanged, multipliers=multipliers)

    def inside(self, path: str) -> Layout:
        """The layout of a wrapper whose language model is one of this family.

        Args:
            path: of the language model in the wrapper, without the head, as "model.language_model".
        """
        own = self.layers.partition(".")[2]
        held = f"language_model.{self.layers}"
        names = (f"{path}.{own}", held, f"model.{held}", f"language_model.model.{self.layers}")
        return replace(
            self,
            layers=f"{path}.{own}",
            prefixes=tuple(dict.fromkeys(f"{name}." for name in names)),
            # Wrappers have their own head, which does not change the logits further.
            softcap=None,
            logit_scale=None,
            logit_divisor=None,
            bias_switches={},
            names=None,
        )


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
    names: ConfigNames | None = ConfigNames(),
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


def _mixture(
    *down: StoredForm,
    module: str = "mlp",
    attn: str = "self_attn.o_proj",
    prefixes: tuple[str, ...] = ("model.layers.", "layers."),
    router: Router | None = None,
    **rest: Any,
) -> Layout:
    """A mixture of experts with all experts in one parameter, under ``mlp.experts`` or another module.

    Its router is by default the module's ``gate``.
    """
    experts = f"{module}.experts"
    return Layout(
        layers="model.layers",
        outputs={"attn": attn, "mlp": f"{experts}.down_proj"},
        gate=experts,
        up=experts,
        prefixes=prefixes,
        stored={"attn": (StoredForm(f"{attn}.weight"),), "mlp": down or _experts_of(module)},
        mixture=module,
        router=router or Router(f"{module}.gate"),
        **rest,
    )


def _experts_of(module: str) -> tuple[StoredForm, StoredForm]:
    """down_proj of every expert in its own tensor, or of all in one."""
    experts = f"{module}.experts"
    return StoredForm(f"{experts}.{{expert}}.down_proj.weight"), StoredForm(
        f"{experts}.down_proj", fused=True
    )


def _choosing(path: str, *old: str) -> Router:
    """A router with DeepSeek-V3's bias; ``old`` are paths of the router in files."""
    bias = "e_score_correction_bias"
    return Router(
        path,
        tuple(f"{name}.weight" for name in old),
        f"{path}.{bias}",
        tuple(f"{name}.{bias}" for name in old),
        sigmoid=True,
    )


def _gated_mlp(module: str) -> Mlp:
    return Mlp(f"{module}.down_proj", f"{module}.gate_proj", f"{module}.up_proj")


def _fused_mlp(module: str) -> Mlp:
    return Mlp(f"{module}.down_proj", f"{module}.gate_up_proj", f"{module}.gate_up_proj")


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
_EACH_EXPERT, _ALL_EXPERTS = _experts_of("mlp")
_W2 = StoredForm("block_sparse_moe.experts.{expert}.w2.weight")
# Mixtral's module in files, and its name in memory.
_SPARSE_MOE = ("block_sparse_moe.gate.weight", "mlp.gate.weight")
# Gemma 2 and 3 normalise the outputs of attention and MLP before adding them.
_GEMMA = replace(
    _GATED,
    activation="hidden_activation",
    residual=False,
    softcap="final_logit_softcapping",
    names=_BIAS_IN_ATTENTION,
)

_DENSE = _gated_mlp("mlp")
# Qwen's mixtures have a shared expert, DeepSeek's several, in one MLP.
_QWEN_MOE = _mixture(
    dense=_DENSE, shared=replace(_gated_mlp("mlp.shared_expert"), factor="mlp.shared_expert_gate")
)
_DEEPSEEK = _mixture(dense=_DENSE, shared=_gated_mlp("mlp.shared_experts"), router=_choosing("mlp.gate"))
_PLAIN = replace(_GATED, gate="mlp.up_proj", up=None, names=None)
_GLM4 = replace(_GATED, gate="mlp.gate_up_proj", up="mlp.gate_up_proj", residual=False, names=None)
# Of most wrappers, beside a tower for images.
_LANGUAGE_MODEL = "model.language_model"
# Some files of a wrapper have the names of the language model alone, and some of a language model those of a wrapper.
_WITH_OR_WITHOUT_WRAPPER = ("model.layers.", "layers.", *_GATED.inside(_LANGUAGE_MODEL).prefixes)
_LLAMA4 = _mixture(
    StoredForm("feed_forward.experts.down_proj", transposed=True, fused=True),
    module="feed_forward",
    router=Router("feed_forward.router"),
    prefixes=_WITH_OR_WITHOUT_WRAPPER,
    transposed=("mlp",),
    dense=_gated_mlp("feed_forward"),
    shared=_gated_mlp("feed_forward.shared_expert"),
)
_GRANITE_SCALE = dict.fromkeys(("attn", "mlp"), "residual_multiplier")
_GRANITE_MOE = _mixture(
    StoredForm("block_sparse_moe.output_linear.weight", fused=True),
    module="block_sparse_moe",
    router=Router(
        "block_sparse_moe.router",
        ("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
    ),
    logit_divisor="logits_scaling",
    residual_scale=_GRANITE_SCALE,
)
_SHARED_MLP = Mlp("shared_mlp.output_linear", "shared_mlp.input_linear", "shared_mlp.input_linear")
# Without experts it is the whole MLP.
_GRANITE_SHARED = replace(_GRANITE_MOE, dense=_SHARED_MLP, shared=_SHARED_MLP)

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
    "gemma3": replace(_GEMMA.inside(_LANGUAGE_MODEL), names=replace(_BIAS_IN_ATTENTION, part="text_config")),
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
        router=Router("mlp.gate", _SPARSE_MOE),
    ),
    "qwen3_moe": _mixture(_EACH_EXPERT, _ALL_EXPERTS, dense=_DENSE),
    "olmoe": _mixture(),
    "phimoe": _mixture(
        _W2,
        _EACH_EXPERT,
        _ALL_EXPERTS,
        router=Router("mlp.router", ("block_sparse_moe.gate.weight", "mlp.router.weight")),
    ),
    # A norm follows the sum of the residual and the attention's output.
    "minimax": _mixture(
        _W2, _EACH_EXPERT, _ALL_EXPERTS, router=Router("mlp.gate", _SPARSE_MOE), residual=False
    ),
    "minimax_m2": _mixture(
        _W2,
        _EACH_EXPERT,
        _ALL_EXPERTS,
        router=Router(
            "mlp.gate",
            _SPARSE_MOE,
            "mlp.e_score_correction_bias",
            ("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias"),
            sigmoid=True,
        ),
    ),
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_SHARED,
    "granitemoehybrid": _GRANITE_SHARED,
    "qwen2_moe": _QWEN_MOE,
    "qwen3_next": _QWEN_MOE,
    "qwen3_5_moe": _QWEN_MOE.inside(_LANGUAGE_MODEL),
    "qwen3_5_moe_text": replace(_QWEN_MOE, prefixes=_WITH_OR_WITHOUT_WRAPPER),
    "qwen3_vl_moe": _mixture(
        StoredForm("mlp.experts.down_proj", fused=True, either=True), dense=_DENSE
    ).inside(_LANGUAGE_MODEL),
    "glm4v_moe": _DEEPSEEK.inside(_LANGUAGE_MODEL),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "glm4_moe": _DEEPSEEK,
    "glm4_moe_lite": _DEEPSEEK,
    "glm_moe_dsa": _DEEPSEEK,
    "dots1": _DEEPSEEK,
    "ernie4_5_moe": _DEEPSEEK,
    "kimi_linear": replace(
        _mixture(
            _W2,
            _EACH_EXPERT,
            _ALL_EXPERTS,
            router=_choosing("mlp.gate", "block_sparse_moe.gate", "mlp.gate"),
        ),
        dense=replace(_DENSE, names=("block_sparse_moe.down_proj.weight", "mlp.down_proj.weight")),
        shared=replace(
            _gated_mlp("mlp.shared_experts"),
            names=(
                "block_sparse_moe.shared_experts.down_proj.weight",
                "mlp.shared_experts.down_proj.weight",
            ),
        ),
    ),
    "jamba": _mixture(
        module="feed_forward", router=Router("feed_forward.router"), dense=_gated_mlp("feed_forward")
    ),
    "lfm2_moe": _mixture(
        StoredForm("feed_forward.experts.{expert}.w2.weight"),
        StoredForm("feed_forward.experts.down_proj", fused=True),
        module="feed_forward",
        router=Router("feed_forward.gate", bias="feed_forward.expert_bias", sigmoid=True),
        attn="self_attn.out_proj",
        activation=None,
        dense=Mlp("feed_forward.w2", "feed_forward.w1", "feed_forward.w3"),
    ),
    # Experts without a gate, and layers that have one module each.
    "nemotron_h": replace(
        _mixture(
            module="mixer",
            attn="mixer.o_proj",
            prefixes=("backbone.layers.", "model.layers."),
            router=_choosing("mixer.gate"),
        ),
        up=None,
        activation="mlp_hidden_act",
        dense=Mlp("mixer.down_proj", "mixer.up_proj", None),
        shared=Mlp("mixer.shared_experts.down_proj", "mixer.shared_experts.up_proj", None),
    ),
    "llama4": _LLAMA4.inside("language_model.model"),
    "llama4_text": _LLAMA4,
    **dict.fromkeys(
        (
            "ministral",
            "ministral3",
            "smollm3",
            "seed_oss",
            "ernie4_5",
            "helium",
            "hunyuan_v1_dense",
            "stablelm",
        ),
        replace(_GATED, names=None),
    ),
    "qwen3_5_text": replace(_GATED, names=None, prefixes=_WITH_OR_WITHOUT_WRAPPER),
    **dict.fromkeys(("qwen3_5", "qwen3_vl"), _GATED.inside(_LANGUAGE_MODEL)),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl"),
        replace(_GATED.inside(_LANGUAGE_MODEL), prefixes=_WITH_OR_WITHOUT_WRAPPER),
    ),
    **dict.fromkeys(("olmo3", "exaone4"), replace(_GATED, residual=False, names=None)),
    "cohere2": replace(_GATED, logit_scale="logit_scale", names=None),
    "granite": replace(_GATED, logit_divisor="logits_scaling", residual_scale=_GRANITE_SCALE, names=None),
    "glm": replace(_GATED, gate="mlp.gate_up_proj", up="mlp.gate_up_proj", names=None),
    "glm4": _GLM4,
    **dict.fromkeys(("glm4v", "glm46v"), _GLM4.inside(_LANGUAGE_MODEL)),
    **dict.fromkeys(("arcee", "nemotron"), _PLAIN),
    # Its activation is learned and changes signs, so its output is counted.
    "apertus": replace(_PLAIN, gate="mlp.act_fn", gate_rows="mlp.up_proj", activation=None),
    "starcoder2": _dense("model.layers", "self_attn.o_proj", "mlp.c_proj", "mlp.c_fc", names=None),
    # Multipliers act on the gate's input to its activation and on the outputs.
    "falcon_h1": _dense(
        "model.layers",
        "self_attn.o_proj",
        "feed_forward.down_proj",
        "feed_forward.gate_proj",
        "feed_forward.up_proj",
        activation=None,
        residual_scale={"attn": "attention_out_multiplier", "mlp": "mlp_multipliers"},
        logit_scale="lm_head_multiplier",
        names=None,
    ),
    "lfm2": _dense(
        "model.layers",
        "self_attn.out_proj",
        "feed_forward.w2",
        "feed_forward.w1",
        "feed_forward.w3",
        activation=None,
        names=None,
    ),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), replace(_GEMMA, names=None)),
    **dict.fromkeys(
        ("gemma4", "gemma4_unified"), replace(_GEMMA.inside(_LANGUAGE_MODEL), softcap=_GEMMA.softcap)
    ),
    # Its first layers keep the largest activations only, so their sign is that of the activation's output.
    "gemma3n_text": replace(
        _GEMMA, gate="mlp.act_fn", gate_rows="mlp.gate_proj", activation=None, names=None
    ),
    # Types without a model class of their own.
    **dict.fromkeys(("internlm3", "iquestcoder"), replace(_GATED, names=None)),
    "git": _dense(
        "git.encoder.layer",
        "attention.output.dense",
        "output.dense",
        "intermediate.dense",
        residual=False,
        names=None,
    ),
    "modernbert-decoder": _dense(
        "model.layers",
        "attn.Wo",
        "mlp.Wo",
        "mlp.Wi",
        "mlp.Wi",
        activation="hidden_activation",
        head_transform="lm_head",
        names=None,
    ),
    # Clamped SwiGLUs, positive exactly where the gate is.
    "minimax_m3_vl_text": _mixture(
        _W2,
        _EACH_EXPERT,
        _ALL_EXPERTS,
        router=_choosing("mlp.gate"),
        activation=None,
        dense=_fused_mlp("mlp"),
        shared=_fused_mlp("mlp.shared_experts"),
    ),
    "gpt_oss": _mixture(
        StoredForm("mlp.experts.down_proj", transposed=True, fused=True),
        router=Router("mlp.router", bias="mlp.router.bias"),
        activation=None,
        transposed=("mlp",),
    ),
}

# model_type of a wrapper of any family's language model -> the path of the language model
WRAPPERS: dict[str, str] = {
    **dict.fromkeys(
        (
            "aya_vision",
            "cohere2_vision",
            "internvl",
            "llava",
            "llava_next",
            "llava_onevision",
            "mistral3",
        ),
        _LANGUAGE_MODEL,
    ),
    **dict.fromkeys(("idefics3", "smolvlm"), "model.text_model"),
}

# PEFT renames the modules of these types' adapters like tensors of their checkpoints, and then finds none of them.
RENAMED_IN_PEFT = ("unlimited_ocr",)
# The classes of these types in vLLM 0.32 do not support LoRA adapters.
NOT_ADAPTED_IN_VLLM = (
    "aria",
    "bloom",
    "cohere2_moe",
    "cohere2_vision",
    "dbrx",
    "falcon",
    "gemma3n_text",
    "gpt-sw3",
    "gpt2",
    "gptj",
    "kimi_linear",
    "llava_onevision",
    "mimo_v2_flash",
    "moss_transcribe_diarize",
    "stablelm",
)


def row_of(config: Any) -> Layout | None:
    """The layout of a config's model type, of a wrapper that of its language model's; None if not in the table.

    Args:
        config: a transformers config.
    """
    layout, path = LAYOUTS.get(config.model_type), WRAPPERS.get(config.model_type)
    if layout is not None or path is None:
        return layout
    text = LAYOUTS.get(config.get_text_config().model_type)
    return None if text is None else text.inside(path)
