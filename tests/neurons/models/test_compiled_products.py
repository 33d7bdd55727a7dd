"""oneDNN keeps few of the products that it compiles, one for every size of a batch."""

import os
import subprocess
import sys

import pytest
import torch

from neurons.models.compiled_products import OWN_SETTINGS

SIZES = 64
# Products of oneDNN also on processors without bfloat16, twice of every size.
CODE = f"""
import torch
from neurons.models.compiled_products import keep_few_products
print(keep_few_products())
weight = torch.randn(16, 16).to_mkldnn()
for size in [*range(1, {SIZES + 1})] * 2:
    torch.nn.functional.linear(torch.randn(size, 16).to_mkldnn(), weight)
"""


def compiled(**settings):
    """(whether the limit was set, number of products that were compiled)"""
    environment = {k: v for k, v in os.environ.items() if k not in OWN_SETTINGS}
    environment |= {"ONEDNN_VERBOSE": "2", **settings}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    made = [line for line in done.stdout.splitlines() if "create:cache_miss,cpu,inner_product" in line]
    return "True" in done.stdout.splitlines(), len(made)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_products_of_many_sizes_are_not_kept():
    assert compiled() == (True, 2 * SIZES)
    assert compiled(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024") == (False, SIZES)  # a user's own setting stands


def test_every_command_asks_for_it(broca, monkeypatch):
    asked = []
    monkeypatch.setattr("cli.main.keep_few_products", lambda: asked.append(True))
    assert broca("--version")[0] == 0
    assert asked == [True]
