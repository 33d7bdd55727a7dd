"""LEACE: no linear classifier can tell from a module's output which language a token is in (arXiv 2306.03819).

With y = W h + b the output of attention or MLP, mu the mean of h, mu_j its mean on language j and S the covariance of
y, the smallest change of y (in the metric of S) that makes its means on all languages equal is the oblique projection

    y' = y - A B^T W (h - mu)    U = orthonormal basis of S^(-1/2) W [mu_1 - mu, mu_2 - mu, ...]
                                 A = S^(1/2) U,  B = S^(-1/2) U,  B^T A = I

of at most one dimension fewer than there are languages.  Equal means are necessary and sufficient.  In the weights,

    W' = W - lambda A (W^T B - C)^T

where column i of C is the linear function of h of minimum variance (``editing.methods.key``) with the mean
b_i^T W mu on every language, and the value of b_i^T W h on the start token, whose output does not change.  C stands for
the constant of the projection, because most architectures have no bias there; the means on the languages are equal
as with a constant.  S follows from the moments of h, so the model runs once.

Every module is fitted to the inputs that it has in the unedited model.  Edits of earlier modules change the inputs of
later ones, in which traces of the language may remain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from editing.methods.bake import in_layer
from editing.methods.key import EPS, key_problem, solve_key
from editing.methods.material import Material
from editing.methods.method import SolvedOnce
from editing.methods.scope import chosen_layers, chosen_modules, chosen_places, require_strength
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS, COMMON_SITES
from neurons.errors import BrocaError, UsageError
from neurons.recording.covariance import Moments, each_moments
from neurons.setting import Range, setting
from neurons.text.batches import counted_tokens, language_batches
from neurons.text.token_budget import KEYS

# Fractions of the largest: smaller variances are rounding of float32 products, and count as 0.
MIN_VARIANCE = 1e-6


def eraser(deviations: torch.Tensor, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, float64 [d, r], of the LEACE projection y - A B^T (y - mu).

    Args:
        deviations: [d, K], each language's mean of y minus the mean of all.
        covariance: [d, d], of y about the mean of all.

    Raises:
        BrocaError: the means are equal, so there is nothing to erase.
    """
    variances, axes = torch.linalg.eigh(covariance.double())
    kept = variances > MIN_VARIANCE * variances[-1]
    scales, axes = variances[kept].sqrt(), axes[:, kept]
    whitened = (axes.T @ deviations.double()) / scales[:, None]
    basis, lengths, _ = torch.linalg.svd(whitened, full_matrices=False)
    basis = basis[:, lengths**2 > MIN_VARIANCE * lengths[:1] ** 2]
    if basis.shape[1] == 0:
        raise BrocaError(
            "its output has the same mean on every language, so there is nothing to erase: leave it out (--layers)"
        )
    return axes @ (scales[:, None] * basis), axes @ (basis / scales[:, None])


def _module_edit(
    place: tuple[int, str],
    weight: torch.Tensor,
    size: int,
    moments: Moments,
    tokens: torch.Tensor,
    strength: float,
    eps: float,
) -> ModuleEdit:
    """The edit of W [d, n] of a layer's module, whose components have ``size`` columns each."""
    fractions = tokens.double() / tokens.sum()
    mean = moments.mean @ fractions
    deviations = weight @ (moments.mean - mean[:, None])
    covariance = weight @ moments.covariance @ weight.T + (deviations * fractions) @ deviations.T
    written, read = eraser(deviations, covariance)
    reads = weight.T @ read
    problem = key_problem(moments, moments.languages, eps)
    targets = (reads.T @ mean).expand(len(moments.languages), -1)
    if moments.start is not None:
        targets = torch.cat([targets, (reads.T @ moments.start)[None]])
    right = reads - solve_key(replace(problem, targets=targets), overwrite=True)
    squares = ((right @ (written.T @ written)) * right).sum(1).clamp(min=0)
    changes = squares.view(-1, size).sum(1).sqrt()
    chosen = changes.nonzero()[:, 0]
    share = changes / weight.norm(dim=0).view(-1, size).norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    return ModuleEdit(
        layer=place[0],
        block=place[1],
        components=tuple(chosen.tolist()),
        left=(-strength * written).float(),
        right=right.float(),
        details={"share": share[chosen]},
        notes={"change_norm": abs(strength) * float(changes.norm()), "weight_norm": float(weight.norm())},
    )


@dataclass(frozen=True, kw_only=True)
class Leace(SolvedOnce):
    """The registered method."""

    name = "leace"
    line = "no linear classifier can tell the languages apart in a module's output"
    source = "arXiv 2306.03819"
    needs = ("corpus",)
    takes = ("layers", "blocks", "strength", "part", "languages", "device", "dtype")
    key_modules = BLOCKS

    strength: float = setting(1.0, "1 makes the means on all languages equal", search=Range(0.1, 1.5))
    eps: float = setting(EPS, "ridge of the constant's key, as a fraction of the mean variance")

    def solved(self, material: Material) -> Plan:
        """The plan at this strength.

        Raises:
            UsageError: fewer than two languages, an unknown module or layer, a mixture of experts, or a strength of 0.
            BrocaError: a norm between modules and residual stream, or a module whose output does not depend on the
                language; names layer and module.
        """
        loaded, corpus, blocks = material.loaded, material.text, material.blocks or BLOCKS
        require_strength(self.strength)
        anatomy = loaded.anatomy
        places = chosen_places(loaded, material.layers, blocks)
        if any(module == "mlp" and anatomy.mixed_in(layer) for layer, module in places):
            raise UsageError(
                f"{anatomy.model_type}: experts see different tokens, so the MLP's output is no linear function of one "
                "input: choose --blocks attn"
            )
        if not anatomy.residual_output:
            raise BrocaError(
                f"{anatomy.model_type}: after a norm or a factor between modules and residual stream the means on the languages "
                "differ again: use --method ablate or ablate-subspace with --set site=own"
            )
        batches = language_batches(loaded, corpus, default=KEYS.tokens)
        if len(batches) < 2:
            raise UsageError(f"the text has one language, {next(iter(batches))}: give text of two or more")
        tokens = torch.tensor([counted_tokens(of_language) for of_language in batches.values()])
        module_of = {(COMMON_SITES[module], layer): (layer, module) for layer, module in places}
        units = {(site, layer): torch.arange(anatomy.width(site, layer)) for site, layer in module_of}
        edits, weights = [], Weights(loaded)
        for place, moments in each_moments(loaded, batches, units, material.progress):
            layer, module = module_of[place]
            size = anatomy.component_width(module, layer)
            with in_layer(layer, module):
                edit = _module_edit(
                    (layer, module),
                    weights.read(layer, module),
                    size,
                    moments,
                    tokens,
                    self.strength,
                    self.eps,
                )
            edits.append(edit)
            # Frees this covariance before the next layer is read.
            del moments
        settings = {
            "layers": list(chosen_layers(loaded, material.layers)),
            "blocks": list(chosen_modules(blocks)),
            "strength": self.strength,
            "eps": self.eps,
            "corpus": corpus.provenance,
        }
        return make_plan(edits, plan_metadata(loaded, self.name, settings, {"languages": list(batches)}))
