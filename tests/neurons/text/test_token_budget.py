"""Even sampling of tokens from the whole text, and lines longer than the context in several rows."""

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editing.directions.recorded import record_texts
from neurons.models.start_tokens import start_tokens
from neurons.recording.record import record
from neurons.text.batches import packed_batches, text_batches
from neurons.text.sampling import even_order


@given(st.integers(0, 300))
def test_the_order_is_a_permutation(count):
    assert sorted(even_order(count)) == list(range(count))


@given(st.integers(2, 300), st.data())
def test_every_prefix_is_distributed_evenly(count, data):
    length = data.draw(st.integers(1, count))
    prefix = sorted(even_order(count)[:length])
    gaps = [b - a for a, b in zip(prefix, [*prefix[1:], count], strict=True)]
    # The gaps of a bit-reversed prefix are at most twice their mean, rounded up to a power of two.
    assert max(gaps) <= 2 ** ((count - 1).bit_length() - length.bit_length() + 1)


def lines_of(batches):
    return sorted(int(line) for batch in batches for line in batch.line_numbers)


def test_texts_are_drawn_from_the_whole_file():
    texts = models.sentences("qaa", 64, words=(5, 5))
    batches = text_batches(texts, models.tiny_tokenizer(), 64, max_tokens=150)
    counted = sum(int(batch.counted.sum()) for batch in batches)
    lines = lines_of(batches)
    assert 150 <= counted < 150 + 64
    assert lines == sorted(even_order(64)[: len(lines)])
    assert lines[-1] >= 32  # not the beginning of the file


def test_parallel_files_give_parallel_lines():
    batches, others = (
        text_batches(models.sentences(k, 40, words=(5, 5)), models.tiny_tokenizer(), 64, max_tokens=120)
        for k in ("qaa", "qab")
    )
    first, second = set(lines_of(batches)), set(lines_of(others))
    assert first <= second or second <= first


def test_blocks_are_drawn_from_the_whole_file():
    texts = [*models.sentences("qaa", 30), *models.sentences("qab", 30)]
    tokenizer = models.tiny_tokenizer()
    ids = torch.cat([b.ids for b in packed_batches(texts, tokenizer, 16, "mixed", max_tokens=160)]).flatten()
    owners = models.token_languages()
    assert len(ids) >= 160
    assert {owners[int(i)] for i in ids} >= {"qaa", "qab"}
    # Also from a single line with a whole book.
    book = packed_batches([" ".join(texts)], tokenizer, 16, "mixed", max_tokens=160)
    assert {owners[int(i)] for batch in book for i in batch.ids.flatten()} >= {"qaa", "qab"}


@pytest.fixture
def long_line():
    """A line of several rows between short ones."""
    return [*models.sentences("qaa", 2, words=(3, 3)), " ".join(models.sentences("qaa", 6)), "", "abe cab"]


def test_a_long_line_is_read_whole(long_line):
    tokenizer = models.tiny_tokenizer()
    batches = text_batches(long_line, tokenizer, 32)
    expected = tokenizer(long_line[2], add_special_tokens=False)["input_ids"]
    pieces = [
        batch.ids[i][batch.attention[i]].tolist()
        for batch in batches
        for i, line in enumerate(batch.line_numbers)
        if line == 2
    ]
    start = len(start_tokens(tokenizer))
    assert sorted(token for piece in pieces for token in piece[start:]) == sorted(expected)
    fractions = torch.cat([batch.fractions for batch in batches])
    lines = torch.cat([batch.line_numbers for batch in batches])
    assert all(torch.isclose(fractions[lines == k].sum(), torch.tensor(1.0).double()) for k in lines.unique())


def test_responses_of_a_long_line_are_over_all_its_tokens(llama, long_line):
    batches = text_batches(long_line, llama.tokenizer, 32)
    result = record(llama, {"qaa": batches}, ["mlp_in:sum", "mlp_in:responses"])
    assert result.lines["qaa"].tolist() == [0, 1, 2, 4]
    only = [
        type(b)(b.ids[keep], b.attention[keep], b.counted[keep], b.lines[keep])
        for b in batches
        if bool((keep := b.line_numbers == 2).any())
    ]
    alone = record(llama, {"qaa": only}, ["mlp_in:sum"])
    mean = alone.moments["mlp_in:sum"][..., 0] / int(alone.tokens[0])
    torch.testing.assert_close(result.responses["qaa"][2].double(), mean, rtol=1e-4, atol=1e-6)


def test_directions_average_over_rows(llama, long_line):
    batches = text_batches(long_line, llama.tokenizer, 32)
    result = record_texts(llama, {"qaa": batches})
    recorded = record(llama, {"qaa": batches}, ["block_out:text_mean"])
    rows = sum(len(batch.ids) for batch in batches)
    torch.testing.assert_close(result.means["block_out"], recorded.moments["block_out:text_mean"] / rows)


def test_drawn_lines_are_joined_in_the_order_of_the_file():
    texts, tokenizer = models.sentences("qaa", 64, words=(5, 5)), models.tiny_tokenizer()
    blocks = torch.cat([batch.ids for batch in packed_batches(texts, tokenizer, 64, "qaa", max_tokens=150)])
    found = blocks[:, len(start_tokens(tokenizer)) :].flatten().tolist()
    of_line = [tokenizer(f"{text}\n", add_special_tokens=False)["input_ids"] for text in texts]
    drawn, tokens = [], 0
    for line in even_order(64):
        if tokens < len(found):
            drawn.append(line)
            tokens += len(of_line[line])
    assert found == [token for line in sorted(drawn) for token in of_line[line]][: len(found)]
