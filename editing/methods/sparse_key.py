"""A sparse key: an elastic net chooses which neurons the key uses, in place of a given neuron set.

    k = argmin k^T F k + l1 |k|_1 + l2 |k|^2    subject to    M^T k = e        (F, M, e: ``editing.methods.key``)

ADMM (Boyd et al. 2011, section 6.4) finds support and signs: x in {M^T x = e}, z = x, with B the eigenvectors
and lambda the eigenvalues of 2 (F + l2 I) inside the null space of M^T and x_0 the feasible point of least norm,

    x = x_0 + B diag(1 / (lambda + rho)) B^T (rho (z - u) - 2 (F + l2 I) x_0)
    z = soft(x + u, l1 / rho)        u = u + x - z

Every so often the minimum is solved exactly for the support A and the signs s of z,

    2 (F + l2 I)_AA k_A + l1 s + M_A nu = 0        M_A^T k_A = e

and taken if it is the optimum: sign(k_A) = s, and |2 F k + M nu| <= l1 off the support; else the units that
violate this enter and leave A (a primal-dual active set) before ADMM goes on.  What is given back is thus an
exact minimum, not an iterate.

As nobody knows l1, ``sparse_key`` bisects it until a given share of the units is left, then solves for the
key of least spread on these units without the penalty, which has done its work (relaxed lasso, Meinshausen
2007): the constraints hold as exactly as without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from editing.methods.key import KeyProblem, least_spread
from neurons.errors import BrocaError, UsageError
from neurons.statistics.cholesky import NotPositiveDefiniteError, solve_positive_definite

MOST_ITERATIONS = 20_000
BETWEEN_SOLVES = 50
ACTIVE_SET_ROUNDS = 12
OPTIMAL = 1e-8
BISECTIONS = 40


@dataclass(frozen=True)
class SparseKey:
    """Which units a sparse key uses, and how.

    Attributes:
        vector: float64 [S], 0 off the support.
        support: int64, indices of the units used, ascending.
        l1: the penalty that left them.
    """

    vector: torch.Tensor
    support: torch.Tensor
    l1: float


def elastic_net(problem: KeyProblem, l1: float, l2: float = 0.0) -> torch.Tensor:
    """The exact minimum, float64 [S].

    Raises:
        UsageError: a negative l1 or l2.
        BrocaError: constraints that are not independent, or no optimum found.
    """
    return _Net(problem, l2).minimum(l1)


def require_share(share: float) -> None:
    """Refuse a share of the neurons that is outside (0, 1].

    Raises:
        UsageError: as said.
    """
    if not 0 < share <= 1:
        raise UsageError(f"sparse {share}: a share of the neurons, above 0 and at most 1, is needed")


def sparse_key(problem: KeyProblem, share: float, l2: float = 0.0) -> SparseKey:
    """The key on the ``share`` of units that an elastic net leaves.

    Args:
        problem: on S units.
        share: in (0, 1]; round(share * S) units are used, or the next smaller number that some l1 leaves.
        l2: beside the ridge that F has.

    Raises:
        UsageError: a share outside (0, 1], or so small that fewer units than constraints would be left.
        BrocaError: as ``elastic_net``.
    """
    units, least = problem.constraints.shape
    require_share(share)
    wanted = round(share * units)
    if wanted < least:
        raise UsageError(
            f"sparse {share} leaves {wanted} of {units} neurons, fewer than the {least} constraints: choose "
            f"at least {least / units:.3g}"
        )
    if wanted == units:
        return SparseKey(least_spread(problem), torch.arange(units), 0.0)
    net = _Net(problem, l2)
    dense = least_spread(problem)
    # Where the penalty weighs as much as the spread.
    l1 = float(dense @ problem.form @ dense) / float(dense.abs().sum())
    low, high = 0.0, math.inf
    best: tuple[torch.Tensor, float] | None = None
    for _ in range(BISECTIONS):
        support = net.minimum(l1).nonzero()[:, 0]
        if len(support) <= wanted:
            high = l1
            if best is None or len(support) > len(best[0]):
                best = support, l1
        else:
            low = l1
        if len(support) == wanted:
            break
        l1 = 4 * low if math.isinf(high) else high / 4 if low == 0 else math.sqrt(low * high)
    if best is None:
        raise BrocaError(f"no penalty leaves {wanted} of {units} neurons: choose a larger share")
    vector = torch.zeros(units, dtype=torch.float64)
    vector[best[0]] = least_spread(problem.on(best[0]))
    return SparseKey(vector, best[0], best[1])


class _Net:
    """One problem, decomposed once, minimised for any l1; each minimum starts where the last one ended."""

    def __init__(self, problem: KeyProblem, l2: float) -> None:
        if not l2 >= 0:
            raise UsageError(f"l2 {l2} must not be negative")
        self._constraints, self._wanted = problem.constraints, problem.wanted
        self._languages = problem.languages
        self._form = 2 * problem.form
        self._form.diagonal().add_(2 * l2)
        least_spread(problem)  # refuses constraints that are not independent
        count = self._constraints.shape[1]
        basis, triangle = torch.linalg.qr(self._constraints, mode="complete")
        inside = torch.linalg.solve_triangular(triangle[:count].T, self._wanted[:, None], upper=False)
        self._point = basis[:, :count] @ inside[:, 0]
        free = basis[:, count:]
        values, vectors = torch.linalg.eigh(free.T @ self._form @ free)
        self._values, self._basis = values.clamp(min=0), free @ vectors
        self._pull = self._form @ self._point
        largest = float(self._values.max())
        self._rho = (largest * max(float(self._values.median()), 1e-6 * largest)) ** 0.5
        self._split = self._point.clone()
        self._dual = torch.zeros_like(self._point)  # rho u

    def minimum(self, l1: float) -> torch.Tensor:
        if not l1 >= 0:
            raise UsageError(f"l1 {l1} must not be negative")
        if l1 == 0:
            return least_spread(KeyProblem(self._form, self._constraints, self._wanted, self._languages))
        for iteration in range(MOST_ITERATIONS):
            rho, split = self._rho, self._split
            wanted = self._basis.T @ (rho * split - self._dual - self._pull)
            point = self._point + self._basis @ (wanted / (self._values + rho))
            shifted = point + self._dual / rho
            self._split = torch.nn.functional.softshrink(shifted, l1 / rho)
            self._dual = rho * (shifted - self._split)
            if iteration % BETWEEN_SOLVES == BETWEEN_SOLVES - 1:
                found = self._exact(self._split.sign(), l1)
                if found is not None:
                    return found
                # Residual balancing (Boyd et al. 2011, section 3.4.1), in steps.
                primal = float((point - self._split).norm())
                dual = rho * float((self._split - split).norm())
                if primal > 10 * dual:
                    self._rho *= 2
                elif dual > 10 * primal:
                    self._rho /= 2
        raise BrocaError(
            f"no sparse key was found in {MOST_ITERATIONS} iterations: raise --eps or choose another share"
        )

    def _exact(self, signs: torch.Tensor, l1: float) -> torch.Tensor | None:
        """The minimum from a guess of its signs [S], or None where the guess does not lead to it."""
        count = self._constraints.shape[1]
        for _ in range(ACTIVE_SET_ROUNDS):
            support = signs.nonzero()[:, 0]
            if len(support) < count:
                return None
            own, constraints = self._form[support][:, support], self._constraints[support]
            try:
                both = solve_positive_definite(
                    own, torch.cat([constraints, l1 * signs[support, None]], dim=1)
                )
                gram = constraints.T @ both[:, :count]
                multipliers = -solve_positive_definite(gram, self._wanted + constraints.T @ both[:, count])
                vector = -both[:, :count] @ multipliers - both[:, count]
                # One step of refinement: what is left of the constraints after rounding.
                left = self._wanted - constraints.T @ vector
                vector = vector + both[:, :count] @ solve_positive_definite(gram, left)
            except NotPositiveDefiniteError:
                return None
            slope = self._form[:, support] @ vector + self._constraints @ multipliers
            slope[support] = 0
            wrong = vector.sign() != signs[support]
            enters = slope.abs() > l1 * (1 + OPTIMAL)
            if not bool(wrong.any() | enters.any()):
                found = torch.zeros_like(self._point)
                found[support] = vector
                return found
            signs = signs.clone()
            signs[support[wrong]] = 0
            signs[enters] = -slope[enters].sign()
        return None
