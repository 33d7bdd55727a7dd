"""A key: a linear coefficient k^T h with mean 1 on source languages, mean 0 on kept languages and minimum variance.

With h the input of an output module, mu_j its mean on language j, C its pooled within-language covariance and
mu_start its mean on the start token (without a start token, on the first position), which is the same for texts of
all languages:

    k = argmin k^T F k    F = C + eps * mean(diag C) * I + weight * sum over soft languages of mu_j mu_j^T
        subject to        k^T mu_j = 1 for every source, 0 for every kept language, k^T mu_start = 0

k^T C k is the variance of the coefficient about each language's mean, and k^T mu_j its mean on language j.  At
weight 1 a mean of x on a soft language costs as much as a standard deviation of x; weight 0 does not constrain the
language, and a large weight approaches a constraint.  With M the constrained means and e their targets, if
M^T F^-1 M is invertible,

    k = F^-1 M (M^T F^-1 M)^-1 e

k is linear in e: the key of two sources is the sum of the keys of each that keep the other.  Related work: the key
k = C^-1 k_* of ROME, with one constraint (arXiv 2202.05262), the many facts of MEMIT (arXiv 2210.07229) and the
null-space projection of AlphaEdit (arXiv 2410.02355).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from neurons.errors import BrocaError, UsageError
from neurons.recording.covariance import Moments
from neurons.statistics.cholesky import NotPositiveDefiniteError, solve_positive_definite

EPS = 1e-2
SOFT_WEIGHT = 1.0
CARRIER_FRACTION = 0.9


@dataclass(frozen=True)
class KeyProblem:
    """argmin k^T form k subject to constraints^T k = targets.

    Attributes:
        form: F, float64 [S, S], symmetric, positive definite.
        constraints: M, float64 [S, m].
        targets: e, float64 [m], or [m, n] for n keys.
        languages: number of languages, for messages.
    """

    form: torch.Tensor
    constraints: torch.Tensor
    targets: torch.Tensor
    languages: int

    def on(self, support: torch.Tensor) -> KeyProblem:
        """The same problem with all units outside ``support`` (int64) fixed at 0."""
        return KeyProblem(
            self.form[support][:, support], self.constraints[support], self.targets, self.languages
        )


@dataclass(frozen=True)
class Key:
    """A key on units of one site.

    Attributes:
        vector: float64 [S], k.
        deviation: standard deviation of k^T h about each language's mean.
        means: float64 [K], mean of k^T h on every language: 1 on the sources, 0 on the kept languages.
        contribution: float64 [S], k_i mu_i with mu the mean of the sources' means: the contribution of unit i to the
            coefficient on the sources; the sum is 1.
        carriers: the smallest number of units that account for 90 % of the sum of |k_i mu_i|.
    """

    vector: torch.Tensor
    deviation: float
    means: torch.Tensor
    contribution: torch.Tensor
    carriers: int


def key(
    moments: Moments,
    source: str | Sequence[str],
    eps: float = EPS,
    keep: Sequence[str] | None = None,
    keep_softly: Sequence[str] = (),
    soft_weight: float = SOFT_WEIGHT,
) -> Key:
    """The key of minimum variance; arguments as in ``key_problem``.

    Raises:
        UsageError: as ``key_problem``.
        BrocaError: the languages' means are linearly dependent on these units.
    """
    problem = key_problem(moments, source, eps, keep, keep_softly, soft_weight)
    return key_of(moments, source, solve_key(problem, overwrite=True))


def keys(moments: Moments, sources: Sequence[Sequence[str]], eps: float = EPS) -> list[Key]:
    """A key for each list of languages, 0 on all others, as in ``key``; F is factorised once.

    Raises:
        UsageError: as ``key_problem``.
        BrocaError: as ``key``.
    """
    for languages in sources:
        require_key(moments.languages, languages, [], (), eps, 0.0)
    problem = key_problem(moments, sources[0], eps)
    targets = torch.zeros(len(problem.targets), len(sources), dtype=torch.float64)
    for column, languages in enumerate(sources):
        targets[[moments.languages.index(name) for name in languages], column] = 1
    vectors = solve_key(replace(problem, targets=targets), overwrite=True)
    return [key_of(moments, languages, vectors[:, column]) for column, languages in enumerate(sources)]


def require_key(
    languages: Sequence[str],
    sources: Sequence[str],
    keep: Sequence[str],
    keep_softly: Sequence[str],
    eps: float,
    soft_weight: float,
) -> None:
    """Check the arguments of ``key_problem`` before any text is read.

    Raises:
        UsageError: a language without text or in two of the lists, no source, or an eps or soft weight that is
            negative or not finite.
    """
    named = [*sources, *keep, *keep_softly]
    if not sources:
        raise UsageError("a key needs a source language: name at least one")
    if missing := [name for name in named if name not in languages]:
        raise UsageError(f"no text of {', '.join(missing)}: the languages are {', '.join(languages)}")
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise UsageError(f"{', '.join(twice)}: a language is a source, kept, or kept softly: name it once")
    if not (0 <= eps < math.inf and 0 <= soft_weight < math.inf):
        raise UsageError(f"eps {eps} and soft weight {soft_weight} must be finite and not negative")


def key_problem(
    moments: Moments,
    source: str | Sequence[str],
    eps: float = EPS,
    keep: Sequence[str] | None = None,
    keep_softly: Sequence[str] = (),
    soft_weight: float = SOFT_WEIGHT,
) -> KeyProblem:
    """F, M and e of the module's docstring.

    Args:
        moments: moments of a site on S units.
        source: language or languages with mean 1.
        eps: ridge, as a fraction of the mean variance.
        keep: languages with mean 0; None: all but the sources and the soft ones.  A language in neither list is
            not constrained.
        keep_softly: languages on which a mean other than 0 is penalised.
        soft_weight: the penalty is soft_weight x mean^2, added to the variance of the coefficient.

    Raises:
        UsageError: a language that the moments lack or that is in two of the lists, no source, or an eps or weight
            that is negative or not finite.
    """
    sources = sources_of(source)
    if keep is None:
        keep = [name for name in moments.languages if name not in (*sources, *keep_softly)]
    require_key(moments.languages, sources, keep, keep_softly, eps, soft_weight)

    def means_of(names: Sequence[str]) -> torch.Tensor:
        return moments.mean[:, [moments.languages.index(name) for name in names]]

    # In the order of the moments, so that the key does not depend on the order of the arguments.
    constrained = [name for name in moments.languages if name in (*sources, *keep)]
    constraints = means_of(constrained)
    targets = torch.tensor([float(name in sources) for name in constrained], dtype=torch.float64)
    if moments.start is not None:
        constraints = torch.cat([constraints, moments.start[:, None]], dim=1)
        targets = torch.cat([targets, torch.zeros(1, dtype=torch.float64)])
    form = moments.covariance.clone()
    form.diagonal().add_(eps * float(moments.covariance.diagonal().mean()))
    if keep_softly and soft_weight:
        soft = means_of(keep_softly)
        form.addmm_(soft, soft.T, alpha=soft_weight)
    return KeyProblem(form, constraints, targets, len(moments.languages))


def solve_key(problem: KeyProblem, overwrite: bool = False) -> torch.Tensor:
    """k of the module's docstring, float64 [S], or [S, n] for n keys.

    Args:
        problem: F, M and e.
        overwrite: F may be destroyed, which saves its memory.

    Raises:
        BrocaError: the constraints are linearly dependent on these units.
    """
    dependent = BrocaError(
        f"{len(problem.form)} neurons do not separate {problem.languages} languages: choose more neurons, more text "
        "or fewer languages"
    )
    try:
        whitened = solve_positive_definite(problem.form, problem.constraints, overwrite)
        gram = problem.constraints.T @ whitened
        if int(torch.linalg.matrix_rank(gram)) < len(gram):
            raise dependent
        return whitened @ solve_positive_definite(gram, problem.targets)
    except NotPositiveDefiniteError as error:
        raise dependent from error


def key_of(moments: Moments, source: str | Sequence[str], vector: torch.Tensor) -> Key:
    """The key with this vector, with its statistics on the text of the moments."""
    sources = [moments.languages.index(name) for name in sources_of(source)]
    contribution = vector * moments.mean[:, sources].mean(1)
    return Key(
        vector=vector,
        deviation=float((vector @ moments.covariance @ vector).clamp(min=0).sqrt()),
        means=moments.mean.T @ vector,
        contribution=contribution,
        carriers=count_carriers(contribution),
    )


def count_carriers(contribution: torch.Tensor) -> int:
    """The smallest number of entries whose absolute values add up to ``CARRIER_FRACTION`` of the sum of all."""
    sums = contribution.abs().sort(descending=True).values.cumsum(0)
    # The tolerance covers rounding of the sums.
    enough = sums >= CARRIER_FRACTION * sums[-1] * (1 - 1e-12)
    return int(enough.int().argmax()) + 1


def sources_of(source: str | Sequence[str]) -> tuple[str, ...]:
    return (source,) if isinstance(source, str) else tuple(source)
