"""Comparison of two checkpoints by tensor, and the plan of edits that maps one to the other.

For each output weight, W [d, n] in the base and W' in the edited checkpoint, whose numbers are rounded to
multiples of a spacing t(W'_ij), the first form that fits is used:

    column scale   every column that differs is c_j W_j up to one rounding: the intervals
                   [W'_ij -+ t/2] / W_ij have a common number c_j (0 for a column of zeros);
                   16-bit numbers may come from float32, whose rounding widens them a little
    row scale      the same for rows
    low rank       W' - W on the columns that are not scaled is U K^T, from its singular values above the noise
    deltas         at most half of the columns, or of the rows, differ, and their number is not above the rank

Rounding errors are independent numbers of standard deviation t/sqrt(12).  The largest singular value of
such a matrix S is at most (1 + e) (a + b) + c max(S) sqrt(log(d + n)), with a and b the largest norm of a
row and of a column of S (Bandeira and van Handel, arXiv 1408.6185); with equal entries that is
S (sqrt(d) + sqrt(n)).  Here e is 0.1 and c is 1, as rounding errors are bounded.

Other matrices (gates, queries, embeddings, ...) have only deltas.  Biases differ by d = b' - b.  All other differences
(norms, or a change of another form) are listed and are not in the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from editing.checkpoints.checkpoint import chunks
from editing.plans.plan import ModuleEdit, Plan, make_plan, plan_metadata
from editing.plans.rounding import round_once
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS, OUTSIDE, StoredPiece
from neurons.errors import BrocaError, NothingToChangeError
from neurons.files.tensor_files import READABLE_DTYPES, TensorEntry, read_tensor, tensor_entries
from neurons.models.source import ModelSource, read_config

NOT_COVERED = "not covered"
_MARGIN, _TAIL = 1.1, 1.0
_FIRST_RANK = 16
_ROUNDS = 4
_MAX_NAMED = 3
# Columns are fitted in groups: the intervals need several times the memory of the weight.
_NUMBERS_AT_ONCE = 1 << 22
_FIRST_ROWS = 32
_FLOAT32, _SMALL = 2.0**-24, 2.0**-6


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that differs.

    Attributes:
        name: in the checkpoint; with * for the expert if each expert has its own tensor.
        relative: ||W' - W||_F / ||W||_F; None without two tensors of the same shape.
        what: the form of the change, or why there is none.
        covered: whether a plan can hold it.
    """

    name: str
    relative: float | None
    what: str
    covered: bool


@dataclass(frozen=True)
class Difference:
    """The difference of an edited checkpoint from its base.

    Attributes:
        edited: name of the edited checkpoint.
        tensors: that differ, output weights first, by layer.
        edits: the changes in the form of edits, one for each module.
        equal: number of equal tensors.
    """

    edited: str
    tensors: tuple[TensorDifference, ...]
    edits: tuple[ModuleEdit, ...]
    equal: int

    @property
    def not_covered(self) -> tuple[str, ...]:
        """Names of the tensors whose change no plan can hold."""
        return tuple(tensor.name for tensor in self.tensors if not tensor.covered)

    def plan(self, base: ModelSource, allow_others: bool = False) -> Plan:
        """The plan that maps the base to the edited checkpoint.

        Args:
            base: the compared model.
            allow_others: skip other differences; the plan's metadata then lists them.

        Raises:
            NothingToChangeError: no output weight and no bias differs.
            BrocaError: a difference that no plan can hold.
        """
        others = self.not_covered
        if others and not allow_others:
            more = f" and {len(others) - _MAX_NAMED} more" if len(others) > _MAX_NAMED else ""
            raise BrocaError(
                f"{self.edited} differs from {base.name} also in {', '.join(others[:_MAX_NAMED])}{more}, which "
                "no plan can hold: add --allow-others to skip it"
            )
        if not self.edits:
            raise NothingToChangeError(
                f"{self.edited} and {base.name} differ in no weight that a plan can hold: there is no edit between them"
            )
        metadata = plan_metadata(base, "diff", {"edited": self.edited}, {"not_covered": list(others)})
        return make_plan(list(self.edits), metadata)


def compare(
    base: ModelSource, edited: Path, progress: Callable[[int, int], None] | None = None
) -> Difference:
    """Compare two checkpoints of one architecture, one module or chunk of a tensor at a time.

    Shards and dtypes may differ; the base is then rounded to the edited checkpoint's dtype.

    Args:
        base: the unedited model.
        edited: the edited checkpoint directory.
        progress: called with (bytes done, bytes in all).

    Raises:
        BrocaError: an output weight is missing in the edited checkpoint or has another shape, or as ``read_config`` for
            the edited checkpoint.
    """
    read_config(str(edited), edited)
    other = replace(base, checkpoint=edited, name=str(edited))
    before, after = tensor_entries(base.checkpoint), tensor_entries(edited)
    old, new = Weights(base), Weights(other)
    total = sum(entry.end - entry.begin for entry in before.values())
    seen: set[str] = set()
    differences: list[TensorDifference] = []
    edits: list[ModuleEdit] = []
    done = equal = 0

    def advance(entries: list[TensorEntry]) -> None:
        nonlocal done
        done += sum(entry.end - entry.begin for entry in entries)
        if progress is not None:
            progress(done, total)

    for layer in range(base.anatomy.layers):
        for block in (block for block in BLOCKS if base.anatomy.has(layer, block)):
            olds, news = old.pieces(layer, block), new.pieces(layer, block)
            names = {entry.name for _, entry in olds}
            dtype = new.stored_dtype(layer, block)
            weight, changed = old.read(layer, block), new.read(layer, block)
            edit, difference = _module(base, layer, block, weight, changed, dtype)
            if difference is None:
                equal += len(names)
            else:
                several = base.anatomy.tensor_name(layer, block, before.keys())
                name = olds[0][1].name if len(names) == 1 else several
                differences.append(replace(difference, name=name))
            seen |= names | {entry.name for _, entry in news}
            bias, of_bias = _bias(base, layer, block, before, after)
            if of_bias is not None:
                differences.append(of_bias)
                seen.add(of_bias.name)
            if edit is not None or bias is not None:
                edits.append(_with_bias(layer, block, edit, bias, weight))
            advance([before[name] for name in names])
    zero_biases = _zero_biases(base, before, after)
    for layer in (OUTSIDE, *range(base.anatomy.layers)):
        for path in base.anatomy.matrices(layer):
            try:
                ((piece, entry),) = old.pieces(layer, path)
            except BrocaError:  # not in the file under its name, or tied
                continue
            other_entry = after.get(entry.name)
            if (
                other_entry is None
                or other_entry.shape != entry.shape
                or other_entry.dtype not in READABLE_DTYPES
            ):
                continue
            differs = _differing(entry, other_entry)
            few = few_places(differs)
            if few is not None:
                edits.append(_deltas(layer, path, piece, (entry, other_entry), *few))
                differences.append(
                    TensorDifference(entry.name, edits[-1].relative_change, _dense_form(edits[-1]), True)
                )
            elif bool(differs.any()):
                continue
            else:
                equal += 1
            seen.add(entry.name)
            advance([entry])
    for name in sorted((before.keys() | after.keys()) - seen - zero_biases):
        if name not in before or name not in after:
            where = "only in the base" if name in before else "only in the edited checkpoint"
            differences.append(TensorDifference(name, None, where, False))
        elif (relative := _relative_change(before[name], after[name])) != 0:
            differences.append(TensorDifference(name, relative, NOT_COVERED, False))
        else:
            equal += 1
        if name in before:
            advance([before[name]])
    return Difference(edited.resolve().name, tuple(differences), tuple(edits), equal)


def _module(
    base: ModelSource, layer: int, block: str, weight: torch.Tensor, changed: torch.Tensor, dtype: torch.dtype
) -> tuple[ModuleEdit | None, TensorDifference | None]:
    """The edit from W to W', if any, and the difference, without a name."""
    differs = round_once(weight, dtype).double() != changed
    columns = differs.any(0)
    if not bool(columns.any()):
        return None, None
    relative = _ratio(float((changed - weight).norm()), float(weight.norm()))
    factors: dict[str, Any] | None = recovered(weight, changed, dtype)
    few = few_places(differs)
    if few is not None and (
        factors is None or ("left" in factors and len(few[1]) <= factors["left"].shape[1])
    ):
        factors = deltas_at(changed - weight, *few)
    if factors is None:
        return None, TensorDifference("", relative, f"{NOT_COVERED}: of full rank", False)
    width = base.anatomy.component_width(block, layer)
    components = columns.view(-1, width).any(1).nonzero()[:, 0].tolist()
    edit = ModuleEdit(layer, block, tuple(components), **factors)
    applied = edit.apply(weight)
    # Factors are float32: where terms cancel, the error of their sum is relative to the terms.
    terms = torch.maximum(weight.abs(), changed.abs())
    if edit.left is not None and edit.right is not None:
        terms = torch.maximum(terms, edit.left.double().abs() @ edit.right.double().abs().T)
    spacing = spacings(terms, dtype)
    notes = {
        "change_norm": float((applied - weight).norm()),
        "weight_norm": float(weight.norm()),
        # In spacings of the largest term; a single rounding gives at most 0.5.
        "worst_in_spacings": float(((applied - changed).abs() / spacing).max()),
    }
    what = [name.replace("_", " ") for name in ("row_scale", "column_scale") if name in factors]
    what += [f"rank {edit.rank}"] if edit.rank else []
    what += [_dense_form(edit)] if edit.dense else []
    return replace(edit, notes=notes), TensorDifference("", relative, ", ".join(what), True)


def few_places(differs: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    """The rows or the columns, whichever are fewer, that hold all changed numbers: "rows" or "columns", and int64.

    Args:
        differs: bool [d, n].

    Returns:
        None if they are more than half, or if nothing differs.
    """
    places = {"rows": differs.any(1), "columns": differs.any(0)}
    name = min(places, key=lambda one: int(places[one].sum()))
    count = int(places[name].sum())
    return (name, places[name].nonzero()[:, 0]) if 0 < 2 * count <= len(places[name]) else None


def deltas_at(change: torch.Tensor, name: str, places: torch.Tensor) -> dict[str, torch.Tensor]:
    """The fields of an edit for a change [d, n] of only these rows or columns."""
    part = change[places] if name == "rows" else change[:, places].T
    return {name: places, f"{name.removesuffix('s')}_deltas": part.float().contiguous()}


def _dense_form(edit: ModuleEdit) -> str:
    return " and ".join(
        f"deltas of {len(places)} {name}"
        for name, places in (("rows", edit.rows), ("columns", edit.columns))
        if places is not None
    )


def _differing(old: TensorEntry, new: TensorEntry) -> torch.Tensor:
    """bool, of the tensors' shape: where the new numbers are not the old ones in their dtype."""
    differs = torch.zeros(old.shape, dtype=torch.bool)
    for _, rows in chunks(old):
        after = read_tensor(new, rows)
        differs[rows] = round_once(read_tensor(old, rows).double(), after.dtype) != after
    return differs


def _deltas(
    layer: int,
    path: str,
    piece: StoredPiece,
    entries: tuple[TensorEntry, TensorEntry],
    name: str,
    places: torch.Tensor,
) -> ModuleEdit:
    """The edit of a module's matrix that changes only these stored rows or columns."""
    before, after = map(read_tensor, entries)
    chosen: Any = places if name == "rows" else (slice(None), places)
    change = after[chosen].double() - before[chosen].double()
    if name == "columns":
        change = change.T
    if piece.transposed:
        name = "columns" if name == "rows" else "rows"
    factors: dict[str, Any] = {name: places, f"{name.removesuffix('s')}_deltas": change.float().contiguous()}
    norms = {"change_norm": float(change.norm()), "weight_norm": float(before.norm(dtype=torch.float64))}
    return ModuleEdit(layer, path, (), notes=norms, **factors)


def recovered(
    weight: torch.Tensor, changed: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor] | None:
    """The factors of the edit from one weight to another.

    Args:
        weight: W, float64 [d, n].
        changed: W', float64 [d, n], with numbers of ``dtype``.
        dtype: in which W' is stored.

    Returns:
        "column_scale" float32 [n], or "row_scale" float32 [d], or "left" float32 [d, rank] and "right"
        float32 [n, rank], possibly with a column scale of other columns; None if the rank exceeds half of
        min(d, n).
    """
    differs = round_once(weight, dtype).double() != changed
    columns, scaled = proportional(weight, changed, dtype)
    touched = differs.any(0)
    if bool(scaled[touched].all()):
        return {"column_scale": torch.where(touched, columns, 1.0).float()}
    rows, whole = proportional(weight.T, changed.T, dtype)
    lines = differs.any(1)
    if bool(whole[lines].all()):
        return {"row_scale": torch.where(lines, rows, 1.0).float()}
    kept = touched & ~scaled
    change = (changed - weight)[:, kept]
    pair = low_rank(change, noise(spacings(changed, dtype)[:, kept]), min(weight.shape) // 2)
    if pair is None:
        return None
    left, right = pair
    full_right = torch.zeros(weight.shape[1], right.shape[1], dtype=torch.float64)
    full_right[kept] = right
    factors = {"left": left.float(), "right": full_right.float()}
    if bool((touched & scaled).any()):
        factors["column_scale"] = torch.where(touched & scaled, columns, 1.0).float()
    return factors


def proportional(
    weight: torch.Tensor, changed: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each column a factor that maps W to W' up to one rounding, and whether it exists.

    Args:
        weight: W, float64 [d, n].
        changed: W', float64 [d, n], with numbers of ``dtype``.
        dtype: in which W' is stored.

    Returns:
        float64 [n], the middle of the interval of such factors, and bool [n].
    """
    # In a weight without scales the first rows already exclude most columns.
    few = slice(0, _FIRST_ROWS)
    candidates = _proportional(weight[few], changed[few], dtype)[1] | ~weight[few].bool().any(0)
    places = candidates.nonzero()[:, 0]
    numbers, fits = torch.ones_like(weight[0]), torch.zeros_like(candidates)
    for group in places.split(max(1, _NUMBERS_AT_ONCE // len(weight))):
        numbers[group], fits[group] = _proportional(weight[:, group], changed[:, group], dtype)
    return numbers, fits


def _proportional(
    weight: torch.Tensor, changed: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    spacing = spacings(changed, dtype)
    # Below a power of two the spacing is half.
    inner = torch.where(torch.frexp(changed.abs())[0] == 0.5, spacing / 4, spacing / 2)
    outer = spacing / 2
    if dtype.itemsize == 2:
        # Rounding of c W, or of W + (c - 1) W, before the cast; small scales are computed in float64.
        before = torch.where(
            changed.abs() < _SMALL * weight.abs(), 0.0, changed.abs() + 2 * (changed - weight).abs()
        )
        inner, outer = inner + _FLOAT32 * before, outer + _FLOAT32 * before
    low = changed - torch.where(changed > 0, inner, outer)
    high = changed + torch.where(changed < 0, inner, outer)
    ends = torch.stack([low / weight, high / weight])
    nonzero = weight != 0
    lowest = torch.where(nonzero, ends.amin(0), -torch.inf).amax(0)
    highest = torch.where(nonzero, ends.amax(0), torch.inf).amin(0)
    # The quotients are rounded too, which matters if W' is float64.
    slack = (lowest.abs() + highest.abs()) * 2.0**-52
    fits = (lowest <= highest + slack) & ((changed == 0) | nonzero).all(0) & nonzero.any(0)
    middle = torch.where(fits, (lowest + highest) / 2, 1.0)
    return torch.where((changed == 0).all(0), 0.0, middle), fits


def spacings(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance from each number to the next of larger magnitude in a float format, in float64."""
    limits = torch.finfo(dtype)
    smallest = math.frexp(limits.tiny)[1]
    exponents = torch.frexp(values)[1].clamp(min=smallest).masked_fill(values == 0, smallest)
    return torch.ldexp(torch.full_like(values, limits.eps), exponents - 1)


def noise(spacing: torch.Tensor) -> float:
    """An upper bound of the largest singular value of rounding errors [d, n]; see the formula above."""
    deviations = spacing / math.sqrt(12)
    rows, columns = deviations.norm(dim=1).max(), deviations.norm(dim=0).max()
    tail = _TAIL * float(deviations.max()) * math.sqrt(math.log(sum(deviations.shape)))
    return _MARGIN * float(rows + columns) + tail


def low_rank(change: torch.Tensor, floor: float, max_rank: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """U [d, rank] and K [n, rank], float64, of the singular values above the floor, at least one.

    For large matrices by subspace iteration, with more random directions until a singular value is below the
    floor.

    Returns:
        None if more than ``max_rank`` exceed it.
    """
    generator = torch.Generator().manual_seed(0)
    size = min(_FIRST_RANK, *change.shape)
    while True:
        if size == min(change.shape):
            left, values, right = torch.linalg.svd(change, full_matrices=False)
        else:
            start = torch.randn(change.shape[1], size, generator=generator, dtype=torch.float64)
            basis = torch.linalg.qr(change @ start).Q
            for _ in range(_ROUNDS):
                basis = torch.linalg.qr(change @ torch.linalg.qr(change.T @ basis).Q).Q
            inside, values, right = torch.linalg.svd(basis.T @ change, full_matrices=False)
            left = basis @ inside
        rank = max(1, int((values > floor).sum()))
        if rank > max_rank:
            return None
        if rank < size or size == min(change.shape):
            roots = values[:rank].sqrt()
            return left[:, :rank] * roots, right[:rank].T * roots
        size = min(4 * size, *change.shape)


def _bias(
    base: ModelSource, layer: int, block: str, before: dict[str, TensorEntry], after: dict[str, TensorEntry]
) -> tuple[torch.Tensor | None, TensorDifference | None]:
    """d = b' - b of a module, and the difference; the base may have no bias."""
    if not base.anatomy.supports_bias(block):
        return None, None
    name = base.anatomy.stored_bias(layer, block, before.keys())
    if name not in after or after[name].dtype not in READABLE_DTYPES:
        return None, None
    new = read_tensor(after[name])
    if name not in before:
        if new.shape != (base.anatomy.residual,) or not bool(new.any()):
            return None, None
        return new.float(), TensorDifference(name, None, "new bias", True)
    if before[name].shape != after[name].shape or before[name].dtype not in READABLE_DTYPES:
        return None, None
    old = read_tensor(before[name]).double()
    if torch.equal(round_once(old, new.dtype), new):
        return None, None
    change = new.double() - old
    return change.float(), TensorDifference(
        name, _ratio(float(change.norm()), float(old.norm())), "bias", True
    )


def _with_bias(
    layer: int, block: str, edit: ModuleEdit | None, bias: torch.Tensor | None, weight: torch.Tensor
) -> ModuleEdit:
    if edit is None:
        notes = {"change_norm": 0.0, "weight_norm": float(weight.norm())}
        return ModuleEdit(layer, block, (), bias=bias, notes=notes)
    return replace(edit, bias=bias)


def _zero_biases(
    base: ModelSource, before: dict[str, TensorEntry], after: dict[str, TensorEntry]
) -> set[str]:
    """Zero biases that only the edited checkpoint has, because its config enables all of a kind."""
    zeros = set()
    for block in base.anatomy.layout.bias_switches:
        for layer in base.anatomy.layers_with(block):
            names = base.anatomy.switched_biases(layer, block, before.keys())
            zeros |= {
                name
                for name in names
                if name in after and name not in before and not bool(read_tensor(after[name]).any())
            }
    return zeros


def _relative_change(old: TensorEntry, new: TensorEntry) -> float | None:
    """||W' - W||_F / ||W||_F, 0 if W' is W in its dtype; None for tensors that cannot be compared."""
    if old.shape != new.shape or (
        old.dtype != new.dtype and not {old.dtype, new.dtype} <= set(READABLE_DTYPES)
    ):
        return None
    if old.dtype not in READABLE_DTYPES:
        return 0.0 if _bytes(old) == _bytes(new) else None
    change = whole = 0.0
    same = True
    for _, rows in chunks(old):
        before, after = read_tensor(old, rows), read_tensor(new, rows)
        same &= torch.equal(round_once(before.double(), after.dtype), after)
        change += float((after.double() - before.double()).square().sum())
        whole += float(before.double().square().sum())
    return 0.0 if same else _ratio(math.sqrt(change), math.sqrt(whole))


def _bytes(entry: TensorEntry) -> bytes:
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        return stream.read(entry.end - entry.begin)


def _ratio(change: float, whole: float) -> float:
    return change / whole if whole else math.inf
