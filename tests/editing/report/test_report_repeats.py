"""The commands on a study's page reproduce its results to the last bit."""

import json
import re
import shlex
from itertools import islice
from pathlib import Path

import click
import models
import pytest
import studies
from click.testing import CliRunner

from cli.command_line import command_line
from cli.main import broca
from cli.options import CommaSeparated

DEMO = Path(__file__).parents[3] / "artifacts" / "demo"
LANGUAGES = ("de", "en", "fr")
PAIR = ("--source", "en", "--target", "fr")
SHORT = ("--new-tokens", 8, "--prompts", 4)
RUN = ("measured-fr.json", "choice-fr.json", "edit-fr.safetensors", "neurons.safetensors", "report.json")


def run(*words):
    result = CliRunner().invoke(broca, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def write_texts(folder):
    """Text for the tiny model, whose invented languages have the names of known ones."""
    models.write_corpus(folder, lines=40)
    for invented, known in zip(models.LANGUAGES, LANGUAGES, strict=True):
        (folder / f"{invented}.txt").rename(folder / f"{known}.txt")
    return folder


def write_demo_texts(folder):
    """The beginnings of a few lines for the shipped model: a search needs a model that writes its target."""
    folder.mkdir()
    for language in LANGUAGES:
        with (DEMO / "corpus" / f"{language}.txt").open(encoding="utf-8") as lines:
            short = [" ".join(line.split()[:12]) + "\n" for line in islice(lines, 24)]
        (folder / f"{language}.txt").write_text("".join(short), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory whose name must be quoted in a shell and escaped in HTML."""
    folder = tmp_path_factory.mktemp("place") / "it's <here> & $there"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def model(checkpoint_of):
    return checkpoint_of()


@pytest.fixture(scope="module")
def study(place, model):
    """Results of every command that a page shows, from little text with few options."""
    texts, study = write_texts(place / "texts"), place / "study"
    questions = place / "questions.jsonl"
    rows = [
        {"question_id": str(i), "text": f"beef cab {i}?", "language": language}
        for language in ("en", "fr")
        for i in range(2)
    ]
    questions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = place / "recipe.toml"
    recipe.write_text(
        f'# A "recipe" of <few> words.\nmodel = {json.dumps(str(model))}\ncorpus = "texts"\nsource = "en"\n'
        'targets = ["fr"]\ntop_rate = 0.1\nprompts = 4\nsamples = 1\nout = "elsewhere"\n',
        encoding="utf-8",
    )
    run("run", recipe, "--out", study / "run")
    corpus = (model, "--corpus", texts)
    neurons, control = study / "run" / "neurons.safetensors", study / "control.safetensors"
    run("identify", "--method", "random", "--like", neurons, "--seed", 4, "--out", control)
    study_of = ("--neurons", neurons, "--doses", "50%,1", "--draws", 1, "--resamples", 20)
    run("ablate", *corpus, *study_of, "--part", "report", "--out", study / "ablation.json")
    fewer = ("--languages", "fr,en", "--way", "resample", "--draws", 0, "--seed", 3, "--tokens", 200)
    run("ablate", *corpus, control, *fewer, "--neurons", neurons, "--out", study / "resampled.json")
    edit = ("--edit", study / "run" / "edit-fr.safetensors")
    run("evaluate", *corpus, *PAIR, *SHORT, *edit, "--samples", 2, "--others", "--out", study / "edited.json")
    asked = ("--questions", questions, "--judge", model, "--against", model)
    run("evaluate", *corpus, *PAIR, *SHORT, *asked, "--out", study / "asked.json")
    ways = ("--methods", "prompt-source,keyed", "--seed", 5, "--temperature", 0.9)
    run("evaluate", *corpus, *PAIR, *SHORT, *ways, "--out", study / "ways.json")
    demo = (DEMO / "model", "--corpus", write_demo_texts(place / "demo"), *PAIR, *SHORT)
    run("tune", *demo, "--trials", 3, "--samples", 1, "--lines", 2, "--out", study / "tuned")
    run("report", study)
    return study


@pytest.fixture(scope="module")
def shown(study):
    return studies.Page((study / "report.html").read_text(encoding="utf-8"))


def commands(page):
    """File -> the command that stands on the page below its name."""
    found, files = {}, []
    section = next(i for i, one in enumerate(page.elements) if one["attributes"].get("id") == "again")
    for one in page.elements[section:]:
        if one["tag"] == "p":
            files = []
        elif one["tag"] == "code" and "p" in one["within"]:
            files.append(one["text"])
        elif one["tag"] == "pre":
            found |= dict.fromkeys(files, one["text"])
            files = []
    return found


def again(command, out):
    """Give the command with another --out."""
    words = shlex.split(command)
    assert words[0] == "broca" and words.count("--out") == 1
    words[words.index("--out") + 1] = str(out)
    run(*words[1:])
    return shlex.join(words)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name", ["ablation.json", "resampled.json", "edited.json", "asked.json", "ways.json", "tuned/tune.json"]
)
def test_the_pages_command_gives_the_same_figures(study, shown, tmp_path, name):
    out = tmp_path / Path(name).name
    repeated = again(commands(shown)[name], out.parent / "again" if "tune" in name else out)
    written = read(out.parent / "again" / "tune.json" if "tune" in name else out)
    assert written.pop("command") == repeated
    first = read(study / name)
    del first["command"]
    assert written == first
    if "tune" in name:
        plan = "edit.safetensors"
        assert (tmp_path / "again" / plan).read_bytes() == (study / "tuned" / plan).read_bytes()


def test_the_pages_command_runs_a_recipe_again(study, shown, tmp_path):
    named = {commands(shown)[f"run/{name}"] for name in RUN[:-1]}
    assert len(named) == 1
    repeated = again(named.pop(), tmp_path / "again")
    for name in RUN:
        first, written = study / "run" / name, tmp_path / "again" / name
        if first.suffix == ".safetensors":
            assert first.read_bytes() == written.read_bytes(), name
            continue
        values = [read(path) for path in (first, written)]
        for value, command in zip(values, (commands(shown)["run/measured-fr.json"], repeated), strict=True):
            entries = value if isinstance(value, list) else [value]
            assert [entry.pop("command") for entry in entries] == [command]
        assert values[0] == values[1], name
    recipe = (study.parent / "recipe.toml").read_text(encoding="utf-8")
    assert recipe in [one["text"] for one in shown.all("pre")]


def test_the_comparison_can_see_another_seed(study, shown, tmp_path):
    """Another seed gives other results, so the equality above is not trivial."""
    for name, figures in (("edited.json", "outcomes"), ("ablation.json", "sets")):
        words = shlex.split(commands(shown)[name])
        words[words.index("--seed") + 1] = "17"
        again(shlex.join(words), tmp_path / name)
        assert read(tmp_path / name)[figures] != read(study / name)[figures]


@pytest.mark.parametrize(
    "name",
    ["ablation.json", "edited.json", "asked.json", "ways.json", "tuned/tune.json", "run/measured-fr.json", "run/choice-fr.json"],
)  # fmt: skip
def test_every_file_says_what_it_was_made_of(study, name):
    value = read(study / name)
    assert len(value["fingerprint"]) == 16
    texts = value["corpora"] if "corpora" in value else [value["corpus"]]
    assert texts and all(len(one["digest"]) == 64 and one["part"] for one in texts)
    assert {"broca", "torch", "transformers"} <= value["packages"].keys()
    assert value["processor"] == {
        "device": "cpu",
        "threads": 1,
        "instructions": value["processor"]["instructions"],
    }
    if "ablation" not in name:
        assert value["packages"]["py3langid"] not in ("", "not installed")


def test_the_page_says_which_part_the_figures_are_of(shown):
    """Each section names the part in its first sentence, with warnings below."""
    said, section = {}, None
    for one in shown.elements:
        if one["tag"] == "h2":
            section = one["text"]
        elif one["tag"] == "p" and section in said and one["text"].startswith("Measured on"):
            said[section].append(one["text"])
        elif one["tag"] == "p" and section is not None and section not in said:
            said[section] = [" ".join(re.findall(r" of (?:the part “\w+”|all parts)", one["text"]))]
    report, everything = " of the part “report”", " of all parts"
    assert {title: found[0] for title, found in said.items() if found[0]} == {
        "Steering: en to fr (run/measured-fr.json)": report,
        "Steering: en to fr (ways.json)": report,
        "Ablation: ablation.json": report,
        "Steering: en to fr (edited.json)": everything,
        "Steering: en to fr (asked.json)": everything,
        "Ablation: resampled.json": everything,
    }
    for found in said.values():
        assert any("not a result" in one for one in found[1:]) == (found[0] == everything)


def test_defaults_that_depend_on_text_model_or_machine_are_written_out(study, model):
    command = shlex.split(read(study / "ablation.json")["command"])
    assert command[:3] == ["broca", "ablate", str(model)]
    for option, value in (
        ("--languages", "de,en,fr"),
        ("--device", "cpu"),
        ("--dtype", "float32"),
        ("--seed", "0"),
        ("--batch-tokens", str(read(study / "ablation.json")["settings"]["batch_tokens"])),
    ):
        assert command[command.index(option) + 1] == value
    asked, edited = (shlex.split(read(study / f"{name}.json")["command"]) for name in ("asked", "edited"))
    assert [words[words.index("--temperature") + 1] for words in (asked, edited)] == ["0.0", "0.7"]
    assert [words[words.index("--relevance") + 1] for words in (asked, edited)] == ["judge", "likelihood"]
    assert "--others" in edited and "--no-others" in asked


def test_files_read_beside_the_text_are_named_with_digests(study, shown):
    options = {
        name: [one["option"] for one in read(study / name)["inputs"]]
        for name in ("ablation.json", "edited.json", "asked.json", "run/measured-fr.json")
    }
    assert options == {
        "ablation.json": ["--neurons"],
        "edited.json": ["--edit"],
        "asked.json": ["--questions", "--against", "--judge"],
        "run/measured-fr.json": ["RECIPE.toml"],
    }
    text = "".join(one["text"] for one in shown.all("dd"))
    for name in options:
        assert all(one["digest"] in text for one in read(study / name)["inputs"])


def test_a_changed_corpus_and_changed_questions_are_seen(study, place, model, tmp_path):
    texts = write_texts(tmp_path / "texts")
    questions = tmp_path / "questions.jsonl"
    questions.write_bytes((place / "questions.jsonl").read_bytes())
    corpus = (model, "--corpus", texts, *PAIR, *SHORT, "--questions", questions)
    results = tmp_path / "results"
    run("evaluate", *corpus, "--out", results / "1.json")
    command = read(results / "1.json")["command"]
    with (texts / "de.txt").open("a", encoding="utf-8") as lines:
        lines.write("beef cab\n")
    again(command, results / "2.json")
    with questions.open("a", encoding="utf-8") as lines:
        lines.write('\n{"question_id": "9", "text": "Another?", "language": "en"}')
    again(command, results / "3.json")
    run("report", results)
    page = studies.Page((results / "report.html").read_text(encoding="utf-8"))
    head, *rows = page.texts("Made of what")
    assert head == ["file", "model", "text", "further files"]
    assert [row[0] for row in rows] == ["1.json", "2.json", "3.json"]
    assert len({row[1] for row in rows}) == 1
    assert rows[0][2] != rows[1][2] == rows[2][2]
    assert rows[0][3] == rows[1][3] != rows[2][3]


def test_a_file_without_a_command_is_said_to_have_none(study, tmp_path):
    value = read(study / "edited.json")
    del value["command"]
    (tmp_path / "old.json").write_text(json.dumps(value), encoding="utf-8")
    (tmp_path / "edit.safetensors").write_bytes((study / "tuned" / "edit.safetensors").read_bytes())
    run("report", tmp_path)
    page = studies.Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert any(
        one["text"].startswith("old.json, edit.safetensors name no command")
        or one["text"].startswith("edit.safetensors, old.json name no command")
        for one in page.all("p")
    )
    assert commands(page).keys() == set()


def test_a_command_line_is_read_as_what_it_was_written_from():
    seen = []

    @click.command("one")
    @click.argument("first")
    @click.argument("more", nargs=-1)
    @click.option("--list", "some", type=CommaSeparated(), default=("a", "b"))
    @click.option("--again", "many", multiple=True)
    @click.option("--yes/--no", default=True)
    @click.option("--flag", is_flag=True)
    @click.option("--number", type=float)
    @click.option("--left-out")
    @click.option("--json", "as_json", is_flag=True)
    def one(**options):
        seen.append((options, command_line()))

    for words in (
        ["x"],
        ["x", "y z", "--no", "--flag", "--again", "1", "--again", "2", "--list", "c, d", "--number", "-0.1"],
        ["--json", "--again", "--odd", "--", "-x", "--yes", "it's"],
    ):
        one.main(words, standalone_mode=False)
        options, line = seen[-1]
        written = shlex.split(line)
        assert written[:2] == ["broca", "one"] and "--left-out" not in written
        one.main(written[2:], standalone_mode=False)
        assert seen[-1][0] == {**options, "as_json": False} and seen[-1][1] == line
