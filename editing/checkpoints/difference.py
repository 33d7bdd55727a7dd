"""Two checkpoints compared tensor by tensor, and the plan of weight edits that leads from one to the other.

For each output weight, W [d, n] in the base and W' in the edited checkpoint, whose numbers are rounded to
multiples of a spacing t(W'_ij), the first of these that holds is taken:

    column scale   every column that differs is c_j W_j up to one rounding: the intervals
                   [W'_ij -+ t/2] / W_ij have a number c_j in common (0 for a column of zeros);
                   16-bit numbers may come from float32, whose own roundings widen them a little
    row scale      the same, of rows
    low rank       W' - W on the columns that are not scaled is U K^T: its singular values above the noise

Rounding errors are independent numbers of standard deviation t/sqrt(12).  The largest singular value of
such a matrix S is at most (1 + e) (a + b) + c max(S) sqrt(log(d + n)), with a and b the largest norm of a
row and of a column of S (Bandeira and van Handel, arXiv 1408.6185); with equal entries that is
S (sqrt(d) + sqrt(n)).  Here e is 0.1 and c is 1, as rounding errors are bounded.

Biases differ by d = b' - b.  What differs otherwise (embeddings, norms, other projections, or a change of
an output weight that has no such form) is named and is in no plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from editing.checkpoints.checkpoint import blocks
from editing.plans.plan import ModuleEdit, Plan, make_plan
from editing.plans.rounding import round_once
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS
from neurons.errors import BrocaError, NothingToChangeError
from neurons.files.tensor_files import READABLE_DTYPES, TensorEntry, read_tensor, tensor_entries
from neurons.models.source import ModelSource

NOT_COVERED = "not covered"
_MARGIN, _TAIL = 1.1, 1.0
_FIRST_RANK = 16
_ROUNDS = 4
_NAMED_AT_MOST = 3
# Columns are fitted in groups: the intervals take several times the room of the weight.
_NUMBERS_AT_ONCE = 1 << 22
_FIRST_ROWS = 32
_FLOAT32, _SMALL = 2.0**-24, 2.0**-6


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that differs.

    Attributes:
        name: in the checkpoint; of experts in a tensor each, with * for the expert.
        relative: ||W' - W||_F / ||W||_F; None where there are not two tensors of one shape.
        what: the form that was found, or why there is none.
        covered: whether a plan can hold it.
    """

    name: str
    relative: float | None
    what: str
    covered: bool


@dataclass(frozen=True)
class Difference:
    """How an edited checkpoint differs from its base.

    Attributes:
        edited: name of the edited checkpoint.
        tensors: those that differ, output weights first, by layer.
        edits: the changes that have the form of an edit, one for each module.
        equal: how many tensors of the base are the same.
    """

    edited: str
    tensors: tuple[TensorDifference, ...]
    edits: tuple[ModuleEdit, ...]
    equal: int

    @property
    def not_covered(self) -> tuple[str, ...]:
        """Names of the tensors that differ in another way."""
        return tuple(tensor.name for tensor in self.tensors if not tensor.covered)

    def plan(self, base: ModelSource, allow_others: bool = False) -> Plan:
        """The plan that leads from the base to the edited checkpoint.

        Args:
            base: the model that was compared.
            allow_others: leave out what differs otherwise; the plan's metadata then names it.

        Raises:
            NothingToChangeError: no output weight and no bias differs.
            BrocaError: something differs that no plan holds.
        """
        others = self.not_covered
        if others and not allow_others:
            more = f" and {len(others) - _NAMED_AT_MOST} more" if len(others) > _NAMED_AT_MOST else ""
            raise BrocaError(
                f"{self.edited} differs from {base.name} also in {', '.join(others[:_NAMED_AT_MOST])}{more}, which "
                "no edit of output weights explains: add --allow-others to leave that out of the plan"
            )
        if not self.edits:
            raise NothingToChangeError(
                f"{self.edited} and {base.name} have the same output weights: there is no edit between them"
            )
        metadata = {
            "model": base.label,
            "fingerprint": base.fingerprint,
            "method": "diff",
            "languages": [],
            "settings": {"edited": self.edited},
            "not_covered": list(others),
        }
        return make_plan(list(self.edits), metadata)


def compare(
    base: ModelSource, edited: Path, progress: Callable[[int, int], None] | None = None
) -> Difference:
    """Compare two checkpoints of one architecture, one module or block of a tensor at a time.

    They may be sharded differently, and stored in different dtypes: the base then counts as rounded to the
    edited checkpoint's.

    Args:
        base: the model before the edit.
        edited: checkpoint directory after it.
        progress: called with (bytes done, bytes in all).

    Raises:
        BrocaError: the edited checkpoint lacks an output weight or has it in another shape.
    """
    other = replace(base, checkpoint=edited, name=str(edited))
    before, after = tensor_entries(base.checkpoint), tensor_entries(edited)
    old, new = Weights(base), Weights(other)
    total = sum(entry.end - entry.begin for entry in before.values())
    seen: set[str] = set()
    found: list[TensorDifference] = []
    edits: list[ModuleEdit] = []
    done = equal = 0

    def advance(entries: list[TensorEntry]) -> None:
        nonlocal done
        done += sum(entry.end - entry.begin for entry in entries)
        if progress is not None:
            progress(done, total)

    for layer in range(base.anatomy.layers):
        for block in BLOCKS:
            olds, news = old.pieces(layer, block), new.pieces(layer, block)
            names = {entry.name for _, entry in olds}
            dtype = new.stored_dtype(layer, block)
            weight, changed = old.read(layer, block), new.read(layer, block)
            edit, difference = _module(base, layer, block, weight, changed, dtype)
            if difference is None:
                equal += len(names)
            else:
                name = olds[0][1].name if len(names) == 1 else base.anatomy.tensor_name(layer, block)
                found.append(replace(difference, name=name))
            seen |= names | {entry.name for _, entry in news}
            bias, of_bias = _bias(base, layer, block, before, after)
            if of_bias is not None:
                found.append(of_bias)
                seen.add(of_bias.name)
            if edit is not None or bias is not None:
                edits.append(_together(layer, block, edit, bias, weight))
            advance([before[name] for name in names])
    quiet = _zero_biases(base, before, after)
    for name in sorted((before.keys() | after.keys()) - seen - quiet):
        if name not in before or name not in after:
            where = "only in the base" if name in before else "only in the edited checkpoint"
            found.append(TensorDifference(name, None, where, False))
        elif (relative := _relative_change(before[name], after[name])) != 0:
            found.append(TensorDifference(name, relative, NOT_COVERED, False))
        else:
            equal += 1
        if name in before:
            advance([before[name]])
    return Difference(edited.resolve().name, tuple(found), tuple(edits), equal)


def _module(
    base: ModelSource, layer: int, block: str, weight: torch.Tensor, changed: torch.Tensor, dtype: torch.dtype
) -> tuple[ModuleEdit | None, TensorDifference | None]:
    """The edit from W to W', if it has the form of one, and what is said of it; the name is left open."""
    differs = round_once(weight, dtype).double() != changed
    columns = differs.any(0)
    if not bool(columns.any()):
        return None, None
    relative = _ratio(float((changed - weight).norm()), float(weight.norm()))
    factors = recovered(weight, changed, dtype)
    if factors is None:
        return None, TensorDifference("", relative, f"{NOT_COVERED}: of full rank", False)
    width = base.anatomy.component_width(block)
    components = columns.view(-1, width).any(1).nonzero()[:, 0].tolist()
    edit = ModuleEdit(
        layer,
        block,
        tuple(components),
        row_scale=factors.get("row_scale"),
        column_scale=factors.get("column_scale"),
        left=factors.get("left"),
        right=factors.get("right"),
    )
    applied = edit.apply(weight)
    # Where terms cancel, their sum is no finer than they are: factors are float32.
    terms = torch.maximum(weight.abs(), changed.abs())
    if edit.left is not None and edit.right is not None:
        terms = torch.maximum(terms, edit.left.double().abs() @ edit.right.double().abs().T)
    spacing = spacings(terms, dtype)
    notes = {
        "change_norm": float((applied - weight).norm()),
        "weight_norm": float(weight.norm()),
        # Of the largest term that was summed; half of one is what one rounding does.
        "worst_in_spacings": float(((applied - changed).abs() / spacing).max()),
    }
    what = [name.replace("_", " ") for name in ("row_scale", "column_scale") if name in factors]
    what += [f"rank {edit.rank}"] if edit.rank else []
    return replace(edit, notes=notes), TensorDifference("", relative, ", ".join(what), True)


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
        float32 [n, rank], the latter also together with a column scale of other columns; None where the
        rank would be more than half of min(d, n).
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
    found = low_rank(change, noise(spacings(changed, dtype)[:, kept]), min(weight.shape) // 2)
    if found is None:
        return None
    left, right = found
    spread = torch.zeros(weight.shape[1], right.shape[1], dtype=torch.float64)
    spread[kept] = right
    factors = {"left": left.float(), "right": spread.float()}
    if bool((touched & scaled).any()):
        factors["column_scale"] = torch.where(touched & scaled, columns, 1.0).float()
    return factors


def proportional(
    weight: torch.Tensor, changed: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each column, a number that takes W to W' with one rounding, and whether there is one.

    Args:
        weight: W, float64 [d, n].
        changed: W', float64 [d, n], with numbers of ``dtype``.
        dtype: in which W' is stored.

    Returns:
        float64 [n], the middle of the interval of such numbers, and bool [n].
    """
    # What the first rows already exclude is most of a weight without scales.
    few = slice(0, _FIRST_ROWS)
    open_yet = _proportional(weight[few], changed[few], dtype)[1] | ~weight[few].bool().any(0)
    places = open_yet.nonzero()[:, 0]
    numbers, fits = torch.ones_like(weight[0]), torch.zeros_like(open_yet)
    for group in places.split(max(1, _NUMBERS_AT_ONCE // len(weight))):
        numbers[group], fits[group] = _proportional(weight[:, group], changed[:, group], dtype)
    return numbers, fits


def _proportional(
    weight: torch.Tensor, changed: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    spacing = spacings(changed, dtype)
    # Below a power of two the numbers lie twice as close.
    inner = torch.where(torch.frexp(changed.abs())[0] == 0.5, spacing / 4, spacing / 2)
    outer = spacing / 2
    if dtype.itemsize == 2:
        # Of c W, or of W + (c - 1) W, before the cast; small scales are computed in float64.
        before = torch.where(
            changed.abs() < _SMALL * weight.abs(), 0.0, changed.abs() + 2 * (changed - weight).abs()
        )
        inner, outer = inner + _FLOAT32 * before, outer + _FLOAT32 * before
    low = changed - torch.where(changed > 0, inner, outer)
    high = changed + torch.where(changed < 0, inner, outer)
    ends = torch.stack([low / weight, high / weight])
    some = weight != 0
    lowest = torch.where(some, ends.amin(0), -torch.inf).amax(0)
    highest = torch.where(some, ends.amax(0), torch.inf).amin(0)
    # The quotients themselves are rounded, which counts where W' is float64.
    slack = (lowest.abs() + highest.abs()) * 2.0**-52
    fits = (lowest <= highest + slack) & ((changed == 0) | some).all(0) & some.any(0)
    middle = torch.where(fits, (lowest + highest) / 2, 1.0)
    return torch.where((changed == 0).all(0), 0.0, middle), fits


def spacings(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance from each number to the next larger one in size of a float format, in float64."""
    limits = torch.finfo(dtype)
    smallest = math.frexp(limits.tiny)[1]
    exponents = torch.frexp(values)[1].clamp(min=smallest).masked_fill(values == 0, smallest)
    return torch.ldexp(torch.full_like(values, limits.eps), exponents - 1)


def noise(spacing: torch.Tensor) -> float:
    """What the largest singular value of rounding errors [d, n] stays below; see the formula above."""
    deviations = spacing / math.sqrt(12)
    rows, columns = deviations.norm(dim=1).max(), deviations.norm(dim=0).max()
    tail = _TAIL * float(deviations.max()) * math.sqrt(math.log(sum(deviations.shape)))
    return _MARGIN * float(rows + columns) + tail


def low_rank(change: torch.Tensor, floor: float, most: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """U [d, rank] and K [n, rank], float64, with the singular values of a matrix that exceed the floor, at least one.

    Large matrices are not decomposed whole: subspace iteration from as many random directions as are
    needed to find a singular value below the floor.

    Returns:
        None where more than ``most`` exceed it.
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
        if rank > most:
            return None
        if rank < size or size == min(change.shape):
            roots = values[:rank].sqrt()
            return left[:, :rank] * roots, right[:rank].T * roots
        size = min(4 * size, *change.shape)


def _bias(
    base: ModelSource, layer: int, block: str, before: dict[str, TensorEntry], after: dict[str, TensorEntry]
) -> tuple[torch.Tensor | None, TensorDifference | None]:
    """d = b' - b of a module, and what is said of it; the base may have none."""
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


def _together(
    layer: int, block: str, edit: ModuleEdit | None, bias: torch.Tensor | None, weight: torch.Tensor
) -> ModuleEdit:
    if edit is None:
        notes = {"change_norm": 0.0, "weight_norm": float(weight.norm())}
        return ModuleEdit(layer, block, (), bias=bias, notes=notes)
    return replace(edit, bias=bias)


def _zero_biases(
    base: ModelSource, before: dict[str, TensorEntry], after: dict[str, TensorEntry]
) -> set[str]:
    """Biases of zeros that only the edited checkpoint has, because its config asks for all of a kind."""
    found = set()
    for block in base.anatomy.layout.bias_switches:
        for layer in range(base.anatomy.layers):
            names = base.anatomy.switched_biases(layer, block, before.keys())
            found |= {
                name
                for name in names
                if name in after and name not in before and not bool(read_tensor(after[name]).any())
            }
    return found


def _relative_change(old: TensorEntry, new: TensorEntry) -> float | None:
    """||W' - W||_F / ||W||_F, 0 where W' is W in its dtype; None where that cannot be said of two tensors."""
    if old.shape != new.shape or (
        old.dtype != new.dtype and not {old.dtype, new.dtype} <= set(READABLE_DTYPES)
    ):
        return None
    if old.dtype not in READABLE_DTYPES:
        return 0.0 if _bytes(old) == _bytes(new) else None
    change = whole = 0.0
    same = True
    for _, rows in blocks(old):
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
