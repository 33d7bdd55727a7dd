"""Examination of an architecture that is not in the table, by its structure.

Expected are one list of decoder layers; in each, an attention whose last linear module is [d, A*D], and
an MLP whose last linear module writes d from its own width I, beside one linear module that writes I
(not gated), two of which one is called gate (gated), or one that writes 2 I (gated, fused, gate first);
or fused experts ([E, d, I] or [E, I, d]).  The result is a guess until the self-check passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from neurons.architectures.layouts import LAYOUTS, Layout, StoredForm
from neurons.errors import BrocaError

_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation")


def examine(model: Any) -> Layout:
    """The layout of a model of an unknown architecture.

    Raises:
        BrocaError: names what is missing or ambiguous.
    """
    text = model.config.get_text_config()
    name = model.config.model_type

    def unsupported(what: str) -> BrocaError:
        return BrocaError(
            f"architecture {name!r} is not in the table and was examined by its structure: {what}; the table "
            f"has {', '.join(LAYOUTS)}"
        )

    for attribute in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        if not isinstance(getattr(text, attribute, None), int):
            raise unsupported(f"its config has no {attribute}")
    activation = next((a for a in _ACTIVATIONS if isinstance(getattr(text, a, None), str)), None)
    if activation is None:
        raise unsupported("its config names no activation")
    d = text.hidden_size
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or d // heads

    path, blocks = _layer_list(model, text.num_hidden_layers, unsupported)
    block = blocks[0]
    shapes = _linear_shapes(block)
    attentions = {
        child
        for child, _ in block.named_children()
        if ("attn" in child or "attention" in child) and any(_inside(p, child) for p in shapes)
    }
    if len(attentions) != 1:
        names = ", ".join(sorted(attentions)) or "none"
        raise unsupported(f"layer 0 must have one attention module with linear modules, but has: {names}")
    attention = attentions.pop()
    attn = [p for p, shape in shapes.items() if _inside(p, attention) and shape == (d, heads * head_dim)]
    if not attn:
        raise unsupported(
            f"layer 0, {attention} has no output linear module of shape {(d, heads * head_dim)}"
        )
    rest = {p: shape for p, shape in shapes.items() if not _inside(p, attention)}
    experts = [
        p
        for p, module in block.named_modules()
        if all(getattr(getattr(module, w, None), "ndim", 0) == 3 for w in ("gate_up_proj", "down_proj"))
    ]
    outputs = {"attn": attn[-1]}
    stored: dict[str, tuple[StoredForm, ...]] = {
        "attn": (StoredForm(f"{attn[-1]}.weight", _conv(block, attn[-1])),)
    }
    transposed = ["attn"] if _conv(block, attn[-1]) else []
    mixture = None
    up: str | None
    if experts:
        gate = up = experts[0]
        module: Any = block.get_submodule(gate)
        count = module.down_proj.shape[0]
        beside = [p for p, shape in rest.items() if shape != (count, d)]
        if len(experts) > 1 or beside:
            raise unsupported(f"layer 0 has {', '.join([*experts[1:], *beside])} beside the experts {gate}")
        mixture = gate.rpartition(".")[0]
        flipped = bool(getattr(module, "is_transposed", False))
        outputs["mlp"] = f"{gate}.down_proj"
        stored["mlp"] = tuple(dict.fromkeys(_expert_forms(gate, flipped)))
        transposed += ["mlp"] if flipped else []
    else:
        down = [p for p, (to, _) in rest.items() if to == d]
        if not down:
            raise unsupported(f"layer 0 has no MLP: no linear module beside {attention} writes {d}")
        mlp = down[-1]
        width = rest.pop(mlp)[1]
        into = {p: shape[0] for p, shape in rest.items()}
        gate, up = _gate_and_up(into, mlp, width, unsupported)
        outputs["mlp"] = mlp
        stored["mlp"] = (StoredForm(f"{mlp}.weight", _conv(block, mlp)),)
        transposed += ["mlp"] if _conv(block, mlp) else []
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
        softcap=_number(text, "final_logit_softcapping"),
        logit_scale=_number(text, "logit_scale"),
        logit_divisor=_number(text, "logits_scaling"),
        examined=True,
    )


def _layer_list(model: Any, depth: int, unsupported: Any) -> tuple[str, list[nn.Module]]:
    """The list of decoder layers: of one class, and as many as in the config."""
    lists = [
        (path, list(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and len({type(layer) for layer in module}) == 1
        and len(_linear_shapes(module[0])) > 1
        and "vision" not in path
        and "encoder" not in path.split(".")
    ]
    if len(lists) != 1:
        names = ", ".join(path for path, _ in lists) or "none"
        raise unsupported(f"the model must have one list of {depth} decoder layers, but has: {names}")
    return lists[0]


def _gate_and_up(into: dict[str, int], mlp: str, width: int, unsupported: Any) -> tuple[str, str | None]:
    """The modules of the pre-activation and of the linear branch, among those that feed the MLP."""
    if len(into) == 1:
        ((only, size),) = into.items()
        if size in (width, 2 * width):
            return only, only if size == 2 * width else None
        raise unsupported(f"layer 0, {only} writes {size}, and {mlp} reads {width}")
    if len(into) == 2 and set(into.values()) == {width}:
        gates = [path for path in into if "gate" in path.rpartition(".")[2]]
        if len(gates) == 1:
            return gates[0], next(path for path in into if path != gates[0])
        raise unsupported(f"layer 0: the names of {' and '.join(into)} do not tell which is the gate")
    if not into:
        raise unsupported(f"layer 0 has no linear module that feeds {mlp}")
    raise unsupported(f"layer 0 has {', '.join(into)} beside {mlp}, and it is unclear which of them feeds it")


def _linear_shapes(block: nn.Module) -> dict[str, tuple[int, int]]:
    """Path -> (outputs, inputs) of every linear module, in order of registration."""
    shapes = {}
    for path, module in block.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            shapes[path] = (weight.shape[0], weight.shape[1])
        elif type(module).__name__ == "Conv1D":
            shapes[path] = (weight.shape[1], weight.shape[0])
    return shapes


def _conv(block: nn.Module, path: str) -> bool:
    return type(block.get_submodule(path)).__name__ == "Conv1D"


def _inside(path: str, parent: str) -> bool:
    return path.startswith(f"{parent}.")


def _expert_forms(gate: str, flipped: bool) -> Iterator[StoredForm]:
    """Common names and shapes of down_proj of fused experts in checkpoints."""
    for experts in (gate, "block_sparse_moe.experts"):
        for name in ("down_proj", "w2"):
            yield StoredForm(f"{experts}.{{expert}}.{name}.weight")
    yield StoredForm(f"{gate}.down_proj", flipped, fused=True)
    yield StoredForm("block_sparse_moe.output_linear.weight", fused=True)


def _prefixes(layers: str, base: str) -> tuple[str, ...]:
    """Prefixes of names on disk: as in memory, without the base model's name, or of old wrappers."""
    wrapped = layers.replace("model.language_model.", "language_model.model.", 1)
    return tuple(dict.fromkeys(f"{path}." for path in (layers, layers.removeprefix(f"{base}."), wrapped)))


def _number(text: Any, attribute: str) -> str | None:
    value = getattr(text, attribute, None)
    return attribute if isinstance(value, int | float) and not isinstance(value, bool) else None
