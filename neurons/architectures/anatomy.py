"""The location of a model's neurons and heads: modules in memory, tensors on disk.

Two modules of a layer, "attn" and "mlp", write to the residual stream, each with a weight W [d, n]:

    attn: ``o_proj``    [d, A*D]; head i owns columns i*D .. (i+1)*D - 1
    mlp:  ``down_proj`` [d, I];   neuron j owns column j, its *value*

In a mixture of E experts, neuron j of expert e has the flat index e*I + j: W is [d, E*I].

Sites at which hooks see activations, with their width:

    mlp_act    the pre-activation, which has the sign of the activation: the gate's output, or fc1's [I]
    mlp_up     the linear branch that multiplies act(mlp_act) in a gated MLP; else mlp_act [I]
    mlp_in     the input of down_proj [I]
    attn_in    the input of o_proj [A*D]
    mlp_out    the output of down_proj, or of the whole mixture [d]
    attn_out   the output of o_proj [d]
    block_out  the residual stream after the layer [d]

Differences between families are in ``neurons.architectures.layouts``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from neurons.architectures.examination import examine
from neurons.architectures.layouts import LAYOUTS, Layout, StoredForm
from neurons.architectures.offload import parameter_value
from neurons.errors import BrocaError

SITES = ("mlp_act", "mlp_up", "mlp_in", "attn_in", "mlp_out", "attn_out", "block_out")
# Sites that exist once for each expert of a mixture.
EXPERT_SITES = ("mlp_act", "mlp_up", "mlp_in")
BLOCKS = ("attn", "mlp")

# Activations that are positive exactly where their input is, so that LAPE can count the sign of the input.
SIGN_PRESERVING = (
    "silu", "swish", "relu", "relu2", "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh",
    "quick_gelu",
)  # fmt: skip


@dataclass(frozen=True)
class StoredPiece:
    """A tensor on disk, or one expert's slice of it, and the columns of W [d, n] that it holds.

    Attributes:
        tensor: name in the checkpoint.
        columns: of W.
        transposed: the piece is [columns, d] instead of [d, columns].
        index: of the piece in the tensor's first dimension; None if the piece is the whole tensor.
    """

    tensor: str
    columns: slice
    transposed: bool = False
    index: int | None = None

    @property
    def rows(self) -> slice | None:
        """The rows of the tensor's first dimension to read; None for all."""
        return None if self.index is None else slice(self.index, self.index + 1)

    def of(self, read: torch.Tensor) -> torch.Tensor:
        """The piece as a view [d, columns] of the ``rows`` read from its tensor."""
        piece = read if self.index is None else read[0]
        return piece.T if self.transposed else piece


@dataclass(frozen=True)
class Anatomy:
    """The parts of a loaded model.

    Attributes:
        model_type: from the config.
        layers: number of layers L.
        residual: width d of the residual stream.
        neurons: MLP neurons a layer, of all experts together.
        heads: query heads A a layer.
        head_dim: width D of a head.
        experts: number of experts E; 1 in a dense model.
        expert_width: neurons I of one expert; all neurons in a dense model.
        gated: whether mlp_in is act(mlp_act) times a linear branch.
        blocks: the decoder layer modules.
        gates: per layer, the module whose output is the pre-activation; of a mixture, the experts.
        ups: per layer, the module of the linear branch; the gate if there is none.
        outputs: block name -> per layer, the linear module that writes to the residual; of a mixture,
            the experts.
        mixtures: per layer, the module of the mixture; empty in a dense model.
        layout: names, in memory and on disk.
        gathered_on: for a model on several devices, the device on which hooks get values; None for the device
            that computes them.
    """

    model_type: str
    layers: int
    residual: int
    neurons: int
    heads: int
    head_dim: int
    experts: int
    expert_width: int
    gated: bool
    blocks: tuple[nn.Module, ...]
    gates: tuple[nn.Module, ...]
    ups: tuple[nn.Module, ...]
    outputs: dict[str, tuple[nn.Module, ...]]
    mixtures: tuple[nn.Module, ...]
    layout: Layout
    gathered_on: torch.device | None = None

    @property
    def mixed(self) -> bool:
        """Whether the MLP is a mixture of experts."""
        return bool(self.mixtures)

    @property
    def residual_output(self) -> bool:
        """Whether the outputs of o_proj and down_proj are added to the residual stream unchanged."""
        return self.layout.residual

    def width(self, site: str) -> int:
        """Width of a site; of a mixture's neurons, all experts together."""
        if site in EXPERT_SITES:
            return self.neurons
        return self.heads * self.head_dim if site == "attn_in" else self.residual

    def component_width(self, block: str) -> int:
        """Columns of a module's output weight for one component: D for a head, 1 for a neuron."""
        return self.head_dim if block == "attn" else 1

    def component_name(self, block: str) -> str:
        return "head" if block == "attn" else "neuron"

    def output_parameter(self, layer: int, block: str) -> nn.Parameter:
        """The parameter that holds W, in the model's shape."""
        parameter: nn.Parameter = getattr(self.outputs[block][layer], self.parameter_name(block))
        return parameter

    def parameter_name(self, block: str) -> str:
        """The name of the parameter that holds W in the module of ``outputs``."""
        return self.layout.outputs[block].rpartition(".")[2] if self._fused(block) else "weight"

    def oriented(self, block: str, tensor: torch.Tensor) -> torch.Tensor:
        """A view [d, n], or [E, d, I] of fused experts, of a tensor shaped like the parameter."""
        return tensor.mT if block in self.layout.transposed else tensor

    def output_weight(self, layer: int, block: str) -> torch.Tensor:
        """W as a view of the live parameter: writing into it edits the model.

        Returns:
            [d, n]; for the MLP of a mixture [E, d, I].
        """
        return self.oriented(block, self.output_parameter(layer, block).data)

    def weight_values(self, layer: int, block: str) -> torch.Tensor:
        """W as in ``output_weight``, read-only; also of an offloaded or (dequantised) a quantised module."""
        module = self.outputs[block][layer]
        return self.oriented(block, parameter_value(module, self.parameter_name(block)))

    def output_bias(self, layer: int, block: str) -> torch.Tensor | None:
        """The bias [d] of an output module as a view of the live parameter; None without a bias.

        Raises:
            BrocaError: the experts of a mixture, which have no common bias.
        """
        if self._fused(block):
            raise BrocaError(
                f"{self.model_type}: the experts of a mixture have no common bias: use the attention's"
            )
        bias = getattr(self.outputs[block][layer], "bias", None)
        return bias.data if isinstance(bias, nn.Parameter) else None

    def supports_bias(self, block: str) -> bool:
        """Whether a checkpoint of this architecture can have a bias in the output module."""
        if self._fused(block):
            return False
        return self.output_bias(0, block) is not None or block in self.layout.bias_switches

    def stored_bias(self, layer: int, block: str, names: Collection[str]) -> str:
        """The name of the tensor of an output bias, which need not be in the checkpoint.

        It is the name of the weight with another ending.
        """
        (piece,) = self.stored(layer, block, names)
        return f"{piece.tensor.removesuffix('.weight')}.bias"

    def switched_biases(self, layer: int, block: str, names: Collection[str]) -> dict[str, int]:
        """Names and lengths of the tensors that the bias switch requires in one layer.

        Raises:
            BrocaError: the architecture has no such switch.
        """
        switch = self.layout.bias_switches.get(block)
        if switch is None:
            raise BrocaError(
                f"{self.model_type}: its {self.layout.outputs[block]} has no bias, and its config cannot add "
                "one: bake the vector into the weights instead"
            )
        output = self.layout.outputs[block]
        stem = self.stored_bias(layer, block, names).removesuffix(f"{output}.bias")
        lengths = {}
        for path in switch.modules:
            module = _part(self.blocks[layer], path, layer)
            lengths[f"{stem}{path}.bias"] = int(module.get_parameter("weight").shape[0])
        return lengths

    def columns(self, block: str, weight: torch.Tensor, chosen: slice) -> torch.Tensor:
        """A view of columns, all of one expert, of a weight from ``output_weight`` or ``oriented``."""
        if not self._fused(block):
            return weight[:, chosen]
        expert, first = divmod(chosen.start, self.expert_width)
        return weight[expert, :, first : first + chosen.stop - chosen.start]

    def value(self, layer: int, neuron: int) -> torch.Tensor:
        """A neuron's value [d], a view of the live parameter."""
        return self.columns("mlp", self.output_weight(layer, "mlp"), slice(neuron, neuron + 1))[:, 0]

    def tensor_name(self, layer: int, block: str) -> str:
        """The usual name of an output weight in the family's checkpoints; * stands for an expert."""
        form = self.layout.stored[block][0]
        return f"{self.layout.prefixes[0]}{layer}.{form.name.format(expert='*')}"

    def stored(self, layer: int, block: str, names: Collection[str]) -> tuple[StoredPiece, ...]:
        """The location of W in a checkpoint: pieces that cover its columns once.

        Args:
            layer: 0 to L - 1.
            block: "attn" or "mlp".
            names: of the tensors in the checkpoint.

        Raises:
            BrocaError: a tensor is missing, or the weight exists under two names.
        """
        complete: list[tuple[StoredPiece, ...]] = []
        missing: list[str] = []
        for prefix in self.layout.prefixes:
            for form in self.layout.stored[block]:
                pieces = self._pieces(f"{prefix}{layer}.", form, block)
                absent = [piece.tensor for piece in pieces if piece.tensor not in names]
                if not absent:
                    complete.append(pieces)
                # Some experts of a mixture are missing: name the first.
                elif len(absent) < len(pieces):
                    missing.append(absent[0])
        if len(complete) > 1:
            raise BrocaError(
                f"the checkpoint has the {block} weight of layer {layer} twice, as {complete[0][0].tensor!r} "
                f"and as {complete[1][0].tensor!r}: keep the one that transformers loads"
            )
        if not complete:
            name = missing[0] if missing else self.tensor_name(layer, block).replace("*", "0")
            fix = (
                "the names for this architecture are unknown"
                if self.layout.examined
                else "download or save it again completely"
            )
            raise BrocaError(f"the checkpoint has no tensor {name!r}: {fix}")
        return complete[0]

    def _fused(self, block: str) -> bool:
        return self.mixed and block == "mlp"

    def _pieces(self, stem: str, form: StoredForm, block: str) -> tuple[StoredPiece, ...]:
        if not self._fused(block):
            return (StoredPiece(stem + form.name, slice(0, self.width(f"{block}_in")), form.transposed),)
        width = self.expert_width
        return tuple(
            StoredPiece(
                stem + form.name.format(expert=expert),
                slice(expert * width, (expert + 1) * width),
                form.transposed,
                expert if form.fused else None,
            )
            for expert in range(self.experts)
        )


def layout_of(config: Any) -> Layout | None:
    """The layout of a config, before any weight is read; None for an architecture that is not in the table.

    Raises:
        BrocaError: an activation that does not preserve signs, or a setting that bypasses the modules.
    """
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        return None
    text = config.get_text_config()
    if layout.bypassed_by is not None and getattr(text, layout.bypassed_by, False):
        raise BrocaError(
            f"{config.model_type} with {layout.bypassed_by}: it computes without calling its modules, so "
            f"hooks see no activations: set {layout.bypassed_by} to false in config.json"
        )
    _check_activation(text, layout)
    return layout.for_config(text)


def _check_activation(text: Any, layout: Layout) -> None:
    activation = None if layout.activation is None else getattr(text, layout.activation, None)
    if layout.activation is not None and activation not in SIGN_PRESERVING:
        raise BrocaError(
            f"activation {activation!r} of {text.model_type}: it does not preserve the sign of its input, "
            "so active neurons cannot be counted"
        )


def anatomy_of(model: Any) -> Anatomy:
    """Find the parts of a causal language model and check their shapes.

    An architecture that is not in the table is examined by its structure; ``layout.examined`` is then true
    and the anatomy is valid only if ``neurons.architectures.self_check`` passes.

    Raises:
        BrocaError: a part that is not found, an activation that does not preserve signs, or a module that is
            missing, has an unexpected shape or differs from the other layers'.
    """
    config = model.config.get_text_config()
    layout = layout_of(model.config)
    if layout is None:
        layout = examine(model)
        _check_activation(config, layout)
    heads = config.num_attention_heads
    return assembled(
        layout,
        model.config.model_type,
        tuple(_submodule(model, layout.layers).children()),
        residual=config.hidden_size,
        heads=heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def assembled(
    layout: Layout,
    model_type: str,
    blocks: tuple[nn.Module, ...],
    *,
    residual: int,
    heads: int,
    head_dim: int,
) -> Anatomy:
    """Find and measure the parts of decoder layers with a known layout.

    Args:
        layout: of the family, resolved for this model.
        model_type: from the config.
        blocks: the decoder layers, each with at least the modules that the layout names.
        residual: width d of the residual stream.
        heads: query heads A a layer.
        head_dim: width D of a head.

    Raises:
        BrocaError: no layers, or a module that is missing, has an unexpected shape or differs from the other
            layers'.
    """
    if not blocks:
        raise BrocaError(f"{model_type} has no layers: set their number in config.json")
    return _measured(
        Anatomy(
            model_type=model_type,
            layers=len(blocks),
            residual=residual,
            neurons=0,
            heads=heads,
            head_dim=head_dim,
            experts=1,
            expert_width=0,
            gated=layout.up is not None,
            layout=layout,
            **_modules(layout, blocks),
        )
    )


def with_modules_of(anatomy: Anatomy, model: Any) -> Anatomy:
    """The same anatomy with the modules of another copy of the model, as one with quantised weights.

    Args:
        anatomy: of the model built from its config.
        model: the same model with quantised linear modules.
    """
    blocks = tuple(_submodule(model, anatomy.layout.layers).children())
    return replace(anatomy, **_modules(anatomy.layout, blocks))


def _modules(layout: Layout, blocks: tuple[nn.Module, ...]) -> dict[str, Any]:
    """The fields of an Anatomy that hold modules."""
    paths = dict(layout.outputs)
    if layout.mixture is not None:
        paths["mlp"] = layout.gate
    outputs = {
        block: tuple(_part(module, path, layer) for layer, module in enumerate(blocks))
        for block, path in paths.items()
    }
    gates = tuple(_part(block, layout.gate, layer) for layer, block in enumerate(blocks))
    ups = tuple(_part(block, layout.up or layout.gate, layer) for layer, block in enumerate(blocks))
    mixtures = (
        ()
        if layout.mixture is None
        else tuple(_part(block, layout.mixture, layer) for layer, block in enumerate(blocks))
    )
    return {"blocks": blocks, "gates": gates, "ups": ups, "outputs": outputs, "mixtures": mixtures}


def _measured(anatomy: Anatomy) -> Anatomy:
    """The same anatomy with its neurons counted, after a check that all layers have the same shapes."""
    d, layout = anatomy.residual, anatomy.layout
    counted = {"attn": anatomy.heads * anatomy.head_dim}
    first_mlp = tuple(anatomy.output_weight(0, "mlp").shape)
    experts, width = (first_mlp[0], first_mlp[2]) if anatomy.mixed else (1, first_mlp[-1])
    for block in BLOCKS:
        fused = anatomy.mixed and block == "mlp"
        expected = (experts, d, width) if fused else (d, counted.get(block, width))
        for layer in range(anatomy.layers):
            shape = tuple(anatomy.output_weight(layer, block).shape)
            if shape != expected:
                source = "the other layers have" if layer and block == "mlp" else "the config implies"
                raise BrocaError(
                    f"layer {layer}, {layout.outputs[block]}: its weight is {shape} where {source} {expected}"
                )
    for layer, experts_module in enumerate(anatomy.outputs["mlp"] if anatomy.mixed else ()):
        for attribute, expected_value in (("has_gate", True), ("has_post_expert_norm", False)):
            if getattr(experts_module, attribute, None) is not expected_value:
                raise BrocaError(
                    f"layer {layer}, {layout.gate}: this kind of experts is not supported "
                    f"({attribute} is {getattr(experts_module, attribute, None)})"
                )
    return Anatomy(
        **{
            **{name: getattr(anatomy, name) for name in Anatomy.__dataclass_fields__},
            "neurons": experts * width,
            "experts": experts,
            "expert_width": width,
        }
    )


def _submodule(parent: nn.Module, path: str) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError as error:
        raise BrocaError(f"{type(parent).__name__} has no module {path!r}") from error


def _part(block: nn.Module, path: str, layer: int) -> nn.Module:
    try:
        return block.get_submodule(path)
    except AttributeError as error:
        raise BrocaError(
            f"layer {layer} ({type(block).__name__}) has no module {path!r}: all layers must have "
            "the same structure"
        ) from error


def site_module(anatomy: Anatomy, site: str, layer: int) -> tuple[nn.Module, bool]:
    """The module of a site, and whether the site is its input (else its output).

    Not for the neurons of a mixture, which have no modules of their own.
    """
    if site == "mlp_act":
        return anatomy.gates[layer], False
    if site == "mlp_up":
        return anatomy.ups[layer], False
    if site == "block_out":
        return anatomy.blocks[layer], False
    if site == "mlp_out" and anatomy.mixed:
        return anatomy.mixtures[layer], False
    block, _, end = site.partition("_")
    return anatomy.outputs[block][layer], end == "in"


def first(value: Any) -> torch.Tensor:
    """The hidden states in a module's input or output, which may be a tuple."""
    tensor: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return tensor
