"""The rounding error of an inverted edit, stored as small integers, so that undo is exact.

Sort the numbers of a float format and number them: with the bits b of a number read as a signed integer,

    n(b) = b where b >= 0, else b with all bits but the sign flipped

is monotone, separates -0 from 0 and is its own inverse.  The remainder of a base number x for a prediction y is
n(x) - n(y): mostly -1, 0 or 1 for a small edit.  It has 8 bits; a number whose remainder does not fit, or whose
prediction y is not finite (the edit scaled it by 0), is stored as its own bits.
"""

from __future__ import annotations

import zlib

import torch

from neurons.errors import BrocaError

# The 8-bit value that marks a number stored as its own bits.
OWN_BITS = -128
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# The data is noise of a few symbols: higher levels take ten times as long for a few per cent.
_LEVEL = 1


def ordinals(values: torch.Tensor) -> torch.Tensor:
    """The rank of each number in its dtype: int64, of the same shape.

    Args:
        values: float64, float32, float16 or bfloat16.
    """
    integer = _INTEGERS[values.element_size()]
    return _flipped(values.contiguous().view(integer), integer).long()


def from_ordinals(places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of these ranks: the inverse of ``ordinals``."""
    integer = _INTEGERS[dtype.itemsize]
    return _flipped(places.to(integer), integer).view(dtype)


def _flipped(bits: torch.Tensor, integer: torch.dtype) -> torch.Tensor:
    return bits ^ ((bits >> (8 * integer.itemsize - 1)) & torch.iinfo(integer).max)


def encoded(base: torch.Tensor, predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The remainder of ``base`` for a prediction of the same shape and dtype.

    Returns:
        int8 [numbers], and the bits of the numbers marked ``OWN_BITS``, as integers of the dtype's width.
    """
    # In 64 bits the difference may wrap around, and wraps back when it is added.
    difference = (ordinals(base) - ordinals(predicted)).flatten()
    fits = (difference > OWN_BITS) & (difference <= 127) & torch.isfinite(predicted).flatten()
    small = torch.where(fits, difference, OWN_BITS).to(torch.int8)
    bits = base.contiguous().view(_INTEGERS[base.element_size()]).flatten()
    return small, bits[~fits]


def decoded(predicted: torch.Tensor, small: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    """The base numbers, bit for bit, in the prediction's shape and dtype.

    Raises:
        BrocaError: the sizes do not match.
    """
    marked = small == OWN_BITS
    if small.numel() != predicted.numel() or int(marked.sum()) != raw.numel():
        raise BrocaError("the remainder does not fit the tensor: it belongs to another checkpoint")
    places = ordinals(predicted).flatten() + small.long()
    numbers = from_ordinals(places, predicted.dtype).view(raw.dtype)
    numbers[marked] = raw
    return numbers.view(predicted.dtype).reshape(predicted.shape)


def packed(values: torch.Tensor) -> bytes:
    """Integers as zlib-compressed bytes."""
    return zlib.compress(values.contiguous().view(torch.uint8).numpy().data, _LEVEL)


def unpacked(content: bytes, dtype: torch.dtype) -> torch.Tensor:
    """The flat integers given to ``packed``.

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
    """The integer dtype for the bits of a float dtype."""
    return _INTEGERS[dtype.itemsize]
