"""oneDNN's compiled products do not take more memory with every size of a batch."""

import os
import subprocess
import sys

import pytest
import torch

from neurons.models.compiled_products import OWN_SETTINGS

# Products of oneDNN also on processors without bfloat16.
PRODUCTS = """
import psutil, torch
from neurons.models.compiled_products import keep_few_products
few = {few}
kept = keep_few_products() if few else None
torch.set_num_threads(1)
weight = torch.randn(256, 256).to_mkldnn()
def products(sizes):
    for size in sizes:
        torch.nn.functional.linear(torch.randn(size, 256).to_mkldnn(), weight)
    return psutil.Process().memory_info().rss
before = products([2048] * 3)
print(kept, products(range(1024, 2048, 8)) - before)
"""


def run(few, **settings):
    environment = {k: v for k, v in os.environ.items() if k not in OWN_SETTINGS} | settings
    code = PRODUCTS.format(few=few)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kept, grown = done.stdout.split()
    return kept, int(grown)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_the_memory_of_many_sizes_is_bounded():
    _, all_kept = run(False)
    kept, few = run(True)
    assert kept == "True" and few < all_kept / 2, (few, all_kept)
    kept, own = run(True, ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")
    assert kept == "False" and own > all_kept / 2  # a user's own setting stands


def test_every_command_bounds_it(broca, monkeypatch):
    asked = []
    monkeypatch.setattr("cli.main.keep_few_products", lambda: asked.append(True))
    assert broca("--version")[0] == 0
    assert asked == [True]
