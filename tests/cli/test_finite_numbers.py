"""Numbers in options and settings must be finite and of the right type: otherwise status 2, before any work."""

import pytest

from editing.study.registry import edits
from neurons.errors import UsageError
from neurons.setting import NUMBER, WHOLE, read_settings

NOT_FINITE = ("nan", "inf", "-inf", "NaN", "1e999")
# These fail before any input is read: MODEL does not exist, and FILE and FOLDER are empty.
COMMANDS = {
    "edit": ["edit", "MODEL", "--direction", "FILE", "--corpus", "FOLDER", "--set", "eps=VALUE"],
    "edit, whole": ["edit", "MODEL", "--method", "ablate", "--direction", "FILE", "--set", "from_layer=VALUE"],
    "edit, by its option": ["edit", "MODEL", "--direction", "FILE", "--corpus", "FOLDER", "--eps", "VALUE"],

    "identify": ["identify", "MODEL", "--method", "lape", "--corpus", "FOLDER", "--set", "filter_rate=VALUE"],
    "identify, threshold": ["identify", "MODEL", "--corpus", "FOLDER", "--threshold=VALUE"],
    "identify, rate": ["identify", "MODEL", "--corpus", "FOLDER", "--top-rate=VALUE"],
    "direction": ["direction", "MODEL", "--corpus", "FOLDER", "--source", "a", "--target", "b", "--method", "probe",
                  "--set", "penalty=VALUE"],
    "tune": ["tune", "MODEL", "--corpus", "FOLDER", "--source", "a", "--target", "b", "--goal-gap=VALUE"],
    "generate": ["generate", "MODEL", "x", "--temperature=VALUE"],
}  # fmt: skip


@pytest.fixture
def refusal(broca, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()

    def run(words, value):
        places = {"MODEL": "none", "FILE": tmp_path / "file", "FOLDER": tmp_path / "folder"}
        words = [str(places.get(word, word)).replace("VALUE", value) for word in words]
        out = [] if words[0] == "generate" else ["--out", tmp_path / "out"]
        status, printed, err = broca(*words, *out)
        assert (status, printed) == (2, "") and err.count("\n") == 1, err
        return err

    return run


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_number_that_is_not_finite_is_refused_by_name(refusal, name, value):
    message = refusal(COMMANDS[name], value)
    option = next(word for word in COMMANDS[name] if "=" in word or word == "--eps").partition("=")[0]
    assert option in message and value in message


@pytest.mark.parametrize("value", ["much", "", "1,5"])
@pytest.mark.parametrize("name", ["edit", "edit, by its option", "identify", "direction"])
def test_what_is_no_number_is_refused_by_name(refusal, name, value):
    assert any(word in refusal(COMMANDS[name], value) for word in ("eps", "filter_rate", "penalty"))


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["identify", "MODEL", "--corpus", "FOLDER", "--method", "lape", "--set", "rate=1"], "'rate'"),
        (["identify", "MODEL", "--corpus", "FOLDER", "--set", "filter_rate=1"], "'filter_rate'"),
        (["identify", "MODEL", "--method", "random", "--languages", "a,b", "--set", "rate=1"], "'rate'"),
        (["identify", "MODEL", "--corpus", "FOLDER", "--method", "lape", "--set", "filter_rate=1",
          "--set", "filter-rate=0.5"], "filter_rate"),
        (["edit", "MODEL", "--direction", "FILE", "--corpus", "FOLDER", "--set", "keep=en,,fr"], "keep=en,,fr"),
        (["edit", "MODEL", "--direction", "FILE", "--corpus", "FOLDER", "--set", "sources="], "sources="),
    ],
)  # fmt: skip
def test_settings_that_are_not_the_methods_are_refused_before_any_work(refusal, words, value):
    assert value in refusal(words, "")


@pytest.mark.parametrize("value", NOT_FINITE)
def test_no_methods_number_may_be_other_than_finite(value):
    for method in edits().values():
        for name, setting in method.settings().items():
            if setting.kind in (NUMBER, WHOLE):
                with pytest.raises(UsageError, match=name):
                    read_settings(method.settings(), {name: value})
