"""Notes about the files of a corpus, before a model is loaded."""

import json

import models
import pytest
import torch

from editing.directions.direction import Direction
from neurons.neuron_sets.neuron_set import load_neuron_set


@pytest.fixture(scope="module")
def model(checkpoint_of):
    return checkpoint_of("llama", True, "bfloat16")


@pytest.fixture
def mixed(tmp_path):
    """English, French and German text under names of several styles, and other files."""
    directory = models.write_corpus(tmp_path / "mixed")
    for invented, name in zip(models.LANGUAGES, ("eng_Latn.dev", "fr-CA.txt", "de.TXT"), strict=True):
        (directory / f"{invented}.txt").rename(directory / name)
    for name in ("README.txt", "requirements.txt", ".DS_Store"):
        (directory / name).write_text("no text of a language\n")
    return directory


def notes(err):
    return [line for line in err.splitlines() if line.startswith("broca: note: ")]


def warnings(err):
    return [line for line in err.splitlines() if line.startswith("broca: warning: ")]


@pytest.fixture
def neurons(tmp_path, model, broca):
    path = tmp_path / "set.safetensors"
    random = ["--method", "random", "--languages", "EN,fra", "--top-rate", "0.2"]
    assert broca("identify", model, *random, "--out", path)[0] == 0
    return path


@pytest.fixture
def direction(tmp_path):
    path = tmp_path / "direction.safetensors"
    Direction("en", "fr", {"mlp_out": torch.ones(2, 32).double()}, {}, {"method": "diffmean"}).save(path)
    return path


PAIR = ("--source", "EN", "--target", "fra_Latn")
# Every command that reads a corpus -> its arguments besides MODEL and --corpus.
COMMANDS = {
    "record": (),
    "identify": (),
    "direction": PAIR,
    "sae": ("--layers", "0"),
    "tune": PAIR,
    "evaluate": PAIR,
    "neuron": ("0", "0"),
    "ablate": ("--neurons", "NEURONS"),
    "edit": ("--direction", "DIRECTION"),
}


@pytest.fixture
def reading(broca, mixed, tmp_path, neurons, direction):
    """Run a command on the corpus with a missing model: notes on the corpus come before its error."""

    def run(name, *more):
        files = {"NEURONS": neurons, "DIRECTION": direction}
        arguments = [files.get(argument, argument) for argument in COMMANDS[name]]
        out = [] if name == "neuron" else ["--out", tmp_path / "out"]
        return broca(name, "./no-such-model", *arguments, "--corpus", mixed, *more, *out)

    return run


@pytest.mark.parametrize("json_too", [(), ("--json",)], ids=["people", "json"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_reads_as_what(reading, name, json_too):
    status, out, err = reading(name, *json_too)
    assert (status, out) == (2, "") and "no-such-model" in err.splitlines()[-1]
    assert len(notes(err)) == 1 and warnings(err) == []
    for value in ("eng_Latn.dev is read as en", "fr-CA.txt is read as fr", "README.txt", "requirements.txt"):
        assert value in notes(err)[0]
    assert ".DS_Store" not in err and "de.TXT" not in err


def test_a_directory_of_many_languages_is_told_in_short(reading, mixed):
    for i, name in enumerate(
        ("spa", "ita", "por", "nld", "pol", "ces", "swe", "dan", "fin", "hun", "ron", "ell")
    ):
        (mixed / f"{name}_Latn.txt").write_text(f"text {i}\nmore {i}\n" * 4)
    (note,) = notes(reading("record")[2])
    assert note.count(" is read as ") == 10 and "4 more" in note and "README.txt" in note


def test_a_run_says_it_too(broca, mixed, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'model = "./no-such-model"\ncorpus = "{mixed}"\nsource = "EN"\ntargets = ["fra"]\n')
    status, out, err = broca("run", recipe, "--out", tmp_path / "out", "--json")
    assert (status, out, len(notes(err))) == (2, "", 1)


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_said_of_files_that_nobody_asked_for(reading, name):
    _, _, err = reading(name, "--languages", "de,en")
    assert len(notes(err)) == 1
    assert "eng_Latn.dev is read as en" in notes(err)[0]
    assert "README" not in err and "fr-CA" not in err


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"tune", "evaluate"}))
def test_a_label_is_noted_at_the_first_command(reading, mixed, name):
    (mixed / "xx.txt").write_text("some other text\nand more\n")
    (mixed / "ceb_Latn.txt").write_text("a language that is not identified\nand more\n")
    err = reading(name)[2]
    assert "ceb, xx: labels" in notes(err)[0] and warnings(err) == []
    assert "labels" not in reading(name, "--languages", "de,en")[2]


@pytest.mark.parametrize("name", ["tune", "evaluate"])
def test_what_measures_refuses_such_a_name_before_it_reads_a_model(reading, mixed, name, tmp_path):
    (mixed / "xx.txt").write_text("".join(f"some other text {i}\n" for i in range(9)))
    status, _, err = reading(name)
    assert status == 2 and "does not know xx" in err.splitlines()[-1]
    words = {label: {"keywords": [label]} for label in ("en", "fr", "de", "xx")}
    (tmp_path / "words.json").write_text(json.dumps(words))
    status, _, err = reading(name, "--classifier", tmp_path / "words.json")
    assert status == 2 and "no-such-model" in err.splitlines()[-1] and "labels" not in err


def test_languages_may_be_named_in_any_spelling(broca, model, mixed, tmp_path, neurons):
    assert load_neuron_set(neurons).languages == ("en", "fr")
    out, common = tmp_path / "out.safetensors", (model, "--corpus", mixed)
    status, printed, err = broca("direction", *common, *PAIR, "--out", out, "--json")
    assert status == 0, err
    assert (json.loads(printed)["source"], json.loads(printed)["target"]) == ("en", "fr")
    edit = ["edit", *common, "--direction", out, "--languages", "deu,eng_Latn,FR", "--out", tmp_path / "edit"]
    assert broca(*edit)[0] == 0
    scale = ["edit", model, "--method", "scale", "--neurons", neurons, "--factor", "0"]
    assert broca(*scale, "--languages", "fra", "--out", tmp_path / "scaled")[0] == 0


def test_a_command_that_is_repeated_reads_the_same_file(broca, model, mixed, tmp_path):
    """The code zh would be ambiguous."""
    for name in ("zho_Hans", "zho_Hant"):
        (mixed / f"{name}.txt").write_text("".join(f"abe bead {name} {i}\n" for i in range(60)))
    out, languages = tmp_path / "e.json", ["--languages", "eng_Latn,zho_Hant"]
    measure = ["--source", "en", "--target", "zho_Hant", "--prompts", "2", "--new-tokens", "2", "--out", out]
    status, _, err = broca("evaluate", model, "--corpus", mixed, *languages, *measure)
    assert status == 0, err
    assert "--languages eng_Latn,zho_Hant" in json.loads(out.read_text())["command"]


def test_a_recipe_may_name_them_so_too(tmp_path, mixed):
    from editing.pipeline.recipe import read_recipe

    path = tmp_path / "recipe.toml"
    path.write_text(f'model = "m"\ncorpus = "{mixed}"\nsource = "EN"\ntargets = ["fra_Latn", "deu"]\n')
    recipe = read_recipe(path)
    assert (recipe.source, recipe.targets) == ("en", ("fr", "de"))
