"""What a rounded edit loses: the small integers between a base tensor and what inverting the edit gives.

Numbers of one float format, in their order, are numbered by the integers: with the bits b of a number read
as a signed integer of w bits,

    n(b) = b where b >= 0, else b with all bits but the sign flipped

is monotone, tells -0 from 0 and is its own inverse.  The remainder of a base number x for a prediction y is
n(x) - n(y): mostly -1, 0 or 1 where the edit is small.  It is kept in 8 bits; a number whose remainder does
not fit, or that nothing predicts (y is not finite: the edit scaled it by 0), is kept as its own bits.
"""

from __future__ import annotations

import zlib

import torch

from neurons.errors import BrocaError

# Of the 8 bits, the value that stands for "see the number's own bits".
OWN_BITS = -128
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# The planes are noise of a few symbols: higher levels take ten times as long for a few per cent.
_LEVEL = 1


def ordinals(values: torch.Tensor) -> torch.Tensor:
    """The place of each number among those of its dtype: int64, of the same shape.

    Args:
        values: float64, float32, float16 or bfloat16.
    """
    integer = _INTEGERS[values.element_size()]
    return _flipped(values.contiguous().view(integer), integer).long()


def from_ordinals(places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers at these places: the inverse of ``ordinals``."""
    integer = _INTEGERS[dtype.itemsize]
    return _flipped(places.to(integer), integer).view(dtype)


def _flipped(bits: torch.Tensor, integer: torch.dtype) -> torch.Tensor:
    return bits ^ ((bits >> (8 * integer.itemsize - 1)) & torch.iinfo(integer).max)


def encoded(base: torch.Tensor, predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The remainder of ``base`` for a prediction of the same shape and dtype.

    Returns:
        int8 [numbers], and the bits of those that it marks as ``OWN_BITS``, as integers of the dtype's width.
    """
    # In 64 bits the difference wraps around, and back when it is added.
    difference = (ordinals(base) - ordinals(predicted)).flatten()
    fits = (difference > OWN_BITS) & (difference <= 127) & torch.isfinite(predicted).flatten()
    small = torch.where(fits, difference, OWN_BITS).to(torch.int8)
    bits = base.contiguous().view(_INTEGERS[base.element_size()]).flatten()
    return small, bits[~fits]


def decoded(predicted: torch.Tensor, small: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The base numbers again, bit for bit, of the prediction's shape and dtype.

    Raises:
        BrocaError: the parts are of another size.
    """
    marked = small == OWN_BITS
    if small.numel() != predicted.numel() or int(marked.sum()) != own.numel():
        raise BrocaError("the remainder does not fit the tensor: it belongs to another checkpoint")
    places = ordinals(predicted).flatten() + small.long()
    numbers = from_ordinals(places, predicted.dtype).view(own.dtype)
    numbers[marked] = own
    return numbers.view(predicted.dtype).reshape(predicted.shape)


def packed(values: torch.Tensor) -> bytes:
    """Integers as zlib-compressed bytes."""
    return zlib.compress(values.contiguous().view(torch.uint8).numpy().data, _LEVEL)


def unpacked(content: bytes, dtype: torch.dtype) -> torch.Tensor:
    """The flat integers that ``packed`` was given.

    Raises:
        BrocaError: the bytes are damaged.
    """
    try:
        plain = bytearray(zlib.decompress(content))
    except zlib.error as error:
        raise BrocaError(f"the remainder is damaged ({error}): undo from an undamaged copy") from error
    if len(plain) % dtype.itemsize:
        raise BrocaError("the remainder is damaged: undo from an undamaged copy")
    return torch.frombuffer(plain, dtype=dtype) if plain else torch.empty(0, dtype=dtype)


def integers_of(dtype: torch.dtype) -> torch.dtype:
    """The integer dtype in which numbers of a float dtype are kept as their own bits."""
    return _INTEGERS[dtype.itemsize]
