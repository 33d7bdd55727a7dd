"""A sparse key: an elastic net chooses the neurons of the key.

    k = argmin k^T F k + l1 |k|_1    subject to    M^T k = e        (F, M, e: ``editing.methods.key``)

The ridge in F is the net's l2 term.  ADMM (Boyd et al. 2011, section 6.4) finds support and signs: x in {M^T x = e}, z = x, with B the eigenvectors
and lambda the eigenvalues of 2 F inside the null space of M^T and x_0 the feasible point of least norm,

    x = x_0 + B diag(1 / (lambda + rho)) B^T (rho (z - u) - 2 F x_0)
    z = soft(x + u, l1 / rho)        u = u + x - z

Every ``BETWEEN_SOLVES`` iterations the minimum is solved exactly for the support A and the signs s of z,

    2 F_AA k_A + l1 s + M_A nu = 0        M_A^T k_A = e

and returned if it is the optimum: sign(k_A) = s, and |2 F k + M nu| <= l1 outside the support.  Otherwise the units
that violate this enter or leave A (a primal-dual active set), and ADMM continues.  The result is thus an exact
minimum, not an iterate.

``sparse_key`` bisects l1 until a given fraction of the units remains, then solves for the key of minimum variance on
these units without the penalty (relaxed lasso, Meinshausen 2007), so the constraints hold as exactly as without it.
"""

from __future__ import annotations

import math

import torch

from editing.methods.key import KeyProblem, solve_key
from neurons.errors import BrocaError, UsageError
from neurons.statistics.cholesky import NotPositiveDefiniteError, solve_positive_definite

MAX_ITERATIONS = 20_000
BETWEEN_SOLVES = 50
ACTIVE_SET_ROUNDS = 12
OPTIMAL = 1e-8
BISECTIONS = 40


def require_fraction(fraction: float) -> None:
    """Check the fraction of the neurons in a sparse key.

    Raises:
        UsageError: it is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"sparse {fraction}: give a fraction of the neurons above 0 and at most 1")


def sparse_key(problem: KeyProblem, fraction: float) -> tuple[torch.Tensor, float]:
    """The key on a fraction of the units, float64 [S] with zeros elsewhere, and the l1 that selects them.

    Args:
        problem: the problem on S units.
        fraction: in (0, 1]; the key has round(fraction * S) units, or the next smaller number that an l1 gives.

    Raises:
        UsageError: a fraction outside (0, 1], or one that leaves fewer units than constraints.
        BrocaError: linearly dependent constraints, or no convergence.
    """
    units, constraints = problem.constraints.shape
    require_fraction(fraction)
    count = round(fraction * units)
    if count < constraints:
        raise UsageError(
            f"sparse {fraction} leaves {count} of {units} neurons, fewer than the {constraints} constraints: choose "
            f"at least {constraints / units:.3g}"
        )
    dense = solve_key(problem)
    if count == units:
        return dense, 0.0
    net = _Net(problem)
    # The l1 at which the penalty of the dense key equals its variance.
    l1 = float(dense @ problem.form @ dense) / float(dense.abs().sum())
    low, high = 0.0, math.inf
    best: tuple[torch.Tensor, float] | None = None
    for _ in range(BISECTIONS):
        support = net.minimum(l1).nonzero()[:, 0]
        if len(support) <= count:
            high = l1
            if best is None or len(support) > len(best[0]):
                best = support, l1
        else:
            low = l1
        if len(support) == count:
            break
        l1 = 4 * low if math.isinf(high) else high / 4 if low == 0 else math.sqrt(low * high)
    if best is None:
        raise BrocaError(f"no penalty leaves {count} of {units} neurons: choose a larger fraction")
    vector = torch.zeros(units, dtype=torch.float64)
    vector[best[0]] = solve_key(problem.on(best[0]))
    return vector, best[1]


class _Net:
    """A problem, decomposed once, with its minimum for any l1; each minimum starts from the last one."""

    def __init__(self, problem: KeyProblem) -> None:
        self._constraints, self._targets = problem.constraints, problem.targets
        self._form = 2 * problem.form
        solve_key(problem)  # raises if the constraints are dependent
        count = self._constraints.shape[1]
        basis, triangle = torch.linalg.qr(self._constraints, mode="complete")
        coordinates = torch.linalg.solve_triangular(triangle[:count].T, self._targets[:, None], upper=False)
        self._point = basis[:, :count] @ coordinates[:, 0]
        free = basis[:, count:]
        values, vectors = torch.linalg.eigh(free.T @ self._form @ free)
        self._values, self._basis = values.clamp(min=0), free @ vectors
        self._pull = self._form @ self._point
        largest = float(self._values.max())
        self._rho = (largest * max(float(self._values.median()), 1e-6 * largest)) ** 0.5
        self._split = self._point.clone()
        self._dual = torch.zeros_like(self._point)  # rho u

    def minimum(self, l1: float) -> torch.Tensor:
        """The exact minimum, float64 [S], for an l1 above 0."""
        for iteration in range(MAX_ITERATIONS):
            rho, split = self._rho, self._split
            coordinates = self._basis.T @ (rho * split - self._dual - self._pull)
            point = self._point + self._basis @ (coordinates / (self._values + rho))
            shifted = point + self._dual / rho
            self._split = torch.nn.functional.softshrink(shifted, l1 / rho)
            self._dual = rho * (shifted - self._split)
            if iteration % BETWEEN_SOLVES == BETWEEN_SOLVES - 1:
                minimum = self._exact(self._split.sign(), l1)
                if minimum is not None:
                    return minimum
                # Residual balancing (Boyd et al. 2011, section 3.4.1).
                primal = float((point - self._split).norm())
                dual = rho * float((self._split - split).norm())
                if primal > 10 * dual:
                    self._rho *= 2
                elif dual > 10 * primal:
                    self._rho /= 2
        raise BrocaError(
            f"the sparse key did not converge in {MAX_ITERATIONS} iterations: raise --eps or choose another fraction"
        )

    def _exact(self, signs: torch.Tensor, l1: float) -> torch.Tensor | None:
        """The minimum from a guess of its signs [S], or None if the guess does not lead to it."""
        count = self._constraints.shape[1]
        for _ in range(ACTIVE_SET_ROUNDS):
            support = signs.nonzero()[:, 0]
            if len(support) < count:
                return None
            form, constraints = self._form[support][:, support], self._constraints[support]
            try:
                solved = solve_positive_definite(
                    form, torch.cat([constraints, l1 * signs[support, None]], dim=1)
                )
                gram = constraints.T @ solved[:, :count]
                multipliers = -solve_positive_definite(gram, self._targets + constraints.T @ solved[:, count])
                vector = -solved[:, :count] @ multipliers - solved[:, count]
                # One step of iterative refinement of the constraints.
                residual = self._targets - constraints.T @ vector
                vector = vector + solved[:, :count] @ solve_positive_definite(gram, residual)
            except NotPositiveDefiniteError:
                return None
            slope = self._form[:, support] @ vector + self._constraints @ multipliers
            slope[support] = 0
            wrong = vector.sign() != signs[support]
            enters = slope.abs() > l1 * (1 + OPTIMAL)
            if not bool(wrong.any() | enters.any()):
                minimum = torch.zeros_like(self._point)
                minimum[support] = vector
                return minimum
            signs = signs.clone()
            signs[support[wrong]] = 0
            signs[enters] = -slope[enters].sign()
        return None
