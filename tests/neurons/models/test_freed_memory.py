"""Freed memory stays with the process where glibc is asked to keep it, and only there."""

import ctypes
import os
import subprocess
import sys

import pytest

from neurons.models.freed_memory import OWN_SETTINGS

# glibc's thresholds as a process starts with them, but no longer moving: where they go depends on what was freed.
TENSORS = """
import ctypes, resource, torch
from neurons.models.freed_memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory
for threshold in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
    ctypes.CDLL(None).mallopt(threshold, 2**17)
def faults():
    for _ in range(10):
        torch.ones(5_000_000)  # 20 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first, given_back = faults(), faults()
kept = keep_freed_memory()
second, again = faults(), faults()
print(kept, given_back - first, again - second)
"""


def run(code, **settings):
    environment = {k: v for k, v in os.environ.items() if k not in OWN_SETTINGS} | settings
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the allocator is glibc's")
def test_the_same_memory_serves_again():
    kept, given_back, again = run(TENSORS)
    assert kept == "True"
    assert int(given_back) > 40_000  # ten times 4,883 pages
    assert int(again) < 5000
    kept, _, again = run(TENSORS, MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False" and int(again) > 40_000  # a user's own setting stands


def test_every_command_keeps_it(broca, monkeypatch):
    asked = []
    monkeypatch.setattr("cli.main.keep_freed_memory", lambda: asked.append(True))
    assert broca("--version")[0] == 0
    assert asked == [True]


def test_another_allocator_is_left_alone():
    code = (
        "import ctypes\n"
        "class Other:\n    def __init__(self, name): pass\n"
        "ctypes.CDLL = Other\n"
        "from neurons.models.freed_memory import keep_freed_memory\n"
        "print(keep_freed_memory())"
    )
    assert run(code) == ["False"]
