"""``broca evaluate`` with questions, relevance, side effects and methods."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import commands
import models
import pytest

from cli.evaluate import command
from editing.directions.diffmean import diffmean_direction
from editing.evaluation.generation import generate
from editing.evaluation.relevance import JUDGE_PROMPT
from editing.methods.directional_ablation import directional_ablation_plan
from editing.study.results import load_reports
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
        text = ["--corpus", known_text, "--source", "en", "--target", "fr"]
        result = commands.run(command, llama.name, *text, "--new-tokens", 6, "--out", out, *arguments)
        return result.output, json.loads(out.read_text(encoding="utf-8"))

    return run


def test_the_old_form_asks_openings(evaluate):
    output, results = evaluate("--prompts", 3)
    assert results["prompts"] == {"style": "opening", "ceiling_on": "opening"}
    assert results["settings"]["temperature"] == 0.7
    assert results["questions"] is None and results["outcomes"][0]["others"] == {}
    assert "ceiling" in output


def test_questions_are_greedy_and_the_likelihood_stands_in_for_a_judge(evaluate, questions):
    output, results = evaluate("--questions", questions, "--others")
    assert results["prompts"] == {"style": "completion", "ceiling_on": "completion"}
    assert results["settings"]["temperature"] == 0
    assert results["continuations"] == 4
    assert results["relevance"] == {"scorer": "likelihood"}
    assert set(results["outcomes"][0]["others"]) == {"de", "fr"}
    assert results["outcomes"][0]["relevance"]["scorer"] == "likelihood"
    assert "relevance (likelihood)" in output and "second detector agrees" in output


def test_the_lens_of_an_edit_and_its_plot(evaluate, edit, llama, tmp_path):
    output, _ = evaluate("--prompts", 3, "--edit", edit, "--lens", "--relevance", "none")
    (report,) = load_reports(tmp_path / "report.json")
    assert report.lens.positions == 3 and set(report.lens.masses) == {"base", "edited"}
    assert set(report.lens.languages) == {"en", "fr", "de"} and all(report.lens.tokens.values())
    base, edited = report.lens.masses.values()
    assert len(base) == llama.anatomy.layers and base != edited
    assert all(0 < sum(of_layer) <= 1 for of_layer in (*base, *edited))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG") and "report.png" in output


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
    results = evaluate("--questions", questions, "--no-chat")[1]
    assert results["prompts"]["style"] == "completion"
    assert results["outcomes"] == plain["outcomes"]
    with pytest.raises(UsageError, match="--no-chat"):
        evaluate("--no-chat")


def test_a_judge_is_named(evaluate, questions, llama):
    _, results = evaluate("--questions", questions, "--judge", llama.name)
    of_judge = {"judge": llama.label, "fingerprint": llama.fingerprint, "prompt": JUDGE_PROMPT}
    assert results["relevance"] == {"scorer": "judge", **of_judge}
    assert 0 < results["outcomes"][0]["relevance"]["mean"] < 1


def test_a_dry_run_foresees_keys_and_the_judge(llama, known_text, tmp_path):
    stages = {}
    for name, more in {"plain": [], "judge": ["--judge", llama.name]}.items():
        for methods in ("keyed", "keyed-learned", "diffmean"):
            words = ["--corpus", known_text, "--source", "en", "--target", "fr", "--methods", methods, *more]
            result = commands.run(
                command, llama.name, *words, "--dry-run", "--json", "--out", tmp_path / "r.json"
            )
            stages[name, methods] = json.loads(result.output)["stages"]
    assert set(stages["plain", "diffmean"]) == {"evaluate"}
    assert set(stages["plain", "keyed"]) == {"key", "evaluate"}
    assert set(stages["plain", "keyed-learned"]) == {"key", "learn", "evaluate"}
    for methods in ("keyed", "keyed-learned", "diffmean"):
        for stage, of_stage in stages["plain", methods].items():
            judged = stages["judge", methods][stage]
            weights = judged["parts"].pop("judge")
            assert judged["parts"] == of_stage["parts"] and judged["peak"] == of_stage["peak"] + weights
            assert weights == sum(parameter.nbytes for parameter in llama.model.parameters())


def test_parallel_lines_are_references_where_all_are_long_enough(evaluate, tmp_path):
    lines = {k: [f"{k} one two three four five six seven {i}" for i in range(8)] for k in ("en", "fr", "de")}
    (tmp_path / "long").mkdir()
    for language, texts in lines.items():
        (tmp_path / "long" / f"{language}.txt").write_text("\n".join(texts), encoding="utf-8")
    noted = "note: en and fr have equally many lines"
    output, results = evaluate("--corpus", tmp_path / "long", "--prompts", 2)
    assert results["relevance"]["scorer"] == "chrf" and noted in output
    output, results = evaluate("--prompts", 30)
    assert results["relevance"]["scorer"] == "likelihood" and noted not in output
    assert evaluate("--prompts", 2, "--relevance", "none")[1]["relevance"] is None


def test_chrf_without_references_is_refused_before_any_answer(evaluate, questions, monkeypatch):
    monkeypatch.setattr("editing.evaluation.evaluation.generate", None)
    with pytest.raises(UsageError, match="2 of 2 prompts have no reference"):
        evaluate("--questions", questions, "--relevance", "chrf", "--prompts", 2)
    with pytest.raises(UsageError, match="have no reference"):
        evaluate("--questions", questions, "--relevance", "chrf", "--methods", "prompt-source")
    with pytest.raises(UsageError, match="have no reference"):
        evaluate("--relevance", "chrf")


@pytest.mark.parametrize(("part", "scorer"), [(1, "chrf"), (2, "likelihood"), (3, "likelihood")])
def test_one_scorer_for_the_text_that_is_chosen_on_and_for_that_which_is_reported(
    evaluate, tmp_path, part, scorer
):
    """One line of a part (0 and 1: estimate, 2: choose, 3: report) has only an opening."""
    (tmp_path / "text").mkdir()
    for language in ("en", "fr", "de"):
        lines = [
            f"{language} one two three four five" + ("" if i == 4 + part else f" six seven {i}")
            for i in range(12)
        ]
        (tmp_path / "text" / f"{language}.txt").write_text("\n".join(lines), encoding="utf-8")
    _, results = evaluate("--corpus", tmp_path / "text", "--methods", "prompt-source")
    assert results["relevance"]["scorer"] == scorer
    assert {outcome["relevance"]["scorer"] for outcome in results["tried"]} == {scorer}


def test_methods_are_chosen_and_reported_in_a_table(evaluate, questions, tmp_path):
    output, results = evaluate("--methods", "prompt-source,keyed", "--prompts", 2)
    names = ["base", "prompt, source language", "keyed edit"]
    assert [outcome["name"] for outcome in results["outcomes"]] == names
    assert results["corpus"]["part"] == "report"
    assert results["methods"] == ["prompt-source", "keyed"] and len(results["tried"]) == 4
    assert " --others " in results["command"]  # which are measured; --no-others would be refused
    assert all(outcome["kl"] for outcome in results["outcomes"][1:])
    assert "keyed edit" in output
    table = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| keyed edit |" in table and "ceiling" in table.splitlines()[0]
    output, dosed = evaluate("--methods", "prompt-source,keyed", "--doses", "50%")
    assert [outcome["details"]["dose"] for outcome in dosed["curves"]["keyed edit"]] == [0.5, 1.0]
    assert "| keyed edit | 0.5 |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG") and "report.png" in output
    # Two languages have no third that could be harmed.
    output, _ = evaluate("--methods", "prompt-source", "--doses", "50%", "--languages", "en,fr")
    assert "plot" not in output
    _, half = evaluate("--methods", "prompt-source", "--questions", questions)
    assert half["continuations"] == 2  # the other half is for choosing
    assert {sample["prompt"] for sample in half["outcomes"][0]["samples"]} == {"beef cab 1?", "beef cab 3?"}


@pytest.fixture(scope="module")
def plan(llama, known_text):
    direction = diffmean_direction(llama, read_corpus(known_text), "en", "fr")
    return directional_ablation_plan(llama, direction, strength=-3.0)


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for the package vllm that uses transformers and records its calls."""
    calls = SimpleNamespace(started=[], stopped=[], dtypes=[], fails=lambda: None)

    class LLM:
        def __init__(self, **settings):
            calls.started.append(settings["model"])
            calls.dtypes.append(settings["dtype"])
            self.loaded = load_model(settings["model"], "cpu", settings["dtype"])
            core = SimpleNamespace(shutdown=lambda: calls.stopped.append(settings["model"]))
            self.llm_engine = SimpleNamespace(engine_core=core)

        def generate(self, rows, settings, use_tqdm):
            if len(calls.started) == 2:
                calls.fails()
            assert all(sampling["temperature"] == 0 for sampling in settings)
            prompts = [row["prompt_token_ids"] for row in rows]
            continuations = generate(self.loaded, prompts, settings[0]["max_tokens"], temperature=0)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=item.ids)]) for item in continuations]

    stand_in = SimpleNamespace(LLM=LLM, SamplingParams=dict, __version__="9.9")
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    return calls


GREEDY = ("--prompts", 3, "--temperature", 0, "--others")


@pytest.mark.parametrize("option", ["--edit", "--against"])
def test_vllm_writes_the_answers(evaluate, vllm, llama, edit, steered, option):
    """One engine per checkpoint; the figures equal those of the same answers by transformers."""
    few = (option, edit if option == "--edit" else steered, *GREEDY)
    _, expected = evaluate(*few)
    assert vllm.started == []
    _, results = evaluate(*few, "--engine", "vllm")
    base_outcome, steered_outcome = results["outcomes"]
    assert base_outcome["samples"] != steered_outcome["samples"]
    assert results["outcomes"] == expected["outcomes"] and results["ceiling"] == expected["ceiling"]
    assert vllm.started == vllm.stopped and vllm.dtypes == ["float32"] * 2
    base, other = vllm.started
    assert base == str(llama.checkpoint)
    if option == "--against":
        assert other == str(steered)
    else:
        assert not Path(other).exists() and not Path(other).parent.exists()
    assert (expected["settings"]["engine"], results["settings"]["engine"]) == ("transformers", "vllm")
    assert "--engine vllm" in results["command"] and "--engine transformers" in expected["command"]
    assert results["packages"] == {**expected["packages"], "vllm": "9.9"}


def test_vllm_writes_for_the_base_alone(evaluate, vllm, llama):
    _, results = evaluate(*GREEDY, "--engine", "vllm")
    assert [outcome["name"] for outcome in results["outcomes"]] == ["base"]
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
    ("arguments", "value"),
    [
        (["--methods", "keyd"], "'keyd'"),
        (["--methods", "all", "--edit", __file__], "--methods"),
        (["--methods", "all", "--part", "choose"], "--part"),
        (["--methods", "all", "--out", "table.md"], "table.md"),
        (["--methods", "all", "--doses", "50%", "--out", "doses.png"], "doses.png"),
        (["--relevance", "judge"], "--judge MODEL"),
        (["--judge", "m", "--relevance", "chrf"], "--judge"),
        (["--relevance", "chrf", "--prompts", "30"], "reference"),
        (["--doses", "50%"], "--methods"),
        (["--methods", "all", "--doses", "50%,120%"], "1.2"),
        (["--methods", "all", "--engine", "vllm"], "--engine vllm"),
        (["--methods", "all", "--lens"], "--lens"),
        (["--lens", "--out", "lens.png"], "lens.png"),
        (["--samples", "2", "--temperature", "0"], "2 samples"),
    ],
)
def test_invalid_options_are_rejected(evaluate, arguments, value):
    with pytest.raises(UsageError, match=value):
        evaluate(*arguments)
