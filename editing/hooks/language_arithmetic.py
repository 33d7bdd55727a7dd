"""Language arithmetic at inference time (arXiv 2507.22608): deactivate one language's neurons, activate another's.

On s = act(gate) of chosen neurons (``editing.methods.language_arithmetic`` has the modes):

    s_j <- c_j s_j + a_j

In a gated MLP the input of ``down_proj`` is h_j = s_j u_j with u the linear branch, so the hook there writes

    h_j <- c_j h_j + a_j u_j          u_j = 1 in an MLP without gates

with u of the same token: exactly the intervention on s, in any architecture with known branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from editing.methods.affine_neurons import Arithmetic
from editing.methods.language_arithmetic import activation_means, arithmetic
from editing.methods.material import Material
from editing.methods.method import NEURON_METHODS, Hook, Steering
from neurons.architectures.anatomy import Anatomy
from neurons.architectures.sites import Routed, SiteHook, expert_units, site_hooks
from neurons.models.source import LoadedModel
from neurons.setting import setting
from neurons.text.batches import language_batches
from neurons.text.token_budget import MEANS


@dataclass(frozen=True)
class LanguageArithmetic:
    """Language arithmetic on all layers.

    Attributes:
        loaded: the model.
        target_means: float64 [L, I], mean of s on the target's text.
        other_means: float64 [L, I], of the other language; for "difference".
        activated: bool [L, I], neurons to raise.
        deactivated: bool [L, I], neurons that are first set to ``fill``.
        mode: "additive", "replacement" or "difference".
        strength: multiplies the offset.
        fill: 0 or below.
    """

    loaded: LoadedModel
    target_means: torch.Tensor
    other_means: torch.Tensor
    activated: torch.Tensor
    deactivated: torch.Tensor
    mode: str = "additive"
    strength: float = 1.0
    fill: float = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Context in which the model is steered.

        Raises:
            UsageError: an unknown mode.
        """
        anatomy = self.loaded.anatomy
        hooks: dict[tuple[str, int], SiteHook] = {}
        for layer in (self.activated | self.deactivated).any(1).nonzero()[:, 0].tolist():
            change = arithmetic(
                self.target_means[layer],
                self.other_means[layer],
                self.activated[layer],
                self.deactivated[layer],
                self.mode,
                self.strength,
                self.fill,
            )
            # Expert (None: all neurons) -> u of its tokens.
            linear: dict[int | None, torch.Tensor] = {}
            if anatomy.gated:
                hooks["mlp_up", layer] = _keep(linear)
            hooks["mlp_in", layer] = _replace(anatomy, change, linear)
        with site_hooks(anatomy, hooks):
            yield


def _keep(linear: dict[int | None, torch.Tensor]) -> SiteHook:
    def hook(values: torch.Tensor, routed: Routed | None) -> None:
        linear[None if routed is None else routed.expert] = values.clone()

    return hook


def _replace(anatomy: Anatomy, change: Arithmetic, linear: dict[int | None, torch.Tensor]) -> SiteHook:
    def hook(values: torch.Tensor, routed: Routed | None) -> torch.Tensor:
        units = slice(None) if routed is None else expert_units(anatomy, routed)
        scale, added = (
            factor[units].to(values.device, values.dtype) for factor in (change.scale, change.offset)
        )
        u = linear.pop(None if routed is None else routed.expert, None)
        return values * scale + (added if u is None else added * u)

    return hook


@dataclass(frozen=True, kw_only=True)
class _Arithmetic(Hook):
    """The registered method, with means and neurons identified from the text of a study."""

    line = "deactivates the source's neurons, raises the target's"
    source = "arXiv 2507.22608"

    neurons: str = setting(NEURON_METHODS[0], grid=NEURON_METHODS)
    strength: float = setting(1.0, grid=(1.0, 3.0))

    def prepare(self, material: Material) -> Callable[..., Steering]:
        """
        Raises:
            BrocaError: a language without neurons.
        """
        off, on = (material.mask(self.neurons, language) for language in material.pair)
        of_target, of_source = material.once("activation means", lambda: _means(material))
        mode = self.name.removeprefix("arithmetic-")
        return partial(LanguageArithmetic, material.loaded, of_target, of_source, on, off, mode)

    def hooks(self, prepared: Callable[..., Steering]) -> Steering:
        return prepared(self.strength)


class AdditiveArithmetic(_Arithmetic):
    name, title = "arithmetic-additive", "language arithmetic, additive"


class ReplacementArithmetic(_Arithmetic):
    name, title = "arithmetic-replacement", "language arithmetic, replacement"


class DifferenceArithmetic(_Arithmetic):
    name, title = "arithmetic-difference", "language arithmetic, difference"


def _means(material: Material) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of s on the target's and on the source's text, float64 [L, I] each."""
    source, target = material.pair
    batches = language_batches(material.loaded, material.text, default=MEANS.tokens)
    means = activation_means(
        material.loaded, {k: batches[k] for k in (source, target)}, range(material.loaded.anatomy.layers)
    )
    of_target, of_source = (
        torch.stack([means[layer][k] for layer in sorted(means)]) for k in (target, source)
    )
    return of_target, of_source
