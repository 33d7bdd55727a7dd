"""Examination of an architecture that is not in the table, by its structure.

Expected is one list of decoder layers, which need not be alike.  In a layer there may be a softmax attention, whose
last linear module that writes d is its output, and an MLP whose last linear module writes d from its own width I,
beside one linear module that writes I (not gated), two of which one is called gate (gated), or one that writes 2 I
(gated, fused, gate first); or fused experts ([E, d, I] or [E, I, d]), with or without such an MLP as a shared expert.
All else is left alone.  The result is a guess until the self-check passes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from neurons.architectures.attention import is_other_mixer, softmax_attention
from neurons.architectures.layouts import SIGN_PRESERVING, Layout, Mlp, StoredForm
from neurons.errors import BrocaError

_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation", "mlp_hidden_act")
# Parts of the names of modules that are the MLP, if a layer has more than one with the shape of an MLP.
_MLP_NAMES = ("mlp", "ffn", "feed_forward", "ff")
# (gate, linear branch) where neither is called gate.
_GATE_NAMES = (("w1", "w3"),)
_OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")
# Names on disk of attention outputs that transformers renames while loading.
_OLD_ATTENTION_NAMES = ("attention.dense.weight",)
# Parts of the names of what is not the language model.
_TOWERS = ("vision", "audio", "visual", "speech")
_ACTIVATION_MODULES = ("act_fn", "act", "activation_fn", "activation")


@dataclass(frozen=True)
class _Layer:
    """The paths of one layer's parts, None where it has no such part."""

    attn: str | None
    mlp: Mlp | None
    experts: str | None


def examine(model: Any) -> Layout:
    """The layout of a model of an unknown architecture.

    Raises:
        BrocaError: names what is missing or ambiguous.
    """
    text = model.config.get_text_config()
    name = model.config.model_type

    def unsupported(what: str) -> BrocaError:
        return BrocaError(
            f"architecture {name!r} is not in the table and was examined by its structure: {what}"
        )

    for attribute in ("num_hidden_layers", "hidden_size"):
        if not isinstance(getattr(text, attribute, None), int):
            raise unsupported(f"its config has no {attribute}")
    d = text.hidden_size
    depths = {getattr(text, name, None) for name in ("num_hidden_layers", "decoder_layers")}
    path, blocks = _layer_list(model, depths, unsupported)
    layers = [_layer(block, d) for block in blocks]
    attn = _most(layer.attn for layer in layers)
    experts = _most(layer.experts for layer in layers)
    dense = _most(layer.mlp for layer in layers if layer.experts is None)
    if attn is None and dense is None and experts is None:
        classes = ", ".join(dict.fromkeys(type(module).__name__ for module in blocks[0].children()))
        raise unsupported(
            f"its layers have neither attention nor an MLP that Broca understands, but {classes}"
        )
    shared = _most(layer.mlp for layer in layers if layer.experts is not None)
    block = next(
        (block for block, layer in zip(blocks, layers, strict=True) if layer.experts == experts), blocks[0]
    )
    activation = next((a for a in _ACTIVATIONS if isinstance(getattr(text, a, None), str)), None)
    outputs: dict[str, str] = {"attn": attn or "(none)", "mlp": "(none)"}
    stored: dict[str, tuple[StoredForm, ...]] = {"attn": (), "mlp": ()}
    transposed: list[str] = []
    mixture = None
    if attn is not None:
        holder = next(b for b, layer in zip(blocks, layers, strict=True) if layer.attn == attn)
        names = dict.fromkeys((f"{attn}.weight", *_OLD_ATTENTION_NAMES))
        stored["attn"] = tuple(StoredForm(name, _conv(holder, attn)) for name in names)
        transposed += ["attn"] if _conv(holder, attn) else []
    gate, up = "(none)", None
    if experts is not None:
        module: Any = block.get_submodule(experts)
        gate, up = experts, experts if getattr(module, "has_gate", True) else None
        mixture = experts.rpartition(".")[0] or experts
        flipped = bool(getattr(module, "is_transposed", False))
        if shared is not None:
            shared = replace(shared, factor=_factor(block, mixture, d))
        outputs["mlp"] = f"{experts}.down_proj"
        stored["mlp"] = tuple(dict.fromkeys(_expert_forms(experts, flipped)))
        transposed += ["mlp"] if flipped else []
    elif dense is not None:
        holder = next(b for b, layer in zip(blocks, layers, strict=True) if layer.mlp == dense)
        gate, up = dense.gate, dense.up
        if activation is not None and getattr(text, activation) not in SIGN_PRESERVING:
            # The activation's output has its sign, if a module computes it.
            parent = dense.output.rpartition(".")[0]
            modules = [f"{parent}.{name}" for name in _ACTIVATION_MODULES]
            acts = [path for path, _ in holder.named_modules() if path in modules]
            gate, activation = (acts[0], None) if acts and gate != up else (gate, activation)
        outputs["mlp"] = dense.output
        stored["mlp"] = (StoredForm(f"{dense.output}.weight", _conv(holder, dense.output)),)
        transposed += ["mlp"] if _conv(holder, dense.output) else []
    return Layout(
        layers=path,
        outputs=outputs,
        gate=gate,
        up=up,
        prefixes=_prefixes(path, model.base_model_prefix),
        stored=stored,
        activation=activation,
        transposed=tuple(transposed),
        mixture=mixture,
        dense=dense if experts is not None else None,
        shared=shared,
        softcap=_number(text, "final_logit_softcapping") or _number(text, "logits_soft_cap"),
        logit_scale=_number(text, "logit_scale"),
        logit_divisor=_number(text, "logits_scaling") or _number(text, "logits_mup_width_multiplier"),
        vocabulary=_number(text, "unpadded_vocab_size"),
        examined=True,
    )


def _most(found: Iterator[Any]) -> Any:
    """The most frequent of the values that are not None, the first of equally frequent ones."""
    counted = Counter(value for value in found if value is not None)
    return counted.most_common(1)[0][0] if counted else None


def _layer(block: nn.Module, d: int) -> _Layer:
    shapes = _linear_shapes(block)
    attention = softmax_attention(block)
    attn = [p for p, (to, _) in shapes.items() if attention and _inside(p, attention) and to == d]
    others = [name for name, module in block.named_children() if name == attention or is_other_mixer(module)]
    experts = fused_experts(block)
    rest = {p: shape for p, shape in shapes.items() if not any(_inside(p, other) for other in others)}
    attn = [path for path in attn if path.rpartition(".")[2] in _OUTPUT_NAMES] or attn
    depth = min((path.count(".") for path in attn), default=0)
    attn = [path for path in attn if path.count(".") == depth]
    return _Layer(attn[-1] if attn else None, _mlp(rest, d), experts[0] if len(experts) == 1 else None)


def fused_experts(block: nn.Module) -> list[str]:
    """The paths of modules that hold all experts of a mixture in one parameter."""
    return [
        path
        for path, module in block.named_modules()
        if hasattr(module, "has_post_expert_norm")
        and getattr(getattr(module, "down_proj", None), "ndim", 0) == 3
    ]


def _mlp(shapes: dict[str, tuple[int, int]], d: int) -> Mlp | None:
    """The MLP without experts among linear modules; None if there is none, or more than one."""
    found = []
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in shapes if "norm" not in path):
        beside = {path: shape for path, shape in shapes.items() if path.rpartition(".")[0] == parent}
        down = [path for path, (to, _) in beside.items() if to == d]
        if down:
            width = beside.pop(down[-1])[1]
            made = _gate_and_up({p: to for p, (to, of) in beside.items() if of == d}, width)
            found += [] if made is None else [Mlp(down[-1], *made, _names(down[-1]))]
    named = [mlp for mlp in found if any(part in mlp.output for part in _MLP_NAMES)]
    chosen = named or found
    return chosen[0] if len(chosen) == 1 else None


def _factor(block: nn.Module, mixture: str, d: int) -> str | None:
    """The linear module of a mixture that writes one number for each token."""
    shapes = _linear_shapes(block)
    return next((path for path, shape in shapes.items() if _inside(path, mixture) and shape == (1, d)), None)


def _gate_and_up(into: dict[str, int], width: int) -> tuple[str, str | None] | None:
    """The modules of the pre-activation and of the linear branch, among those that feed an MLP."""
    whole = [path for path, size in into.items() if size == width]
    fused = [path for path, size in into.items() if size == 2 * width]
    if len(whole) == 1:
        return whole[0], None
    if not whole and len(fused) == 1:
        return fused[0], fused[0]
    if len(whole) == 2:
        named = {path.rpartition(".")[2]: path for path in whole}
        gates = [path for name, path in named.items() if "gate" in name or name == "linear"]
        if len(gates) == 1:
            return gates[0], next(path for path in whole if path != gates[0])
        for gate, up in _GATE_NAMES:
            if gate in named and up in named:
                return named[gate], named[up]
    return None


def _layer_list(model: Any, depths: Collection[Any], unsupported: Any) -> tuple[str, list[nn.Module]]:
    """The list of decoder layers, as many as in the config."""
    lists = {
        path: list(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) in depths
        and any(len(_linear_shapes(layer)) > 1 for layer in module)
        and not any(tower in path for tower in _TOWERS)
    }
    # Not the lists inside a layer.
    lists = {path: of for path, of in lists.items() if not any(_inside(path, other) for other in lists)}
    decoders = {path: of for path, of in lists.items() if "encoder" not in path.split(".")}
    if not decoders and lists:
        raise unsupported(f"its layers, {', '.join(lists)}, are an encoder's, and Broca edits decoders")
    if len(decoders) != 1:
        names = ", ".join(decoders) or "none"
        raise unsupported(
            f"it must have one list of decoder layers, as many as its config says, but has: {names}"
        )
    return next(iter(decoders.items()))


def _linear_shapes(block: nn.Module) -> dict[str, tuple[int, int]]:
    """Path -> (outputs, inputs) of every linear module, in order of registration."""
    shapes = {}
    for path, module in block.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            # The weight of a module in 4 bits is packed.
            shapes[path] = (module.out_features, module.in_features)
        elif type(module).__name__ == "Conv1D":
            shapes[path] = (weight.shape[1], weight.shape[0])
    return shapes


def _conv(block: nn.Module, path: str) -> bool:
    return type(block.get_submodule(path)).__name__ == "Conv1D"


def _inside(path: str, parent: str) -> bool:
    return path.startswith(f"{parent}.")


def _expert_forms(gate: str, flipped: bool) -> Iterator[StoredForm]:
    """Common names and shapes of down_proj of fused experts in checkpoints."""
    for experts in dict.fromkeys((gate, "block_sparse_moe.experts")):
        for name in ("down_proj", "w2"):
            yield StoredForm(f"{experts}.{{expert}}.{name}.weight")
    yield StoredForm(f"{gate}.down_proj", flipped, fused=True)
    yield StoredForm(f"{gate}.fc2.weight", flipped, fused=True)
    yield StoredForm("block_sparse_moe.output_linear.weight", fused=True)


def _names(output: str) -> tuple[str, ...]:
    """Common names of the weight of an MLP without experts in checkpoints."""
    shared = [output.replace("shared_experts", other) for other in ("shared_expert", "shared_mlp")]
    old = re.sub("^mlp[.]", "block_sparse_moe.", output)
    return tuple(dict.fromkeys(f"{path}.weight" for path in (output, *shared, old)))


def _prefixes(layers: str, base: str) -> tuple[str, ...]:
    """Prefixes of names on disk: as in memory, without the base model's name, or of old wrappers."""
    wrapped = layers.replace("model.language_model.", "language_model.model.", 1)
    paths = (layers, layers.removeprefix(f"{base}."), wrapped, layers.replace("model.", "backbone.", 1))
    return tuple(dict.fromkeys(f"{path}." for path in paths))


def _number(text: Any, attribute: str) -> str | None:
    value = getattr(text, attribute, None)
    return attribute if isinstance(value, int | float) and not isinstance(value, bool) else None
