"""One rounding: against fractions, and edited weights in float32 against float64, bit for bit."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from editing.rounding import edited_and_rounded, round_once

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


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-7, 1e3])
@pytest.mark.parametrize("scale", [0.02, 1e-6, 300.0])
def test_edits_in_float32_have_the_bits_of_float64(dtype: torch.dtype, size: float, scale: float) -> None:
    weight = (scale * torch.randn(60, 300, generator=torch.Generator().manual_seed(1))).to(dtype)
    r, c, u, k = factors(60, 300, 1, size * scale, 2)
    for row, column, ranked in itertools.product((r, None), (c, None), (True, False)):
        left, right = (u, k) if ranked else (None, None)
        found = edited_and_rounded(weight, row, column, left, right)
        assert same_bits(found.stored, round_once(naive(weight, row, column, left, right), dtype))
        change = naive(weight, row, column, left, right) - weight.double()
        assert (found.change - change).norm() <= 1e-5 * change.norm()


@pytest.mark.parametrize("dtype", FORMATS)
def test_an_edit_of_several_ranks(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(3)).to(dtype)
    for rank in (2, 5, 16):
        r, c, u, k = factors(40, 200, rank, 0.1, rank)
        assert same_bits(
            edited_and_rounded(weight, r, c, u, k).stored, round_once(naive(weight, r, c, u, k), dtype)
        )


@pytest.mark.parametrize("dtype", FORMATS)
def test_ties_that_float32_cannot_tell(dtype: torch.dtype) -> None:
    """W' = 1 + eps/2 + a little: float32 loses the little, and a cast of it goes to the even neighbour, 1."""
    half, little = torch.finfo(dtype).eps / 2, 2.0**-30
    weight = torch.ones(64, 64, dtype=dtype)
    left = torch.tensor([half, little]).expand(64, 2).contiguous()
    right = torch.ones(64, 2)
    right[:, 1] = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)
    twice = (weight.float() + left @ right.T).to(dtype)
    found = edited_and_rounded(weight, left=left, right=right).stored
    assert same_bits(found, round_once(naive(weight, None, None, left, right), dtype))
    assert found[0, 0] > 1
    assert found[0, 1] == 1
    assert twice[0, 0] == 1
    # Among numbers that are no ties too, so that only single numbers are computed again.
    mixed = torch.randn(64, 6400, generator=torch.Generator().manual_seed(5)).to(dtype)
    mixed[:, :64] = weight
    keys = torch.cat([right, torch.randn(6336, 2, generator=torch.Generator().manual_seed(6))])
    found = edited_and_rounded(mixed, left=left, right=keys)
    assert found.change.dtype == torch.float32
    assert same_bits(found.stored, round_once(naive(mixed, None, None, left, keys), dtype))
    assert same_bits(found.stored[:, :64], edited_and_rounded(weight, left=left, right=right).stored)


@pytest.mark.parametrize("dtype", FORMATS)
def test_an_edit_that_all_but_cancels_the_weight(dtype: torch.dtype) -> None:
    """A rank-1 weight less itself: what float32 gives there is its own error."""
    generator = torch.Generator().manual_seed(4)
    u, k = torch.randn(50, 1, generator=generator), torch.randn(400, 1, generator=generator)
    weight = (u @ k.T).to(dtype)
    scale = torch.full((400,), 1 + 2.0**-20)
    expected = round_once(naive(weight, None, scale, -u, k), dtype)
    assert same_bits(edited_and_rounded(weight, None, scale, -u, k).stored, expected)


@pytest.mark.parametrize("dtype", FORMATS)
def test_zeros_keep_their_sign_and_whole_blocks_of_them_are_exact(dtype: torch.dtype) -> None:
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


def test_transposed_blocks_and_wide_dtypes() -> None:
    r, c, u, k = factors(30, 70, 2, 0.1, 9)
    weight = torch.randn(70, 30, generator=torch.Generator().manual_seed(8))
    for dtype in (torch.bfloat16, torch.float16):
        stored = weight.to(dtype)
        assert same_bits(
            edited_and_rounded(stored.T, r, c, u, k).stored, round_once(naive(stored.T, r, c, u, k), dtype)
        )
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
