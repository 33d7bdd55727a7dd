"""Corpus files to texts, and texts to token batches."""

import json

import models
import pyarrow
import pyarrow.parquet
import pytest
import torch

from neurons.errors import UsageError
from neurons.text.batches import block_length, packed_batches, text_batches
from neurons.text.corpus import PARTS, read_corpus


def directory_of(tmp_path, **files):
    """Files by language, of bytes or text; two underscores separate the suffix."""
    for name, content in files.items():
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / name.replace("__", ".")).write_bytes(content)
    return tmp_path


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_the_three_formats_read_alike(tmp_path):
    lines = ["ein Satz", "", "ö \u2028 gleiche Zeile", "vier"]
    directory_of(
        tmp_path,
        aa__txt="\n".join(lines) + "\n",
        bb__jsonl="\n".join(json.dumps({"id": 1, "text": line}) if line else " " for line in lines) + "\n",
    )
    parquet(tmp_path / "cc.parquet", other=[1, 2, 3, 4], text=[line or None for line in lines])
    read = [read_corpus(tmp_path, [language], min_languages=1) for language in ("aa", "bb", "cc")]
    assert [list(corpus.texts.values()) for corpus in read] == [[tuple(lines)]] * 3
    assert read[1].non_empty("bb") == [line for line in lines if line]
    assert read[1].part == "all"


def test_blank_lines_keep_their_place(tmp_path):
    directory_of(tmp_path, aa__txt="one\n\n  \nfour\r\n five \n", bb__txt="1\n2\n3\n4\n5")
    corpus = read_corpus(tmp_path)
    assert corpus.texts == {"aa": ("one", "", "", "four", "five"), "bb": ("1", "2", "3", "4", "5")}


def test_parts_are_disjoint_by_line_number_and_stay_parallel(tmp_path):
    numbers = [str(i) for i in range(11)]
    directory_of(tmp_path, aa__txt="\n".join(numbers), bb__txt="\n".join(["b0", "", "", *numbers[3:]]))
    assert set(PARTS) == {"all", "estimate", "choose", "report"}
    read = {part: read_corpus(tmp_path, part=part) for part in PARTS}
    assert read["estimate"].texts["aa"] == ("0", "1", "4", "5", "8", "9")
    assert read["choose"].texts["aa"] == ("2", "6", "10")
    assert read["report"].texts["aa"] == ("3", "7")
    assert read["all"].texts["aa"] == tuple(numbers)
    assert read["estimate"].texts["bb"] == ("b0", "", "4", "5", "8", "9")
    assert read["choose"].texts["bb"] == ("", "6", "10")
    with pytest.raises(UsageError, match=r"'half'.*estimate"):
        read_corpus(tmp_path, part="half")


def test_a_part_without_text_is_refused(tmp_path):
    directory_of(tmp_path, aa__txt="1\n2\n3\n4\n", bb__txt="1\n2\n3\n\n")
    with pytest.raises(UsageError, match=r"'bb'.*'report'"):
        read_corpus(tmp_path, part="report")


def test_a_byte_order_mark_is_no_text(tmp_path):
    directory_of(tmp_path, aa__txt=b"\xef\xbb\xbfone\ntwo", bb__jsonl=b'\xef\xbb\xbf{"text": "eins"}\n')
    assert read_corpus(tmp_path).texts == {"aa": ("one", "two"), "bb": ("eins",)}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "after a byte order mark"])
@pytest.mark.parametrize(
    ("content", "line"), [(b"ok\nok\nb\xffd\n", 3), (b"\xff\nok\n", 1), (b"ok\n\xff\n", 2), (b"ok\n\xc3", 2)]
)
def test_bad_utf8_is_refused_with_its_line(tmp_path, mark, content, line):
    directory_of(tmp_path, aa__txt="fine", bb__txt=mark + content)
    with pytest.raises(UsageError, match=rf"bb\.txt: line {line} is not UTF-8"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("line", ['{"text": 5}', '{"text": null}', '{"words": "a"}', "[1]", "5", "{", "a"])
def test_a_bad_json_line_is_refused_with_its_number(tmp_path, line):
    directory_of(tmp_path, aa__txt="fine", bb__jsonl=f'{{"text": "ok"}}\n\n{line}\n')
    with pytest.raises(UsageError, match=r"bb\.jsonl: line 3.*'text'"):
        read_corpus(tmp_path)


def test_half_a_surrogate_in_json_is_refused_with_its_number(tmp_path):
    directory_of(tmp_path, aa__txt="fine", bb__jsonl='{"text": "ok"}\n{"text": "a\\ud800b"}\n')
    with pytest.raises(UsageError, match=r"bb\.jsonl: line 2"):
        read_corpus(tmp_path)


def test_bad_parquet_is_refused(tmp_path):
    directory_of(tmp_path, aa__txt="fine", bb__parquet="no parquet")
    with pytest.raises(UsageError, match=r"bb\.parquet"):
        read_corpus(tmp_path)
    parquet(tmp_path / "bb.parquet", words=["a"])
    with pytest.raises(UsageError, match=r"bb\.parquet"):
        read_corpus(tmp_path)
    parquet(tmp_path / "bb.parquet", text=[1, 2])
    with pytest.raises(UsageError, match=r"bb\.parquet: row 1\b.*'text'"):
        read_corpus(tmp_path)


def test_missing_things_are_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        read_corpus(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no <language>"):
        read_corpus(directory_of(tmp_path, notes__md="text", __hidden="x"))
    directory_of(tmp_path, aa__txt="a", bb__txt="b")
    with pytest.raises(UsageError, match=r"xx, yy .*aa, bb"):
        read_corpus(tmp_path, ["aa", "xx", "yy"])


@pytest.mark.parametrize("name", ["bb.txt", "bb.jsonl", "bb.parquet"])
@pytest.mark.parametrize("content", [[], ["", "  "]])
def test_a_language_without_text_is_refused(tmp_path, name, content):
    directory_of(tmp_path, aa__txt="a")
    if name.endswith("parquet"):
        parquet(tmp_path / name, text=pyarrow.array(content, pyarrow.string()))
    else:
        (tmp_path / name).write_text("".join(line + "\n" for line in content))
    with pytest.raises(UsageError, match=rf"{name}: .*'bb'"):
        read_corpus(tmp_path)


def test_one_language_is_refused_unless_one_is_enough(tmp_path):
    directory_of(tmp_path, aa__txt="a", bb__txt="b")
    with pytest.raises(UsageError, match=r"\(bb\)"):
        read_corpus(tmp_path, ["bb"])
    assert read_corpus(tmp_path, ["bb"], min_languages=1).languages == ("bb",)


def test_duplicates_are_refused(tmp_path):
    directory_of(tmp_path, aa__txt="a", bb__txt="b", aa__jsonl='{"text": "a"}')
    with pytest.raises(UsageError, match=r"'aa'.*aa\.jsonl and aa\.txt"):
        read_corpus(tmp_path)
    (tmp_path / "aa.jsonl").unlink()
    with pytest.raises(UsageError, match="aa"):
        read_corpus(tmp_path, ["aa", "bb", "aa"])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("copy", [b"1\n2\n3\n4\n", b"\xef\xbb\xbf1\r\n\r\n2\n3 \n4"], ids=["bytes", "lines"])
def test_the_same_text_under_two_names_is_refused(tmp_path, part, copy):
    directory_of(tmp_path, aa__txt="4\n3\n2\n1\n", de__txt=copy, en__txt="1\n2\n3\n4\n")
    with pytest.raises(UsageError, match=r"de\.txt and en\.txt"):
        read_corpus(tmp_path, part=part)
    assert read_corpus(tmp_path, ["aa", "en"]).languages == ("aa", "en")


def test_equal_parts_of_different_files_are_accepted(tmp_path):
    directory_of(tmp_path, aa__txt="1\n2\n3\n4\n", bb__txt="1\n5\n6\n7\n")
    assert set(read_corpus(tmp_path, part="all").texts) == {"aa", "bb"}


def test_the_digest_says_what_was_read(tmp_path):
    directory_of(tmp_path, aa__txt="a\nb\n", bb__txt="b\n", cc__txt="c\n")
    first = read_corpus(tmp_path, ["aa", "bb"])
    assert first.languages == ("aa", "bb")
    assert read_corpus(tmp_path, ["bb", "aa"]).languages == ("bb", "aa")
    assert read_corpus(tmp_path, ["aa", "bb"]).digest == first.digest
    others = [read_corpus(tmp_path, wanted).digest for wanted in (["aa", "cc"], ["bb", "aa"], None)]
    (tmp_path / "bb.txt").write_text("d\n")
    others.append(read_corpus(tmp_path, ["aa", "bb"]).digest)
    assert len({first.digest, *others}) == 5


# --- token batches -------------------------------------------------------------------------------


# The second tokenizer never adds its beginning-of-sequence token, as those of SmolLM2 and Qwen.
TOKENIZERS = pytest.mark.parametrize("adds_start", [True, False], ids=["start", "no start"])


def stream_of(texts):
    tokenizer = models.tiny_tokenizer()
    return [
        token for text in texts for token in tokenizer(text + "\n", add_special_tokens=False)["input_ids"]
    ]


@TOKENIZERS
def test_packed_blocks_are_full(adds_start, monkeypatch):
    monkeypatch.setattr("neurons.text.batches.TOKENS_A_BATCH", 48)
    texts = [*models.sentences("qaa", 12), "", *models.sentences("qaa", 5, seed=1)]
    batches = packed_batches(texts, models.tiny_tokenizer(adds_start), 16, "qaa")
    starts = int(adds_start)
    stream = stream_of([text for text in texts if text])
    ids = torch.cat([batch.ids for batch in batches])
    counted = torch.cat([batch.counted for batch in batches])
    assert len(batches) > 1
    assert all(batch.ids.shape[1] == 16 and len(batch.ids) <= 3 and not batch.padded for batch in batches)
    assert all(bool(batch.attention.all()) for batch in batches)
    assert len(ids) == len(stream) // (16 - starts)
    assert ids[:, starts:].flatten().tolist() == stream[: len(ids) * (16 - starts)]
    assert bool((ids[:, :starts] == 0).all())
    # The first position is an attention sink with or without a start token.
    assert bool(counted[:, 1:].all())
    assert not counted[:, 0].any()


@pytest.mark.parametrize(("max_tokens", "rows"), [(1, 1), (15, 1), (16, 2), (45, 3), (46, 4), (10**6, None)])
def test_packed_blocks_stop_after_enough_tokens(max_tokens, rows):
    texts = models.sentences("qab", 12)
    batches = packed_batches(texts, models.tiny_tokenizer(), 16, "qab", max_tokens)
    assert sum(len(batch.ids) for batch in batches) == (rows or len(stream_of(texts)) // 15)


def test_too_little_text_for_a_block_is_named():
    text = models.sentences("qac", 1)
    count = len(stream_of(text))
    assert len(packed_batches(text, models.tiny_tokenizer(), count + 1, "qac")[0].ids) == 1
    with pytest.raises(UsageError, match=rf"'qac'.* {count} .* {count + 1}"):
        packed_batches(text, models.tiny_tokenizer(), count + 2, "qac")


@TOKENIZERS
def test_text_batches_hold_one_text_in_each_row(adds_start, monkeypatch):
    monkeypatch.setattr("neurons.text.batches.TOKENS_A_BATCH", 60)
    texts = [*models.sentences("qaa", 14, words=(1, 12)), ""]
    start = [0] * adds_start
    batches = text_batches(texts, models.tiny_tokenizer(adds_start), 20)
    rows = []
    for batch in batches:
        assert batch.ids.numel() <= 60
        for ids, attention, counted in zip(batch.ids, batch.attention, batch.counted, strict=True):
            length = int(attention.sum())
            assert attention.tolist() == [True] * length + [False] * (len(ids) - length)
            # The first position is an attention sink with or without a start token.
            assert counted.tolist() == [False, *attention.tolist()[1:]]
            rows.append(ids[:length].tolist())
    encode = models.tiny_tokenizer()
    # A text longer than a row continues in the next row.
    body, whole = 20 - len(start), []
    for text in texts:
        tokens = encode(text, add_special_tokens=False)["input_ids"]
        whole += [start + tokens[first : first + body] for first in range(0, len(tokens), body)]
    assert sorted(rows) == sorted(row for row in whole if len(row) > 1)
    assert len(whole) > len(texts)
    assert any(batch.padded for batch in batches)
    assert len(batches) > 1


def test_block_length_is_the_context_or_the_given_length(llama):
    assert block_length(llama.model) == 128
    assert block_length(llama.model, 2) == 2
    assert block_length(llama.model, 128) == 128
    for length in (0, 1, 129, -5):
        with pytest.raises(UsageError, match=f" {length} .* 128"):
            block_length(llama.model, length)
    long = models.tiny_model(max_position_embeddings=9000)
    assert block_length(long) == 2048
    assert block_length(long, 9000) == 9000
