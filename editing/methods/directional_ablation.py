"""Directional ablation ("abliteration"): removes a direction from the output of modules.

With v^ the unit direction, s the strength and W [d, n] the output weight of attention or MLP:

    plain             W' = W - s v^ v^^T W                               (Arditi et al. 2024, arXiv 2406.11717)
    norm-preserving   W' = (W - s v^ v^^T W) diag(c),   c_j = ||w_j|| / ||w_j - s v^ v^^T w_j||
    biprojected       plain, with v <- v - m^ m^^T v first, m the neutral mean at the site

so that v^^T W' = (1 - s) v^^T W diag(c): s = 1 removes the direction, s = 2 reverses it, and s < 0 amplifies it.
A bias b of the module becomes b - s v^ v^^T b.  This is Steer2Edit's amplification c = -s for every component.

Columns are renormalised rather than rows: a column is the output weight of a neuron and keeps its length, and
scaling it leaves it orthogonal to v^, whereas scaling rows would rotate columns towards v^.  A column parallel to v^
has no other component to rescale: it is ablated with c = 1.

The biprojected form (grimjim's projected and biprojected abliteration) does not change the output along the neutral
mean: m^T W' = m^T W.  With ``from_layer`` the mean of that layer is projected out first, then the mean of the edited
layer.

The published form uses the direction of one layer everywhere (``from_layer``) and also ablates the embeddings.  A
plan edits only output modules, so the embeddings' component along v remains in the residual stream.
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

# form -> (columns keep their lengths, the neutral mean is preserved)
FORMS = {
    "plain": (False, False),
    "norm-preserving": (True, False),
    "biprojected": (False, True),
    "norm-preserving-biprojected": (True, True),
}
# The remainder that rounding to bfloat16 can leave of a column parallel to v^; columns grow by at most 1 / this.
MIN_REMAINDER = 2**-8


@dataclass(frozen=True)
class Ablation:
    """W' = W diag(column_scale) + left right^T.

    Attributes:
        left: float64 [d], v^.
        right: float64 [n], -s c_j v^^T w_j.
        column_scale: float64 [n], c; None if columns are not renormalised.
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
        norm_preserving: rescale every column to its length before.

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
    # Includes columns of zeros.
    parallel = after <= MIN_REMAINDER * before
    scale = torch.where(parallel, 1.0, before / torch.where(parallel, 1.0, after))
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
    """The direction minus its component along a mean (unchanged if the mean is 0).  [d] each, float64.

    Raises:
        BrocaError: the direction is parallel to the mean.
    """
    vector, neutral = direction.double(), mean.double()
    size = neutral.norm()
    if not size > 0:
        return vector
    neutral = neutral / size
    remainder: torch.Tensor = vector - (neutral @ vector) * neutral
    # Twice, because cancellation can leave the first difference not quite orthogonal.
    remainder = remainder - (neutral @ remainder) * neutral
    if not float(remainder.norm()) > 1e-9 * float(vector.norm()):
        raise BrocaError("the direction is parallel to the neutral mean, so nothing is left to ablate")
    return remainder


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
        direction: a direction with vectors at ``site``.
        layers: layers to edit; None takes all.
        blocks: "attn", "mlp" or both.
        form: a key of ``FORMS``.
        site: "block_out" (residual stream), or "own" (output of the edited module).
        strength: s, 1 removes the direction.
        from_layer: layer whose direction is used in all layers, as published; None takes each layer's own.
        neutral: for the biprojected forms, site -> [L, d], the mean there (``neutral_means``).  Missing sites are
            taken from the direction: its mean at the site, or, at the output of a module, W mu + b, the mean output
            on both languages.

    Raises:
        UsageError: an unknown form, site, module or layer, no vectors or no neutral mean at the site, or a
            strength of 0.
        BrocaError: a direction of another model; a norm between module and residual stream; a direction of length
            0, a module without output along it, or experts with biases.
    """
    if form not in FORMS:
        raise UsageError(f"form {form!r} is unknown: choose from {', '.join(FORMS)}")
    norm_preserving, biprojected = FORMS[form]
    require_strength(strength)
    direction.require_model(source)
    require_site(source, site)
    if from_layer is not None:
        chosen_layers(source, [from_layer])
    settings = {
        "layers": list(chosen_layers(source, layers)),
        "blocks": list(chosen_modules(blocks)),
        "form": form,
        "site": site,
        "strength": strength,
        "from_layer": from_layer,
    }
    weights = Weights(source)
    edits = []
    for layer, module in chosen_places(source, layers, blocks):
        at = site_of(site, module)
        vector_layer = layer if from_layer is None else from_layer
        vector = vector_at(direction, at, vector_layer)
        if not bool(vector.any()):
            raise BrocaError(
                f"the direction has length 0 at {at} of layer {vector_layer}: choose other layers"
            )
        weight = weights.read(layer, module)
        bias = output_bias(source, weights, layer, module)
        if biprojected:
            for mean_layer in dict.fromkeys((vector_layer, layer)):
                mean = _neutral_mean(source, weights, direction, neutral, at, mean_layer)
                vector = without(vector, mean)
        edits.append(
            _module_edit(
                weight,
                bias,
                directional_ablation(weight, vector, strength, norm_preserving),
                strength,
                (layer, module),
                source.anatomy.component_width(module, layer),
            )
        )
    return make_plan(edits, plan_metadata(source, "ablate", settings, direction.provenance))


def _module_edit(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ablation: Ablation,
    strength: float,
    place: tuple[int, str],
    width: int,
) -> ModuleEdit:
    layer, module = place
    if not bool(ablation.right.any()):
        raise BrocaError(
            f"layer {layer}, {module}: its output has no component along the direction, so there is nothing to "
            "ablate: choose other layers or blocks"
        )
    along = ablation.left @ weight
    fraction = _per_component(along, width) / _per_component(weight.norm(dim=0), width)
    chosen = _per_component(ablation.right, width).nonzero()[:, 0]
    if ablation.column_scale is None:
        change_norm = float(ablation.right.norm())
    else:
        change = torch.addr(weight * (ablation.column_scale - 1), ablation.left, ablation.right)
        change_norm = float(change.norm())
    shift = None if bias is None else -strength * (ablation.left @ bias) * ablation.left
    return ModuleEdit(
        layer=layer,
        block=module,
        components=tuple(chosen.tolist()),
        column_scale=None if ablation.column_scale is None else ablation.column_scale.float(),
        left=ablation.left[:, None].float(),
        right=ablation.right[:, None].float(),
        bias=None if shift is None or not bool(shift.any()) else shift.float(),
        details={
            "c": torch.full((len(chosen),), -strength, dtype=torch.float64),
            "share": fraction[chosen],
        },
        notes={
            "change_norm": change_norm,
            "weight_norm": float(weight.norm()),
            "share": float(along.norm() / weight.norm()),
        },
    )


def _per_component(values: torch.Tensor, width: int) -> torch.Tensor:
    """The norm over each component of values [n], float64 [n / width]."""
    norms: torch.Tensor = values.view(-1, width).norm(dim=1)
    return norms


def _neutral_mean(
    source: ModelSource,
    weights: Weights,
    direction: Direction,
    neutral: Mapping[str, torch.Tensor] | None,
    site: str,
    layer: int,
) -> torch.Tensor:
    """The mean at a site of a layer, float64 [d]: given, of the direction, or computed from its mean input."""
    for means in (neutral or {}, direction.input_means):
        if site in means:
            return means[site][layer].double()
    module = site.removesuffix("_out")
    inputs = f"{module}_in"
    if inputs not in direction.input_means or (module == "mlp" and source.anatomy.mixed_in(layer)):
        raise UsageError(
            f"the biprojected form needs the neutral mean at {site}, which the direction does not have: give "
            "neutral text (--corpus), or use the form plain or norm-preserving"
        )
    weight = weights.read(layer, module)
    mean = weight @ direction.input_means[inputs][layer, : weight.shape[1]].double()
    bias = output_bias(source, weights, layer, module)
    return mean if bias is None else mean + bias


@dataclass(frozen=True, kw_only=True)
class Ablate(Method):
    """The registered method; the biprojected forms preserve the mean of neutral text, if given."""

    name = "ablate"
    title = "directional ablation"
    line = "removes the direction from the outputs of attention and MLP"
    source = "arXiv 2406.11717"
    needs = ("direction",)
    takes = ("layers", "blocks", "strength", "corpus", "languages", "part", "device", "dtype")
    min_languages = 1

    strength: float = setting(1.0, search=Range(0.25, 2.0), grid=(1.0, 2.0, -1.0))
    form: str = setting(
        "plain",
        "form; the biprojected forms preserve the mean of neutral text (--corpus, --languages)",
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
        sites = tuple(dict.fromkeys(site_of(self.site, module) for module in blocks))
        neutral = neutral_means(material.loaded, corpus, sites, material.progress)
        provenance = {
            "languages": list(corpus.languages),
            "corpus": corpus.provenance,
        }

        def make_neutral(**settings: Any) -> Plan:
            plan = make(neutral=neutral, **settings)
            return Plan(plan.edits, {**plan.metadata, "neutral": provenance})

        return make_neutral

    def plan(self, prepared: Callable[..., Plan]) -> Plan:
        return prepared(strength=self.strength)
