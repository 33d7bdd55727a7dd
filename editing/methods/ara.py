"""Arbitrary-rank ablation (ARA): a module's outputs on one language become those on another, by least squares.

With W [d, n] the weight of an output module, X_s and X_t the inputs of T texts of source and target (the mean over a
text's tokens), Y = X W^T, and S the second moment of the inputs on all tokens of the kept languages (the target and
all but the source), W' minimises

    tr((W' - W) S (W' - W)^T) / sigma^2
        + steer / sigma * (dist(X_s W'^T, Y_t) - overcorrect * dist(X_s W'^T, Y_s))

dist(A, B) is the mean over the rows of A of the mean Euclidean distance to the nearest ``neighbors`` rows of B, and
sigma = dist(Y_s, Y_t).  The first term is the mean square change of the outputs on the kept languages, the
second pulls the source's outputs to the target's and pushes them away from where they were.

With P = X_s S^-1 X_s^T = E diag(e) E^T, the minimum over all W' lies among changes of rank at most T:

    W' = W + sigma Z^T K^T      K = S^-1 X_s^T E diag(e)^(-1/2)  [n, r],  K^T S K = I,  Z [r, d]

so that the first term is |Z|^2 and the source's outputs are Y_s + sigma E diag(e)^(1/2) Z.  Z is found by L-BFGS
(Liu and Nocedal 1989) from 0.  If rows keep their norms, W' = diag(s)(W + sigma Z^T K^T) with s_i = |w_i| / |w_i'|, over
the same Z.  S counts the start token once more than all others together, and has a ridge of ``eps`` times its mean
variance.

Source: the branch ``ara`` of heretic (https://github.com/p-e-w/heretic/pull/211), without a paper.  There the weights of the
terms are absolute and searched for every model; sigma makes one weight valid for modules of any scale.  There
the first term is over the last positions of some hundred prompts; S is over all tokens, because so few rows leave most
of the n dimensions free to change.  And there the whole matrix is the variable, or a LoRA of rank 128.

Every module is fitted to the inputs that it has in the unedited model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from editing.methods.austeer import text_responses
from editing.methods.bake import in_layer, total_moments
from editing.methods.key import EPS
from editing.methods.material import Material
from editing.methods.method import Method
from editing.methods.scope import chosen_places
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS, COMMON_SITES, Anatomy
from neurons.errors import BrocaError, UsageError
from neurons.recording.covariance import Moments, each_moments
from neurons.recording.text_pass import begin_stage
from neurons.setting import COUNT, Range, setting
from neurons.statistics.cholesky import solve_positive_definite
from neurons.text.batches import counted_tokens, language_batches
from neurons.text.corpus import Corpus
from neurons.text.sampling import even_order
from neurons.text.token_budget import KEYS

# heretic's LoRA has this rank, and its optimiser takes these steps of so many iterations.
TEXTS = 128
STEPS, ITERATIONS, HISTORY = 5, 20, 10
# Fractions of the largest eigenvalue of P: smaller ones are rounding.
MIN_EIGENVALUE = 1e-10


def mean_distance(rows: torch.Tensor, to: torch.Tensor, neighbors: int) -> torch.Tensor:
    """Mean over rows [A, d] of the mean Euclidean distance to the nearest of ``to`` [B, d]; fewer if B is smaller."""
    # By products of matrices distances lose half of their digits, which are enough to find the nearest.
    rough = torch.cdist(rows.detach(), to, compute_mode="use_mm_for_euclid_dist")
    nearest = rough.topk(min(neighbors, len(to)), dim=1, largest=False).indices
    distances: torch.Tensor = (rows[:, None] - to[nearest]).norm(dim=2)
    return distances.mean()


@dataclass(frozen=True)
class Problem:
    """The least squares of one module, in float64.

    Attributes:
        source: Y_s [T, d].
        target: Y_t [B, d].
        keys: K [n, r].
        gram: K^T K [r, r].
        reached: E diag(e)^(1/2) [T, r], K^T x of the source's texts.
        weight_squares: |w_i|^2 [d].
        kept_squares: w_i^T S w_i [d].
        images: W K [d, r].
        kept_images: W S K [d, r].
        width: columns of W for one head or neuron.
    """

    source: torch.Tensor
    target: torch.Tensor
    keys: torch.Tensor
    gram: torch.Tensor
    reached: torch.Tensor
    weight_squares: torch.Tensor
    kept_squares: torch.Tensor
    images: torch.Tensor
    kept_images: torch.Tensor
    width: int = 1

    def row_scale(self, left: torch.Tensor) -> torch.Tensor:
        """s [d] of W + left K^T, left [d, r]."""
        # A row of zeros stays one, with a gradient that is finite.
        floor = 1e-30 * self.weight_squares.mean()
        grown = ((2 * self.images + left @ self.gram) * left).sum(1)
        return ((self.weight_squares + floor) / (self.weight_squares + grown).clamp(min=0).add(floor)).sqrt()

    def kept_change(self, left: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """tr((W' - W) S (W' - W)^T) of W' = diag(scale)(W + left K^T)."""
        if scale is None:
            return left.square().sum()
        shrunk, moved = scale - 1, scale[:, None] * left
        crossed = 2 * shrunk[:, None] * self.kept_images * moved
        return (shrunk.square() * self.kept_squares).sum() + (crossed + moved.square()).sum()

    def change(self, left: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """|W' - W|^2."""
        shrunk = torch.zeros_like(self.weight_squares) if scale is None else scale - 1
        moved = left if scale is None else scale[:, None] * left
        crossed = 2 * shrunk[:, None] * self.images + moved @ self.gram
        return (shrunk.square() * self.weight_squares).sum() + (crossed * moved).sum()

    def outputs(self, left: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """X_s W'^T [T, d]."""
        moved = self.source + self.reached @ left.T
        return moved if scale is None else moved * scale


def make_problem(
    weight: torch.Tensor, source: torch.Tensor, target: torch.Tensor, second: torch.Tensor, width: int = 1
) -> Problem:
    """The problem of a module.

    Args:
        weight: W [d, n].
        source: X_s [T, n].
        target: X_t [B, n].
        second: S [n, n], positive definite; its memory is reused.
        width: columns of W for one head or neuron.

    Raises:
        NotPositiveDefiniteError: S is singular.
        BrocaError: the source's inputs are 0.
    """
    weight, source = weight.double(), source.double()
    kept_squares = ((weight @ second) * weight).sum(1)
    solved = solve_positive_definite(second, source.T, overwrite=True)
    values, vectors = torch.linalg.eigh(source @ solved)
    if not bool(values[-1] > 0):
        raise BrocaError("its input is 0 in every text of the source: leave it out (--layers)")
    kept = values > MIN_EIGENVALUE * values[-1]
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    keys, outputs = solved @ (vectors / roots), source @ weight.T
    return Problem(
        source=outputs,
        target=target.double() @ weight.T,
        keys=keys,
        gram=keys.T @ keys,
        reached=vectors * roots,
        weight_squares=weight.square().sum(1),
        kept_squares=kept_squares,
        images=weight @ keys,
        kept_images=outputs.T @ (vectors / roots),
        width=width,
    )


@dataclass(frozen=True)
class Objective:
    """The objective of the module's docstring, over sigma.

    Attributes:
        steer: weight of the second term.
        overcorrect: weight of the push, as a fraction of the pull.
        neighbors: number of nearest rows.
        row_norms: whether rows of W keep their norms.
    """

    steer: float
    overcorrect: float
    neighbors: int
    row_norms: bool

    def at(
        self, problem: Problem, left: torch.Tensor, sigma: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(objective, first term, dist to the target over sigma) at W + left K^T, its rows rescaled with ``row_norms``."""
        scale = problem.row_scale(left) if self.row_norms else None
        moved = problem.outputs(left, scale)
        kept = problem.kept_change(left, scale) / sigma**2
        pull = push = mean_distance(moved, problem.target, self.neighbors) / sigma
        if self.overcorrect:
            push = mean_distance(moved, problem.source, self.neighbors) / sigma
        return kept + self.steer * (pull - self.overcorrect * push), kept, pull


@dataclass(frozen=True)
class Solution:
    """W' = diag(scale)(W + left K^T).

    Attributes:
        left: float64 [d, r].
        scale: float64 [d]; None if rows need not keep their norms.
        distance: dist(X_s W'^T, Y_t) / sigma.
        kept: root mean square change of the outputs over that of the outputs, both by S.
    """

    left: torch.Tensor
    scale: torch.Tensor | None
    distance: float
    kept: float


def solve(problem: Problem, objective: Objective) -> Solution:
    """Minimise the objective by L-BFGS.

    Raises:
        BrocaError: source and target have equal outputs, or the objective is not finite.
    """
    sigma = float(mean_distance(problem.source, problem.target, objective.neighbors))
    if not sigma > 0:
        raise BrocaError("its outputs are equal on source and target: leave it out (--layers)")
    shape = problem.keys.shape[1], len(problem.weight_squares)
    coefficients = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [coefficients], max_iter=ITERATIONS, history_size=HISTORY, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = objective.at(problem, sigma * coefficients.T, sigma)[0]
        value.backward()
        return value

    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.step(closure)
    left = sigma * coefficients.detach().T
    value, kept, distance = objective.at(problem, left, sigma)
    if not bool(torch.isfinite(value)):
        raise BrocaError("the optimisation diverged: lower steer or overcorrect")
    return Solution(
        left=left,
        scale=problem.row_scale(left) if objective.row_norms else None,
        distance=float(distance),
        kept=sigma * float((kept / problem.kept_squares.sum()).clamp(min=0).sqrt()),
    )


def second_moment(moments: Moments, tokens: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """S, float64 [n, n].

    Args:
        moments: of the module's input on the kept languages.
        tokens: [K], tokens of each language.
        eps: ridge, as a fraction of the mean variance.
    """
    mean, covariance = total_moments(moments, tokens)
    second = covariance.addr(mean, mean)
    if moments.start is not None:
        second.addr_(moments.start, moments.start)
    second.diagonal().add_(eps * float(covariance.diagonal().mean()))
    return second


def few_texts(corpus: Corpus, count: int) -> Corpus:
    """At most ``count`` texts of each language, evenly from its file."""
    texts = {}
    for language, of_language in corpus.texts.items():
        chosen = {*[line for line in even_order(len(of_language)) if of_language[line]][:count]}
        texts[language] = tuple(text if line in chosen else "" for line, text in enumerate(of_language))
    return replace(corpus, texts=texts)


def module_edit(place: tuple[int, str], problem: Problem, solution: Solution) -> ModuleEdit:
    """The edit of a layer's module."""
    left, scale = solution.left, solution.scale
    return ModuleEdit(
        layer=place[0],
        block=place[1],
        components=tuple(range(len(problem.keys) // problem.width)),
        row_scale=None if scale is None else scale.float(),
        left=(left if scale is None else scale[:, None] * left).float(),
        right=problem.keys.float(),
        notes={
            "change_norm": float(problem.change(left, scale).clamp(min=0).sqrt()),
            "weight_norm": float(problem.weight_squares.sum().sqrt()),
            "distance": solution.distance,
            "kept": solution.kept,
        },
    )


@dataclass(frozen=True, kw_only=True)
class Ara(Method):
    """The registered method; of ``--languages`` the first is the source, the second the target, all others are kept."""

    name = "ara"
    title = "ARA"
    line = "moves a module's outputs on the source to those on the target, by least squares"
    source = "heretic"
    needs = ("languages", "corpus")
    takes = ("part", "layers", "blocks", "strength", "device", "dtype")
    solves_keys = True
    key_modules = BLOCKS

    strength: float = setting(1.0, "of the solved change")
    steer: float = setting(
        0.1, "weight of moving the source beside keeping the others", search=Range(1e-3, 10.0, log=True),
        grid=(0.01, 0.03, 0.1, 0.3),
    )  # fmt: skip
    overcorrect: float = setting(0.0, "push away from the source's outputs, per pull", search=Range(0.0, 1.3))
    neighbors: int = setting(1, "nearest texts that count", kind=COUNT, search=Range(1, 15))
    row_norms: bool = setting(True, "rows of the weights keep their norms")
    texts: int = setting(TEXTS, "texts of source and of target; also the rank of the edit", kind=COUNT)
    eps: float = setting(
        EPS, "ridge of the kept languages' second moment, as a fraction of the mean variance"
    )

    def kept_bytes(self, anatomy: Anatomy, layers: int, modules: Sequence[str]) -> int:
        widths = [anatomy.width(COMMON_SITES[module]) for module in modules]
        texts, residual = self.texts, anatomy.residual
        # A problem has the edit's rank at most: keys, outputs on both languages, and the images of the keys.
        problem = 8 * sum(texts * width + 4 * texts * residual + 2 * texts**2 for width in widths)
        means = 4 * 2 * texts * anatomy.layers * sum(widths)
        return layers * problem + means

    def problems(self, material: Material) -> dict[tuple[int, str], Problem]:
        """(layer, module) -> its problem, from two passes over text.

        Raises:
            UsageError: an unknown layer or module, a mixture of experts, or eps not above 0.
            BrocaError: as ``make_problem``; names layer and module.
        """
        loaded, corpus, (source, target) = material.loaded, material.text, material.pair
        if not 0 < self.eps < float("inf"):
            raise UsageError(f"eps is {self.eps}: it must be above 0")
        corpus.require(source, target)
        places, anatomy = chosen_places(loaded, material.layers, material.blocks or BLOCKS), loaded.anatomy
        if any(module == "mlp" and anatomy.mixed_in(layer) for layer, module in places):
            raise UsageError(
                f"{anatomy.model_type}: experts see different tokens, so the MLP's output is no linear function of one "
                "input: choose --blocks attn"
            )
        sites = list(dict.fromkeys(COMMON_SITES[module] for _, module in places))
        few = few_texts(corpus.only(source, target), self.texts)
        responses, _ = text_responses(
            loaded, few, sites, material.progress, sorted({layer for layer, _ in places})
        )
        kept = corpus.only(*(language for language in corpus.languages if language != source))
        batches = language_batches(loaded, kept, default=KEYS.tokens)
        tokens = torch.tensor([counted_tokens(of_language) for of_language in batches.values()])
        module_of = {(COMMON_SITES[module], layer): module for layer, module in places}
        units = {(site, layer): torch.arange(anatomy.width(site, layer)) for site, layer in module_of}
        weights, made = Weights(loaded), {}
        for (site, layer), moments in each_moments(loaded, batches, units, material.progress):
            module, width = module_of[site, layer], len(moments.units)
            at_source, at_target = (responses[k][site][:, layer, :width] for k in (source, target))
            with in_layer(layer, module):
                second = second_moment(moments, tokens, self.eps)
                size = anatomy.component_width(module, layer)
                made[layer, module] = make_problem(
                    weights.read(layer, module), at_source, at_target, second, size
                )
            # Frees this covariance before the next layer is read.
            del moments
        return made

    def prepare(self, material: Material) -> Plan:
        """The plan at strength 1."""
        source, target = material.pair
        made = material.once((self.name, self.texts, self.eps), lambda: self.problems(material))
        settings = {
            "layers": sorted({layer for layer, _ in made}),
            "blocks": list(dict.fromkeys(module for _, module in made)),
            **{name: getattr(self, name) for name in self.settings()},
            "strength": 1.0,
            "corpus": material.text.provenance,
        }
        languages = {"source": source, "target": target, "languages": list(material.text.languages)}
        objective = Objective(self.steer, self.overcorrect, self.neighbors, self.row_norms)
        begin_stage(material.progress, "Solving least squares", len(made), "modules")
        edits = []
        for (layer, module), problem in made.items():
            with in_layer(layer, module):
                solution = solve(problem, objective)
            edits.append(module_edit((layer, module), problem, solution))
            if material.progress is not None:
                material.progress(1)
        return make_plan(edits, plan_metadata(material.opened, self.name, settings, languages))
