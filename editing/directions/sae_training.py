"""Training of a sparse autoencoder (Neural FOXP2, arXiv 2602.00945, stage I).

With x = h / ||h|| a state h [d] divided by its length, W [d, F] with columns of length 1, and b [F],

    z = max(x W + b, 0)        x^ = z W^T
    loss = mean over a batch of ||x - x^||^2 + l1 * sum_f z_f        minimised by Adam

Encoder and decoder share W, and there is no decoder bias.  The released code (PhotonTJ/NeuralFoxP2) averages the
squared error over the d coordinates too, which is an l1 d times as large: with the published 5e-3 it leaves none of
1,024 features active on the demo model.  This is the sum.  The code sets the columns' length after each epoch, this
before the first step and after each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from editing.directions.autoencoder import Autoencoder
from neurons.errors import BrocaError
from neurons.recording.text_pass import Progress

BATCH = 512  # of the released code
HELD_OUT = 10  # one state in as many is not trained on


@dataclass(frozen=True)
class SaeTraining:
    """Settings of the training; the defaults are those of the paper.

    Attributes:
        features: F.
        l1: weight of the features' sum.
        rate: Adam's learning rate.
        epochs: passes over the states.
        seed: of the initial weights and of the order of the states.
    """

    features: int = 1024
    l1: float = 5e-3
    rate: float = 5e-4
    epochs: int = 150
    seed: int = 0


@dataclass(frozen=True)
class SaeFigures:
    """An autoencoder on states that it was not trained on.

    Attributes:
        states: number of states it was trained on.
        unexplained: fraction of the variance of x that x^ misses.
        active: mean number of features that are active on a state.
        dead: number of features that are active on no state, trained on or not.
    """

    states: int
    unexplained: float
    active: float
    dead: int


def train_autoencoder(
    states: torch.Tensor,
    layer: int,
    training: SaeTraining,
    progress: Progress | None = None,
) -> tuple[Autoencoder, SaeFigures]:
    """Train an autoencoder of the residual stream.

    Args:
        states: [n, d], in a random order; of any length but 0.  It is trained on their device.
        layer: whose output they are.
        training: the settings.
        progress: called with 1 after each epoch.

    Returns:
        The autoencoder, on the CPU, and its figures on every ``HELD_OUT``-th state.

    Raises:
        BrocaError: fewer states than ``2 * HELD_OUT``, none that differ from each other, or a training
            that leaves a larger error than no feature would.
    """
    if len(states) < 2 * HELD_OUT:
        raise BrocaError(f"{len(states)} states are too few to train on: give more text or --states")
    unit = states.float() / states.float().norm(dim=1, keepdim=True)
    held_out = torch.arange(len(unit), device=unit.device) % HELD_OUT == 0
    trained_on = unit[~held_out]
    generator = torch.Generator().manual_seed(training.seed)
    weight = torch.randn(unit.shape[1], training.features, generator=generator).to(unit.device)
    weight = (weight / weight.norm(dim=0)).requires_grad_()
    bias = torch.zeros(training.features, device=unit.device, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=training.rate)
    with torch.enable_grad():
        for _ in range(training.epochs):
            for index in torch.randperm(len(trained_on), generator=generator).to(unit.device).split(BATCH):
                batch = trained_on[index]
                codes = torch.relu(batch @ weight + bias)
                error = (batch - codes @ weight.T).square().sum(1)
                loss = (error + training.l1 * codes.sum(1)).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                with torch.no_grad():
                    weight /= weight.norm(dim=0)
            if progress is not None:
                progress(1)
    weight, bias = weight.detach(), bias.detach()
    no_bias = torch.zeros(len(weight))
    autoencoder = Autoencoder(
        weight.cpu(), bias.cpu(), weight.T.contiguous().cpu(), no_bias, layer, unit=True
    )
    return autoencoder, _figures(unit, held_out, weight, bias)


def _figures(
    unit: torch.Tensor, held_out: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> SaeFigures:
    fired = torch.zeros(len(bias), dtype=torch.bool, device=unit.device)
    for batch in unit.split(BATCH):
        fired |= (batch @ weight + bias > 0).any(0)
    tested = unit[held_out].double()
    codes = torch.relu(tested @ weight.double() + bias.double())
    variance = (tested - tested.mean(0)).square().sum()
    if not variance > 0:
        raise BrocaError("the states do not differ from each other: give more text")
    error = (tested - codes @ weight.double().T).square().sum()
    if not error <= tested.square().sum():
        raise BrocaError("the training diverged, or ended too early: lower --rate or raise --epochs")
    return SaeFigures(
        int((~held_out).sum()),
        float(error / variance),
        float((codes > 0).sum() / len(tested)),
        int((~fired).sum()),
    )
