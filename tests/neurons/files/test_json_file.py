"""Dataclasses to JSON and back: what is null, what is left out, and how a fault is told."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from neurons.errors import UsageError
from neurons.files.artifact import json_bytes
from neurons.files.json_file import Figure, checked, document, read_json


@dataclass(frozen=True)
class Inner:
    rises: Mapping[str, Figure]
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    figure: Figure
    count: int = 0
    notes: tuple[str, ...] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.count < 0:
            raise UsageError(f"a count of {self.count} is impossible")


def test_what_is_written_is_read(tmp_path):
    one = Outer(
        (Inner({"fr": math.inf, "de": 0.5}, ("a",)),), math.nan, 3, about={"model": "m\udce9", "corpora": [1]}
    )
    path = tmp_path / "a.json"
    path.write_bytes(json_bytes(document(one)))
    value = read_json(path)
    assert value == {
        "inner": [{"rises": {"fr": None, "de": 0.5}, "words": ["a"]}],
        "figure": None, "count": 3, "model": "m\udce9", "corpora": [1],
    }  # fmt: skip
    found = checked(Outer, value, path)
    assert json_bytes(document(found)) == path.read_bytes()
    assert math.isnan(found.figure) and math.isnan(found.inner[0].rises["fr"]) and found.notes is None
    assert found.about == one.about and found.inner[0].words == ("a",)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"figure": "much"}, "figure should be a valid number"),
        ({"inner": [{}]}, "inner.0.rises is missing"),
        ({"inner": [{"rises": {"fr": []}}]}, "inner.0.rises.fr should be a valid number"),
        ({"count": 1.5}, "count should be a valid integer"),
        ({"count": -1}, "a count of -1"),
        ({"notes": [3]}, "notes.0 should be a valid string"),
    ],
)
def test_a_fault_is_told_by_file_and_place(changed, named):
    value = {"inner": [], "figure": 0.5, **changed}
    with pytest.raises(UsageError) as refused:
        checked(Outer, value, "a.json")
    assert str(refused.value).startswith("a.json: ") and named in str(refused.value)


@pytest.mark.parametrize("value", [None, 3, "text", [], [{}]])
def test_what_is_no_object_is_refused(value):
    with pytest.raises(UsageError, match=r"^a\.json: .*the document"):
        checked(Outer, value, "a.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_json_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    for broken in (path, tmp_path / "none.json", tmp_path):
        with pytest.raises(UsageError) as refused:
            read_json(broken)
        assert str(broken) in str(refused.value)
