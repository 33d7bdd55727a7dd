"""Where a model keeps its neurons and heads: modules in memory, tensors on disk.

The only place that knows architectures.  Two blocks of a layer write to the residual stream:

    attn: ``o_proj``    [d, A*D]; head i owns columns i*D .. (i+1)*D - 1
    mlp:  ``down_proj`` [d, I];   neuron j owns column j, its *value*

Sites, where activations are read, with their width:

    mlp_act    the gate's pre-activation [I]; its sign is that of act(gate)
    mlp_in     the input of down_proj [I], act(gate) * up
    attn_in    the input of o_proj [A*D]
    mlp_out    the output of down_proj [d]
    attn_out   the output of o_proj [d]
    block_out  the residual stream after the layer [d]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neurons.errors import BrocaError

SITES = ("mlp_act", "mlp_in", "attn_in", "mlp_out", "attn_out", "block_out")
BLOCKS = ("attn", "mlp")

# Activations that are positive exactly where their input is, so that LAPE may count the input's sign.
SIGN_PRESERVING = (
    "silu", "swish", "relu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How one architecture family names its parts.

    Attributes:
        layers: path of the list of decoder layers from the causal language model.
        gate: path of the module whose output is the pre-activation, from a layer.
        outputs: block -> path of the linear module that writes to the residual, from a layer.
        tensors: block -> name of that module's weight in the checkpoint, with ``{layer}``.
        residual: whether the modules' outputs are added to the residual as they are (no norm after).
    """

    layers: str
    gate: str
    outputs: dict[str, str]
    tensors: dict[str, str]
    residual: bool = True


_GATED = Layout(
    layers="model.layers",
    gate="mlp.gate_proj",
    outputs={"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"},
    tensors={
        "attn": "model.layers.{layer}.self_attn.o_proj.weight",
        "mlp": "model.layers.{layer}.mlp.down_proj.weight",
    },
)

# model_type of the config -> layout
LAYOUTS: dict[str, Layout] = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma": _GATED,
}


@dataclass(frozen=True)
class Anatomy:
    """The parts of a loaded model.

    Attributes:
        model_type: the config's.
        layers: number of layers L.
        residual: width d of the residual stream.
        neurons: MLP width I.
        heads: query heads A a layer.
        head_dim: width D of a head.
        blocks: the decoder layer modules.
        gates: per layer, the module whose output's sign is the neuron's.
        outputs: block name -> per layer, the linear module that writes to the residual.
        layout: names, for the checkpoint on disk.
    """

    model_type: str
    layers: int
    residual: int
    neurons: int
    heads: int
    head_dim: int
    blocks: tuple[nn.Module, ...]
    gates: tuple[nn.Module, ...]
    outputs: dict[str, tuple[nn.Linear, ...]]
    layout: Layout

    def tensor_name(self, layer: int, block: str) -> str:
        """The weight [d, width] of a block's output module, as the checkpoint on disk calls it."""
        return self.layout.tensors[block].format(layer=layer)

    def width(self, site: str) -> int:
        """Width of a site."""
        if site in ("mlp_act", "mlp_in"):
            return self.neurons
        return self.heads * self.head_dim if site == "attn_in" else self.residual

    def component_width(self, block: str) -> int:
        """Columns of a block's output weight that one component owns: D for a head, 1 for a neuron."""
        return self.head_dim if block == "attn" else 1

    def component_name(self, block: str) -> str:
        return "head" if block == "attn" else "neuron"


def layout_of(config: Any) -> Layout:
    """The layout of a config, before any weight is read.

    Raises:
        BrocaError: an architecture that is not known, or an activation whose sign says nothing; by name.
    """
    text = config.get_text_config()
    layout = LAYOUTS.get(text.model_type)
    if layout is None:
        raise BrocaError(
            f"architecture {text.model_type!r} is not known to Broca: it knows {', '.join(LAYOUTS)}"
        )
    activation = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None)
    if activation not in SIGN_PRESERVING:
        raise BrocaError(
            f"activation {activation!r} of {text.model_type}: its sign does not follow its input's, so "
            "active neurons cannot be counted"
        )
    return layout


def anatomy_of(model: Any) -> Anatomy:
    """Find the parts of a causal language model and check their shapes.

    Raises:
        BrocaError: an architecture that is not known, an activation whose sign says nothing, or a
            module that is missing or of an unexpected shape; by name.
    """
    config = model.config.get_text_config()
    layout = layout_of(model.config)
    blocks = tuple(_submodule(model, layout.layers).children())
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    anatomy = Anatomy(
        model_type=config.model_type,
        layers=len(blocks),
        residual=config.hidden_size,
        neurons=config.intermediate_size,
        heads=heads,
        head_dim=head_dim,
        blocks=blocks,
        gates=tuple(_submodule(block, layout.gate) for block in blocks),
        outputs={
            name: tuple(_submodule(block, path) for block in blocks)  # type: ignore[misc]
            for name, path in layout.outputs.items()
        },
        layout=layout,
    )
    expected = {"attn": heads * head_dim, "mlp": anatomy.neurons}
    for block, modules in anatomy.outputs.items():
        for layer, module in enumerate(modules):
            shape = tuple(module.weight.shape)
            if shape != (anatomy.residual, expected[block]):
                raise BrocaError(
                    f"layer {layer}, {layout.outputs[block]}: its weight is {shape} where "
                    f"{(anatomy.residual, expected[block])} was expected from the config"
                )
    return anatomy


def _submodule(parent: nn.Module, path: str) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError as error:
        raise BrocaError(f"{type(parent).__name__} has no module {path!r}") from error


def site_module(anatomy: Anatomy, site: str, layer: int) -> tuple[nn.Module, bool]:
    """The module that a site is read at, and whether it is the module's input (else its output)."""
    if site == "mlp_act":
        return anatomy.gates[layer], False
    if site == "block_out":
        return anatomy.blocks[layer], False
    block, _, end = site.partition("_")
    return anatomy.outputs[block][layer], end == "in"


def first(value: Any) -> torch.Tensor:
    """The hidden states of what a module returned or was given: some return tuples."""
    tensor: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return tensor
