"""An order in which every beginning is spread evenly over the whole: the bits of a place, read backwards."""

from __future__ import annotations


def spread(count: int) -> list[int]:
    """0 to count - 1 in the van der Corput order: 0, then the middle, the quarters, the eighths ...

    However many of its first places are taken, they lie evenly over all; and of two files with as many lines
    the same places come first, so what is drawn of parallel files is parallel.
    """
    bits = max(count - 1, 0).bit_length()
    backwards = (int(f"{place:0{bits}b}"[::-1] or "0", 2) for place in range(2**bits))
    return [place for place in backwards if place < count]
