"""Conversations in a corpus: which tokens are counted, against pieces written by hand; bad rows by their place."""

import json
import shutil
from functools import partial

import models
import pyarrow.parquet
import pytest
import torch
from conversations import CHATML, counted_by_hand, said, written

from neurons.errors import UsageError
from neurons.models.source import load_model
from neurons.neuron_sets.identify import identify
from neurons.recording.corpus_recording import record_corpus
from neurons.scorers.method import PACKED, TEXTS
from neurons.text.batches import language_batches, packed_corpus
from neurons.text.conversations import ROLES
from neurons.text.corpus import read_corpus
from neurons.text.corpus_rows import Conversation

THINKING = "<think>\nbad\n</think>\n\na cab"
# As Mistral's, which refuse two messages of the same speaker in a row.
ALTERNATING = CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if not loop.first and m['role'] == messages[loop.index0 - 1]['role'] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}",
)


ROWS = {
    "qaa": [
        said(("user", "bad cab"), ("assistant", "a bee. ")),
        {"text": "cab bead"},
        None,
        said(
            ("system", "be bad"),
            ("user", "cab"),
            ("assistant", "abe"),
            ("user", "fed"),
            ("assistant", THINKING),
        ),
    ],
    "qab": [
        {"text": "hi ill", "messages": None},
        said(("user", "high hill")),
        said(("user", "ill"), ("assistant", "kill a high hill")),
    ],
}
# The same by hand: (role of the tokens, text).
SYSTEM, ANSWER, END = "<|system|>\nbe good<|end|>\n<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>\n"
PIECES = {
    ("qaa", 0): [("template", SYSTEM), ("user", "bad cab"), ("template", ANSWER), ("answer", "a bee."), ("template", END)],
    ("qaa", 3): [
        ("template", "<|system|>\n"), ("system", "be bad"), ("template", "<|end|>\n<|user|>\n"), ("user", "cab"),
        ("template", ANSWER), ("answer", "abe"), ("template", "<|end|>\n<|user|>\n"), ("user", "fed"),
        ("template", f"{ANSWER}<think>\n"), ("thought", "bad"), ("template", "\n</think>\n\n"), ("answer", "a cab"),
        ("template", END),
    ],
    ("qab", 1): [("template", SYSTEM), ("user", "high hill"), ("template", ANSWER)],
    ("qab", 2): [("template", SYSTEM), ("user", "ill"), ("template", ANSWER), ("answer", "kill a high hill"), ("template", END)],
}  # fmt: skip
TEXTS_BY_HAND = {("qaa", 1): "cab bead", ("qab", 0): "hi ill"}
CHOICES = [(role,) for role in ROLES] + [("user", "header"), ("before-answer",), None]


def without_text(rows=ROWS):
    return {
        language: [None if row and row.get("text") else row for row in of_language]
        for language, of_language in rows.items()
    }


def naive_rows(tokenizer, roles):
    """(language, line) -> (ids, counted positions) of every text and conversation."""
    rows = {place: counted_by_hand(tokenizer, pieces, roles) for place, pieces in PIECES.items()}
    for place, text in TEXTS_BY_HAND.items() if roles is None else ():
        ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        rows[place] = ids, list(range(1, len(ids)))
    return {place: row for place, row in rows.items() if row[1]}


def read_rows(batches):
    return {
        (language, line): (
            batch.ids[row][batch.attention[row]].tolist(),
            batch.counted[row].nonzero()[:, 0].tolist(),
        )
        for language, of_language in batches.items()
        for batch in of_language
        for row, line in enumerate(batch.line_numbers.tolist())
    }


def corpus_of(tmp_path, roles, part="all"):
    return read_corpus(
        written(tmp_path / "text", ROWS if roles is None else without_text()), None, part, 1, roles
    )


@pytest.mark.parametrize("roles", CHOICES)
def test_the_tokens_of_the_roles_are_counted(chatting, tmp_path, roles):
    corpus = corpus_of(tmp_path, roles)
    expected = naive_rows(chatting.tokenizer, roles)
    languages = {language for language, _ in expected}
    if languages < {*ROWS}:
        with pytest.raises(UsageError, match="'qab'.*" + roles[0]):
            language_batches(chatting, corpus)
        corpus = corpus.only(*languages)
    assert read_rows(language_batches(chatting, corpus)) == expected
    for batch in language_batches(chatting, corpus)["qaa"]:
        first = torch.zeros_like(batch.counted)
        first[:, 0] = True
        assert torch.equal(batch.at_start, first)


@pytest.mark.parametrize("roles", [("answer",), ("user", "header"), ("before-answer",), None])
@pytest.mark.parametrize("reads", [PACKED, TEXTS])
def test_recorded_means_and_counts_are_those_of_a_loop_over_the_tokens(chatting, tmp_path, roles, reads):
    corpus = corpus_of(tmp_path, roles)
    moments = ["mlp_act:positive", "mlp_in:sum", "mlp_out:text_mean"]
    statistics = record_corpus(chatting, corpus, moments, reads)
    rows = naive_rows(chatting.tokenizer, roles)
    for k, language in enumerate(statistics.languages):
        positive, total, means, tokens = 0, 0.0, [], 0
        for (of_row, _), (ids, counted) in rows.items():
            if of_row != language:
                continue
            _, layers = models.naive_llama(chatting.model, ids)
            at = {
                site: torch.stack([layer[site].detach()[counted] for layer in layers])
                for site in ("mlp_act", "mlp_in", "mlp_out")
            }
            positive = positive + (at["mlp_act"] > 0).sum(1)
            total = total + at["mlp_in"].sum(1)
            means.append(at["mlp_out"].mean(1))
            tokens += len(counted)
        assert int(statistics.tokens[k]) == tokens
        assert int(statistics.texts[k]) == len(means)
        assert torch.equal(statistics.moments["mlp_act:positive"][..., k], positive)
        torch.testing.assert_close(statistics.moments["mlp_in:sum"][..., k], total, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            statistics.text_mean("mlp_out")[..., k], torch.stack(means).mean(0), rtol=1e-4, atol=1e-5
        )
    assert statistics.metadata["corpora"][0]["roles"] == list(corpus.roles)
    assert statistics.metadata["settings"]["reads"] == TEXTS


def test_neurons_of_the_answers_alone_are_found_in_the_answers_alone(chatting, tmp_path):
    # The questions are the same; only the answers differ.
    answers = {"qaa": "a bad cab fed a bee", "qab": "kill him, high hill"}
    questions = ["bad cab", "high hill", "cab hill", "him", "bee"]
    rows = {k: [said(("user", q), ("assistant", answers[k])) for q in questions] for k in answers}
    directory = written(tmp_path / "text", rows)
    counts = {
        role: record_corpus(
            chatting, read_corpus(directory, roles=[role]), ["mlp_act:positive"], PACKED
        ).moments["mlp_act:positive"]
        for role in ("user", "header", "answer")
    }
    for role in ("user", "header"):
        assert torch.equal(counts[role][..., 0], counts[role][..., 1])
    assert not torch.equal(counts["answer"][..., 0], counts["answer"][..., 1])
    found = identify(chatting, read_corpus(directory, roles=["answer"]), "lape")
    assert sum(map(len, found.members.values())) and found.metadata["corpora"][0]["roles"] == ["answer"]


def test_conversations_are_not_joined_into_blocks(chatting, tmp_path):
    corpus = corpus_of(tmp_path, None)
    assert read_rows(packed_corpus(chatting, corpus)) == read_rows(language_batches(chatting, corpus))
    with pytest.raises(UsageError, match="--block"):
        record_corpus(chatting, corpus, ["mlp_act:positive"], PACKED, block=16)


def test_few_tokens_are_whole_conversations_until_enough_are_counted(chatting, tmp_path):
    corpus = corpus_of(tmp_path, ("answer",)).only("qaa")
    first, last = (
        len(counted_by_hand(chatting.tokenizer, PIECES["qaa", line], ("answer",))[1]) for line in (0, 3)
    )
    assert list(read_rows(language_batches(chatting, corpus, tokens=first))) == [("qaa", 0)]
    both = read_rows(language_batches(chatting, corpus, tokens=first + 1))
    assert sum(len(counted) for _, counted in both.values()) == first + last


def test_an_interrupted_recording_of_other_roles_is_not_resumed(chatting, tmp_path):
    class StopError(Exception):
        pass

    def stop_at_the_second(done, _):
        done.append(1)
        if len(done) == 2:
            raise StopError

    out = tmp_path / "statistics"
    moments = ["mlp_in:sum"]
    user, answer = (corpus_of(tmp_path, (role,)) for role in ("user", "answer"))
    expected = record_corpus(chatting, answer.only("qaa"), moments)
    for corpus in (user, answer):
        assert corpus.digest == user.digest
        with pytest.MonkeyPatch.context() as patch, pytest.raises(StopError):
            patch.setattr("neurons.recording.resume.Unfinished.is_due", lambda _: True)
            record_corpus(
                chatting,
                corpus.only("qaa"),
                moments,
                batch_tokens=1,
                progress=partial(stop_at_the_second, []),
                out=out,
            )
    result = record_corpus(chatting, answer.only("qaa"), moments, batch_tokens=1, out=out)
    assert torch.equal(result.tokens, expected.tokens)
    torch.testing.assert_close(result.moments["mlp_in:sum"], expected.moments["mlp_in:sum"])


def test_one_file_of_all_languages_is_the_directory(tmp_path):
    directory = written(tmp_path / "text", ROWS)
    file = tmp_path / "all.jsonl"
    # Interleaved, with another spelling of the code.
    rows = [{**row, "language": k} for k in ROWS for row in ROWS[k] if row is not None]
    file.write_text("\n".join(json.dumps(row) for row in reversed(rows)) + "\n\n")
    corpus, reversed_corpus = read_corpus(directory), read_corpus(file)
    assert {k: [*reversed(texts)] for k, texts in reversed_corpus.texts.items()} == {
        k: corpus.non_empty(k) for k in corpus.languages
    }
    assert read_corpus(file, ["qab"], min_languages=1).languages == ("qab",)
    assert read_corpus(file, part="choose").texts["qab"] == reversed_corpus.texts["qab"][2:3]
    with pytest.raises(UsageError, match="qac"):
        read_corpus(file, ["qaa", "qac"])
    file.write_text(json.dumps(said(("user", "bad"))))
    with pytest.raises(UsageError, match=r"all\.jsonl: line 1.*'language'"):
        read_corpus(file)
    with pytest.raises(UsageError, match=r"qaa\.txt"):
        read_corpus(shutil.copy(file, tmp_path / "qaa.txt"))


def test_parquet_holds_the_same_conversations(tmp_path):
    files = {"text": written(tmp_path / "text", ROWS)}
    files["columns"] = tmp_path / "columns"
    files["columns"].mkdir()
    for language, rows in ROWS.items():
        columns = [{"text": None, "messages": None, "other": 1, **(row or {})} for row in rows]
        table = pyarrow.Table.from_pylist(columns)
        pyarrow.parquet.write_table(table, files["columns"] / f"{language}.parquet")
    by_line, by_row = (read_corpus(directory) for directory in files.values())
    assert by_row.texts == by_line.texts and by_row.digest == by_line.digest
    (files["columns"] / "qab.parquet").unlink()
    bad = [{"messages": said(("user", "a"))["messages"]}, {"messages": said(("tool", "a"))["messages"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(bad), files["columns"] / "qab.parquet")
    with pytest.raises(UsageError, match=r"qab\.parquet: row 2\b.*'tool'"):
        read_corpus(files["columns"])


def test_the_same_conversations_in_two_languages_are_refused(tmp_path):
    rows = {k: [said(("user", "bad cab"))] for k in ("qaa", "qab")}
    with pytest.raises(UsageError, match="same text"):
        read_corpus(written(tmp_path / "text", rows))
    file = tmp_path / "all.jsonl"
    file.write_text("\n".join(json.dumps({**of[0], "language": k}) for k, of in rows.items()))
    with pytest.raises(UsageError, match="'qaa' and language 'qab'"):
        read_corpus(file)


def test_the_digest_depends_on_every_message(tmp_path):
    digests = set()
    for role, content, answer in (
        ("user", "bad", "cab"),
        ("system", "bad", "cab"),
        ("user", "bee", "cab"),
        ("user", "bad", "<think>bee</think>cab"),
    ):
        directory = written(tmp_path / "text", {"qaa": [said((role, content), ("assistant", answer))]})
        digests.add(read_corpus(directory, min_languages=1).digest)
    assert len(digests) == 4


@pytest.mark.parametrize(
    "content", ["<think>\nbad\n</think>\n\ncab", "bad</think>cab", " <think>bad</think> cab "]
)
def test_thoughts_are_apart_from_the_answer(tmp_path, content):
    directory = written(tmp_path / "text", {"qaa": [said(("user", "</think> a"), ("assistant", content))]})
    (conversation,) = read_corpus(directory, min_languages=1).texts["qaa"]
    assert conversation.as_json() == [
        ["user", "</think> a", None],
        ["assistant", conversation.messages[1].content, "bad"],
    ]
    assert conversation.messages[1].content.strip() == "cab"


def test_an_empty_thought_is_none(tmp_path):
    directory = written(tmp_path / "text", {"qaa": [said(("assistant", "<think>\n\n</think>\n\ncab"))]})
    assert read_corpus(directory, min_languages=1).texts["qaa"][0].messages[0].thought is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (said(("tool", "a")), "'tool'"),
        (said(("user", "a"), ("assistant", " ")), "message 2 .assistant."),
        (said(("user", "a"), ("assistant", "<think>bad</think>")), "message 2 .assistant."),
        (said(("user", ["a"])), "message 1 .user.*'content'"),
        (said(("user", "\ud800")), "message 1 .user.*'content'"),
        ({"messages": [{"content": "a"}]}, "message 1.*'role'"),
        ({"messages": ["a"]}, "message 1.*'role'"),
        ({"messages": []}, "'messages'"),
        ({"messages": "a"}, "'messages'"),
        ({**said(("user", "a")), "text": "b"}, "both"),
        ({"conversations": []}, "'text' or 'messages'"),
        ([said(("user", "a"))], "'text' or 'messages'"),
        ({"text": 1}, "'text'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, message):
    directory = written(tmp_path / "text", {"qaa": [ROWS["qaa"][0], row]})
    with pytest.raises(UsageError, match=rf"qaa\.jsonl: line 2\b.*{message}"):
        read_corpus(directory, min_languages=1)


def test_roles_are_checked(tmp_path):
    with pytest.raises(UsageError, match="'assistant'"):
        read_corpus(written(tmp_path / "text", without_text()), roles=["user", "assistant"])
    with pytest.raises(UsageError, match=r"qaa\.jsonl"):
        read_corpus(written(tmp_path / "text", ROWS), roles=["user"])
    plain = models.write_corpus(tmp_path / "plain")
    with pytest.raises(UsageError, match="plain text"):
        read_corpus(plain, roles=["user"])


def test_what_the_template_refuses_is_named_by_file_and_line(checkpoint_of, tmp_path):
    twice = said(("user", "bad"), ("user", "cab"), ("assistant", "bee"))
    corpus = read_corpus(written(tmp_path / "text", {"qaa": [ROWS["qaa"][0], twice]}), min_languages=1)
    loaded = load_model(str(checkpoint_of()), device="cpu")
    with pytest.raises(UsageError, match=r"qaa\.jsonl: line 1\b.*no chat template"):
        language_batches(loaded, corpus)
    loaded.tokenizer.chat_template = ALTERNATING
    with pytest.raises(UsageError, match=r"qaa\.jsonl: line 2\b.*roles must alternate"):
        language_batches(loaded, corpus)
    loaded.tokenizer.chat_template = CHATML
    assert len(read_rows(language_batches(loaded, corpus))) == 2


def test_a_conversation_is_read_whole_or_refused(chatting, tmp_path):
    context = chatting.model.config.max_position_embeddings
    rows = {"qaa": [said(("user", "ab " * context))]}
    corpus = read_corpus(written(tmp_path / "text", rows), min_languages=1)
    with pytest.raises(UsageError, match=rf"qaa\.jsonl: line 1\b.*{context}"):
        language_batches(chatting, corpus)


def test_openings_are_of_plain_text(tmp_path):
    corpus = corpus_of(tmp_path, None)
    assert isinstance(corpus.texts["qaa"][0], Conversation)
    with pytest.raises(UsageError, match=r"qab\.jsonl: line 2\b"):
        corpus.lines("qab")
    assert corpus.only("qab").has_conversations
