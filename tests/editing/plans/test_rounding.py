"""One rounding, against fractions; edited weights, against float32 number by number and against float64."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from editing.plans.plan import ModuleEdit
from editing.plans.rounding import all_finite, edited_and_rounded, float32_is_enough, round_once

# Bits of the significand and the exponent of the smallest normal number.
FORMATS = {torch.bfloat16: (8, -126), torch.float16: (11, -14)}


def nearest(value: float, dtype: torch.dtype) -> float:
    """Rounded to nearest even by exact arithmetic; only for what does not overflow."""
    if value == 0:
        return value
    precision, smallest = FORMATS[dtype]
    exponent = max(math.frexp(value)[1] - 1, smallest)
    step = Fraction(2) ** (exponent - precision + 1)
    # Python's round takes ties to even.
    return math.copysign(float(round(Fraction(value) / step) * step), value)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    assert found.dtype == expected.dtype
    return torch.equal(found.contiguous().view(torch.int16), expected.contiguous().view(torch.int16))


@pytest.mark.parametrize("dtype", FORMATS)
def test_float64_is_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=generator, dtype=torch.float64)
    below = values.to(dtype)
    ties = (below.double() + torch.nextafter(below, torch.full_like(below, torch.inf)).double()) / 2
    # So close to a tie that float32 cannot tell: two roundings go wrong here.
    close = torch.cat([ties * (1 + 2.0**-40), ties * (1 - 2.0**-40), ties])
    tiny = values * 2.0 ** (FORMATS[dtype][1] - 6)
    for value in (values, close, tiny):
        expected = [nearest(float(number), dtype) for number in value]
        assert round_once(value, dtype).double().tolist() == expected
    assert not same_bits(round_once(close, dtype), close.to(dtype)), "torch has learnt to round once"


def test_float32_and_wider_are_cast() -> None:
    values = torch.tensor([1.0, 1 + 2**-30, -0.0], dtype=torch.float64)
    assert torch.equal(round_once(values, torch.float32), values.float())
    assert torch.equal(round_once(values, torch.float64), values)


def naive(
    weight: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
) -> torch.Tensor:
    """The formula in float64, whole."""
    result = weight.double()
    if row_scale is not None:
        result = result * row_scale.double()[:, None]
    if column_scale is not None:
        result = result * column_scale.double()
    if left is not None and right is not None:
        result = result + left.double() @ right.double().T
    return result


def factors(
    rows: int, columns: int, rank: int, size: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        1 + 0.1 * torch.randn(rows, generator=generator),
        1 + 0.1 * torch.randn(columns, generator=generator),
        size * torch.randn(rows, rank, generator=generator),
        torch.randn(columns, rank, generator=generator),
    )


def in_float32(
    weight: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
) -> torch.Tensor:
    """Number by number, each operation rounded to float32 by numpy; then one cast."""
    result = torch.empty(weight.shape)
    one = np.float32(1)
    for i, j in itertools.product(*map(range, weight.shape)):
        scale = one
        if row_scale is not None:
            scale = np.float32(row_scale[i].item())
        if column_scale is not None:
            scale = scale * np.float32(column_scale[j].item())
        base = np.float32(weight[i, j].item())
        change = base * (scale - one)
        if left is not None and right is not None:
            for u, k in zip(left[i], right[j], strict=True):
                change = change + np.float32(u.item()) * np.float32(k.item())
        result[i, j] = float(base + change)
    return result.to(weight.dtype)


def bound(
    weight: torch.Tensor,
    row_scale: torch.Tensor | None,
    column_scale: torch.Tensor | None,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
) -> torch.Tensor:
    """How far a number may be from the float64 answer: the docstring's error, and half a step of the dtype."""
    exact = naive(weight, row_scale, column_scale, left, right)
    scaled = naive(weight, row_scale, column_scale, None, None)
    size, rank = weight.double().abs() + (scaled - weight.double()).abs(), 0
    if left is not None and right is not None:
        size, rank = size + left.double().abs() @ right.double().abs().T, left.shape[1]
    stored = round_once(exact, weight.dtype)
    above = torch.nextafter(stored.abs(), torch.full_like(stored, torch.inf)).double()
    return (4 + 2 * rank) * 2.0**-24 * size + (above - stored.double().abs()) / 2


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-7, 1e3])
@pytest.mark.parametrize("scale", [0.02, 1e-6, 300.0])
def test_edits_are_computed_in_float32_and_cast_once(dtype: torch.dtype, size: float, scale: float) -> None:
    if dtype == torch.float16 and size * scale > 1e3:
        size = 1e3 / scale
    weight = (scale * torch.randn(20, 50, generator=torch.Generator().manual_seed(1))).to(dtype)
    r, c, u, k = factors(20, 50, 1, size * scale, 2)
    for row, column, ranked in itertools.product((r, None), (c, None), (True, False)):
        left, right = (u, k) if ranked else (None, None)
        found = edited_and_rounded(weight, row, column, left, right)
        assert same_bits(found.stored, in_float32(weight, row, column, left, right))
        exact = naive(weight, row, column, left, right)
        error = (found.stored.double() - exact).abs()
        assert bool((error <= bound(weight, row, column, left, right)).all())
        change = exact - weight.double()
        assert (found.change - change).norm() <= 1e-5 * change.norm()


@pytest.mark.parametrize("dtype", FORMATS)
def test_an_edit_of_several_ranks(dtype: torch.dtype) -> None:
    weight = torch.randn(20, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    for rank in (2, 5, 16):
        r, c, u, k = factors(20, 40, rank, 0.1, rank)
        found = edited_and_rounded(weight, r, c, u, k).stored
        assert same_bits(found, in_float32(weight, r, c, u, k))
        error = (found.double() - naive(weight, r, c, u, k)).abs()
        assert bool((error <= bound(weight, r, c, u, k)).all())


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_scale_of_zero_leaves_zero_and_what_is_not_edited_keeps_its_bits(dtype: torch.dtype) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    scale, key = torch.ones(64), torch.zeros(64, 1)
    scale[3], key[7] = 0, 1
    found = edited_and_rounded(weight, None, scale, torch.ones(16, 1), key)
    assert found.stored[:, 3].abs().max() == 0
    assert not same_bits(found.stored[:, 7], weight[:, 7])
    others = [column for column in range(64) if column not in (3, 7)]
    assert same_bits(found.stored[:, others], weight[:, others])
    rows = torch.full((16,), 1.7)
    assert edited_and_rounded(weight, rows, scale).stored[:, 3].abs().max() == 0


@pytest.mark.parametrize("dtype", FORMATS)
def test_scales_near_zero_are_computed_in_float64(dtype: torch.dtype) -> None:
    weight = torch.randn(30, 80, generator=torch.Generator().manual_seed(4)).to(dtype)
    small = torch.full((80,), 2.0**-17 / 3)
    assert float32_is_enough(None, torch.tensor([0.0, 0.5, -1.0, 3.0]))
    assert float32_is_enough(torch.tensor([]), None)
    assert not float32_is_enough(None, torch.tensor([1.0, -1e-3]))
    assert not float32_is_enough(torch.full((3,), 2.0**-4), torch.full((3,), 2.0**-4))
    exact = round_once(naive(weight, None, small, None, None), dtype)
    assert not same_bits(edited_and_rounded(weight, None, small).stored, exact)
    assert same_bits(edited_and_rounded(weight, None, small, in_float32=False).stored, exact)
    edit = ModuleEdit(0, "mlp", tuple(range(80)), column_scale=torch.cat([small[:79], torch.ones(1)]))
    # Also of a block whose own scales are not small: the whole edit decides.
    expected = round_once(edit.apply(weight), dtype)
    assert same_bits(edit.rounded(weight).stored, expected)
    assert same_bits(edit.rounded(weight.T[79:], 79, 0, transposed=True).stored, expected.T[79:])
    assert edit.rounded(weight.T[79:], 79, 0, transposed=True).change.dtype == torch.float64


@pytest.mark.parametrize("dtype", FORMATS)
def test_zeros_keep_their_sign_and_empty_blocks_are_blocks(dtype: torch.dtype) -> None:
    weight = torch.zeros(8, 9, dtype=dtype)
    weight[::2] = -weight[::2]
    scale = torch.full((9,), 2.0)
    found = edited_and_rounded(weight, column_scale=scale).stored
    assert same_bits(found, weight)
    assert edited_and_rounded(weight[:0], column_scale=scale).stored.shape == (0, 9)


@pytest.mark.parametrize("dtype", FORMATS)
def test_numbers_that_overflow_or_are_none(dtype: torch.dtype) -> None:
    weight = torch.ones(16, 200, dtype=dtype)
    weight[0, :3] = torch.tensor([math.nan, math.inf, torch.finfo(dtype).max], dtype=dtype)
    scale = torch.full((200,), 2.0)
    expected = round_once(weight.double() * 2, dtype)
    found = edited_and_rounded(weight, column_scale=scale).stored
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    # Beyond float32 on the way, within it at the end.
    large = torch.full((4, 4), 2.0**120).bfloat16()
    up, down = torch.full((4,), 2.0**100), torch.full((4,), 2.0**-110)
    assert edited_and_rounded(large, up, down).stored.unique().tolist() == [2.0**110]


@pytest.mark.parametrize("dtype", [*FORMATS, torch.float32, torch.float64])
def test_what_is_finite(dtype: torch.dtype) -> None:
    values = torch.full((5, 300), torch.finfo(dtype).max, dtype=dtype)  # their sum is not
    assert all_finite(values)
    assert all_finite(torch.empty(0, dtype=dtype))
    for bad in (math.nan, math.inf, -math.inf):
        values[2, 17] = bad
        assert not all_finite(values)
        assert not all_finite(torch.tensor([1.0, bad], dtype=dtype))
    assert not all_finite(torch.tensor([math.inf, -math.inf], dtype=dtype))


def test_transposed_blocks_and_wide_dtypes() -> None:
    r, c, u, k = factors(30, 70, 2, 0.1, 9)
    weight = torch.randn(70, 30, generator=torch.Generator().manual_seed(8))
    edit = ModuleEdit(0, "mlp", tuple(range(70)), row_scale=r, column_scale=c, left=u, right=k)
    for dtype in (torch.bfloat16, torch.float16):
        stored = weight.to(dtype)
        whole = edit.rounded(stored.T)
        assert same_bits(whole.stored, in_float32(stored.T, r, c, u, k))
        piece = edit.rounded(stored[11:40], 11, 0, transposed=True)
        assert same_bits(piece.stored, whole.stored.T[11:40])
        assert torch.equal(piece.change, whole.change.T[11:40])
    for dtype in (torch.float32, torch.float64):
        found = edited_and_rounded(weight.T.to(dtype), r, c, u, k)
        assert found.stored.dtype == dtype
        assert torch.allclose(found.stored, naive(weight.T.to(dtype), r, c, u, k).to(dtype), 1e-6, 1e-7)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_change_far_below_the_weight_is_told(dtype: torch.dtype) -> None:
    weight = torch.randn(20, 90, generator=torch.Generator().manual_seed(10)).to(dtype)
    left, right = torch.full((20, 1), 2.0**-20), torch.full((90, 1), 2.0**-20)
    found = edited_and_rounded(weight, left=left, right=right)
    assert torch.equal(found.change.double(), torch.full((20, 90), 2.0**-40, dtype=torch.float64))
    assert same_bits(found.stored, weight)
