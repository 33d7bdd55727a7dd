"""Freed memory stays with the process where glibc is asked to keep it, and only there."""

import ctypes
import os
import subprocess
import sys

import pytest

from neurons.freed_memory import OWN_SETTINGS

TENSORS = """
import resource, torch
from neurons.freed_memory import keep_freed_memory
kept = keep_freed_memory() if {keep} else None
def passed():
    for _ in range(4):
        torch.ones(5_000_000)  # 20 MB, freed at once
for _ in range(3):
    passed()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    passed()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(code, **settings):
    environment = {k: v for k, v in os.environ.items() if k not in OWN_SETTINGS} | settings
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the allocator is glibc's")
def test_the_same_memory_serves_again():
    kept, faults = run(TENSORS.format(keep=True))
    assert kept == "True"
    # 40 tensors of 4,883 pages each.
    assert int(faults) < 5000
    fresh = run(TENSORS.format(keep=True), MALLOC_MMAP_THRESHOLD_="1000000")
    assert fresh[0] == "False" and int(fresh[1]) > 100_000  # a user's own setting stands


def test_another_allocator_is_left_alone():
    code = (
        "import ctypes\n"
        "class Other:\n    def __init__(self, name): pass\n"
        "ctypes.CDLL = Other\n"
        "from neurons.freed_memory import keep_freed_memory\n"
        "print(keep_freed_memory())"
    )
    assert run(code) == ["False"]
