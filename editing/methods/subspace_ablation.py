"""Subspace ablation: removes a language's subspace from the output of modules.

With M [d, r] an orthonormal basis, W [d, n] the output weight of attention or MLP and b its bias:

    W' = W - lambda M M^T W        b' = b - lambda M M^T b

When Less Language is More (arXiv 2505.15257) removes the subspace from the hidden states of middle layers,
h' = h - lambda M M^T h, and adds it back in the top layers with a negative lambda.  Here the modules of a layer
write less (or more) of it permanently.  M is the subspace of a direction, or the span of several directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from editing.directions.direction import Direction
from editing.methods.material import Material
from editing.methods.method import Method, Settings
from editing.methods.scope import (
    FROM_LINE,
    OWN,
    SITE_LINE,
    chosen_layers,
    chosen_modules,
    chosen_places,
    output_bias,
    require_site,
    require_strength,
    site_of,
    vector_at,
)
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS
from neurons.errors import BrocaError, UsageError
from neurons.models.source import ModelSource
from neurons.setting import Range, setting

# Minimum length of a unit vector after projecting out those before it; less is rounding.
MIN_REMAINDER = 1e-6


def orthonormal(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An orthonormal basis of the columns' span, by QR.

    Args:
        vectors: [d, r], of any length.

    Returns:
        (float64 [d, r], bool [r]): the basis, and whether a column depends on those before it; the basis is only
        valid if none does.
    """
    lengths = vectors.double().norm(dim=0)
    basis, triangle = torch.linalg.qr(vectors.double() / torch.where(lengths > 0, lengths, 1.0))
    remainder = torch.zeros(vectors.shape[1], dtype=torch.float64)
    remainder[: len(triangle)] = triangle.diagonal().abs()
    return basis, ~(remainder > MIN_REMAINDER)


def subspace_ablation(
    weight: torch.Tensor, basis: torch.Tensor, strength: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """M, float64 [d, r], and -lambda W^T M, float64 [n, r], of W' = W - lambda M (W^T M)^T of one output weight.

    Args:
        weight: [d, n].
        basis: M [d, r], orthonormal columns.
        strength: lambda; 1 removes the subspace, a negative one amplifies it.

    Raises:
        UsageError: a strength that is 0 or not finite.
        BrocaError: columns that are not orthonormal.
    """
    require_strength(strength)
    exact = basis.double()
    error = exact.T @ exact - torch.eye(exact.shape[1], dtype=torch.float64)
    if not float(error.abs().max()) < 1e-9:
        raise BrocaError("the basis of the subspace is not orthonormal")
    return exact, -strength * (weight.double().T @ exact)


def _name(direction: Direction) -> str:
    method = direction.metadata.get("method")
    return f"{direction.source} to {direction.target}" + (f" ({method})" if method else "")


def _basis(directions: Sequence[Direction], site: str, layer: int, rank: int | None) -> torch.Tensor:
    """M of a site of a layer, float64 [d, r]."""
    if len(directions) == 1:
        columns = directions[0].subspace(site, layer).double()
        if columns.shape[1] == 0:
            raise BrocaError(f"the subspace at {site} of layer {layer} is empty: choose other layers")
        if rank is not None and not 0 < rank <= columns.shape[1]:
            raise UsageError(
                f"rank {rank}: the subspace at {site} of layer {layer} has {columns.shape[1]} dimensions"
            )
        columns = columns if rank is None else columns[:, :rank]
        names = [f"column {i} of the subspace" for i in range(columns.shape[1])]
    else:
        columns = torch.stack([vector_at(direction, site, layer) for direction in directions], dim=1)
        names = [f"the direction {_name(direction)}" for direction in directions]
    if not bool(torch.isfinite(columns).all()):
        raise BrocaError(f"the subspace at {site} of layer {layer} is not finite")
    basis, dependent = orthonormal(columns)
    if bool(dependent.any()):
        index = int(dependent.nonzero()[0, 0])
        fault = "depends on those before it" if index else "has length 0"
        raise BrocaError(f"{names[index]} {fault} at {site} of layer {layer}: leave it out")
    return basis


def _module_edit(
    source: ModelSource, weights: Weights, basis: torch.Tensor, strength: float, layer: int, module: str
) -> ModuleEdit:
    weight = weights.read(layer, module)
    bias = output_bias(source, weights, layer, module)
    left, right = subspace_ablation(weight, basis, strength)
    width = source.anatomy.component_width(module, layer)
    changes = right.reshape(-1, width * basis.shape[1]).norm(dim=1)
    sizes = weight.norm(dim=0).view(-1, width).norm(dim=1)
    chosen = changes.nonzero()[:, 0]
    if not len(chosen):
        raise BrocaError(
            f"layer {layer}, {module}: its output has no component in the subspace, so there is nothing to ablate: "
            "choose other layers or blocks"
        )
    shift = None if bias is None else -strength * (basis @ (basis.T @ bias))
    return ModuleEdit(
        layer=layer,
        block=module,
        components=tuple(chosen.tolist()),
        left=left.float(),
        right=right.float(),
        bias=None if shift is None or not bool(shift.any()) else shift.float(),
        details={
            "c": torch.full((len(chosen),), -strength, dtype=torch.float64),
            "share": changes[chosen] / sizes[chosen] / abs(strength),
        },
        notes={
            "change_norm": float(right.norm()),
            "weight_norm": float(weight.norm()),
            "share": float(right.norm() / weight.norm()) / abs(strength),
        },
    )


@dataclass(frozen=True, kw_only=True)
class AblateSubspace(Method):
    """The registered method; a study uses the language subspace of its text."""

    name = "ablate-subspace"
    line = "removes a subspace from outputs; a strength below 0 amplifies it"
    source = "arXiv 2505.15257"
    needs = ("direction",)
    takes = ("layers", "blocks", "strength")

    strength: float = setting(1.0, search=Range(0.1, 2.0))
    site: str = setting("block_out", SITE_LINE, words=("block_out", OWN))
    from_layer: int | None = setting(None, FROM_LINE)
    rank: int | None = setting(None, "number of leading dimensions of the subspace; all")

    @classmethod
    def of(cls, material: Material, settings: Settings) -> AblateSubspace:
        return cls(site="block_out" if material.opened.anatomy.residual_output else OWN, **settings)

    def prepare(self, material: Material) -> Plan:
        """The plan at this strength, without a forward pass: of one direction the subspace at ``site``, of several the span.

        Raises:
            UsageError: no direction, an unknown site, module or layer, no vectors at the site, an invalid rank, or a
                strength of 0.
            BrocaError: a direction of another model, no subspace at the site, linearly dependent directions (by name),
                a norm between module and residual stream, a module without output in the subspace, or experts with
                biases.
        """
        source, blocks = material.opened, material.blocks or BLOCKS
        directions = (material.subspace,) if material.studied else material.directions
        if not directions:
            raise UsageError("name at least one direction whose subspace should be removed")
        if self.rank is not None and len(directions) > 1:
            raise UsageError(
                "a rank applies to the subspace of a single direction: leave it out with several"
            )
        require_strength(self.strength)
        require_site(source, self.site)
        for direction in directions:
            direction.require_model(source)
        if self.from_layer is not None:
            chosen_layers(source, [self.from_layer])
        weights = Weights(source)
        edits = []
        ranks: dict[str, int] = {}
        for layer, module in chosen_places(source, material.layers, blocks):
            at, subspace_layer = (
                site_of(self.site, module),
                layer if self.from_layer is None else self.from_layer,
            )
            basis = _basis(directions, at, subspace_layer, self.rank)
            ranks[f"{at} {subspace_layer}"] = basis.shape[1]
            edits.append(_module_edit(source, weights, basis, self.strength, layer, module))
        settings = {
            "layers": list(chosen_layers(source, material.layers)),
            "blocks": list(chosen_modules(blocks)),
            "site": self.site,
            "strength": self.strength,
            "from_layer": self.from_layer,
            "rank": self.rank,
            "ranks": ranks,
            "directions": [_name(direction) for direction in directions],
        }
        metadata = plan_metadata(source, self.name, settings, directions[0].provenance)
        languages = [k for direction in directions for k in (direction.source, direction.target)]
        for end in ("source", "target"):
            if len({getattr(direction, end) for direction in directions}) > 1:
                del metadata[end]
        return make_plan(edits, {**metadata, "languages": list(dict.fromkeys(languages))})
