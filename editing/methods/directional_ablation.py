"""Directional ablation ("abliteration"): what a module writes along a direction is taken out of its weights.

With v^ the unit direction, s the strength and W [d, n] the output weight of attention or MLP:

    plain             W' = W - s v^ v^^T W                               (Arditi et al. 2024, arXiv 2406.11717)
    norm-preserving   W' = (W - s v^ v^^T W) diag(c),   c_j = ||w_j|| / ||w_j - s v^ v^^T w_j||
    biprojected       plain, with v <- v - m^ m^^T v first, m the neutral mean at the site

so that v^^T W' = (1 - s) v^^T W diag(c): nothing of the direction is left at s = 1, all of it is turned round
at s = 2, and s < 0 amplifies.  A bias b of the module becomes b - s v^ v^^T b.  It is Steer2Edit's
amplification c = -s for every component.

Columns are renormalised and not rows: a column is what a neuron writes and keeps its length, and scaling it
leaves it orthogonal to v^, whereas scaling rows turns the columns back towards v^.  A column that lies on v^
altogether has nothing to give its length back to: it is ablated and keeps c = 1.

Biprojected (grimjim's projected and biprojected abliteration) leaves what the module writes along the
neutral mean as it was: m^T W' = m^T W.  Where one layer's direction serves all, its own layer's mean goes out
of it first and the mean of the layer that is edited last.

The published form uses one direction, of one layer, everywhere (``from_layer``) and ablates the embeddings
too; a plan reaches output modules only, so what the embeddings write along v stays in the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from editing.directions.direction import Direction
from editing.methods.material import Material
from editing.methods.method import Method, Settings
from editing.methods.neutral_mean import neutral_means
from editing.methods.reach import (
    FROM_LINE,
    OWN,
    SITE_LINE,
    chosen_blocks,
    chosen_layers,
    chosen_site,
    output_bias,
    require_strength,
    site_of,
    vector_at,
)
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS
from neurons.errors import BrocaError, UsageError
from neurons.models.source import ModelSource
from neurons.scorers.setting import Range, setting

# form -> (columns keep their lengths, the neutral mean is spared)
FORMS = {
    "plain": (False, False),
    "norm-preserving": (True, False),
    "biprojected": (False, True),
    "norm-preserving-biprojected": (True, True),
}
# What rounding to bfloat16 can leave of a column that lies on v^; no column grows by more than 1 / this.
LEAST_REST = 2**-8


@dataclass(frozen=True)
class Ablation:
    """W' = W diag(column_scale) + left right^T.

    Attributes:
        left: float64 [d], v^.
        right: float64 [n], -s c_j v^^T w_j.
        column_scale: float64 [n], c; None where columns are not renormalised.
    """

    left: torch.Tensor
    right: torch.Tensor
    column_scale: torch.Tensor | None = None


def directional_ablation(
    weight: torch.Tensor, direction: torch.Tensor, strength: float = 1.0, norm_preserving: bool = False
) -> Ablation:
    """Directional ablation of one output weight.

    Args:
        weight: [d, n].
        direction: [d], v, of any length but 0.
        strength: s; 1 removes the direction, a negative one amplifies it.
        norm_preserving: give every column its length back.

    Raises:
        UsageError: a strength that is 0 or not finite.
        BrocaError: a direction of length 0 or not finite.
    """
    require_strength(strength)
    unit = unit_vector(direction)
    exact = weight.double()
    along = unit @ exact
    if not norm_preserving:
        return Ablation(unit, -strength * along)
    before = exact.norm(dim=0)
    after = torch.addr(exact, unit, along, alpha=-strength).norm(dim=0)
    # Also a column of zeros, which has no length to keep.
    lost = after <= LEAST_REST * before
    scale = torch.where(lost, 1.0, before / torch.where(lost, 1.0, after))
    return Ablation(unit, -strength * scale * along, scale)


def unit_vector(direction: torch.Tensor) -> torch.Tensor:
    """v^, float64.

    Raises:
        BrocaError: length 0, or not finite.
    """
    length = direction.double().norm()
    if not 0 < float(length) < float("inf"):
        raise BrocaError(f"the direction has length {float(length):g}")
    unit: torch.Tensor = direction.double() / length
    return unit


def without(direction: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The direction less its component along a mean; all of it where the mean is 0.  [d] each, float64.

    Raises:
        BrocaError: nothing is left of the direction.
    """
    vector, neutral = direction.double(), mean.double()
    size = neutral.norm()
    if not size > 0:
        return vector
    neutral = neutral / size
    rest: torch.Tensor = vector - (neutral @ vector) * neutral
    # Once more: after much cancellation the first difference is not quite orthogonal.
    rest = rest - (neutral @ rest) * neutral
    if not float(rest.norm()) > 1e-9 * float(vector.norm()):
        raise BrocaError("the direction lies along the neutral mean, so nothing of it is left to ablate")
    return rest


def directional_ablation_plan(
    source: ModelSource,
    direction: Direction,
    layers: Sequence[int] | None = None,
    blocks: Sequence[str] = BLOCKS,
    form: str = "plain",
    site: str = "block_out",
    strength: float = 1.0,
    from_layer: int | None = None,
    neutral: Mapping[str, torch.Tensor] | None = None,
) -> Plan:
    """A plan that removes a direction; no forward pass.

    Args:
        source: the model.
        direction: with vectors at ``site``.
        layers: which layers; None takes all.
        blocks: of "attn" and "mlp".
        form: a key of ``FORMS``.
        site: "block_out", the direction of the residual stream, or "own", each block's at its output.
        strength: s, 1 removes the direction.
        from_layer: the layer whose direction serves all layers, as published; None takes each layer's own.
        neutral: for the biprojected forms, site -> [L, d], the mean there (``neutral_means`` takes it).  What
            is not given is taken from the direction: its mean at the site, or, at a block's own output,
            W mu + b, the mean of what the block writes on both languages.

    Raises:
        UsageError: an unknown form, site, block or layer, no vectors or no neutral mean at the site, or a
            strength of 0.
        BrocaError: another model's direction; a norm between module and residual; a direction of length 0,
            one that a module does not write along at all, or experts with biases of their own.
    """
    if form not in FORMS:
        raise UsageError(f"form {form!r} is unknown: choose from {', '.join(FORMS)}")
    norm_preserving, biprojected = FORMS[form]
    require_strength(strength)
    direction.require_model(source)
    chosen_site(source, site)
    if from_layer is not None:
        chosen_layers(source, [from_layer])
    settings = {
        "layers": list(chosen_layers(source, layers)),
        "blocks": list(chosen_blocks(blocks)),
        "form": form,
        "site": site,
        "strength": strength,
        "from_layer": from_layer,
    }
    weights = Weights(source)
    edits = []
    for layer in chosen_layers(source, layers):
        for block in chosen_blocks(blocks):
            at = site_of(site, block)
            origin = layer if from_layer is None else from_layer
            vector = vector_at(direction, at, origin)
            if not bool(vector.any()):
                raise BrocaError(f"the direction has length 0 at {at} of layer {origin}: choose other layers")
            weight = weights.read(layer, block)
            bias = output_bias(source, weights, layer, block)
            if biprojected:
                for place in dict.fromkeys((origin, layer)):
                    vector = without(vector, _neutral_mean(source, weights, direction, neutral, at, place))
            edits.append(
                _module_edit(
                    weight,
                    bias,
                    directional_ablation(weight, vector, strength, norm_preserving),
                    strength,
                    (layer, block),
                    source.anatomy.component_width(block),
                )
            )
    return make_plan(edits, plan_metadata(source, "ablate", direction, settings))


def _module_edit(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    found: Ablation,
    strength: float,
    place: tuple[int, str],
    width: int,
) -> ModuleEdit:
    layer, block = place
    if not bool(found.right.any()):
        raise BrocaError(
            f"layer {layer}, {block}: the module writes nothing along the direction, so there is nothing to "
            "ablate: choose other layers or blocks"
        )
    along = found.left @ weight
    share = _per_component(along, width) / _per_component(weight.norm(dim=0), width)
    chosen = _per_component(found.right, width).nonzero()[:, 0]
    if found.column_scale is None:
        change_norm = float(found.right.norm())
    else:
        change = torch.addr(weight * (found.column_scale - 1), found.left, found.right)
        change_norm = float(change.norm())
    shift = None if bias is None else -strength * (found.left @ bias) * found.left
    return ModuleEdit(
        layer=layer,
        block=block,
        components=tuple(chosen.tolist()),
        column_scale=None if found.column_scale is None else found.column_scale.float(),
        left=found.left[:, None].float(),
        right=found.right[:, None].float(),
        bias=None if shift is None or not bool(shift.any()) else shift.float(),
        details={
            "c": torch.full((len(chosen),), -strength, dtype=torch.float64),
            "share": share[chosen],
        },
        notes={
            "change_norm": change_norm,
            "weight_norm": float(weight.norm()),
            "share": float(along.norm() / weight.norm()),
        },
    )


def _per_component(values: torch.Tensor, width: int) -> torch.Tensor:
    """The length of each component's part of values [n], float64 [n / width]."""
    lengths: torch.Tensor = values.view(-1, width).norm(dim=1)
    return lengths


def _neutral_mean(
    source: ModelSource,
    weights: Weights,
    direction: Direction,
    neutral: Mapping[str, torch.Tensor] | None,
    site: str,
    layer: int,
) -> torch.Tensor:
    """The mean at a site of a layer, float64 [d]: as given, as the direction has it, or as it follows."""
    for held in (neutral or {}, direction.input_means):
        if site in held:
            return held[site][layer].double()
    block = site.removesuffix("_out")
    inputs = f"{block}_in"
    if inputs not in direction.input_means or (block == "mlp" and source.anatomy.mixed):
        raise UsageError(
            f"the biprojected form needs the neutral mean at {site}, which the direction does not have: give "
            "neutral text (--corpus), or use the form plain or norm-preserving"
        )
    mean = weights.read(layer, block) @ direction.input_means[inputs][layer].double()
    bias = output_bias(source, weights, layer, block)
    return mean if bias is None else mean + bias


@dataclass(frozen=True, kw_only=True)
class Ablate(Method):
    """The method; the biprojected forms spare the mean of neutral text where there is some."""

    name = "ablate"
    title = "directional ablation"
    line = "the direction is taken out of what blocks write"
    source = "arXiv 2406.11717"
    needs = ("direction",)
    takes = ("layers", "blocks", "strength", "corpus", "languages", "part", "device", "dtype")
    least_languages = 1

    strength: float = setting(1.0, search=Range(0.25, 2.0), grid=(1.0, 2.0, -1.0))
    form: str = setting(
        "plain",
        "which form; the biprojected spare the mean of neutral text, --corpus and --languages",
        words=tuple(FORMS),
    )
    site: str = setting("block_out", SITE_LINE, words=("block_out", OWN))
    from_layer: int | None = setting(None, FROM_LINE)

    @classmethod
    def of(cls, material: Material, settings: Settings) -> Ablate:
        return cls(site="block_out" if material.opened.anatomy.residual_output else OWN, **settings)

    def prepare(self, material: Material) -> Callable[..., Plan]:
        corpus, blocks = material.corpus, material.blocks or BLOCKS
        make = partial(
            directional_ablation_plan,
            material.opened,
            material.direction,
            material.layers,
            blocks,
            self.form,
            self.site,
            from_layer=self.from_layer,
        )
        if material.studied:
            return make
        if corpus is None:
            if material.languages is not None:
                raise UsageError("--languages chooses the neutral text from --corpus, which is not given")
            return make
        if not FORMS[self.form][1]:
            raise UsageError(
                f"--corpus is neutral text, which form {self.form} does not use: leave it out, or give --set "
                "form=biprojected"
            )
        sites = tuple(dict.fromkeys(site_of(self.site, block) for block in blocks))
        neutral = neutral_means(material.loaded, corpus, sites, material.progress)
        origin = {
            "languages": list(corpus.languages),
            "corpus": {"digest": corpus.digest, "part": corpus.part},
        }

        def made(**settings: Any) -> Plan:
            plan = make(neutral=neutral, **settings)
            return Plan(plan.edits, {**plan.metadata, "neutral": origin})

        return made

    def plan(self, prepared: Callable[..., Plan]) -> Plan:
        return prepared(strength=self.strength)
