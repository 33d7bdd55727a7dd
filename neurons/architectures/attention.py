"""The attention of a decoder layer: its kind, and the number and the width of its heads.

A config may name the kind of each layer, have its own config for each, or have one number or a list of heads.
"""

from __future__ import annotations

from typing import Any

from torch import nn

SOFTMAX, LINEAR = "softmax attention", "linear attention"
# Config attributes with the kind of each layer's attention.
_ATTENTION_KINDS = ("layer_types", "layers_block_type")
# Config attributes with the kind of each layer.
LAYER_KINDS = (*_ATTENTION_KINDS, "mlp_layer_types")
# Parts of the names of mixers that are not softmax attention: kind or class -> its name in messages.
_OTHERS = {
    "mamba": "a state space model (Mamba)",
    "delta": LINEAR,
    "lightning": LINEAR,
    "conv": "a convolution",
    "rwkvselfattention": "a recurrent module",
    "recurrentblock": "a recurrent module",
    "rglru": "a recurrent module",
}
NO_HEADS = "attention whose output is not computed from its heads alone"
_NO_ATTENTION = "no attention that Broca understands"


def kind_of_attention(config: Any, layer: int, block: nn.Module) -> str:
    """The kind of a layer's attention, as "softmax attention" or "linear attention".

    Args:
        config: of the language model.
    """
    named = next(
        (kinds for name in _ATTENTION_KINDS if isinstance(kinds := getattr(config, name, None), list)), None
    )
    kind = named[layer] if named is not None and layer < len(named) else ""
    if softmax_attention(block) is not None:
        return SOFTMAX
    names = (*(type(module).__name__ for module in block.children()), kind)
    other = next((of for name in names if (of := _other(name)) is not None), None)
    return other or (LINEAR if "linear" in kind else _NO_ATTENTION)


def softmax_attention(block: nn.Module) -> str | None:
    """The path of a layer's softmax attention; None without one."""
    found = [
        name
        for name, module in block.named_children()
        if "attention" in type(module).__name__.lower() and not is_other_mixer(module)
    ]
    return found[0] if found else None


def is_understood(kind: str) -> bool:
    """Whether a layer with this kind of attention has heads that Broca edits."""
    return kind == SOFTMAX


def is_other_mixer(module: nn.Module) -> bool:
    """Whether a module is a mixer of tokens that is not softmax attention."""
    return _other(type(module).__name__) is not None and not isinstance(module, nn.Linear | nn.Conv1d)


def _other(name: str) -> str | None:
    return next((of for part, of in _OTHERS.items() if part in name.lower()), None)


def head_shape(config: Any, layer: int, block: nn.Module, path: str, width: int) -> tuple[int, int]:
    """The number A of query heads of a layer and the width D of each.

    Args:
        config: of the language model.
        path: of o_proj in the layer.
        width: of o_proj's input.

    Returns:
        (A, D) with A * D = ``width``; another product where neither the module nor the config names a fitting D.
    """
    own = config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config
    count = getattr(own, "num_attention_heads", None)
    heads = count[layer] if isinstance(count, list) else count
    module: Any = block.get_submodule(path.rpartition(".")[0])
    sizes = [
        size
        for holder in (module, own)
        for name in ("v_head_dim", "head_dim", "head_size")
        if type(size := getattr(holder, name, None)) is int and size > 0
    ]
    if isinstance(heads, int) and heads > 0:
        sizes += [own.hidden_size // heads]
        for size in sizes:
            if heads * size == width:
                return heads, size
    return next(
        ((width // size, size) for size in sizes[:1] if width % size == 0), (heads or 0, (sizes or [0])[-1])
    )
