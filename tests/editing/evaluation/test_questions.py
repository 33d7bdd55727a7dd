"""Files of questions."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from editing.evaluation.questions import Question, read_questions
from neurons.errors import UsageError

ROWS = [
    {"question_id": "1", "text": "How do I bake bread?", "reference": "On mélange la farine."},
    {"question_id": "2", "text": 'Why is "it", the sky, blue?', "reference": "La lumière."},
]
EXPECTED = tuple(Question(row["question_id"], row["text"], row["reference"]) for row in ROWS)


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as stream:
            writer = csv.DictWriter(stream, sorted({name for row in rows for name in row}))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_holds_the_same(tmp_path, suffix):
    questions = read_questions(write(tmp_path / f"q{suffix}", ROWS), "en")
    assert questions.of == {"en": EXPECTED}
    assert (questions.part, len(questions.digest)) == ("all", 64)


def test_numbers_are_ids_and_references_may_be_missing(tmp_path):
    questions = read_questions(write(tmp_path / "q.parquet", [{"question_id": 7, "text": " Why? "}]), "en")
    assert questions.of == {"en": (Question("7", "Why?", None),)}


def test_a_language_column_and_a_directory(tmp_path):
    rows = [{**ROWS[0], "language": "en"}, {**ROWS[0], "text": "Comment ?", "language": "fr"}]
    by_column = read_questions(write(tmp_path / "q.jsonl", rows), "en")
    assert {k: [q.text for q in questions] for k, questions in by_column.of.items()} == {
        "en": ["How do I bake bread?"],
        "fr": ["Comment ?"],
    }
    (tmp_path / "by").mkdir()
    write(tmp_path / "by" / "en.jsonl", rows[:1])
    write(tmp_path / "by" / "fr.csv", [{"question_id": "1", "text": "Comment ?"}])
    assert [q.text for q in read_questions(tmp_path / "by", "fr").of["fr"]] == ["Comment ?"]
    assert set(read_questions(str(tmp_path / "by")).of) == {"en", "fr"}


def test_halves_share_no_question(tmp_path):
    rows = [{"question_id": str(i), "text": f"Question {i}?"} for i in range(5)]
    questions = read_questions(write(tmp_path / "q.jsonl", rows), "en")
    choose, report = questions.half("choose"), questions.half("report")
    assert [q.question_id for q in choose.of["en"]] == ["0", "2", "4"]
    assert [q.question_id for q in report.of["en"]] == ["1", "3"]
    assert (choose.part, report.part) == ("choose", "report")
    with pytest.raises(UsageError, match="two or more"):
        read_questions(write(tmp_path / "one.jsonl", rows[:1]), "en").half("report")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("q.jsonl", '{"text": "no id"}\n', "row 1"),
        ("q.jsonl", '{"question_id": "1", "text": " "}\n', "row 1"),
        ("q.jsonl", '{"question_id": "1", "text": "a", "reference": 3}\n', "reference"),
        ("q.jsonl", "not json\n", "line 1"),
        ("q.jsonl", "[1]\n", "line 1"),
        ("q.jsonl", '{"question_id": "1", "text": "a"}\n' * 2, "twice"),
        ("q.jsonl", '{"question_id": "1", "text": "a", "language": "de"}\n', "'en'"),
        ("q.jsonl", "", "no question"),
        ("q.txt", "Why?\n", ".jsonl"),
        ("q.parquet", "junk", "parquet"),
    ],
)
def test_what_is_refused(tmp_path, name, content, named):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=named):
        read_questions(tmp_path / name, "en")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such questions"):
        read_questions(tmp_path / "none.jsonl", "en")
