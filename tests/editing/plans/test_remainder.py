"""Ordinals, remainders and their bytes against their definitions."""

import struct

import pytest
import torch

from editing.plans.remainder import (
    OWN_BITS,
    decoded,
    encoded,
    from_ordinals,
    integers_of,
    ordinals,
    packed,
    unpacked,
)
from neurons.errors import BrocaError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(
        *(t.contiguous().view(integers_of(t.dtype)) for t in (one, other))
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_16_bit_numbers_in_their_order(dtype):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    places = ordinals(numbers)
    assert same_bits(from_ordinals(places, dtype), numbers)
    assert len(set(places.tolist())) == 2**16
    finite = numbers.isfinite()
    ordered = numbers[finite][places[finite].argsort()].double()
    assert bool((ordered[1:] >= ordered[:-1]).all())
    # Each number's next is its neighbour: no place is left out.
    assert places[finite].max() - places[finite].min() + 1 == int(finite.sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wide_numbers_from_the_bits(dtype):
    kind, bits = ("d", 64) if dtype == torch.float64 else ("f", 32)
    values = [0.0, -0.0, 1.0, -1.0, 3.5e-300, -2.5, 1e30, float("inf"), -float("inf")]
    numbers = torch.tensor(values, dtype=torch.float64).to(dtype)
    for number, place in zip(numbers.tolist(), ordinals(numbers).tolist(), strict=True):
        (raw,) = struct.unpack("q" if bits == 64 else "i", struct.pack(kind, number))
        assert place == (raw if raw >= 0 else -(raw + 2 ** (bits - 1)) - 1)
    assert ordinals(numbers)[1] == -1 and ordinals(numbers)[0] == 0
    assert same_bits(from_ordinals(ordinals(numbers), dtype), numbers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_base_comes_back_from_any_prediction(dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 7, generator=generator, dtype=torch.float64).to(dtype)
    places = ordinals(base)
    predicted = from_ordinals(places + torch.randint(-3, 4, places.shape, generator=generator), dtype)
    base[0, :3] = torch.tensor([0.0, -0.0, torch.finfo(dtype).max])
    predicted[0, :3] = torch.tensor([-0.0, 5.0, -torch.finfo(dtype).max])
    predicted[1, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    small, own = encoded(base, predicted)
    assert small.dtype == torch.int8 and small.shape == (280,)
    assert own.dtype == integers_of(dtype) and int((small == OWN_BITS).sum()) == own.numel() >= 5
    assert same_bits(decoded(predicted, small, own), base)


def test_remainders_are_differences_of_places():
    base = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0], dtype=torch.float32)
    steps = [3, -127, 127, 128, -128]
    predicted = from_ordinals(ordinals(base) - torch.tensor(steps), torch.float32)
    small, own = encoded(base, predicted)
    assert small.tolist() == [3, -127, 127, OWN_BITS, OWN_BITS]
    assert own.view(torch.float32).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_bytes_and_back(dtype):
    for count in (0, 1, 1000):
        values = torch.arange(count).to(dtype)
        assert torch.equal(unpacked(packed(values), dtype), values)
    assert len(packed(torch.zeros(100_000, dtype=dtype))) < 5000


def test_damage_is_said():
    content = bytearray(packed(torch.arange(1000)))
    content[100] ^= 255
    with pytest.raises(BrocaError, match="damaged"):
        unpacked(bytes(content), torch.int64)
    with pytest.raises(BrocaError, match="damaged"):
        unpacked(packed(torch.zeros(3, dtype=torch.int8)), torch.int16)
    with pytest.raises(BrocaError, match="does not fit"):
        decoded(torch.ones(4), torch.zeros(3, dtype=torch.int8), torch.zeros(0, dtype=torch.int32))
    with pytest.raises(BrocaError, match="does not fit"):
        decoded(torch.ones(3), torch.zeros(3, dtype=torch.int8), torch.zeros(1, dtype=torch.int32))
