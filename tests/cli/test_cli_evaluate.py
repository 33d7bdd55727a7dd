"""``broca evaluate`` with questions, relevance, side effects and all methods."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
from click.testing import CliRunner

from cli.evaluate import command
from editing.directions.diffmean import diffmean_direction
from editing.evaluation.generation import generate
from editing.evaluation.relevance import JUDGE_PROMPT
from editing.methods.directional_ablation import directional_ablation_plan
from neurons.errors import UsageError
from neurons.models.source import load_model
from neurons.text.corpus import read_corpus


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    rows = [
        {"question_id": str(i), "text": f"beef cab {i}?", "language": language}
        for language in ("en", "fr")
        for i in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def evaluate(llama, known_text, tmp_path):
    def run(*arguments):
        out = tmp_path / "report.json"
        common = [
            llama.name,
            "--corpus",
            known_text,
            "--source",
            "en",
            "--target",
            "fr",
            "--new-tokens",
            6,
            "--out",
            out,
        ]
        found = CliRunner().invoke(command, list(map(str, [*common, *arguments])))
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        assert found.exit_code == 0, found.output
        return found.output, json.loads(out.read_text(encoding="utf-8"))

    return run


def test_the_old_form_asks_openings(evaluate):
    output, found = evaluate("--prompts", 3)
    assert found["prompts"] == {"style": "opening", "ceiling_on": "opening"}
    assert found["settings"]["temperature"] == 0.7
    assert found["questions"] is None and found["outcomes"][0]["others"] == {}
    assert "ceiling" in output


def test_questions_are_greedy_and_the_likelihood_stands_in_for_a_judge(evaluate, questions):
    output, found = evaluate("--questions", questions, "--others")
    assert found["prompts"] == {"style": "completion", "ceiling_on": "completion"}
    assert found["settings"]["temperature"] == 0
    assert found["continuations"] == 4
    assert found["relevance"] == {"scorer": "likelihood"}
    assert set(found["outcomes"][0]["others"]) == {"de", "fr"}
    assert found["outcomes"][0]["relevance"]["scorer"] == "likelihood"
    assert "relevance (likelihood)" in output and "second detector agrees" in output


def test_questions_without_the_chat_template(evaluate, questions, llama, monkeypatch):
    monkeypatch.setattr(
        "neurons.models.source.load_model",
        lambda *_: replace(llama, tokenizer=models.tiny_tokenizer.__wrapped__()),
    )
    plain = evaluate("--questions", questions)[1]
    broken = models.tiny_tokenizer.__wrapped__()
    broken.chat_template = "{{ raise_exception('not this way') }}"
    monkeypatch.setattr("neurons.models.source.load_model", lambda *_: replace(llama, tokenizer=broken))
    with pytest.raises(UsageError, match=r"not this way.*--no-chat"):
        evaluate("--questions", questions)
    found = evaluate("--questions", questions, "--no-chat")[1]
    assert found["prompts"]["style"] == "completion"
    assert found["outcomes"] == plain["outcomes"]
    with pytest.raises(UsageError, match="--no-chat"):
        evaluate("--no-chat")


def test_a_judge_is_named(evaluate, questions, llama):
    _, found = evaluate("--questions", questions, "--judge", llama.name)
    assert found["relevance"] == {
        "scorer": "judge",
        "judge": llama.label,
        "fingerprint": llama.fingerprint,
        "prompt": JUDGE_PROMPT,
    }
    assert 0 < found["outcomes"][0]["relevance"]["mean"] < 1


def test_parallel_lines_are_references_where_all_are_long_enough(evaluate, tmp_path):
    lines = {k: [f"{k} one two three four five six seven {i}" for i in range(8)] for k in ("en", "fr", "de")}
    (tmp_path / "long").mkdir()
    for language, some in lines.items():
        (tmp_path / "long" / f"{language}.txt").write_text("\n".join(some), encoding="utf-8")
    assert evaluate("--corpus", tmp_path / "long", "--prompts", 2)[1]["relevance"]["scorer"] == "chrf"
    assert evaluate("--prompts", 30)[1]["relevance"]["scorer"] == "likelihood"
    assert evaluate("--prompts", 2, "--relevance", "none")[1]["relevance"] is None


@pytest.mark.parametrize(("part", "scorer"), [(1, "chrf"), (2, "likelihood"), (3, "likelihood")])
def test_one_scorer_for_the_text_that_is_chosen_on_and_for_that_which_is_reported(
    evaluate, tmp_path, part, scorer
):
    """A line of one part (0 and 1: estimate, 2: choose, 3: report) has no more than its opening."""
    (tmp_path / "text").mkdir()
    for language in ("en", "fr", "de"):
        lines = [
            f"{language} one two three four five" + ("" if i == 4 + part else f" six seven {i}")
            for i in range(12)
        ]
        (tmp_path / "text" / f"{language}.txt").write_text("\n".join(lines), encoding="utf-8")
    _, found = evaluate("--corpus", tmp_path / "text", "--methods", "prompt-source")
    assert found["relevance"]["scorer"] == scorer
    assert {one["relevance"]["scorer"] for one in found["tried"]} == {scorer}


def test_methods_are_chosen_and_reported_in_a_table(evaluate, questions, tmp_path):
    output, found = evaluate("--methods", "prompt-source,keyed", "--prompts", 2)
    assert [one["name"] for one in found["outcomes"]] == ["base", "prompt, source language", "keyed edit"]
    assert found["corpus"]["part"] == "report"
    assert found["methods"] == ["prompt-source", "keyed"] and len(found["tried"]) == 4
    assert all(one["kl"] for one in found["outcomes"][1:])
    assert "keyed edit" in output
    table = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| keyed edit |" in table and "ceiling" in table.splitlines()[0]
    output, dosed = evaluate("--methods", "prompt-source,keyed", "--doses", "50%")
    assert [one["details"]["dose"] for one in dosed["curves"]["keyed edit"]] == [0.5, 1.0]
    assert "| keyed edit | 0.5 |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG") and "report.png" in output
    _, asked = evaluate("--methods", "prompt-source", "--questions", questions)
    assert asked["continuations"] == 2  # the other half was chosen on
    assert {one["prompt"] for one in asked["outcomes"][0]["samples"]} == {"beef cab 1?", "beef cab 3?"}


@pytest.fixture(scope="module")
def plan(llama, known_text):
    direction = diffmean_direction(llama, read_corpus(known_text), "en", "fr")
    return directional_ablation_plan(llama, direction, strength=-3.0)


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for the package vllm, by transformers; it tells what ran, and fails if asked to."""
    told = SimpleNamespace(started=[], stopped=[], dtypes=[], fails=lambda: None)

    class LLM:
        def __init__(self, **settings):
            told.started.append(settings["model"])
            told.dtypes.append(settings["dtype"])
            self.loaded = load_model(settings["model"], "cpu", settings["dtype"])
            core = SimpleNamespace(shutdown=lambda: told.stopped.append(settings["model"]))
            self.llm_engine = SimpleNamespace(engine_core=core)

        def generate(self, rows, settings, use_tqdm):
            if len(told.started) == 2:
                told.fails()
            assert all(one["temperature"] == 0 for one in settings)
            asked = [row["prompt_token_ids"] for row in rows]
            found = generate(self.loaded, asked, settings[0]["max_tokens"], temperature=0)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=item.ids)]) for item in found]

    stand_in = SimpleNamespace(LLM=LLM, SamplingParams=dict, __version__="9.9")
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    return told


GREEDY = ("--prompts", 3, "--temperature", 0, "--others")


@pytest.mark.parametrize("option", ["--edit", "--against"])
def test_vllm_writes_the_answers(evaluate, vllm, llama, edit, steered, option):
    """Answers of either checkpoint, of one engine each; figures are those of its answers by transformers."""
    few = (option, edit if option == "--edit" else steered, *GREEDY)
    _, expected = evaluate(*few)
    assert vllm.started == []
    _, found = evaluate(*few, "--engine", "vllm")
    own, changed = found["outcomes"]
    assert own["samples"] != changed["samples"]
    assert found["outcomes"] == expected["outcomes"] and found["ceiling"] == expected["ceiling"]
    assert vllm.started == vllm.stopped and vllm.dtypes == ["float32"] * 2
    base, other = vllm.started
    assert base == str(llama.checkpoint)
    if option == "--against":
        assert other == str(steered)
    else:
        assert not Path(other).exists() and not Path(other).parent.exists()
    assert (expected["settings"]["engine"], found["settings"]["engine"]) == ("transformers", "vllm")
    assert "--engine vllm" in found["command"] and "--engine transformers" in expected["command"]
    assert found["packages"] == {**expected["packages"], "vllm": "9.9"}


def test_vllm_writes_for_the_base_alone(evaluate, vllm, llama):
    _, found = evaluate(*GREEDY, "--engine", "vllm")
    assert [one["name"] for one in found["outcomes"]] == ["base"]
    assert vllm.started == vllm.stopped == [str(llama.checkpoint)]


@pytest.mark.parametrize(
    ("error", "raised", "named"),
    [(OSError("no space"), OSError, "no space"), (KeyboardInterrupt(), AssertionError, "Aborted")],
)
def test_nothing_is_left_of_vllm_where_it_is_stopped(evaluate, vllm, edit, tmp_path, error, raised, named):
    def fails():
        raise error

    vllm.fails = fails
    with pytest.raises(raised, match=named):
        evaluate("--edit", edit, *GREEDY, "--engine", "vllm")
    assert len(vllm.started) == 2 and vllm.stopped == vllm.started
    assert not Path(vllm.started[1]).parent.exists()
    assert not (tmp_path / "report.json").exists()


def test_vllm_that_is_not_installed_is_one_sentence(evaluate, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match="pip install vllm"):
        evaluate("--engine", "vllm")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--methods", "keyd"], "'keyd'"),
        (["--methods", "all", "--edit", __file__], "--methods makes"),
        (["--methods", "all", "--part", "choose"], "--part"),
        (["--methods", "all", "--out", "table.md"], "name a .json"),
        (["--methods", "all", "--doses", "50%", "--out", "doses.png"], "name a .json"),
        (["--relevance", "judge"], "--judge MODEL"),
        (["--judge", "m", "--relevance", "chrf"], "--judge judges"),
        (["--relevance", "chrf", "--prompts", "30"], "no reference"),
        (["--doses", "50%"], "--methods too"),
        (["--methods", "all", "--doses", "50%,120%"], "between 0 and 1"),
        (["--methods", "all", "--engine", "vllm"], "hooks"),
        (["--samples", "2", "--temperature", "0"], "2 samples"),
    ],
)
def test_what_is_refused(evaluate, arguments, named):
    with pytest.raises(UsageError, match=named):
        evaluate(*arguments)
