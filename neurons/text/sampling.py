"""A sampling order with evenly distributed prefixes: the van der Corput order."""

from __future__ import annotations


def even_order(count: int) -> list[int]:
    """0 to count - 1 by bit reversal: 0, then the middle, the quarters, the eighths ...

    Every prefix is distributed evenly over the whole.  The order depends only on ``count``, so the lines sampled
    from parallel files are parallel.
    """
    bits = max(count - 1, 0).bit_length()
    reversed_bits = (int(f"{place:0{bits}b}"[::-1] or "0", 2) for place in range(2**bits))
    return [place for place in reversed_bits if place < count]
