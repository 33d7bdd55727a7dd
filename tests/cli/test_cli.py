"""The commands: their output, their files and their errors."""

import json
import re
import shutil
import sys

import pytest
from commands import one_sentence

from cli.main import COMMANDS, main
from neurons.errors import UsageError


@pytest.fixture(scope="module")
def model(checkpoint_of):
    return checkpoint_of("llama", True, "bfloat16")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def test_the_stages_one_after_the_other(broca, model, known_text, files):
    neurons, direction, edit = (files / f"{name}.safetensors" for name in ("neurons", "direction", "edit"))
    common = [model, "--corpus", known_text]
    status, out, err = broca(
        "identify", *common, "--method", "gradient-contrast", "--top-rate", "0.2", "--out", neurons
    )
    assert status == 0, err
    assert out.strip().splitlines()[-1] == str(neurons)
    assert "en" in out and "de" in out

    steps = ["--source", "en", "--target", "fr"]
    assert broca("direction", *common, *steps, "--out", direction)[0] == 0
    status, out, err = broca("edit", *common, "--direction", direction, "--out", edit)
    assert status == 0, err
    assert "keyed, en to fr" in out

    checkpoint = files / "steered"
    status, out, err = broca("export", model, "--edit", edit, "--out", checkpoint)
    assert status == 0, err
    assert out.strip().splitlines()[-1] == str(checkpoint)
    assert (checkpoint / "broca" / "edit.safetensors").is_file()

    evaluate = ["evaluate", *common, *steps, "--prompts", "4", "--new-tokens", "5"]
    applied, exported = files / "applied.json", files / "exported.json"
    assert broca(*evaluate, "--edit", edit, "--out", applied)[0] == 0
    assert broca(*evaluate, "--against", checkpoint, "--out", exported)[0] == 0
    first, second = (json.loads(path.read_text())["outcomes"] for path in (applied, exported))
    assert [outcome["name"] for outcome in first] == ["base", "edited"]
    for name in ("nll", "kl", "target_share", "samples"):
        assert first[1][name] == second[1][name], name
    assert first[1]["nll_rise"]["en"] != 0


@pytest.mark.parametrize("name", ["neurons", "direction", "edit", "steered"])
def test_inspect_shows_every_kind_of_file(broca, files, name):
    path = files / ("steered" if name == "steered" else f"{name}.safetensors")
    status, out, _ = broca("inspect", path)
    assert status == 0
    assert "┃" in out
    status, out, err = broca("inspect", path, "--json")
    # The edit of the tiny model is larger than its weights, which gives a warning.
    assert status == 0 and all(line.startswith("broca: warning: layer") for line in err.splitlines())
    assert "fingerprint" in json.loads(out)


def test_a_direction_looks_the_same_when_it_is_inspected(broca, model, known_text, files):
    out = files / "shift.safetensors"
    shown = broca(
        "direction", model, "--corpus", known_text, "--source", "en", "--target", "fr", "--method", "low-rank-shift",
        "--out", out,
    )[1]  # fmt: skip
    table = shown.strip().splitlines()[:-1]
    inspected = broca("inspect", out)[1].strip().splitlines()
    assert table[0] == "text read"
    table = table[next(i for i, line in enumerate(table) if line.startswith("low-rank-shift")) :]
    assert inspected[2:] == table
    header = [cell.strip() for cell in table[2].strip("┃").split("┃")]
    assert header[:4] == ["layer", "attn_out", "mlp_out", "block_out"] and len(header) > 5


def test_the_list_says_what_each_needs(broca):
    methods = json.loads(broca("identify", "--method", "list", "--json")[1])
    assert methods["random"]["needs"] == "--like, or MODEL --languages"
    assert methods["random-matched"]["needs"] == "--like, and --statistics or MODEL --corpus"
    assert methods["lape"]["needs"] == "MODEL --corpus, or --statistics"
    assert methods["culnig"]["needs"] == "MODEL --prompts --control [--recognition]"
    out = broca("identify", "--method", "list")[1]
    assert all(method["needs"] in out for method in methods.values())
    assert "filter_rate" in out and {"line", "source", "reads", "moments", "selection"} < {*methods["lape"]}


def test_statistics_of_another_model_match_nothing(broca, model, known_text, files, checkpoint_of):
    other = checkpoint_of("gpt2")
    statistics, out = files / "others.safetensors", files / "none.safetensors"
    assert (
        broca("record", other, "--corpus", known_text, "--for", "random-matched", "--out", statistics)[0] == 0
    )
    like = ["identify", "--method", "random-matched", "--like", files / "neurons.safetensors", "--out", out]
    for given in (["--statistics", statistics], [other, "--corpus", known_text]):
        status, _, err = broca(*like, *given)
        assert status == 1 and "fingerprint" in one_sentence(err)
        assert not out.exists()


def test_json_is_one_object_and_nothing_else(broca, model, known_text, files):
    neurons, edit = files / "neurons.safetensors", files / "scaled.safetensors"
    steps = ["--source", "en", "--target", "fr"]
    few = ["--prompts", "2", "--new-tokens", "3"]
    scale = ["--method", "scale", "--languages", "fr", "--factor", "0"]
    for arguments in (
        ["identify", model, "--corpus", known_text, "--out", files / "again.safetensors"],
        ["direction", model, "--corpus", known_text, *steps, "--out", files / "d.safetensors"],
        ["edit", model, "--neurons", neurons, *scale, "--out", edit],
        ["export", model, "--edit", edit, "--out", files / "scaled"],
        ["evaluate", model, "--corpus", known_text, *steps, *few, "--out", files / "e.json"],
    ):
        status, out, err = broca(*arguments, "--json")
        assert status == 0, err
        printed = json.loads(out)
        assert isinstance(printed, dict) and ("read" in printed or arguments[0] == "export")
        if arguments[0] == "edit":
            assert sum(module["components"] for module in printed["modules"]) == printed["components"] > 0
        assert not [
            line for line in err.splitlines() if not line.startswith(("broca: warning", "broca: note"))
        ]


def test_the_same_command_twice_gives_the_same_bytes(broca, model, known_text, files):
    for command in (
        ["identify", model, "--corpus", known_text, "--method", "gradient-contrast"],
        ["direction", model, "--corpus", known_text, "--source", "en", "--target", "fr"],
        ["edit", model, "--corpus", known_text, "--direction", files / "direction.safetensors"],
        ["evaluate", model, "--corpus", known_text, "--source", "en", "--target", "fr", "--prompts", "3"],
    ):
        # The same path for both, because the output may contain the command.
        out, contents = files / "again", []
        for _ in range(2):
            assert broca(*command, "--out", out)[0] == 0
            contents.append(out.read_bytes())
            out.unlink()
        assert contents[0] == contents[1], command[0]


def test_lape_says_which_language_has_no_neurons(broca, model, known_text, files):
    lape = ["--method", "lape", "--top-rate", "0.01"]
    status, out, err = broca(
        "identify", model, "--corpus", known_text, *lape, "--out", files / "few", "--json"
    )
    empty = json.loads(out)["empty"]
    assert status == 0
    assert empty, "with 1 % of 144 neurons some language has none"
    assert ", ".join(empty) in err


def changed(known_text, tmp_path, language, content):
    """A copy of the corpus in which one file is replaced."""
    copy = shutil.copytree(known_text, tmp_path / "changed")
    (copy / f"{language}.txt").write_bytes(content)
    return copy


def alone(known_text, tmp_path):
    """A corpus with only English."""
    (tmp_path / "english").mkdir()
    shutil.copy(known_text / "en.txt", tmp_path / "english")
    return tmp_path / "english"


# name -> (arguments from model, known_text, files and an empty directory; exit status; value in the message)
REFUSALS = {
    "no model": (lambda m, t, f, d: ["identify", "no/such", "--corpus", t], 2, "no/such"),
    "one language": (lambda m, t, f, d: ["identify", m, "--corpus", alone(t, d)], 2, "(en)"),
    "empty file": (lambda m, t, f, d: ["identify", m, "--corpus", changed(t, d, "de", b"")], 2, "'de'"),
    "bad UTF-8": (
        lambda m, t, f, d: ["identify", m, "--corpus", changed(t, d, "de", b"fine\n\xff\n")], 2, "line 2"),
    "too little text": (
        lambda m, t, f, d: ["identify", m, "--corpus", changed(t, d, "de", b"abe\n")], 2, "'de'"),
    "rate out of range": (lambda m, t, f, d: ["identify", m, "--corpus", t, "--top-rate", "2"], 2, "rate"),
    "block too long": (lambda m, t, f, d: ["identify", m, "--corpus", t, "--block", "100000"], 2, "100000"),
    "source is target": (
        lambda m, t, f, d: ["direction", m, "--corpus", t, "--source", "en", "--target", "en"], 2, "both"),
    "no direction": (lambda m, t, f, d: ["edit", m, "--corpus", t], 2, "--direction"),
    "no keyed corpus": (
        lambda m, t, f, d: ["edit", m, "--direction", f / "direction.safetensors"], 2, "--corpus"),
    "no such layer": (
        lambda m, t, f, d: ["edit", m, "--direction", f / "direction.safetensors", "--corpus", t, "--layers", "9"],
        2, "layers"),
    "already edited": (
        lambda m, t, f, d: ["export", f / "steered", "--edit", f / "edit.safetensors"], 1, "fingerprint"),
    "two steered models": (
        lambda m, t, f, d: ["evaluate", m, "--corpus", t, "--source", "en", "--target", "fr"]
        + ["--edit", f / "edit.safetensors", "--against", m], 2, "--against"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_gets_one_sentence(broca, model, known_text, files, tmp_path, name):
    arguments, expected_status, value = REFUSALS[name]
    out = tmp_path / "result"
    status, _, err = broca(*arguments(model, known_text, files, tmp_path), "--out", out)
    assert status == expected_status, err
    assert value in one_sentence(err)
    assert not out.exists()


def test_export_keeps_what_the_user_owns(broca, model, files):
    export = ["export", model, "--edit", files / "edit.safetensors", "--out"]
    before = {path: path.read_bytes() for path in model.iterdir()}
    for out, options, value in (
        (files / "steered", [], "--overwrite"),
        (model, ["--overwrite"], "source"),
        (model / "inside", [], "source"),
    ):
        status, _, err = broca(*export, out, *options)
        assert status == 1
        assert value in one_sentence(err)
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert broca(*export, files / "steered", "--overwrite")[0] == 0


def test_debug_shows_where(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["broca", "inspect", str(tmp_path / "none"), "--debug"])
    with pytest.raises(Exception, match="no such file"):
        main()


@pytest.mark.parametrize("index", [1, 3, 6])
def test_debug_stands_where_an_option_may(monkeypatch, tmp_path, index):
    words = ["broca", "generate", str(tmp_path / "none"), "--prompts", "a", "--seed=1"]
    words.insert(index, "--debug")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UsageError):
        main()


@pytest.mark.parametrize("rest", [["--prompts", "--debug"], ["--prompts", "a", "--", "--debug"]])
def test_debug_that_is_a_value_is_none_of_mains(broca, monkeypatch, tmp_path, rest):
    prompts = []
    monkeypatch.setattr("cli.generate._read_prompts", lambda given: prompts.append(given) or ["text"])
    status, _, err = broca("generate", tmp_path / "none", *rest)
    assert status == 2 and "Traceback" not in err
    if "--" in rest:
        assert "--debug" in one_sentence(err)  # an argument too many
    else:
        assert prompts == [("--debug",)]


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_help_names_debug_and_has_an_example(broca, name):
    for _ in range(2):  # loading a command twice must not add the option twice
        status, out, _ = broca(*([name] if name else []), "--help")
        assert status == 0 and out.count("--debug") == 1
    assert re.search(rf"Examples?:\n\s+broca {name or 'demo'} ", out)


def test_interrupt_says_so(broca, monkeypatch, model, known_text, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("neurons.recording.corpus_recording.record", interrupted)
    status, _, err = broca("identify", model, "--corpus", known_text, "--out", tmp_path / "o")
    assert status == 130
    assert "stopped" in err
    assert not (tmp_path / "o").exists()
