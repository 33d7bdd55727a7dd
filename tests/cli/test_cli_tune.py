"""``broca tune`` on the demo model and a few lines of its text."""

import json
import shlex
import signal
from itertools import islice
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.tune import command
from editing.plans.plan import load_plan
from editing.study.search_scoring import Scoring
from neurons.errors import BrocaError, UsageError

DEMO = Path(__file__).parents[2] / "artifacts" / "demo"
SMALL = [
    "--trials", "3", "--prompts", "6", "--samples", "1", "--lines", "2", "--new-tokens", "12", "--device", "cpu"
]  # fmt: skip
MADE = {"study.jsonl", "tune.json", "edit.safetensors", "front.png", "front.svg"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A few lines of four languages."""
    folder = tmp_path_factory.mktemp("text")
    for language in ("en", "fr", "de", "es"):
        with (DEMO / "corpus" / f"{language}.txt").open(encoding="utf-8") as lines:
            (folder / f"{language}.txt").write_text("".join(islice(lines, 48)), encoding="utf-8")
    return folder


def tune(text, out, *more, options=SMALL):
    words = [DEMO / "model", "--corpus", text, "--source", "en", "--target", "fr", "--out", out]
    return CliRunner().invoke(command, [*map(str, words), *options, *more])


@pytest.fixture(scope="module")
def tuned(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "tuned"
    return out, tune(text, out, "--json")


def test_what_it_leaves(tuned):
    out, result = tuned
    assert result.exception is None, result.output
    assert {path.name for path in out.iterdir()} == MADE
    value = json.loads((out / "tune.json").read_text(encoding="utf-8"))
    assert json.loads(result.stdout) == {"out": str(out), **value}
    assert len(value["trials"]) == 3
    assert value["finished"] is True
    assert value["read"]["en"]["tokens"] > 0
    assert value["identity"]["corpus"].keys() == {"estimate", "choose", "report"}
    assert len(set(value["identity"]["corpus"].values())) == 3
    assert {"optuna", "torch", "broca"} <= set(value["packages"])
    assert set(value["front"]) <= {0, 1, 2}
    base, edited = value["report"]["outcomes"]
    assert (base["name"], edited["name"]) == ("base", "tuned edit")
    assert base["target_share"] < 0.5 < edited["target_share"]
    assert value["report"]["continuations"] == 12
    plan = load_plan(out / "edit.safetensors")
    chosen = value["trials"][value["chosen"]]
    assert plan.metadata["fingerprint"] == value["identity"]["model"]
    assert plan.metadata["settings"]["strength"] == chosen["settings"]["strength"]
    assert edited["details"]["settings"]["strength"] == chosen["settings"]["strength"]
    # The report uses other text than the search.
    prompts = {sample["prompt"] for sample in edited["samples"]}
    lines = (DEMO / "corpus" / "en.txt").read_text(encoding="utf-8").splitlines()
    numbers = {i % 4 for prompt in prompts for i, line in enumerate(lines) if line.startswith(prompt)}
    assert len(numbers) == 1


def test_the_command_that_it_names_goes_on_where_it_stopped(tuned, monkeypatch):
    out, _ = tuned
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(Scoring, "few", lambda *_: pytest.fail("a trial was repeated"))
    words = shlex.split(json.loads(before["tune.json"])["command"])
    assert words[:2] == ["broca", "tune"]
    result = CliRunner().invoke(command, words[2:])
    assert result.exception is None, result.output
    for name in MADE - {"study.jsonl"}:
        assert (out / name).read_bytes() == before[name], name
    assert "front of 3 edits" in result.output


def test_without_sampling_every_answer_is_counted_once(text, tmp_path):
    """The 6 prompts of SMALL are counted once: by samples, by the seeds of the confirmation and in the report."""
    words = [word for word in SMALL if word not in ("--samples", "1")]
    result = tune(text, tmp_path / "out", "--temperature", "0", options=words)
    assert result.exception is None, result.output
    value = json.loads((tmp_path / "out" / "tune.json").read_text(encoding="utf-8"))
    assert value["identity"]["samples"] == 1 and " --samples 1 " in value["command"]
    assert {trial["continuations"] for trial in value["trials"]} == {6}
    assert value["report"]["continuations"] == 6


def test_a_dry_run_foresees_its_stages_and_does_nothing(text, tmp_path):
    stages = {}
    for methods in ("keyed,steer2edit", "steer2edit", "language-arithmetic"):
        result = tune(text, tmp_path / "none", "--methods", methods, "--dry-run", "--json")
        assert result.exception is None, result.output
        stages[methods] = json.loads(result.stdout)["stages"]
    assert {methods: set(of_methods) for methods, of_methods in stages.items()} == {
        "keyed,steer2edit": {"direction", "key", "learn", "evaluate"},
        "steer2edit": {"direction", "evaluate"},
        "language-arithmetic": {"direction", "key", "evaluate"},
    }  # fmt: skip
    # Keys over heads too, beside those over neurons.
    both, neurons = (
        stages[methods]["key"]["parts"] for methods in ("keyed,steer2edit", "language-arithmetic")
    )
    assert both["covariances"] > neurons["covariances"]
    assert not (tmp_path / "none").exists()


def test_what_a_method_refuses_is_said(text, tmp_path, monkeypatch):
    def refuse(*_):
        raise UsageError("no keys in this model")

    monkeypatch.setattr("editing.methods.keyed_search.KeyedSearch.prepare", refuse)
    result = tune(text, tmp_path / "out", "--methods", "keyed,steer2edit")
    assert result.exception is None, result.output
    assert result.output.count("refused: no keys in this model") == 1
    trials = json.loads((tmp_path / "out" / "tune.json").read_text(encoding="utf-8"))["trials"]
    assert {trial["method"] for trial in trials if trial["state"] == "refused"} == {"keyed"}


@pytest.mark.parametrize("option", ["seed", "tokens"])
def test_refuses_another_search_in_the_same_directory(tuned, text, option):
    out, _ = tuned
    error = tune(text, out, f"--{option}", "700").exception
    assert isinstance(error, BrocaError)
    assert option in str(error)


@pytest.mark.parametrize("changed", ["packages", "model files"])
def test_refuses_to_go_on_after_an_update(tuned, text, monkeypatch, changed):
    if changed == "packages":
        monkeypatch.setattr("editing.study.provenance.MEASURING", ())
    else:
        monkeypatch.setattr("neurons.models.source.ModelSource.files_digest", "another")
    with pytest.raises(BrocaError, match=f"an earlier search with another {changed}:"):
        raise tune(text, tuned[0]).exception


def test_ctrl_c_keeps_the_front_and_says_that_it_was_stopped(text, tmp_path, monkeypatch):
    harm = Scoring.harm
    calls = []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return harm(self)

    monkeypatch.setattr(Scoring, "harm", interrupted)
    result = tune(text, tmp_path / "out")
    assert result.exit_code == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == MADE
    value = json.loads((tmp_path / "out" / "tune.json").read_text(encoding="utf-8"))
    assert (value["finished"], value["report"], len(value["trials"])) == (False, None, 1)


def test_refusals(text, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    error = tune(text, tmp_path).exception
    assert isinstance(error, BrocaError)
    assert str(tmp_path) in str(error)
    for words, value in (
        (["--methods", "magic"], "'magic'"),
        (["--languages", "en,fr"], "no language beside"),
        (["--target", "en"], "'en'"),
        (["--target", "it"], "'it'"),
        (["--samples", "3", "--temperature", "0"], "3 samples"),
    ):
        error = tune(text, tmp_path / "new", *words).exception
        assert isinstance(error, UsageError)
        assert value in str(error)
        assert not (tmp_path / "new").exists()
