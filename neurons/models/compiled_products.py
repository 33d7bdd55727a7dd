"""Keep few of the products that oneDNN compiles on a CPU.

oneDNN compiles a product of matrices for its sizes, in bfloat16 for every number of positions in a batch, and keeps the
code of the last 1,024: .6 MB each, which grows with the number of batches of different sizes, so with the length of the
text.  A forward pass has about six different products; to compile one anew takes milliseconds.
"""

from __future__ import annotations

import os

PRODUCTS = 32
OWN_SETTINGS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")


def keep_few_products() -> bool:
    """Keep the last ``PRODUCTS`` in this process, if it has not computed one yet.  Commands call this; the library does not.

    Returns:
        Whether it is set: not if the environment has a setting.
    """
    if any(name in os.environ for name in OWN_SETTINGS):
        return False
    os.environ[OWN_SETTINGS[0]] = str(PRODUCTS)
    return True
