"""Selective Steering: rotates what attention and MLP read, in a plane through the direction (arXiv 2601.19375).

With n the output of a norm, mu_s and mu_t its means on source and target and d = (mu_t - mu_s) / |mu_t - mu_s|
the norm's candidate,

    b1 = the candidate with the highest mean cosine with all candidates ("global"), or the norm's own ("layer")
    b2 = p - b1 b1^T p, normalised     p the first principal component of all candidates about their mean
    n' = R n                           R = I - B B^T + B Rot(theta) B^T,  B = [b1 b2]
                                       Rot = [[cos theta, -sin theta], [sin theta, cos theta]]

in every layer at all of whose norms b1^T mu_s and b1^T mu_t have opposite signs.  R keeps |n|.  The modules that read
n are linear (q, k, v, gate, up), so in the weights the rotation is exact and of rank 2:

    W' = W R = W + W B (Rot - I) B^T

Theta is an angle between n and n': at 180 degrees R reverses both b1 and b2, which exchanges the two languages.

Where: as in the released code, at the output of the norms before attention and MLP, after their gain, and not in the
residual stream, which keeps its component along b1.  The means are recorded there too.  A direction of the residual
stream is another one: the gain and the length of each token stand between.

The released code differs in three points.  It averages over the last token of each prompt; here a mean is over texts of
the mean over a text's tokens, as in DiffMean.  It scales activations to length 1 before it compares signs.  And it
hooks all modules whose names contain "layernorm" or "rmsnorm", also those between a module's output and the residual
stream (Gemma 2 and 3), after which no weight can contain a rotation: these are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from editing.methods.material import Material
from editing.methods.method import Method
from editing.methods.scope import chosen_layers
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.architectures.reading_norms import ReadingNorm, reading_norms
from neurons.architectures.sites import Routed
from neurons.errors import BrocaError, NothingToChangeError, UsageError
from neurons.models.source import LoadedModel
from neurons.recording.text_pass import Position, Progress, numbered, read_text
from neurons.setting import Range, setting
from neurons.statistics.sums import text_sums
from neurons.text.batches import TokenBatch, language_batches
from neurons.text.corpus import Corpus
from neurons.text.token_budget import DIRECTIONS

GLOBAL, LAYER = "global", "layer"
OPPOSITE, ALL = "opposite", "all"
# Of the candidates' length: a shorter rest is rounding.
MIN_REST = 1e-6


def steering_planes(means: torch.Tensor, plane: str = GLOBAL) -> torch.Tensor:
    """B of every norm.

    Args:
        means: float64 [N, d, 2], mu_s and mu_t of each norm.
        plane: GLOBAL or LAYER.

    Returns:
        float64 [N, d, 2], orthonormal columns b1 and b2.

    Raises:
        BrocaError: a norm with equal means, or candidates on one line.
    """
    differences = means[..., 1] - means[..., 0]
    lengths = differences.norm(dim=1, keepdim=True)
    if not bool((lengths > 0).all()):
        raise BrocaError("a norm has the same mean on source and target: leave its layer out (--layers)")
    candidates = differences / lengths
    first = candidates
    if plane == GLOBAL:
        first = candidates[(candidates @ candidates.T).mean(1).argmax()].expand_as(candidates)
    component = torch.linalg.svd(candidates - candidates.mean(0), full_matrices=False).Vh[0]
    # A component has no sign, but a rotation has a direction: the largest entry is positive.
    component = component * component[component.abs().argmax()].sign()
    second = component - (first @ component)[:, None] * first
    rest = second.norm(dim=1, keepdim=True)
    if not bool((rest > MIN_REST).all()):
        raise BrocaError(
            "all candidate directions are on one line, so they span no plane: choose more layers"
        )
    return torch.stack([first, second / rest], dim=2)


def turn(theta: float) -> torch.Tensor:
    """Rot(theta) - I, float64 [2, 2], of an angle in degrees."""
    cos, sin = math.cos(math.radians(theta)), math.sin(math.radians(theta))
    return torch.tensor([[cos - 1, -sin], [sin, cos - 1]], dtype=torch.float64)


def opposite_layers(norms: Sequence[ReadingNorm], projections: torch.Tensor) -> list[int]:
    """The layers at all of whose norms the two means project on opposite sides.

    Args:
        norms: N norms.
        projections: [N, 2], b1^T mu_s and b1^T mu_t.
    """
    same = {norm.layer for norm, (s, t) in zip(norms, projections.tolist(), strict=True) if s * t >= 0}
    return sorted({norm.layer for norm in norms} - same)


def norm_means(
    loaded: LoadedModel,
    batches: Mapping[str, Sequence[TokenBatch]],
    norms: Sequence[ReadingNorm],
    progress: Progress | None = None,
) -> torch.Tensor:
    """float64 [N, d, K], the mean of each norm's output: over texts, of the mean over a text's tokens."""
    sums = torch.zeros(len(norms), len(batches), loaded.anatomy.residual, dtype=torch.float64)

    def read(index: int, values: torch.Tensor, _: Routed | None, at: Position) -> None:
        counted = at.counted.to(values.device)
        means = text_sums(values.detach(), counted) / counted.sum(1)[:, None]
        sums[index, at.language] += means.sum(0).cpu()

    readers = {(norm.path, norm.layer): partial(read, index) for index, norm in enumerate(norms)}
    read_text(loaded, numbered(batches), readers, progress)
    texts = torch.tensor([sum(len(batch.ids) for batch in of_language) for of_language in batches.values()])
    return (sums / texts[:, None]).transpose(1, 2)


@dataclass(frozen=True)
class Rotated:
    """A module that reads a rotated norm.

    Attributes:
        layer: index of the layer.
        path: of the module in its layer.
        basis: B, float64 [d, 2].
        image: W B, float64 [outputs, 2].
        notes: of its edit.
    """

    layer: int
    path: str
    basis: torch.Tensor
    image: torch.Tensor
    notes: Mapping[str, Any]

    def edit(self, theta: float) -> ModuleEdit:
        left = self.image @ turn(theta)
        return ModuleEdit(
            layer=self.layer,
            block=self.path,
            components=(),
            left=left.float(),
            right=self.basis.float(),
            notes={**self.notes, "change_norm": float(left.norm())},
        )


@dataclass(frozen=True, kw_only=True)
class SelectiveSteering(Method):
    """The registered method."""

    name = "selective-steering"
    title = "Selective Steering"
    line = "rotates what attention and MLP read, in a plane through the direction"
    source = "arXiv 2601.19375"
    needs = ("languages", "corpus")
    takes = ("part", "layers", "device", "dtype")
    strength_setting = "theta"

    theta: float = setting(
        90.0,
        "angle in degrees; 180 exchanges the languages",
        search=Range(10.0, 350.0),
        grid=(60.0, 75.0, 90.0),
    )
    plane: str = setting(
        GLOBAL,
        "b1: one direction in all layers, or each norm's own (layer)",
        words=(GLOBAL, LAYER),
        search_words=True,
        grid=(GLOBAL, LAYER),
    )
    select: str = setting(
        OPPOSITE, "layers: those whose means are on opposite sides, or all", words=(OPPOSITE, ALL)
    )

    def rotated_modules(self, material: Material, corpus: Corpus) -> list[Rotated]:
        """The modules to edit, from one pass over the corpus: first the source, then the target.

        Raises:
            UsageError: an unknown layer.
            NothingToChangeError: no layer has opposite signs.
            BrocaError: as ``reading_norms`` and ``steering_planes``.
        """
        loaded = material.loaded
        norms = reading_norms(loaded.model, loaded.anatomy, chosen_layers(loaded, material.layers))
        batches = language_batches(loaded, corpus, default=DIRECTIONS.tokens)
        means = norm_means(loaded, batches, norms, material.progress)
        planes = steering_planes(means, self.plane)
        projections = torch.einsum("nd,ndk->nk", planes[..., 0], means)
        chosen = opposite_layers(norms, projections)
        if self.select == OPPOSITE and not chosen:
            raise NothingToChangeError(
                "in no layer are the means of the two languages on opposite sides: rotate all with --set select=all, or "
                "try --set plane=layer"
            )
        weights, modules = Weights(loaded), []
        for norm, basis, projected in zip(norms, planes, projections.tolist(), strict=True):
            if self.select == ALL or norm.layer in chosen:
                for path in norm.readers:
                    weight = weights.read(norm.layer, path)
                    notes = {"weight_norm": float(weight.norm()), "norm": norm.path, "projections": projected}
                    modules.append(Rotated(norm.layer, path, basis, weight @ basis, notes))
        return modules

    def prepare(self, material: Material) -> tuple[list[Rotated], dict[str, Any]]:
        source, target = material.pair
        if not material.studied and len(material.languages or ()) > 2:
            raise UsageError(f"a rotation is between two languages: give --languages {source},{target}")
        material.text.require(source, target)
        corpus = material.text.only(source, target)
        modules = material.once(
            (self.name, self.plane, self.select), lambda: self.rotated_modules(material, corpus)
        )
        languages = {"source": source, "target": target, "languages": [source, target]}
        settings = {
            "theta": self.theta,
            "plane": self.plane,
            "select": self.select,
            "layers": sorted({module.layer for module in modules}),
            "corpus": corpus.provenance,
        }
        return modules, plan_metadata(material.opened, self.name, settings, languages)

    def plan(self, prepared: tuple[list[Rotated], dict[str, Any]]) -> Plan:
        modules, metadata = prepared
        if self.theta % 360 == 0:
            raise UsageError(f"theta {self.theta:g}: a whole turn changes nothing: give another angle")
        return make_plan([module.edit(self.theta) for module in modules], metadata)
