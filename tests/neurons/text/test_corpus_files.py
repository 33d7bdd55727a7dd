"""The files of a corpus directory by language."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editing.evaluation.language_id import IDENTIFIED, unidentified
from neurons.errors import UsageError
from neurons.text.corpus import read_corpus
from neurons.text.corpus_files import corpus_files, is_language_code, language_label
from neurons.text.prompts import read_prompts


def files_in(directory, *names):
    """Files of different text."""
    for number, name in enumerate(names):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"text {number}\nmore {number}\n", encoding="utf-8")
    return directory


def found_in(directory, languages=None):
    return {language: path.name for language, path in corpus_files(directory, languages).of.items()}


# --- names ---------------------------------------------------------------------------------------

SPELLED = {
    "en": ("en", "EN", "eng", "eng_Latn", "en-US", "en_GB"),
    "zh": ("zh", "zho", "zho_Hans", "zho_Hant", "zh-CN", "zh_TW", "cmn", "cmn_Hans", "chi"),
    "fr": ("fra", "fre", "fr-CA", "fra_Latn"), "ar": ("ar", "ara", "arb_Arab", "arb"),
    "fa": ("fas", "pes_Arab"), "no": ("no", "nb", "nob_Latn"), "nn": ("nno_Latn",), "ps": ("pbt_Arab", "pus"),
    "lv": ("lvs_Latn",), "ms": ("zsm_Latn",), "id": ("ind_Latn", "in"), "sr": ("srp_Cyrl",),
    "sw": ("swh_Latn",), "tl": ("tgl_Latn", "fil"), "he": ("heb_Hebr", "iw"), "yue": ("yue_Hant",),
    "arz": ("arz_Arab",),
    # Languages without a code of two letters, and names that are not languages.
    "ceb": ("ceb_Latn",), "qaa": ("qaa",), "xx": ("xx",), "l0": ("l0",), "en-train": ("en-train",),
    "english": ("english",), "README": ("README",),
}  # fmt: skip


@pytest.mark.parametrize(
    ("code", "name"), [(code, name) for code, names in SPELLED.items() for name in names]
)
def test_a_code_is_understood_however_it_is_spelled(code, name):
    assert language_label(name) == code


@pytest.mark.parametrize("label", sorted(IDENTIFIED))
def test_what_the_identifier_calls_a_language_is_its_label(label):
    assert language_label(label) == label
    assert is_language_code(label)


def test_the_labels_of_the_identifier_are_known_without_it():
    from editing.evaluation.language_id import _identifier

    assert set(_identifier().labels) == IDENTIFIED


@given(
    st.one_of(
        st.text(max_size=12), st.from_regex(r"[a-zA-Z]{1,8}([-_][a-zA-Z0-9]{1,8}){0,2}", fullmatch=True)
    )
)
def test_any_name_has_a_label_that_is_its_own(name):
    label = language_label(name)
    assert language_label(label) == label
    assert is_language_code(label) == is_language_code(name)


def test_languages_that_cannot_be_measured():
    assert unidentified(["en", "ceb", "xx"]) == ["ceb", "xx"]


# --- directories ---------------------------------------------------------------------------------


def test_what_lies_beside_text_is_no_language(tmp_path):
    beside = ["README.txt", "requirements.txt", "LICENSE.txt", "Licence-MIT.txt", "notice.TXT", "SOURCES.txt"]
    beside += ["CHANGELOG.txt", "requirements-dev.txt", "README.en.txt"]
    files_in(
        tmp_path,
        "en.txt",
        "fr.txt",
        *beside,
        ".DS_Store",
        "._en.txt",
        ".hidden.txt",
        "SOURCES.md",
        "data.csv",
    )
    files_in(tmp_path, "de.csv", "parts/de.txt", "es.txt/es.txt")
    files = corpus_files(tmp_path)
    assert found_in(tmp_path) == {"en": "en.txt", "fr": "fr.txt"}
    assert set(files.left_out) == {*beside, "de.csv"}
    assert files.renamed == {}
    assert read_corpus(tmp_path).languages == ("en", "fr")
    assert corpus_files(tmp_path, ["fr"]).left_out == ()


def test_a_directory_of_text_alone_has_nothing_to_say(tmp_path):
    files = corpus_files(files_in(tmp_path, "qaa.txt", "en.jsonl", "yue.parquet"))
    assert list(files.of) == ["en", "qaa", "yue"]
    assert not (files.left_out or files.renamed)


def test_flores_is_read_under_two_letters(tmp_path):
    files_in(tmp_path, "eng_Latn.dev", "fra_Latn.dev", "zho_Hans.dev", "ceb_Latn.dev")
    assert corpus_files(tmp_path).renamed == {
        "ceb_Latn.dev": "ceb", "eng_Latn.dev": "en", "fra_Latn.dev": "fr", "zho_Hans.dev": "zh",
    }  # fmt: skip
    corpus = read_corpus(tmp_path, ["zho_Hans", "EN"])
    assert corpus.texts == {"zh": ("text 2", "more 2"), "en": ("text 0", "more 0")}
    files_in(tmp_path / "plain", "zh.txt", "en.txt")
    (tmp_path / "plain" / "zh.txt").write_text("text 2\nmore 2")
    assert read_corpus(tmp_path / "plain", ["zh", "en"]).texts.keys() == corpus.texts.keys()


def test_a_name_that_is_no_code_is_a_label(tmp_path):
    files = corpus_files(files_in(tmp_path, "xx.txt", "english.txt", "en.txt"))
    assert list(files.of) == ["en", "english", "xx"]
    assert list(corpus_files(tmp_path, ["xx", "en"]).of) == ["xx", "en"]


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (("zh.txt", "zho_Hans.txt"), ("zh.txt", "zho_Hans.txt")),
        (("EN.txt", "eng_Latn.jsonl"), ("EN.txt", "eng_Latn.jsonl")),
        (("eng_Latn.dev", "eng_Latn.devtest"), ("eng_Latn.dev", "eng_Latn.devtest")),
        (("en.txt", "en.jsonl"), ("en.jsonl", "en.txt")),
    ],
)
def test_two_files_of_one_language_are_refused(tmp_path, names, refused):
    files_in(tmp_path, *names, "fr.txt")
    with pytest.raises(UsageError) as caught:
        corpus_files(tmp_path)
    assert all(name in str(caught.value) for name in refused)
    assert found_in(tmp_path, ["fr"]) == {"fr": "fr.txt"}


def test_a_file_that_is_named_is_meant_where_there_are_several_of_its_language(tmp_path):
    files_in(tmp_path, "eng_Latn.dev", "zho_Hans.dev", "zho_Hant.dev")
    assert found_in(tmp_path, ["eng_Latn", "zho_Hant"]) == {"en": "eng_Latn.dev", "zh": "zho_Hant.dev"}
    with pytest.raises(UsageError, match=r"zho_Hans\.dev and zho_Hant\.dev.*list zho_Hans among"):
        corpus_files(tmp_path, ["en", "zh"])
    with pytest.raises(UsageError, match="zh"):
        corpus_files(tmp_path, ["zho_Hans", "zho_Hant"])
    # No choice by name between files of the same name.
    files_in(tmp_path, "eng_Latn.devtest")
    with pytest.raises(UsageError) as caught:
        corpus_files(tmp_path, ["eng_Latn"])
    assert "--languages" not in str(caught.value)


def test_the_folder_that_holds_text_is_named(tmp_path):
    files_in(tmp_path, "README", "dev/eng_Latn.dev", "devtest/eng_Latn.devtest", ".cache/en.txt", "docs/a.md")
    with pytest.raises(UsageError, match=r"dev or devtest$"):
        corpus_files(tmp_path)
    with pytest.raises(UsageError, match="nowhere"):
        corpus_files(tmp_path / "nowhere")


def test_prompts_are_named_as_text_is(tmp_path):
    for name in ("eng_Latn", "FR", "README"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "answer": " a"}}\n')
    assert set(read_prompts(tmp_path).of) == {"en", "fr"}
    assert read_prompts(tmp_path, ["fra"]).of["fr"][0].prompt == "FR"
