"""``broca evaluate`` with questions, relevance, side effects and all methods."""

import json

import models
import pytest
from click.testing import CliRunner

from cli.evaluate import command
from editing.relevance import JUDGE_PROMPT
from neurons.errors import UsageError


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    written = models.write_corpus(tmp_path_factory.mktemp("text"), lines=40)
    for invented, known in zip(models.LANGUAGES, ("en", "de", "fr"), strict=True):
        (written / f"{invented}.txt").rename(written / f"{known}.txt")
    return written


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
def evaluate(llama, text, tmp_path):
    def run(*arguments):
        out = tmp_path / "report.json"
        common = [
            llama.name,
            "--corpus",
            text,
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


def test_a_judge_is_named(evaluate, questions, llama):
    _, found = evaluate("--questions", questions, "--judge", llama.name)
    assert found["relevance"] == {
        "scorer": "judge",
        "judge": llama.label,
        "fingerprint": llama.fingerprint,
        "prompt": JUDGE_PROMPT,
    }
    assert 0 < found["outcomes"][0]["relevance"]["mean"] < 1


def test_parallel_lines_are_references_where_all_are_long_enough(evaluate, tmp_path, text):
    lines = {k: [f"{k} one two three four five six seven {i}" for i in range(8)] for k in ("en", "fr", "de")}
    (tmp_path / "long").mkdir()
    for language, some in lines.items():
        (tmp_path / "long" / f"{language}.txt").write_text("\n".join(some), encoding="utf-8")
    assert evaluate("--corpus", tmp_path / "long", "--prompts", 2)[1]["relevance"]["scorer"] == "chrf"
    assert evaluate("--prompts", 30)[1]["relevance"]["scorer"] == "likelihood"
    assert evaluate("--prompts", 2, "--relevance", "none")[1]["relevance"] is None


def test_methods_are_chosen_and_reported_in_a_table(evaluate, questions, tmp_path):
    output, found = evaluate("--methods", "prompt-source,keyed", "--prompts", 2)
    assert [one["name"] for one in found["outcomes"]] == ["base", "prompt, source language", "keyed edit"]
    assert found["corpus"]["part"] == "report"
    assert found["methods"] == ["prompt-source", "keyed"] and len(found["tried"]) == 4
    assert all(one["kl"] for one in found["outcomes"][1:])
    assert "keyed edit" in output
    table = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| keyed edit |" in table and "ceiling" in table.splitlines()[0]
    _, asked = evaluate("--methods", "prompt-source", "--questions", questions)
    assert asked["continuations"] == 2  # the other half was chosen on
    assert {one["prompt"] for one in asked["outcomes"][0]["samples"]} == {"beef cab 1?", "beef cab 3?"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--methods", "keyd"], "'keyd'"),
        (["--methods", "all", "--edit", __file__], "--methods makes"),
        (["--methods", "all", "--part", "choose"], "--part"),
        (["--methods", "all", "--out", "table.md"], "name a .json"),
        (["--relevance", "judge"], "--judge MODEL"),
        (["--judge", "m", "--relevance", "chrf"], "--judge judges"),
        (["--relevance", "chrf", "--prompts", "30"], "no reference"),
        (["--doses", "50%"], "--methods too"),
        (["--methods", "all", "--doses", "50%,120%"], "between 0 and 1"),
    ],
)
def test_what_is_refused(evaluate, arguments, named):
    with pytest.raises(UsageError, match=named):
        evaluate(*arguments)
