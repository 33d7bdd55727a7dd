"""A value through a norm: the value with which the norm after a module adds a given vector to the residual stream.

Gemma 2 and 3 add norm(y) to the residual stream, y the output of down_proj (or o_proj), with

    norm(y) = g * y / r(y)        r(y) = sqrt(|y|^2 / d + eps)

An edit that adds c_t delta to y_t, with c_t the key's coefficient on token t, changes the residual stream by
norm(y_t + c_t delta) - norm(y_t).  This should equal v on the source's tokens; e_t is the error:

    delta = argmin |mean e_t|^2 + scatter * mean |e_t - mean e|^2     e_t = norm(y_t + c_t delta) - norm(y_t) - v

At scatter 1 the objective is the mean of |e_t|^2.  At its minimum the mean change is smaller than v, because the
changes of tokens with different y have different directions.  At scatter 0 only the mean counts, as without a norm.
The minimum is found by damped Gauss-Newton (Levenberg-Marquardt) from delta = 0: with z_t = y_t + c_t delta,
r_t = r(z_t),

    J_t = c_t diag(g) (I - z_t z_t^T / (d r_t^2)) / r_t        J = mean J_t, e = mean e_t
    N = scatter * mean J_t^T J_t + (1 - scatter) * J^T J
    (N + damping * mean diag N * I) step = -scatter * mean J_t^T e_t - (1 - scatter) * J^T e

A step is accepted if it lowers the objective; the damping is then divided by 10, otherwise multiplied by 10.  A norm
bounds its output: |norm(y) / g| <= sqrt(d) for any y.  A long v can therefore only be reached in part; ``through`` is
the fraction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neurons.errors import BrocaError, UsageError
from neurons.statistics.cholesky import NotPositiveDefiniteError, solve_positive_definite

SCATTER = 0.01
MAX_ROUNDS = 100
DAMPING = 1e-3
MAX_DAMPING = 1e12
CONVERGED = 1e-12


@dataclass(frozen=True)
class NormValue:
    """A value for a module that a norm follows.

    Attributes:
        vector: delta, float64 [d].
        through: <mean change of the norm's output, v> / |v|^2: 1 if v is reached.
        error: root mean square of |change - v|, as a fraction of |v|.
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
    """delta for tokens of the source.

    Args:
        outputs: y, float64 [T, d], outputs of the module before the edit.
        gain: g, float64 [d].
        eps: eps of the norm.
        value: v, float64 [d].
        coefficients: c, float64 [T]; None: 1 on every token.
        scatter: weight of differences between tokens, in [0, 1].

    Raises:
        UsageError: a scatter outside [0, 1].
        BrocaError: a value of length 0, or no tokens.
    """
    tokens, width = outputs.shape
    if not 0 <= scatter <= 1:
        raise UsageError(f"scatter {scatter}: it must be between 0 and 1")
    if not tokens:
        raise BrocaError("no tokens to solve a value on: the source's text is empty")
    if not bool(value.any()):
        raise BrocaError("the value has length 0: choose another direction or layer")
    c = torch.ones(tokens, dtype=torch.float64) if coefficients is None else coefficients
    targets = rms_norm(outputs, gain, eps) + value

    def errors_at(delta: torch.Tensor) -> torch.Tensor:
        return rms_norm(outputs + c[:, None] * delta, gain, eps) - targets

    def objective(errors: torch.Tensor) -> float:
        mean = errors.mean(0)
        return float(mean @ mean + scatter * (errors - mean).square().sum(1).mean())

    delta = torch.zeros(width, dtype=torch.float64)
    errors = errors_at(delta)
    damping = DAMPING
    for _ in range(MAX_ROUNDS):
        normal, slope = _normal_equations(outputs + c[:, None] * delta, c, gain, eps, errors, scatter)
        normal.diagonal().add_(damping * float(normal.diagonal().mean()))
        try:
            step = -solve_positive_definite(normal, slope)
        except NotPositiveDefiniteError:
            step = torch.zeros_like(delta)  # no improvement, so the damping increases
        new = errors_at(delta + step)
        before, after = objective(errors), objective(new)
        if after < before:
            delta, errors = delta + step, new
            damping /= 10
            if before - after < CONVERGED * before:
                break
        else:
            damping *= 10
            if damping > MAX_DAMPING:
                break
    change = errors.mean(0) + value
    square = float(value.square().sum())
    return NormValue(
        vector=delta,
        through=float(change @ value) / square,
        error=float((errors.square().sum(1).mean() / square).sqrt()),
    )


def _normal_equations(
    outputs: torch.Tensor,
    c: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    errors: torch.Tensor,
    scatter: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """N [d, d] and the right side [d], computed without the J of single tokens."""
    tokens, width = outputs.shape
    square = outputs.square().mean(-1) + eps
    along = outputs / (width * square)[:, None]  # z / (d r^2)
    pull = c / square.sqrt()
    jacobian = gain[:, None] * (
        torch.eye(width, dtype=torch.float64) * pull.sum() - (pull[:, None] * outputs).T @ along
    )
    jacobian = jacobian / tokens
    normal = (1 - scatter) * jacobian.T @ jacobian
    slope = (1 - scatter) * jacobian.T @ errors.mean(0)
    if scatter:
        # P D P of every token, P = I - z along^T, D = diag(g^2).
        weight = scatter * c.square() / square / tokens
        squared_gain = gain.square()
        cross = (weight[:, None] * squared_gain * outputs).T @ along
        twice = weight * (squared_gain * outputs.square()).sum(-1)
        normal += torch.diag(weight.sum() * squared_gain) - cross - cross.T
        normal += (twice[:, None] * along).T @ along
        scaled = gain * errors
        projected = scaled - (outputs * scaled).sum(-1, keepdim=True) * along
        slope += scatter * (pull[:, None] * projected).mean(0)
    return normal, slope
