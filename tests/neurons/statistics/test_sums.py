"""Sums over tokens, both ways of doing them, against a loop over every value."""

import subprocess
import sys

import pytest
import torch

from neurons.statistics.fused_sums import CHUNK_TOKENS, add_fused
from neurons.statistics.sums import OF_TOKENS, add_chunked, add_tokens


def zeros(units, moments=OF_TOKENS):
    return {m: torch.zeros(units, dtype=torch.int64 if m == "positive" else torch.float64) for m in moments}


def looped(values, positions, start):
    """float64 loops straight from the names of the moments."""
    found = {moment: total.tolist() for moment, total in start.items()}
    for position in positions.tolist():
        for unit, value in enumerate(values[position].double().tolist()):
            for moment, term in (
                ("positive", int(value > 0)),
                ("sum", value),
                ("square", value * value),
                ("absolute", abs(value)),
            ):
                if moment in found:
                    found[moment][unit] += term
    return found


def some_values(tokens, units, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens * 1000 + units)
    values = torch.randn(tokens, units, generator=generator)
    values[torch.rand(tokens, units, generator=generator) < 0.2] = 0.0  # zero is not positive
    return values.to(dtype)


@pytest.mark.parametrize("add", [add_fused, add_chunked])
@pytest.mark.parametrize("moments", [("positive",), ("sum",), ("square", "absolute"), OF_TOKENS])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, CHUNK_TOKENS + 5, 2 * CHUNK_TOKENS])
def test_equals_a_loop(add, moments, tokens, monkeypatch):
    monkeypatch.setattr("neurons.statistics.sums.CHUNK", 7 * 100)
    values = some_values(tokens + 9, 7)
    # Out of their order, with gaps between them.
    positions = torch.randperm(tokens + 9, generator=torch.Generator().manual_seed(1))[:tokens]
    totals = zeros(7, moments)
    for moment in totals:
        totals[moment] += 3  # they are added to, not replaced
    expected = looped(values, positions, totals)
    add(values, positions, totals)
    for moment, total in totals.items():
        if moment == "positive":
            assert total.tolist() == expected[moment]
        else:
            assert total.tolist() == pytest.approx(expected[moment], rel=1e-13, abs=1e-12)


@pytest.mark.parametrize("add", [add_fused, add_chunked])
def test_no_token_adds_nothing(add):
    totals = zeros(5)
    add(torch.full((4, 5), torch.nan), torch.zeros(0, dtype=torch.int64), totals)
    assert all(not total.any() for total in totals.values())


@pytest.mark.parametrize("add", [add_fused, add_chunked])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(add, bad):
    values = some_values(6, 5)
    values[4, 2] = bad
    for moment in ("sum", "square", "absolute"):
        totals = zeros(5, (moment,))
        add(values, torch.arange(6), totals)
        assert torch.isfinite(totals[moment]).tolist() == [True, True, False, True, True]
        totals = zeros(5, (moment,))
        add(values, torch.tensor([0, 1, 2, 3, 5]), totals)  # what does not count may be anything
        assert torch.isfinite(totals[moment]).all()


def test_float32_is_summed_in_float64():
    values = torch.tensor([[1e8], [1.0], [-1e8]])
    totals = zeros(1, ("sum",))
    add_tokens(values, torch.arange(3), totals)
    assert totals["sum"].tolist() == [1.0]  # in float32 it would be 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_type_and_shape(dtype):
    values = some_values(6, 8, dtype)
    wanted, positions = zeros(8), torch.tensor([5, 1, 2])
    add_chunked(values, positions, wanted)
    for shaped in (values, values.view(2, 3, 8), values.t().contiguous().t()):
        totals = zeros(8)
        add_tokens(shaped, positions, totals)
        for moment in OF_TOKENS:
            torch.testing.assert_close(totals[moment], wanted[moment], rtol=1e-14, atol=0)


def test_the_number_of_threads_changes_no_bit():
    values, positions = some_values(5 * CHUNK_TOKENS + 3, 33), torch.arange(1, 5 * CHUNK_TOKENS)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(zeros(33))
            add_tokens(values, positions, found[-1])
    finally:
        torch.set_num_threads(before)
    for moment in OF_TOKENS:
        assert torch.equal(found[0][moment], found[1][moment])


def test_works_where_nothing_can_be_written(tmp_path):
    """numba refuses to keep what it compiled where it finds no place: then it compiles once a process."""
    code = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"
        "import torch; from neurons.statistics.fused_sums import add_fused, _add_chunks\n"
        "t = {'sum': torch.zeros(2, dtype=torch.float64)}\n"
        "add_fused(torch.ones(3, 2), torch.arange(3), t)\n"
        "print(t['sum'].tolist(), type(_add_chunks._cache).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split("\n")[0] == "[3.0, 3.0] NullCache", done.stderr


def test_torch_keeps_its_threads(tmp_path):
    code = (
        "import torch; torch.set_num_threads(1); from neurons.statistics.fused_sums import add_fused\n"
        "add_fused(torch.ones(600, 2), torch.arange(600), {'sum': torch.zeros(2, dtype=torch.float64)})\n"
        "print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "1\n", done.stderr
