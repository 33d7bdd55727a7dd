"""Rows of many lengths in batches of few sizes."""

from __future__ import annotations

import random

import pytest

from neurons.text.batches import SIZES, row_batches


def of_many_lengths(rows: int, longest: int = 256) -> list[list[int]]:
    lengths = random.Random(0)
    return [[number + 1] * lengths.randint(1, longest) for number in range(rows)]


@pytest.mark.parametrize("at_once", [128, 1000, 4096])
def test_text_of_any_length_has_few_sizes_of_batches(at_once):
    # Every number of positions costs memory that is never freed.
    sizes = {batch.ids.numel() for batch in row_batches(of_many_lengths(4000), 0, tokens_a_batch=at_once)}
    assert len(sizes) <= 2 * SIZES
    few = {batch.ids.numel() for batch in row_batches(of_many_lengths(1000), 0, tokens_a_batch=at_once)}
    assert len(sizes) <= len(few) + SIZES // 2


@pytest.mark.parametrize("at_once", [1, 128, 1000, 4096])
def test_batches_hold_every_row_once_and_pad_no_row_beyond_the_longest(at_once):
    rows = of_many_lengths(500)
    batches = row_batches(rows, 0, tokens_a_batch=at_once)
    found = {
        int(line): batch.ids[row][batch.attention[row]].tolist()
        for batch in batches
        for row, line in enumerate(batch.line_numbers)
    }
    assert found == dict(enumerate(rows))
    # A model with learned positions has none beyond its context.
    assert max(batch.ids.shape[1] for batch in batches) == max(map(len, rows))


def test_padding_stays_small_where_text_fills_the_batches():
    batches = row_batches(of_many_lengths(4000), 0)
    positions = sum(batch.ids.numel() for batch in batches)
    assert positions / sum(int(batch.attention.sum()) for batch in batches) < 1.03
