"""Keep freed memory for the next batch, where glibc would give it back to the system and fetch it again.

A forward pass on a CPU frees and allocates the same tens of megabytes at every layer.  glibc returns what is
free at the heap's end, and allocations above a size that it guesses anew; the system then has to clear every
page again, which a small model's pass feels.
"""

from __future__ import annotations

import ctypes
import os

# <malloc.h>; 32 MiB is the largest threshold that glibc takes on 64 bits.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT, LARGEST_ON_HEAP = 2**31 - 1, 32 * 2**20
OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Set it for this process, which is its owner's to decide: commands do it, the library does not.

    Memory in use stays what it was at its highest.  Nothing is changed where the environment has settings of
    its own for glibc, or where the allocator is another one.

    Returns:
        Whether freed memory is kept.
    """
    if any(name in os.environ for name in OWN_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_ON_HEAP)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT))
