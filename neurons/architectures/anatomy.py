"""The location of a model's neurons and heads: modules in memory, tensors on disk.

Two modules of a layer, "attn" and "mlp", write to the residual stream, each with a weight W [d, n]:

    attn: ``o_proj``    [d, A*D]; head i owns columns i*D .. (i+1)*D - 1
    mlp:  ``down_proj`` [d, I];   neuron j owns column j, its *value*

In a mixture of E experts, neuron j of expert e has the flat index e*I + j: W is [d, E*I].  The neurons of a shared
expert follow those of the others.  Layers need not be alike: n, A and D may differ, and a layer may lack either
module, or have dense neurons in a model of mixtures.  So that all layers have places for the same numbers of neurons,
indices from n on are places without a neuron.

In a model of mixtures all neurons are in groups of I, which count as experts: a shared expert's, and those of a dense
layer, are groups that every token reaches.

Sites at which hooks see activations, with their width:

    mlp_act    the pre-activation, which has the sign of the activation: the gate's output, or fc1's [I]
    mlp_up     the linear branch that multiplies act(mlp_act) in a gated MLP; else mlp_act [I]
    mlp_in     the input of down_proj [I]
    mlp_common the input of the down_proj that every token reaches, a dense MLP's or a shared expert's, times the
               factor of its output for each token; only to read
    router_in  the input of a mixture's router [d]
    router_out the router's scores of the E routed experts: the logits, or their sigmoids where a bias is added to those
               to choose experts (``layouts.Router``), without that bias; only to read
    attn_in    the input of o_proj [A*D]
    mlp_out    the output of down_proj, or of the whole mixture with its shared expert [d]
    attn_out   the output of o_proj [d]
    block_out  the residual stream after the layer [d]

Any other module with a matrix, such as ``gate_proj``, ``q_proj`` or a router, is named by its path in its layer, and one
beside the list of layers (``OUTSIDE``), as the embeddings, by its path in the model; the output embeddings are ``HEAD``.

Differences between families are in ``neurons.architectures.layouts``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from neurons.architectures.attention import NO_HEADS, SOFTMAX, head_shape, is_understood, kind_of_attention
from neurons.architectures.examination import examine, fused_experts
from neurons.architectures.layouts import SIGN_PRESERVING, Layout, Mlp, StoredForm, row_of
from neurons.architectures.offload import parameter_value
from neurons.errors import BrocaError, UsageError

SITES = ("mlp_act", "mlp_up", "mlp_in", "attn_in", "mlp_out", "attn_out", "block_out")
# Sites that exist once for each expert of a mixture.
EXPERT_SITES = ("mlp_act", "mlp_up", "mlp_in")
COMMON = "mlp_common"
ROUTER_SITES = ROUTER_IN, ROUTER_OUT = ("router_in", "router_out")
BLOCKS = ("attn", "mlp")
OUTSIDE = -1  # the "layer" of modules outside the decoder layers
HEAD = "lm_head"  # the name of the output embeddings, whatever the family calls them
HEADS_ON_DISK = ("lm_head", "embed_out")
# What a neuron set holds -> the block whose W has its columns; the site BLOCK_in has its values.
UNITS = {"neuron": "mlp", "head": "attn"}
# Block -> the site of the inputs of its output module that every token reaches.
COMMON_SITES = {"attn": "attn_in", "mlp": COMMON}


@dataclass(frozen=True)
class StoredPiece:
    """A tensor on disk, or one expert's slice of it, and the columns of W [d, n] that it holds.

    Attributes:
        tensor: name in the checkpoint.
        columns: of W.
        transposed: the piece is [columns, d] instead of [d, columns].
        index: of the piece in the tensor's first dimension; None if the piece is the whole tensor.
        count: pieces in the tensor.
        either: the piece may also have the other orientation, if the tensor's shape is that one's.
    """

    tensor: str
    columns: slice
    transposed: bool = False
    index: int | None = None
    count: int = 1
    either: bool = False

    def shape(self, residual: int) -> tuple[int, ...]:
        """The shape of the tensor for W [``residual``, n]."""
        width = self.columns.stop - self.columns.start
        of_piece = (width, residual) if self.transposed else (residual, width)
        return of_piece if self.index is None else (self.count, *of_piece)

    def stored_as(self, shape: tuple[int, ...], residual: int) -> StoredPiece:
        """The piece of a tensor of this shape, in its orientation if it may have either."""
        turned = replace(self, transposed=not self.transposed)
        other = self.either and shape != self.shape(residual) and shape == turned.shape(residual)
        return turned if other else self

    @property
    def rows(self) -> slice | None:
        """The rows of the tensor's first dimension to read; None for all."""
        return None if self.index is None else slice(self.index, self.index + 1)

    def of(self, read: torch.Tensor) -> torch.Tensor:
        """The piece as a view [d, columns] of the ``rows`` read from its tensor."""
        piece = read if self.index is None else read[0]
        return piece.T if self.transposed else piece


@dataclass(frozen=True)
class Part:
    """Columns of a layer's W [d, n] in one parameter: all of them, those of all experts, or of a shared expert.

    Attributes:
        path: of the output module in the layer; of experts, of the parameter.
        module: the linear module that writes to the residual; of experts, the module that holds them.
        parameter: name of the weight in ``module``.
        first: the first column of W.
        experts: number of experts in the parameter; None if it is a matrix.
        transposed: the parameter is [n, d], or [E, I, d].
        stored: forms in checkpoints.
        gate: of neurons, the module whose output is the pre-activation; of experts, their module.
        up: of neurons, the module of the linear branch; the gate if there is none.
        halves: whether one module computes gate and linear branch, the gate first.
        factor: the module whose sigmoid multiplies the output of a shared expert; None without one.
    """

    path: str
    module: nn.Module
    parameter: str
    first: int
    experts: int | None
    transposed: bool
    stored: tuple[StoredForm, ...]
    gate: nn.Module | None = None
    up: nn.Module | None = None
    halves: bool = False
    factor: nn.Module | None = None

    @property
    def width(self) -> int:
        """Number of columns."""
        # The weight of a quantised linear module has another shape.
        features = getattr(self.module, "in_features", None)
        if self.experts is None and isinstance(features, int):
            return features
        return int(self.weight.shape[-1]) * (self.experts or 1)

    @property
    def columns(self) -> slice:
        """Of W."""
        return slice(self.first, self.first + self.width)

    @property
    def weight(self) -> torch.Tensor:
        """[d, columns], or [E, d, I] of experts: a view of the live parameter."""
        return self.oriented(getattr(self.module, self.parameter).data)

    @property
    def values(self) -> torch.Tensor:
        """The weight, read-only; also of an offloaded or (dequantised) a quantised module."""
        return self.oriented(parameter_value(self.module, self.parameter))

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view [d, columns], or [E, d, I] of experts, of a tensor shaped like the parameter, and back."""
        return tensor.mT if self.transposed else tensor

    def cut(self, weight: torch.Tensor, chosen: slice) -> torch.Tensor:
        """A view of columns of W, all of one expert, of the part's ``weight`` or ``values``."""
        start, count = chosen.start - self.first, chosen.stop - chosen.start
        if self.experts is None:
            return weight[:, start : start + count]
        expert, first_column = divmod(start, weight.shape[-1])
        return weight[expert, :, first_column : first_column + count]

    def pieces(self, stem: str, form: StoredForm) -> tuple[StoredPiece, ...]:
        """The location on disk of the columns, if stored in this form.

        Args:
            stem: prefix of the layer's tensors.
            form: one of ``stored``.
        """
        if self.experts is None:
            return (StoredPiece(stem + form.name, self.columns, form.transposed),)
        width = self.width // self.experts
        return tuple(
            StoredPiece(
                stem + form.name.format(expert=expert),
                slice(self.first + expert * width, self.first + (expert + 1) * width),
                form.transposed,
                expert if form.fused else None,
                self.experts if form.fused else 1,
                form.either,
            )
            for expert in range(self.experts)
        )


@dataclass(frozen=True)
class Anatomy:
    """The parts of a loaded model.

    Attributes:
        layers: number of layers L.
        residual: width d of the residual stream.
        neurons: places for MLP neurons in a layer, of all experts together: the maximum over the layers.
        heads: query heads A a layer, the maximum over the layers.
        head_dim: width D of a head in the first layer with heads.
        experts: number of groups of I neurons E, with those of shared experts; 1 in a dense model.
        expert_width: neurons I of one expert; all neurons in a dense model.
        gated: whether mlp_in is act(mlp_act) times a linear branch.
        blocks: the decoder layer modules.
        gates: per layer, the module whose output is the pre-activation; of a mixture, the experts; None without
            an MLP.
        ups: per layer, the module of the linear branch; the gate if there is none.
        outputs: block name -> per layer, the linear module that writes to the residual; of a mixture,
            the experts; None where the layer has no such block.
        mixtures: per layer, the module of the mixture, None in dense layers; empty in a dense model.
        shared: per layer, the gate, linear branch and output of the shared expert, or None; empty without any.
        head_dims: per layer, the width of a head.
        attention: per layer, the kind of attention, as "softmax attention" or "linear attention".
        layout: names, in memory and on disk.
        outside: path -> module, for each matrix beside the list of layers, and for ``HEAD``.
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
    gates: tuple[nn.Module | None, ...]
    ups: tuple[nn.Module | None, ...]
    outputs: dict[str, tuple[nn.Module | None, ...]]
    mixtures: tuple[nn.Module | None, ...]
    shared: tuple[tuple[nn.Module, nn.Module, nn.Module] | None, ...]
    head_dims: tuple[int, ...]
    attention: tuple[str, ...]
    layout: Layout
    outside: Mapping[str, nn.Module] = field(default_factory=dict)
    gathered_on: torch.device | None = None

    @property
    def mixed(self) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return bool(self.mixtures)

    @property
    def residual_output(self) -> bool:
        """Whether the outputs of o_proj and down_proj are added to the residual stream, times ``multiplier``."""
        return self.layout.residual

    def multiplier(self, block: str) -> float:
        """The number of the config that multiplies a module's output on its way to the residual stream."""
        return self.layout.multipliers.get(block, 1.0)

    def mixed_in(self, layer: int) -> bool:
        """Whether the MLP of a layer is a mixture of experts."""
        return self.mixed and self.mixtures[layer] is not None

    def has(self, layer: int, block: str) -> bool:
        """Whether a layer has heads ("attn") or neurons ("mlp") that Broca understands."""
        return self.outputs[block][layer] is not None

    def layers_with(self, block: str) -> tuple[int, ...]:
        """The layers that have a block."""
        return tuple(layer for layer in range(self.layers) if self.has(layer, block))

    def unread_experts(self) -> tuple[int, ...]:
        """The layers with routed experts beside the MLP that is read and edited, as in Gemma 4."""
        return tuple(
            layer
            for layer, block in enumerate(self.blocks)
            if not self.mixed_in(layer) and fused_experts(block)
        )

    def require(self, block: str, layers: Collection[int]) -> None:
        """Check that layers have a block.

        Raises:
            UsageError: names the layers without it and what they have instead, or a layer that the model does not have.
        """
        if absent := [layer for layer in layers if not 0 <= layer < self.layers]:
            raise UsageError(
                f"{self.model_type}: layer {absent[0]}: the model has layers 0 to {self.layers - 1}"
            )
        lacking = [layer for layer in sorted(layers) if not self.has(layer, block)]
        if not lacking:
            return
        kinds = list(dict.fromkeys(self.attention[layer] for layer in lacking))
        what = ", ".join(kinds) if block == "attn" else "no MLP that Broca understands"
        where = f"layer{'s' * (len(lacking) > 1)} {', '.join(map(str, lacking))}"
        raise UsageError(
            f"{self.model_type}: {where} {'have' if len(lacking) > 1 else 'has'} {what}: "
            f"{self.component_name(block)}s are not edited there"
        )

    def width(self, site: str, layer: int | None = None) -> int:
        """Width of a site in a layer, 0 where it does not exist; None gives the maximum over the layers.

        Of a mixture's neurons, all experts together.
        """
        layers = range(self.layers) if layer is None else (layer,)
        if site == COMMON:
            return max(0 if (part := self.common(at, "mlp")) is None else part.width for at in layers)
        if site in ROUTER_SITES:
            routers = [part.weight for at in layers if (part := self.router(at)) is not None]
            return max((weight.shape[1 if site == ROUTER_IN else 0] for weight in routers), default=0)
        block = "mlp" if site in EXPERT_SITES else "attn"
        if site not in EXPERT_SITES and site != "attn_in":
            return self.residual
        if layer is None:
            return self.neurons if block == "mlp" else max(self.width(site, at) for at in range(self.layers))
        parts = self.parts(layer, block)
        return parts[-1].columns.stop if parts else 0

    def component_width(self, block: str, layer: int) -> int:
        """Columns of a module's output weight for one component: D for a head, 1 for a neuron."""
        return self.head_dims[layer] if block == "attn" else 1

    def component_name(self, block: str) -> str:
        return "head" if block == "attn" else "neuron"

    def places(self, unit: str) -> int:
        """Places for units in a layer: I neurons or A heads, the maximum over the layers."""
        return self.heads if unit == "head" else self.neurons

    def unit_counts(self, unit: str) -> tuple[int, ...]:
        """Number of neurons or heads of each layer, 0 where Broca understands none."""
        block = UNITS[unit]
        return tuple(
            self.width(f"{block}_in", layer) // max(1, self.component_width(block, layer))
            for layer in range(self.layers)
        )

    def unit_columns(self, unit: str, rows: torch.Tensor) -> torch.Tensor:
        """The columns of W of units, int64 [n, 2] (layer, column), from rows int64 [m, 2] (layer, neuron or head)."""
        every = torch.tensor([self.component_width(UNITS[unit], layer) for layer in range(self.layers)])
        widths = every[rows[:, 0]]
        offsets = torch.arange(int(widths.sum())) - (widths.cumsum(0) - widths).repeat_interleave(widths)
        columns = (rows[:, 1] * widths).repeat_interleave(widths) + offsets
        return torch.stack([rows[:, 0].repeat_interleave(widths), columns], dim=1)

    def parts(self, layer: int, block: str) -> tuple[Part, ...]:
        """The parameters that hold W, in the order of its columns; empty where the layer has no such block.

        Raises:
            UsageError: a path in a layer that the model does not have.
            BrocaError: a path that names no matrix, or that of an output module, or an architecture that was examined.
        """
        if block not in BLOCKS:
            return (self._named(layer, block),)
        module, layout = self.outputs[block][layer], self.layout
        if module is None:
            return ()
        if block == "attn":
            flipped = "attn" in layout.transposed
            return (Part(layout.outputs["attn"], module, "weight", 0, None, flipped, layout.stored["attn"]),)
        gate, up = self.gates[layer], self.ups[layer]
        mixed = self.mixed_in(layer)
        if self.mixed and not mixed and layout.dense is not None:
            return (self._dense(layout.dense, 0, gate, up, module),)
        path, flipped = layout.outputs["mlp"], "mlp" in layout.transposed
        name = path.rpartition(".")[2] if mixed else "weight"
        count = len(getattr(module, name)) if mixed else None
        halves = layout.gate == layout.up
        part = Part(path, module, name, 0, count, flipped, layout.stored["mlp"], gate, up, halves)
        shared = self.shared[layer] if self.shared and mixed else None
        if shared is None or layout.shared is None:
            return (part,)
        factor = layout.shared.factor
        of_shared = self._dense(layout.shared, part.width, *shared)
        return part, replace(
            of_shared, factor=None if factor is None else _part(self.blocks[layer], factor, layer)
        )

    def _named(self, layer: int, path: str) -> Part:
        """The matrix of a module that is not an output module."""
        if layer >= self.layers:
            raise UsageError(f"{self.model_type}: layer {layer}: the model has layers 0 to {self.layers - 1}")
        if self.layout.examined:
            raise BrocaError(
                f"{self.model_type} is not in the table of architectures, so only its output modules are known, and not "
                f"{path!r}: edit those"
            )
        module = self.outside.get(path) if layer == OUTSIDE else _found(self.blocks[layer], path)
        where = "outside its layers" if layer == OUTSIDE else f"in layer {layer}"
        weight = getattr(module, "weight", None)
        if module is None or weight is None or weight.ndim != 2:
            raise BrocaError(
                f"{self.model_type} has no module {path!r} with a matrix {where} (the experts of a mixture are one "
                "parameter, which is not supported): give the path of a linear module"
            )
        if layer != OUTSIDE:
            for block in BLOCKS:
                if any(part.module is module for part in self.parts(layer, block)):
                    raise BrocaError(
                        f"{self.model_type}: {path} {where} is its output module: call it {block!r}"
                    )
        # Only families whose linear modules are all [n, d] in memory have a transposed attention.
        flipped = layer != OUTSIDE and "attn" in self.layout.transposed
        router = self.layout.router
        if router is not None and path == router.path and self.mixed_in(layer):
            return Part(path, module, "weight", 0, None, False, router.stored)
        names: tuple[str, ...] = HEADS_ON_DISK if (layer, path) == (OUTSIDE, HEAD) else (path,)
        if layer == OUTSIDE:
            names = tuple(name.removeprefix(self.parent) for name in names)
        forms = tuple(StoredForm(f"{name}.weight", flipped) for name in names)
        return Part(path, module, "weight", 0, None, flipped, forms)

    @property
    def parent(self) -> str:
        """The prefix of the modules beside the list of layers, in memory."""
        return self.layout.layers.removesuffix(self.layout.layers.rpartition(".")[2])

    def _stems(self, layer: int, block: str, names: Collection[str]) -> list[str]:
        """The prefixes that the names of a layer's tensors, or of one outside the layers, may have on disk."""
        if layer != OUTSIDE:
            stems = [f"{prefix}{layer}." for prefix in self.layout.prefixes]
            if not self.layout.examined or any(name.startswith(tuple(stems)) for name in names):
                return stems
            return [f"{prefix}{layer}." for prefix in self._prefixes_by_structure(names)] or stems
        if block == HEAD:
            return ["", "language_model."]
        own = self.layout.layers.rpartition(".")[2] + "."
        return list(dict.fromkeys(prefix.removesuffix(own) for prefix in self.layout.prefixes))

    def _prefixes_by_structure(self, names: Collection[str]) -> list[str]:
        """The only prefix under which the output weights of as many layers are on disk; empty if there is another one."""
        tails = [form.name.format(expert=0) for forms in self.layout.stored.values() for form in forms]
        first = tuple(f".0.{tail}" for tail in tails)
        found = {
            name.removesuffix(tail[1:])
            for name in names
            if name.endswith(first)
            for tail in first
            if name.endswith(tail)
        }
        numbered = [
            prefix
            for prefix in found
            if any(name.startswith(f"{prefix}{self.layers - 1}.") for name in names)
            and not any(name.startswith(f"{prefix}{self.layers}.") for name in names)
        ]
        return numbered if len(numbered) == 1 else []

    def matrices(self, layer: int) -> list[str]:
        """The paths of the modules with a matrix, in a layer or ``OUTSIDE``, without output modules."""
        modules = self.outside if layer == OUTSIDE else dict(self.blocks[layer].named_modules())
        outputs = (
            () if layer == OUTSIDE else [part.module for block in BLOCKS for part in self.parts(layer, block)]
        )
        return sorted(
            path
            for path, module in modules.items()
            if getattr(getattr(module, "weight", None), "ndim", 0) == 2
            and not any(module is output for output in outputs)
        )

    def rows(self, layer: int, block: str) -> int:
        """Number of rows of W: d of an output module."""
        return self.residual if block in BLOCKS else int(self.parts(layer, block)[0].weight.shape[-2])

    def input_rows(self, layer: int, neurons: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows of the gates and linear branches that compute neurons.

        Args:
            layer: 0 to L - 1.
            neurons: indices, ascending.

        Returns:
            Path of a module in the layer -> int64, ascending; its rows are the neurons in their order, or, in a module
            that computes gate and linear branch, first all gates and then all branches.

        Raises:
            BrocaError: neurons of routed experts.
        """
        rows: dict[str, torch.Tensor] = {}
        for part in self.parts(layer, "mlp"):
            chosen = [
                neuron - part.first for neuron in neurons if neuron in range(part.first, part.columns.stop)
            ]
            if not chosen:
                continue
            if part.experts is not None:
                raise BrocaError(
                    f"{self.model_type}: neuron {chosen[0] + part.first} of layer {layer} belongs to a routed expert, whose "
                    "gates are in one parameter with those of the others, which is not supported"
                )
            own = torch.tensor(chosen)
            for path in self._paths_into(layer, part):
                rows[path] = torch.cat([own, own + part.width]) if part.halves else own
        return rows

    def computes_neurons(self, layer: int, path: str) -> bool:
        """Whether a module's rows are gates or linear branches of neurons."""
        return layer != OUTSIDE and any(
            path in self._paths_into(layer, part) for part in self.parts(layer, "mlp")
        )

    def _paths_into(self, layer: int, part: Part) -> list[str]:
        """The paths of the linear modules whose rows are gates or linear branches of neurons."""
        paths = {id(module): path for path, module in self.blocks[layer].named_modules()}
        into = [paths[id(module)] for module in (part.gate, part.up) if module is not None]
        rows = self.layout.gate_rows
        return [rows if rows is not None and path == self.layout.gate else path for path in into]

    def _dense(
        self, names: Mlp, first: int, gate: nn.Module | None, up: nn.Module | None, output: nn.Module
    ) -> Part:
        halves = names.gate == names.up
        return Part(names.output, output, "weight", first, None, False, names.stored, gate, up, halves)

    def common(self, layer: int, block: str) -> Part | None:
        """The part of W whose inputs every token reaches: all, or a shared expert's; None if there is none."""
        parts = self.parts(layer, block)
        if block == "mlp" and self.mixed_in(layer):
            shared = self.layout.shared
            return parts[1] if len(parts) > 1 and shared is not None and shared.added else None
        return parts[0] if parts else None

    def router(self, layer: int) -> Part | None:
        """The router of a layer's mixture, with W [E, d]; None if the layer has no mixture."""
        names = self.layout.router
        return None if names is None or not self.mixed_in(layer) else self._named(layer, names.path)

    def bias_place(self, layer: int, block: str) -> tuple[nn.Module, str] | None:
        """The module and the name in it of the bias of an output module, or of a router's bias [E]; None without one.

        Raises:
            BrocaError: the experts of a mixture, which have no common bias, or another module than these.
        """
        if block == "mlp" and self.mixed_in(layer):
            raise BrocaError(
                f"{self.model_type}: the experts of a mixture have no common bias: use the attention's"
            )
        names = self.layout.router
        if block in BLOCKS:
            module = self.outputs[block][layer]
            has_bias = module is not None and isinstance(getattr(module, "bias", None), nn.Parameter)
            return (module, "bias") if module is not None and has_bias else None
        if names is None or block != names.path or layer == OUTSIDE or not self.mixed_in(layer):
            raise BrocaError(f"{self.model_type}: {block} gets no bias: only output modules and routers do")
        path, _, name = (names.bias or "").rpartition(".")
        owner = None if names.bias is None else _found(self.blocks[layer], path)
        bias = getattr(owner, name, None)
        return None if owner is None or not isinstance(bias, torch.Tensor) else (owner, name)

    def part_of(self, layer: int, block: str, column: int) -> Part:
        """The part that holds a column of W."""
        return next(part for part in self.parts(layer, block) if column < part.columns.stop)

    def weight_values(self, layer: int, block: str) -> torch.Tensor:
        """W [d, n], for the MLP of a mixture [E, d, I] without a shared expert: ``Part.values``."""
        return self.parts(layer, block)[0].values

    def output_norms(self, layer: int, block: str) -> torch.Tensor:
        """The norms of the columns of W, float64 [n], on the weight's device."""
        parts = self.parts(layer, block)
        return torch.cat([part.values.double().norm(dim=-2).flatten() for part in parts])

    def output_bias(self, layer: int, block: str) -> torch.Tensor | None:
        """The bias of a module as a view of the live tensor; None without one.

        Raises:
            BrocaError: as ``bias_place``.
        """
        place = self.bias_place(layer, block)
        if place is None:
            return None
        bias: torch.Tensor = getattr(*place)
        return bias.data

    def supports_bias(self, block: str) -> bool:
        """Whether a checkpoint of this architecture can have a bias in the output module."""
        layers = self.layers_with(block)
        if not layers or (block == "mlp" and self.mixed):
            return False
        return self.output_bias(layers[0], block) is not None or block in self.layout.bias_switches

    def stored_bias(self, layer: int, block: str, names: Collection[str]) -> str:
        """The name of the tensor of a bias, which need not be in the checkpoint.

        Of an output module it is the name of the weight with another ending.
        """
        router = self.layout.router
        if block not in BLOCKS and router is not None and router.bias is not None:
            possible = [
                stem + name
                for stem in self._stems(layer, block, names)
                for name in router.bias_names or (router.bias,)
            ]
            return next((name for name in possible if name in names), possible[0])
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

    def columns(self, layer: int, block: str, chosen: slice) -> torch.Tensor:
        """A view [d, columns] of columns of W, all of one expert, of the live parameter."""
        part = self.part_of(layer, block, chosen.start)
        return part.cut(part.weight, chosen)

    def value(self, layer: int, neuron: int) -> torch.Tensor:
        """A neuron's value [d], a view of the live parameter."""
        return self.columns(layer, "mlp", slice(neuron, neuron + 1))[:, 0]

    def tensor_name(self, layer: int, block: str, names: Collection[str]) -> str:
        """The name of an output weight in a checkpoint with tensors of these names; * stands for an expert."""
        parts = self.parts(layer, block)
        form = parts[0].stored[0] if parts else self.layout.stored[block][0]
        stems = self._stems(layer, block, names)
        used = next((stem for stem in stems if any(name.startswith(stem) for name in names)), stems[0])
        return used + form.name.format(expert="*")

    def stored(self, layer: int, block: str, names: Collection[str]) -> tuple[StoredPiece, ...]:
        """The location of W in a checkpoint: pieces that cover its columns once.

        Args:
            layer: 0 to L - 1.
            block: "attn" or "mlp", or the path of another module.
            names: of the tensors in the checkpoint.

        Raises:
            BrocaError: a tensor is missing, or the weight exists under two names.
            UsageError: the layer has no such block.
        """
        if block in BLOCKS:
            self.require(block, [layer])
        return tuple(
            piece for part in self.parts(layer, block) for piece in self._stored(layer, block, part, names)
        )

    def _stored(self, layer: int, block: str, part: Part, names: Collection[str]) -> tuple[StoredPiece, ...]:
        complete: list[tuple[StoredPiece, ...]] = []
        missing: list[str] = []
        stems = self._stems(layer, block, names)
        for stem in stems:
            for form in part.stored:
                pieces = part.pieces(stem, form)
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
            usual = part.pieces(stems[0], part.stored[0])[0].tensor
            name = missing[0] if missing else usual
            if layer == OUTSIDE:
                raise BrocaError(
                    f"the checkpoint has no tensor {name!r}: if {block} is tied to the embeddings, edit those"
                )
            fix = (
                "the names for this architecture are unknown"
                if self.layout.examined
                else "download or save it again completely"
            )
            raise BrocaError(f"the checkpoint has no tensor {name!r}: {fix}")
        return complete[0]


def layout_of(config: Any) -> Layout | None:
    """The layout of a config, before any weight is read; None for an architecture that is not in the table.

    Raises:
        BrocaError: an activation that does not preserve signs, or a setting that bypasses the modules.
    """
    layout = row_of(config)
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
            missing or has an unexpected shape.
    """
    config = model.config.get_text_config()
    layout = layout_of(model.config)
    if layout is None:
        layout = examine(model)
        _check_activation(config, layout)
    blocks = tuple(_submodule(model, layout.layers).children())
    path = layout.outputs["attn"]
    attention = [kind_of_attention(config, layer, block) for layer, block in enumerate(blocks)]
    for layer, block in enumerate(blocks) if layout.examined else ():
        output: Any = _found(block, path)
        width = 0 if output is None else output.weight.shape[0 if "attn" in layout.transposed else 1]
        count, size = head_shape(config, layer, block, path, width) if width else (0, 0)
        if count * size != width:
            attention[layer] = NO_HEADS
    anatomy = assembled(
        layout,
        model.config.model_type,
        blocks,
        residual=config.hidden_size,
        heads=lambda layer, width: head_shape(config, layer, blocks[layer], path, width),
        attention=attention,
    )
    outside = {
        anatomy.parent + name: module
        for name, module in _submodule(model, anatomy.parent.removesuffix(".")).named_children()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    }
    head = model.get_output_embeddings()
    return replace(anatomy, outside=outside if head is None else {**outside, HEAD: head})


def assembled(
    layout: Layout,
    model_type: str,
    blocks: tuple[nn.Module, ...],
    *,
    residual: int,
    heads: Callable[[int, int], tuple[int, int]],
    attention: Sequence[str] | None = None,
) -> Anatomy:
    """Find and measure the parts of decoder layers with a known layout.

    Args:
        layout: of the family, resolved for this model.
        blocks: the decoder layers, each with at least the modules that the layout names.
        residual: width d of the residual stream.
        heads: (layer, input width of o_proj) -> query heads A and width D of a head.
        attention: per layer, the kind of attention; None: softmax attention in all.

    Raises:
        BrocaError: no layers, or a module that is missing or has an unexpected shape.
    """
    if not blocks:
        raise BrocaError(f"{model_type} has no layers: set their number in config.json")
    kinds = tuple(attention or [SOFTMAX] * len(blocks))
    return _measured(
        Anatomy(
            model_type=model_type,
            layers=len(blocks),
            residual=residual,
            neurons=0,
            heads=0,
            head_dim=0,
            experts=1,
            expert_width=0,
            gated=layout.up is not None,
            head_dims=(),
            attention=kinds,
            layout=layout,
            **_modules(layout, blocks, kinds),
        ),
        heads,
    )


def with_modules_of(anatomy: Anatomy, model: Any) -> Anatomy:
    """The same anatomy with the modules of another copy of the model, as one with quantised weights.

    Args:
        anatomy: of the model built from its config.
        model: the same model with quantised linear modules.
    """
    blocks = tuple(_submodule(model, anatomy.layout.layers).children())
    return replace(anatomy, **_modules(anatomy.layout, blocks, anatomy.attention))


def _modules(layout: Layout, blocks: tuple[nn.Module, ...], attention: Sequence[str]) -> dict[str, Any]:
    """The fields of an Anatomy that hold modules."""
    mixed = layout.mixture is not None
    usual = {name: path for name, path in layout.outputs.items() if name != "mlp" or not mixed}
    columns: dict[str, list[Any]] = {name: [] for name in ("attn", "mlp", "gate", "up", "mixture", "shared")}
    for layer, block in enumerate(blocks):
        attn = _found(block, usual["attn"]) if is_understood(attention[layer]) else None
        columns["attn"].append(attn)
        experts = _found(block, layout.gate) if mixed else None
        dense = layout.dense if mixed and experts is None else None
        if experts is not None:
            columns["mlp"].append(experts)
            columns["gate"].append(experts)
            columns["up"].append(experts)
            columns["mixture"].append(_part(block, layout.mixture or "", layer))
            columns["shared"].append(_modules_of(block, layout.shared, layer))
            continue
        names = dense if mixed else Mlp(usual["mlp"], layout.gate, layout.up)
        found = _modules_of(block, names, layer)
        if attn is None and found is None and is_understood(attention[layer]):
            # Raises, as neither block was found.
            _part(block, usual["attn"], layer)
        for name, module in zip(("gate", "up", "mlp"), found or (None, None, None), strict=True):
            columns[name].append(module)
        columns["mixture"].append(None)
        columns["shared"].append(None)
    return {
        "blocks": blocks,
        "gates": tuple(columns["gate"]),
        "ups": tuple(columns["up"]),
        "outputs": {name: tuple(columns[name]) for name in BLOCKS},
        "mixtures": tuple(columns["mixture"]) if mixed else (),
        "shared": tuple(columns["shared"]) if layout.shared is not None else (),
    }


def _modules_of(
    block: nn.Module, names: Mlp | None, layer: int
) -> tuple[nn.Module, nn.Module, nn.Module] | None:
    """The gate, the linear branch and the output of an MLP; None if the layer lacks the output."""
    output = None if names is None else _found(block, names.output)
    if names is None or output is None:
        return None
    return _part(block, names.gate, layer), _part(block, names.up or names.gate, layer), output


def _measured(anatomy: Anatomy, heads: Callable[[int, int], tuple[int, int]]) -> Anatomy:
    """The same anatomy with its neurons and heads counted, after a check of all shapes."""
    d = anatomy.residual
    for layer, module in enumerate(anatomy.mixtures):
        experts_module = anatomy.gates[layer]
        if module is None:
            continue
        if getattr(experts_module, "has_post_expert_norm", False):
            raise BrocaError(
                f"layer {layer}, {anatomy.layout.gate}: experts with a norm after them are not supported"
            )
    shapes: list[tuple[int, int]] = []
    widths: list[int] = []
    for layer in range(anatomy.layers):
        parts = anatomy.parts(layer, "attn") + anatomy.parts(layer, "mlp")
        for part in parts:
            if part.weight.shape[-2] != d:
                raise BrocaError(
                    f"layer {layer}, {part.path}: its weight is {tuple(part.weight.shape)} and does not write "
                    f"{d} numbers"
                )
            width = _gate_width(part)
            if width is not None and width != part.width:
                raise BrocaError(
                    f"layer {layer}, {part.path}: its weight is {tuple(part.weight.shape)} where the gate implies "
                    f"{(d, width)}"
                )
        width = anatomy.width("attn_in", layer)
        shapes.append(heads(layer, width) if width else (0, 0))
        if shapes[-1][0] * shapes[-1][1] != width:
            expected = (d, shapes[-1][0] * shapes[-1][1])
            raise BrocaError(
                f"layer {layer}, {anatomy.layout.outputs['attn']}: its weight is {(d, width)} where the config "
                f"implies {expected}"
            )
        widths.append(anatomy.width("mlp_in", layer))
    experts, width = 1, max(widths)
    if anatomy.mixed:
        sizes = {
            part.weight.shape[-1]
            for at in range(anatomy.layers)
            for part in anatomy.parts(at, "mlp")
            if part.experts
        }
        # Without a layer of experts, all neurons are one group.
        width = max(sizes, default=width)
        if len(sizes) > 1:
            raise BrocaError(
                f"{anatomy.model_type}: its layers have experts of {sorted(sizes)} neurons, which is not supported"
            )
        experts = -(-max(widths) // width) if width else 1
    return replace(
        anatomy,
        neurons=experts * width,
        experts=experts,
        expert_width=width,
        heads=max(count for count, _ in shapes),
        head_dim=next((size for _, size in shapes if size), 0),
        head_dims=tuple(size for _, size in shapes),
    )


def _gate_width(part: Part) -> int | None:
    """The neurons that the gate writes; None if it is no linear module, as of experts."""
    weight = getattr(part.gate, "weight", None)
    if part.experts is not None or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
        return None
    rows = part.oriented(weight).shape[-2]
    return rows // 2 if part.halves else rows


def _found(block: nn.Module, path: str) -> nn.Module | None:
    return dict(block.named_modules()).get(path)


def _submodule(parent: nn.Module, path: str) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError as error:
        raise BrocaError(f"{type(parent).__name__} has no module {path!r}") from error


def _part(block: nn.Module, path: str, layer: int) -> nn.Module:
    try:
        return block.get_submodule(path)
    except AttributeError as error:
        raise BrocaError(f"layer {layer} ({type(block).__name__}) has no module {path!r}") from error


def output_module(anatomy: Anatomy, site: str, layer: int) -> nn.Module | None:
    """The module whose output is at a site of width d, or None where the layer has none."""
    if site == "block_out":
        return anatomy.blocks[layer]
    if site == "mlp_out" and anatomy.mixed_in(layer):
        return anatomy.mixtures[layer]
    return anatomy.outputs[site.partition("_")[0]][layer]


def first(value: Any) -> torch.Tensor:
    """The hidden states in a module's input or output, which may be a tuple or a list."""
    tensor: torch.Tensor = value[0] if isinstance(value, tuple | list) else value
    return tensor
