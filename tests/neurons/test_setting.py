"""One reader of settings: texts and values of every kind, read or refused by name."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from neurons.errors import UsageError
from neurons.setting import (
    COUNT,
    NUMBER,
    NUMBERS,
    WHOLE,
    WORD,
    WORDS,
    YES_NO,
    Setting,
    assigned,
    declared,
    defaults,
    read_settings,
    setting,
)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (NUMBER, "-1e-3", -0.001),
        (WHOLE, "3.0", 3),
        (COUNT, "7", 7),
        (NUMBERS, "1,2.5", (1.0, 2.5)),
        (YES_NO, "No", False),
        (YES_NO, "1", True),
        (WORD, "sign", "sign"),
        (WORDS, "en, fr", ("en", "fr")),
    ],
)
def test_a_text_is_read(kind, text, value):
    found = Setting(kind, None).read("--set x", text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((NUMBER, text) for text in ("nan", "-inf", "1e999", "", "1,5", "much")),
        *((WHOLE, text) for text in ("1.5", "nan", "inf", "x")),
        *((COUNT, text) for text in ("0", "-1", "inf")),
        *((NUMBERS, text) for text in ("1,0", "1,,2", "nan", "")),
        (YES_NO, "perhaps"),
        (WORDS, "en,,fr"),
        (WORDS, ""),
    ],
)
def test_a_text_of_another_kind_is_refused_as_it_was_typed(kind, text):
    with pytest.raises(UsageError, match=f"--set own={text}: give {kind}"):
        read_settings({"own": Setting(kind, None)}, {"own": text})


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (NUMBER, True), (NUMBER, float("nan")), (WHOLE, 1.5), (WHOLE, float("inf")), (COUNT, 0), (NUMBERS, []),
        (NUMBERS, [1.0, 0]), (NUMBERS, 2.0), (YES_NO, 1), (WORD, 3), (WORDS, ["en", 3]), (WORDS, 3),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_by_name(kind, value):
    with pytest.raises(UsageError) as caught:
        read_settings({"own": Setting(kind, 1)}, {"own": value})
    assert "own" in str(caught.value) and repr(value) in str(caught.value)


def test_a_word_that_is_none_of_them():
    one = Setting(WORD, "a", words=("a", "b"))
    assert one.read("--set x=b", "b") == "b"
    with pytest.raises(UsageError, match="--set x=c: give a, b"):
        one.read("--set x=c", "c")
    with pytest.raises(UsageError, match="'c'"):
        one.require("x", "c")


def test_an_unknown_setting_is_refused_with_those_that_there_are():
    with pytest.raises(UsageError, match="'epps'"):
        read_settings({"eps": Setting(NUMBER, 1.0)}, {"epps": "1"})


def test_assignments():
    assert assigned(["a-b=1", "c = x=y "]) == {"a_b": "1", "c": "x=y"}
    for given, already in ((["a"], ()), (["=1"], ()), (["a=1", "a=2"], ()), (["a=1"], ("a",))):
        with pytest.raises(UsageError, match=f"--set {given[-1]}"):
            assigned(given, already)


def test_a_dataclass_declares_its_settings():
    @dataclass(frozen=True)
    class Own:
        place: Path
        rate: float = 0.5
        rank: int | None = None
        jointly: bool = False
        words: tuple[str, ...] = ()
        strengths: tuple[float, ...] | None = None
        times: int = setting(2, "how often", kind=COUNT)

    found = declared(Own)
    assert [one.kind for one in found.values()] == [WORD, NUMBER, WHOLE, YES_NO, WORDS, NUMBERS, COUNT]
    assert found["times"].line == "how often"
    assert defaults(found) == {"place": None, **{k: v for k, v in vars(Own("x")).items() if k != "place"}}
    assert read_settings(found, {"rank": None}) == {"rank": None}
