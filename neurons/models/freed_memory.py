"""Keep freed memory for the next batch, where glibc would return it to the system and allocate it again.

A forward pass on a CPU frees and allocates the same tens of megabytes at every layer.  glibc returns free memory
at the end of the heap, and allocations above a dynamic threshold; the system then clears every page again, which
slows down small models.
"""

from __future__ import annotations

import ctypes
import os

# <malloc.h>; 32 MiB is the maximum threshold of glibc on 64 bits.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT, MAX_ON_HEAP = 2**31 - 1, 32 * 2**20
OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Keep freed memory in this process.  Commands call this; the library does not.

    Memory use then stays at its peak.  Nothing changes if the environment has settings for glibc, or if the
    allocator is another one.

    Returns:
        Whether freed memory is kept.
    """
    if any(name in os.environ for name in OWN_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MAX_ON_HEAP)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT))
