"""A value through a norm: what a module must write so that the norm after it puts a wanted vector in the residual.

Gemma 2 and 3 add norm(y) to the residual stream, y the output of down_proj (or o_proj), with

    norm(y) = g * y / r(y)        r(y) = sqrt(|y|^2 / d + eps)

An edit that adds c_t delta to y_t, c_t the key's coefficient on token t, moves the residual by
norm(y_t + c_t delta) - norm(y_t).  On the source's tokens that is to be v, with e_t what it differs by:

    delta = argmin |mean e_t|^2 + scatter * mean |e_t - mean e|^2     e_t = norm(y_t + c_t delta) - norm(y_t) - v

At scatter 1 that is the mean of |e_t|^2, whose minimum writes less than v on average, as what is written to
tokens of different y goes different ways; at 0 the mean alone counts, as it does where no norm stands
between.  By damped Gauss-Newton (Levenberg-Marquardt) from delta = 0: with z_t = y_t + c_t delta, r_t = r(z_t),

    J_t = c_t diag(g) (I - z_t z_t^T / (d r_t^2)) / r_t        J = mean J_t, e = mean e_t
    N = scatter * mean J_t^T J_t + (1 - scatter) * J^T J
    (N + damping * mean diag N * I) step = -scatter * mean J_t^T e_t - (1 - scatter) * J^T e

a step is taken if it lowers the objective, and the damping divided by 10 then, else multiplied by 10.  A norm
bounds what can be written: |norm(y) / g| is at most sqrt(d), whatever y is.  So not all of v gets through where
v is long; ``through`` says how much does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neurons.errors import BrocaError, UsageError
from neurons.statistics.cholesky import NotPositiveDefiniteError, solve_positive_definite

SCATTER = 0.01
MOST_ROUNDS = 100
DAMPING = 1e-3
MOST_DAMPING = 1e12
CONVERGED = 1e-12


@dataclass(frozen=True)
class NormValue:
    """A value for a module that a norm follows.

    Attributes:
        vector: delta, float64 [d].
        through: <mean change of the norm's output, v> / |v|^2: 1 if v gets through.
        error: root of the mean of |change - v|^2, as a share of |v|.
    """

    vector: torch.Tensor
    through: float
    error: float


def rms_norm(outputs: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """g * y / r(y) of rows y [T, d]."""
    return gain * outputs / (outputs.square().mean(-1, keepdim=True) + eps).sqrt()


def value_through_norm(
    outputs: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    value: torch.Tensor,
    coefficients: torch.Tensor | None = None,
    scatter: float = SCATTER,
) -> NormValue:
    """delta for some tokens of the source.

    Args:
        outputs: y, float64 [T, d], of the module before the edit.
        gain: g, float64 [d].
        eps: of the norm.
        value: v, float64 [d].
        coefficients: c, float64 [T]; None: 1 on every token.
        scatter: what differences between tokens weigh, in [0, 1].

    Raises:
        UsageError: a scatter outside [0, 1].
        BrocaError: a value of no length, or no tokens.
    """
    tokens, width = outputs.shape
    if not 0 <= scatter <= 1:
        raise UsageError(f"scatter {scatter} must lie between 0 and 1")
    if not tokens:
        raise BrocaError("no tokens to solve a value on: the source's text is empty")
    if not bool(value.any()):
        raise BrocaError("a value of length 0 changes nothing: take another direction or layer")
    c = torch.ones(tokens, dtype=torch.float64) if coefficients is None else coefficients
    wanted = rms_norm(outputs, gain, eps) + value

    def errors(delta: torch.Tensor) -> torch.Tensor:
        return rms_norm(outputs + c[:, None] * delta, gain, eps) - wanted

    def objective(left: torch.Tensor) -> float:
        mean = left.mean(0)
        return float(mean @ mean + scatter * (left - mean).square().sum(1).mean())

    delta = torch.zeros(width, dtype=torch.float64)
    left = errors(delta)
    damping = DAMPING
    for _ in range(MOST_ROUNDS):
        normal, slope = _normal_equations(outputs + c[:, None] * delta, c, gain, eps, left, scatter)
        normal.diagonal().add_(damping * float(normal.diagonal().mean()))
        try:
            step = -solve_positive_definite(normal, slope)
        except NotPositiveDefiniteError:
            step = torch.zeros_like(delta)  # improves nothing, so that the damping rises
        tried = errors(delta + step)
        before, after = objective(left), objective(tried)
        if after < before:
            delta, left = delta + step, tried
            damping /= 10
            if before - after < CONVERGED * before:
                break
        else:
            damping *= 10
            if damping > MOST_DAMPING:
                break
    change = left.mean(0) + value
    length = float(value.square().sum())
    return NormValue(
        vector=delta,
        through=float(change @ value) / length,
        error=float((left.square().sum(1).mean() / length).sqrt()),
    )


def _normal_equations(
    outputs: torch.Tensor,
    c: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    left: torch.Tensor,
    scatter: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """N [d, d] and the right side [d] without any token's own J."""
    tokens, width = outputs.shape
    square = outputs.square().mean(-1) + eps
    along = outputs / (width * square)[:, None]  # z / (d r^2)
    pull = c / square.sqrt()
    jacobian = gain[:, None] * (
        torch.eye(width, dtype=torch.float64) * pull.sum() - (pull[:, None] * outputs).T @ along
    )
    jacobian = jacobian / tokens
    normal = (1 - scatter) * jacobian.T @ jacobian
    slope = (1 - scatter) * jacobian.T @ left.mean(0)
    if scatter:
        # P D P of every token, P = I - z along^T, D = diag(g^2).
        weight = scatter * c.square() / square / tokens
        squared_gain = gain.square()
        cross = (weight[:, None] * squared_gain * outputs).T @ along
        twice = weight * (squared_gain * outputs.square()).sum(-1)
        normal += torch.diag(weight.sum() * squared_gain) - cross - cross.T
        normal += (twice[:, None] * along).T @ along
        pulled = gain * left
        own = pulled - (outputs * pulled).sum(-1, keepdim=True) * along
        slope += scatter * (pull[:, None] * own).mean(0)
    return normal, slope
