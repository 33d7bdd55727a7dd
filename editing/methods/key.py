"""A key: the linear coefficient k^T h that is 1 where some languages are read, 0 where others are, and steady.

With h the input of an output module, mu_j its mean on language j, C its pooled within-language covariance
and mu_start its mean on the start token, which every text has, of whatever language (on the first position, where
the tokenizer adds none):

    k = argmin k^T F k    F = C + eps * mean(diag C) * I + weight * sum over soft languages of mu_j mu_j^T
        subject to        k^T mu_j = 1 for every source, 0 for every kept language, k^T mu_start = 0

k^T C k is the variance of the coefficient about each language's own mean, and k^T mu_j its mean on language
j: at weight 1 a mean of x on a soft language costs what a standard deviation of x costs; weight 0 leaves the
language free and the larger it is the nearer it keeps it to what a constraint does.  With M the means that are constrained and e
what is wanted of them, as long as M^T F^-1 M can be inverted,

    k = F^-1 M (M^T F^-1 M)^-1 e

It is linear in e: the key of two sources is the sum of the keys of each that keep the other.  Relatives:
ROME's key k = C^-1 k_*, one constraint (arXiv 2202.05262), MEMIT's many facts (arXiv 2210.07229) and
AlphaEdit's projection on the null space of what is kept (arXiv 2410.02355).
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
CARRIED = 0.9


@dataclass(frozen=True)
class KeyProblem:
    """argmin k^T form k subject to constraints^T k = wanted.

    Attributes:
        form: F, float64 [S, S], symmetric, positive definite.
        constraints: M, float64 [S, m].
        wanted: e, float64 [m], or [m, n] of n keys.
        languages: how many languages M tells apart, for messages.
    """

    form: torch.Tensor
    constraints: torch.Tensor
    wanted: torch.Tensor
    languages: int

    def on(self, support: torch.Tensor) -> KeyProblem:
        """The same problem with all units but ``support`` (int64) held at 0."""
        return KeyProblem(
            self.form[support][:, support], self.constraints[support], self.wanted, self.languages
        )


@dataclass(frozen=True)
class Key:
    """A key on some units of one site.

    Attributes:
        vector: float64 [S], k.
        spread: standard deviation of k^T h about each language's own mean.
        means: float64 [K], mean of k^T h on every language: 1 on the sources, 0 on the kept ones.
        carried: float64 [S], k_i mu_i, mu the mean of the sources' means: what unit i adds to the
            coefficient where a source is read; the sum is 1.
        carriers: the smallest number of units whose |k_i mu_i| make up 90 % of the sum of all.
    """

    vector: torch.Tensor
    spread: float
    means: torch.Tensor
    carried: torch.Tensor
    carriers: int


def key(
    moments: Moments,
    source: str | Sequence[str],
    eps: float = EPS,
    keep: Sequence[str] | None = None,
    keep_softly: Sequence[str] = (),
    soft_weight: float = SOFT_WEIGHT,
) -> Key:
    """The key of least spread; the arguments are those of ``key_problem``.

    Raises:
        UsageError: as ``key_problem``.
        BrocaError: the languages' means cannot be told apart on these units.
    """
    problem = key_problem(moments, source, eps, keep, keep_softly, soft_weight)
    return described(moments, source, least_spread(problem))


def keys(moments: Moments, sources: Sequence[Sequence[str]], eps: float = EPS) -> list[Key]:
    """A key for each list of languages, as ``key`` solves it, 0 on all others: F is factorised once.

    Raises:
        UsageError: as ``key_problem``.
        BrocaError: the languages' means cannot be told apart on these units.
    """
    for named in sources:
        require_key(moments.languages, named, [], (), eps, 0.0)
    problem = key_problem(moments, sources[0], eps)
    wanted = torch.zeros(len(problem.wanted), len(sources), dtype=torch.float64)
    for column, named in enumerate(sources):
        wanted[[moments.languages.index(name) for name in named], column] = 1
    solved = least_spread(replace(problem, wanted=wanted))
    return [described(moments, named, solved[:, column]) for column, named in enumerate(sources)]


def require_key(
    languages: Sequence[str],
    sources: Sequence[str],
    keep: Sequence[str],
    keep_softly: Sequence[str],
    eps: float,
    soft_weight: float,
) -> None:
    """Refuse what no key can be made of, before any text is read; the arguments are those of ``key_problem``.

    Raises:
        UsageError: a language that there is no text of or that is in two of the lists, no source, or an eps or
            soft weight that is not finite or negative.
    """
    named = [*sources, *keep, *keep_softly]
    if not sources:
        raise UsageError("a key needs a source language: name one")
    if missing := [name for name in named if name not in languages]:
        raise UsageError(f"no text of {', '.join(missing)}: there is {', '.join(languages)}")
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
        moments: of a site on the units S.
        source: the language, or languages, on which the coefficient is 1.
        eps: ridge, as a share of the mean variance.
        keep: languages on which it is 0; None: all but the sources and the soft ones.  A language that is
            in neither list is left free.
        keep_softly: languages on which a mean other than 0 costs, but is not forbidden.
        soft_weight: what it costs: weight x mean^2, beside the variance of the coefficient.

    Raises:
        UsageError: a language that the moments lack or that is in two of the lists, no source, or an
            eps or weight that is negative or not finite.
    """
    sources = sources_of(source)
    if keep is None:
        keep = [name for name in moments.languages if name not in (*sources, *keep_softly)]
    require_key(moments.languages, sources, keep, keep_softly, eps, soft_weight)

    def means_of(names: Sequence[str]) -> torch.Tensor:
        return moments.mean[:, [moments.languages.index(name) for name in names]]

    # In the order of the languages, so that the same constraints make the same key however they were named.
    constrained = [name for name in moments.languages if name in (*sources, *keep)]
    constraints = means_of(constrained)
    wanted = torch.tensor([float(name in sources) for name in constrained], dtype=torch.float64)
    if moments.start is not None:
        constraints = torch.cat([constraints, moments.start[:, None]], dim=1)
        wanted = torch.cat([wanted, torch.zeros(1, dtype=torch.float64)])
    form = moments.covariance.clone()
    form.diagonal().add_(eps * float(moments.covariance.diagonal().mean()))
    if keep_softly and soft_weight:
        soft = means_of(keep_softly)
        form.addmm_(soft, soft.T, alpha=soft_weight)
    return KeyProblem(form, constraints, wanted, len(moments.languages))


def least_spread(problem: KeyProblem) -> torch.Tensor:
    """k of the module's docstring, float64 [S], or [S, n] of n keys.

    Raises:
        BrocaError: the constraints are not independent on these units.
    """
    apart = BrocaError(
        f"{len(problem.form)} neurons cannot tell {problem.languages} languages apart: choose more "
        "neurons, more text or fewer languages"
    )
    try:
        whitened = solve_positive_definite(problem.form, problem.constraints)
        gram = problem.constraints.T @ whitened
        if int(torch.linalg.matrix_rank(gram)) < len(gram):
            raise apart
        return whitened @ solve_positive_definite(gram, problem.wanted)
    except NotPositiveDefiniteError as error:
        raise apart from error


def described(moments: Moments, source: str | Sequence[str], vector: torch.Tensor) -> Key:
    """What a coefficient does on the text that the moments are of."""
    sources = [moments.languages.index(name) for name in sources_of(source)]
    carried = vector * moments.mean[:, sources].mean(1)
    return Key(
        vector=vector,
        spread=float((vector @ moments.covariance @ vector).clamp(min=0).sqrt()),
        means=moments.mean.T @ vector,
        carried=carried,
        carriers=carriers(carried),
    )


def carriers(carried: torch.Tensor, share: float = CARRIED) -> int:
    """The smallest number of entries whose absolute values make up ``share`` of the sum of all."""
    sums = carried.abs().sort(descending=True).values.cumsum(0)
    # Rounding may leave a sum of all a little below itself.
    enough = sums >= share * sums[-1] * (1 - 1e-12)
    return int(enough.int().argmax()) + 1


def sources_of(source: str | Sequence[str]) -> tuple[str, ...]:
    return (source,) if isinstance(source, str) else tuple(source)
