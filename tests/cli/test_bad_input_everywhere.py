"""Bad input to every command: one sentence with the offending value, the exit status, and no output.

Status 2 is for errors in the command line or a corpus: paths that do not exist or have the wrong type, outputs that
cannot be written, unknown names.  Status 1 is for the content of files from programs: damaged, of another kind, or made
for another model.
"""

import json
import os

import pytest
import torch

from editing.directions.direction import Direction
from editing.plans.plan import ModuleEdit, make_plan
from neurons.files.artifact import save_artifact
from neurons.models.source import open_model
from neurons.neuron_sets.neuron_set import neuron_set
from neurons.statistics.statistics import Statistics

D, WIDTH, LAYERS = 64, 48, 3
KINDS = ("neurons", "statistics", "direction", "edit")
LANGUAGES = ("en", "fr", "de")

# In the commands, {neurons} to {edit} are good files of that kind, BAD is the bad one.
# option -> (command with a bad file, kind of file, whether the file has the fingerprint of a model)
FILES = {
    "identify --statistics": ("identify --statistics {BAD} --method lape --out {OUT}", "statistics", False),
    "identify --like": ("identify --method random --like {BAD} --out {OUT}", "neurons", False),
    "identify --like, matched": (
        "identify --method random-matched --like {neurons} --statistics {BAD} --out {OUT}", "statistics", True),
    "edit --direction": ("edit {MODEL} --direction {BAD} --corpus {TEXT} --out {OUT}", "direction", True),
    "edit --neurons": (
        "edit {MODEL} --method scale --neurons {BAD} --languages en --factor 0 --out {OUT}", "neurons", True),
    "edit --statistics": ("edit {MODEL} --method clas --statistics {BAD} --out {OUT}", "statistics", True),
    "edit --vector": (
        "edit {MODEL} --method bake-bias --vector {BAD} --layers 1 --out {OUT}", "direction", False),
    "edit --compose": ("edit --compose {edit} {BAD} --out {OUT}", "edit", True),
    "edit --invert": ("edit {MODEL} --invert {BAD} --out {OUT}", "edit", True),
    "edit --restrict": ("edit {MODEL} --restrict {BAD} --layers 1 --out {OUT}", "edit", True),
    "edit --convert": ("edit {MODEL} --convert {BAD} --out {OUT}", "factors", False),
    "edit --restrict --neurons": (
        "edit {MODEL} --restrict {edit} --neurons {BAD} --out {OUT}", "neurons", True),
    "export --edit": ("export {MODEL} --edit {BAD} --out {OUT}", "edit", True),
    "export --format lora": ("export {MODEL} --edit {BAD} --format lora --out {OUT}", "edit", True),
    "inspect": ("inspect {BAD}", None, False),
    "compare, neuron sets": ("compare {neurons} {BAD} --plot {OUT}.png", "neurons", True),
    "compare, edits": ("compare {BAD} {edit}", "edit", False),
    "plot": ("plot {BAD} --out {OUT}.png", "neurons, statistics or edit", False),
    "merge": ("merge {statistics} {BAD} --out {OUT}", "statistics", True),
    "convert": ("convert {BAD} --out {OUT}", "neurons", False),
    "convert LANGUAGE=FILE": ("convert en={BAD} --out {OUT}", "counts", False),
    "convert --subtract": ("convert en={edit} --subtract en={BAD} --out {OUT}", None, False),
    "ablate": ("ablate {MODEL} {BAD} --corpus {TEXT} --out {OUT}", "neurons", True),
    "ablate --statistics": (
        "ablate {MODEL} {neurons} --statistics {BAD} --corpus {TEXT} --out {OUT}", "statistics", True),
    "evaluate --edit": (
        "evaluate {MODEL} --edit {BAD} --corpus {TEXT} --source en --target fr --out {OUT}", "edit", True),
    "ability --edit": ("ability {MODEL} --edit {BAD} --out {OUT}", "edit", True),
    "generate --edit": ("generate {MODEL} --edit {BAD} --prompts abe --out {OUT}", "edit", True),
}  # fmt: skip
DIRECTORIES = {
    "record --corpus": "record {MODEL} --corpus {BAD} --out {OUT}",
    "identify --corpus": "identify {MODEL} --corpus {BAD} --out {OUT}",
    "identify --prompts": "identify {MODEL} --method integrated-gradients --prompts {BAD} --out {OUT}",
    "identify --control": "identify {MODEL} --method culnig --prompts {TEXT} --control {BAD} --out {OUT}",
    "sae --corpus": "sae {MODEL} --corpus {BAD} --layers 1 --out {OUT}",
    "direction --corpus": "direction {MODEL} --corpus {BAD} --source en --target fr --out {OUT}",
    "edit --corpus": "edit {MODEL} --direction {direction} --corpus {BAD} --out {OUT}",
    "neuron --corpus": "neuron {MODEL} 1 2 --corpus {BAD}",
    "ablate --corpus": "ablate {MODEL} {neurons} --corpus {BAD} --out {OUT}",
    "evaluate --corpus": "evaluate {MODEL} --corpus {BAD} --source en --target fr --out {OUT}",
    "tune --corpus": "tune {MODEL} --corpus {BAD} --source en --target fr --out {OUT}",
    "report": "report {BAD} --out {OUT}.html",
}
MODELS = {
    "record": "record {BAD} --corpus {TEXT} --out {OUT}",
    "identify": "identify {BAD} --corpus {TEXT} --out {OUT}",
    "sae": "sae {BAD} --corpus {TEXT} --layers 1 --out {OUT}",
    "direction": "direction {BAD} --corpus {TEXT} --source en --target fr --out {OUT}",
    "edit": "edit {BAD} --direction {direction} --corpus {TEXT} --out {OUT}",
    "export": "export {BAD} --edit {edit} --out {OUT}",
    "export --undo": "export {BAD} --undo --out {OUT}",
    "export --dequantise": "export {BAD} --dequantise bf16 --out {OUT}",
    "diff, base": "diff {BAD} {MODEL} --out {OUT}",
    "diff, edited": "diff {MODEL} {BAD} --out {OUT}",
    "compare --model": "compare {edit} {edit} --model {BAD}",
    "neuron": "neuron {BAD} 1 2 --corpus {TEXT}",
    "ablate": "ablate {BAD} {neurons} --corpus {TEXT} --out {OUT}",
    "evaluate": "evaluate {BAD} --corpus {TEXT} --source en --target fr --out {OUT}",
    "evaluate --against": "evaluate {MODEL} --against {BAD} --corpus {TEXT} --source en --target fr --out {OUT}",
    "ability": "ability {BAD} --out {OUT}",
    "generate": "generate {BAD} --prompts abe --out {OUT}",
    "generate --against": "generate {MODEL} --against {BAD} --prompts abe --out {OUT}",
}
# option -> (command with a bad output, whether the output is a file or a directory)
OUTPUTS = {
    "record": ("record {MODEL} --corpus {TEXT} --out {BAD}", "file"),
    "identify": ("identify {MODEL} --corpus {TEXT} --out {BAD}", "file"),
    "direction": ("direction {MODEL} --corpus {TEXT} --source en --target fr --out {BAD}", "file"),
    "edit": ("edit {MODEL} --direction {direction} --corpus {TEXT} --out {BAD}", "file"),
    "export": ("export {MODEL} --edit {edit} --out {BAD}", "directory"),
    "diff": ("diff {MODEL} {MODEL} --out {BAD}", "file"),
    "ablate": ("ablate {MODEL} {neurons} --corpus {TEXT} --out {BAD}", "file"),
    "evaluate": ("evaluate {MODEL} --corpus {TEXT} --source en --target fr --out {BAD}", "file"),
    "ability": ("ability {MODEL} --out {BAD}", "file"),
    "tune": ("tune {MODEL} --corpus {TEXT} --source en --target fr --out {BAD}", "directory"),
    "compare": ("compare {neurons} {neurons} --plot {BAD}", "file"),
    "plot": ("plot {neurons} --out {BAD}", "file"),
    "merge": ("merge {statistics} {statistics} --out {BAD}", "file"),
    "convert": ("convert {neurons} --out {BAD}", "file"),
}
UNKNOWN = {
    "record": "record {MODEL} --corpus {TEXT} --languages en,xx --out {OUT}",
    "identify": "identify {MODEL} --corpus {TEXT} --languages en,xx --out {OUT}",
    "direction": "direction {MODEL} --corpus {TEXT} --source xx --target fr --out {OUT}",
    "direction, target": "direction {MODEL} --corpus {TEXT} --source en --target xx --out {OUT}",
    "edit": "edit {MODEL} --direction {direction} --corpus {TEXT} --languages en,xx --out {OUT}",
    "edit, of neurons": "edit {MODEL} --method scale --neurons {neurons} --languages xx --factor 0 --out {OUT}",
    "edit --restrict": "edit {MODEL} --restrict {edit} --neurons {neurons} --languages xx --out {OUT}",
    "neuron": "neuron {MODEL} 1 2 --corpus {TEXT} --languages xx",
    "ablate --languages": "ablate {MODEL} {neurons} --corpus {TEXT} --languages en,xx --out {OUT}",
    "evaluate --source": "evaluate {MODEL} --corpus {TEXT} --source xx --target fr --out {OUT}",
    "ability": "ability {MODEL} --languages en,xx --out {OUT}",
    "tune": "tune {MODEL} --corpus {TEXT} --languages en,xx --source en --target fr --out {OUT}",
}

# command -> what its error names, although no model may be loaded
TEXT = "{MODEL} --corpus {TEXT}"
PAIR = f"{TEXT} --source en --target fr"
EARLY = {
    "identify {MODEL} --method random-matched --like {neurons} --corpus {TEXT} --dry-run": "--dry-run",
    f"identify {TEXT} --top-rate 5 --out {{OUT}}": "top rate",
    f"identify {TEXT} --kinds foo --dry-run": "'foo'",
    f"identify {TEXT} --min-exclusivity 2 --out {{OUT}}": "exclusivity",
    f"identify {TEXT} --layers 99 --out {{OUT}}": "layers 0-2",
    f"identify {TEXT} --method head-shapley --layers x --out {{OUT}}": "layers 'x'",
    "identify --statistics {statistics} --method lape --part all --out {OUT}": "--part",
    "identify --statistics {statistics} --method lape --device cpu --out {OUT}": "--device",
    "identify --statistics {statistics} --method lape --dtype float16 --out {OUT}": "--dtype",
    "identify --statistics {statistics} --method lape --load-in-8bit --out {OUT}": "--load-in-8bit",
    "identify {MODEL} --method random --languages en --load-in-4bit --out {OUT}": "--load-in-4bit",
    "identify {BAD} --method random --like {neurons} --out {OUT}": "MODEL",
    "identify --method random --like {neurons} --languages fr --out {OUT}": "--languages",
    f"identify {TEXT} --load-in-8bit --dry-run": "--load-in-8bit",
    f"record {TEXT} --load-in-4bit --dry-run --out {{OUT}}": "--load-in-4bit",
    f"direction {PAIR} --load-in-4bit --dry-run --out {{OUT}}": "--load-in-4bit",
    f"direction {PAIR} --source xx --dry-run --out {{OUT}}": "'xx'",
    f"direction {PAIR} --winsorise 2 --dry-run --out {{OUT}}": "quantile is 2",
    f"direction {PAIR} --method sae --dry-run --out {{OUT}}": "--sae",
    f"direction {PAIR} --method bipo --dry-run --out {{OUT}}": "--preferences",
    f"direction {PAIR} --method probe --set penalty=0 --dry-run --out {{OUT}}": "penalty above 0, not 0",
    f"direction {PAIR} --method low-rank-shift --set bootstraps=1 --out {{OUT}}": "2 bootstraps or more, not 1",
    f"direction {PAIR} --method sae-shift --set bootstraps=1 --dry-run --out {{OUT}}": "2 bootstraps or more",
    f"direction {PAIR} --out {{OUT}}.pt": "--convert",
    "direction --convert {direction} --dry-run --out {OUT}.gguf": "--dry-run",
    "direction --convert {direction} --method pca --out {OUT}.gguf": "--method",
    "edit {MODEL} --method scale --neurons {neurons} --languages en --factor 0 --tokens 5 --out {OUT}": "--tokens",
    "edit {MODEL} --method ablate --direction {direction} --tokens 5 --out {OUT}": "--tokens",
    f"edit {TEXT} --direction {{direction}} --blocks mpl --out {{OUT}}": "mpl",
    f"edit {TEXT} --direction {{direction}} --blocks mpl --dry-run --out {{OUT}}": "mpl",
    f"edit {TEXT} --direction {{direction}} --layers 99 --dry-run --out {{OUT}}": "layers 0-2",
    "edit {MODEL} --method clas --statistics {statistics} --neurons {neurons} --out {OUT}": "--statistics and --neurons",
    f"edit {TEXT} --method austeer --languages en,fr --statistics {{statistics}} --out {{OUT}}": "--corpus and --statistics",
    "ablate {MODEL} {neurons} --corpus {TEXT} --dose-of model --out {OUT}": "--doses",
    "ablate {MODEL} {neurons} --corpus {TEXT} --way mean --mean-of xx --out {OUT}": "'xx'",
    "ablate {MODEL} {neurons} --corpus {TEXT} --statistics {statistics} --way mean --mean-of xx --out {OUT}": "'xx'",
    "generate {MODEL} --against {BAD} --compare --prompts abe --out {OUT}": "{BAD}",
    f"evaluate {PAIR} --against {{BAD}} --out {{OUT}}": "{BAD}",
    f"evaluate {PAIR} --judge {{BAD}} --out {{OUT}}": "{BAD}",
    "ability {MODEL} --against {BAD} --out {OUT}": "{BAD}",
    "chat {MODEL} --beside {BAD}": "{BAD}",
    "steer {MODEL} --to fr --judge {BAD} --out {OUT}": "{BAD}",
    f"evaluate {PAIR} --methods keyed --no-others --out {{OUT}}": "--no-others",
    f"evaluate {TEXT} --source en --target EN --dry-run --out {{OUT}}": "both 'en'",
    f"tune {PAIR} --layers abc --dry-run --out {{OUT}}": "layers 'abc'",
    f"train {TEXT} --neurons {{neurons}} --languages en --rate 0 --out {{OUT}}": "'--rate'",
    f"train {TEXT} --neurons {{neurons}} --languages en --out {{neurons}}": "--neurons",
    "convert {neurons} --out {neurons}": "FILE",
    "convert en={edit} --out {edit}": "FILE",
    "convert en={neurons} --subtract en={edit} --out {edit}": "--subtract",
    "generate {MODEL} --prompts {neurons} --out {neurons}": "--prompts",
    f"evaluate {PAIR} --classifier {{neurons}} --out {{neurons}}": "--classifier",
    f"identify {TEXT} --out {{MODEL}}/model.safetensors": "MODEL",
    f"identify {TEXT} --out {{MODEL}}/new.safetensors": "MODEL",
    "ablate {MODEL} {neurons} --corpus {TEXT} --doses 50% --picture {OUT}.png --dose-picture {OUT}.png": "--picture",
}


@pytest.fixture(scope="module")
def model(checkpoint_of):
    return checkpoint_of()


def write_kinds(directory, fingerprint):
    """Write a small file of every kind with the shapes of the tiny llama."""
    about = {"model": "tiny", "fingerprint": fingerprint, "method": "m", "settings": {}}
    rows = torch.tensor([[0, 1], [1, 2]])
    members = dict.fromkeys(LANGUAGES, rows)
    neuron_set(members, {k: torch.ones(2) for k in members}, LAYERS, WIDTH, about).save(
        directory / "neurons.safetensors"
    )
    count = torch.full((3,), 50)
    moments = {
        "mlp_act:positive": torch.arange(LAYERS * WIDTH * 3).reshape(LAYERS, WIDTH, 3) % 51,
        "mlp_in:absolute": torch.ones(LAYERS, WIDTH, 3, dtype=torch.float64),
        "mlp_in:text_mean": torch.ones(LAYERS, WIDTH, 3, dtype=torch.float64),
    }
    Statistics(LANGUAGES, count, count // 5, moments, fingerprint, metadata={"model": "tiny"}).save(
        directory / "statistics.safetensors"
    )
    sites = {
        site: torch.ones(LAYERS, D, dtype=torch.float64) for site in ("attn_out", "mlp_out", "block_out")
    }
    Direction("en", "fr", sites, {}, about).save(directory / "direction.safetensors")
    scale = torch.ones(WIDTH)
    scale[3] = 0.5
    make_plan([ModuleEdit(1, "mlp", (3,), column_scale=scale)], about).save(directory / "edit.safetensors")


@pytest.fixture(scope="module")
def good(tmp_path_factory, model):
    directory = tmp_path_factory.mktemp("good")
    write_kinds(directory, open_model(str(model)).fingerprint)
    return directory


@pytest.fixture(scope="module")
def bad(tmp_path_factory, good):
    """A directory of bad files, by name."""
    directory = tmp_path_factory.mktemp("bad")
    (directory / "empty.safetensors").write_bytes(b"")
    (directory / "text.safetensors").write_text("Once upon a time.\n" * 20)
    for kind in KINDS:
        content = (good / f"{kind}.safetensors").read_bytes()
        (directory / f"truncated {kind}.safetensors").write_bytes(content[: len(content) - 200])
        (directory / f"no header {kind}.safetensors").write_bytes(content[:5])
    (directory / "study.json").write_text(json.dumps({"sets": [], "matrix": [[0.0]]}))
    (directory / "folder").mkdir()
    (directory / "other").mkdir()
    write_kinds(directory / "other", "0123456789abcdef")
    save_artifact(directory / "unfinished.safetensors", "unfinished", {"x": torch.zeros(1)}, {})
    return directory


@pytest.fixture
def refused(broca, model, good, known_text, tmp_path):
    """Run a command that must fail with one sentence and no output; return the sentence."""

    def run(command, bad, expected_status, value=None):
        names = {"MODEL": model, "TEXT": known_text, "BAD": bad, "OUT": tmp_path / "results" / "out"}
        names |= {kind: good / f"{kind}.safetensors" for kind in KINDS}
        words = [word.format(**names) for word in command.split()]
        before = everything(tmp_path, good, model)
        status, out, err = broca(*words)
        lines = err.splitlines()
        assert "Traceback" not in err and "unexpected" not in err, err
        assert len(lines) == 1 and lines[0].startswith("broca: "), err
        assert status == expected_status, err
        assert str(bad if value is None else value) in err
        assert out == ""
        assert everything(tmp_path, good, model) == before
        return err

    return run


def everything(*directories):
    paths = [path for directory in directories for path in directory.rglob("*")]
    return {path: path.is_file() and path.read_bytes() for path in paths}


@pytest.mark.parametrize("fault", ["missing", "a directory"])
@pytest.mark.parametrize("option", FILES)
def test_a_path_that_is_no_file(refused, bad, option, fault):
    if (option, fault) == ("inspect", "a directory"):
        pytest.skip("a checkpoint's directory is shown")
    command, _, _ = FILES[option]
    refused(command, bad / ("none.safetensors" if fault == "missing" else "folder"), 2)


@pytest.mark.parametrize("fault", ["empty", "text", "truncated", "no header"])
@pytest.mark.parametrize("option", FILES)
def test_a_damaged_file(refused, bad, option, fault):
    command, kind, _ = FILES[option]
    if option == "convert --subtract":
        pytest.skip("the file before it is read first")
    if fault in ("truncated", "no header"):
        fault = f"{fault} {kind if kind in KINDS else 'neurons'}"
    refused(command, bad / f"{fault}.safetensors", 1)


@pytest.mark.parametrize("option", [option for option in FILES if FILES[option][1] is not None])
def test_a_file_of_another_kind(refused, bad, good, option):
    command, kinds, _ = FILES[option]
    others = [good / f"{kind}.safetensors" for kind in KINDS if kind not in kinds]
    for path in (*others, bad / "study.json", bad / "unfinished.safetensors"):
        if option == "edit --vector" and path.suffix != ".safetensors":
            continue  # an unsupported suffix is an error of the command line
        refused(command, path, 1)


@pytest.mark.parametrize("option", [option for option in FILES if FILES[option][2]])
def test_a_file_of_another_model(refused, bad, option):
    command, kind, _ = FILES[option]
    path = bad / "other" / f"{kind}.safetensors"
    assert "fingerprint" in refused(command, path, 1, "0123456789abcdef")


@pytest.mark.parametrize("option", DIRECTORIES)
def test_a_path_that_is_no_directory(refused, good, bad, option):
    refused(DIRECTORIES[option], bad / "none", 2)
    refused(DIRECTORIES[option], good / "edit.safetensors", 2)


@pytest.mark.parametrize("option", MODELS)
def test_a_path_that_is_no_model(refused, good, bad, option):
    refused(MODELS[option], bad / "none", 2)
    refused(MODELS[option], good / "edit.safetensors", 2)
    refused(MODELS[option], bad / "folder", 2)


@pytest.mark.parametrize("option", OUTPUTS)
def test_a_place_that_cannot_be_written_to(refused, bad, tmp_path, monkeypatch, option):
    command, kind = OUTPUTS[option]
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "folder").mkdir()
    refused(command, tmp_path / "mine" / "out.png", 2)
    refused(command, tmp_path / ("mine" if kind == "directory" else "folder"), 2)
    # Root can write everywhere, so os.access is replaced.
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK | os.X_OK and allowed(path, mode))
    refused(command, tmp_path / "new" / "out.png", 2)


@pytest.mark.parametrize("command", EARLY)
def test_what_is_refused_before_a_model_is_loaded(refused, bad, monkeypatch, command):
    def load(*_, **__):
        raise AssertionError("a model is loaded")

    for place in ("neurons.models.source", "editing.methods.material"):
        monkeypatch.setattr(f"{place}.load_model", load)
    refused(command, bad / "none", 2, EARLY[command].format(BAD=bad / "none"))


@pytest.mark.parametrize("option", UNKNOWN)
def test_an_unknown_language(refused, bad, option):
    refused(UNKNOWN[option], bad / "unused", 2, "xx")


def test_a_recipe_that_is_not_there(refused, bad):
    refused("run {BAD} --out {OUT}", bad / "none.toml", 2)


def test_a_usage_mistake_is_one_sentence_too(broca):
    for arguments, value in (
        ("edit --nonsense", "no such option '--nonsense'"),
        ("nonsense", "no such command 'nonsense'"),
        ("record m", "missing option '--corpus'"),
        ("merge", "missing argument"),
        ("edit --strength much", "'much' is not a number"),
        ("plot x y", "`broca plot --help`"),
        ("identify", "missing"),
        ("identify x --part third", "third"),
    ):
        status, out, err = broca(*arguments.split())
        assert status == 2 and out == ""
        assert err.count("\n") == 1 and err.startswith("broca: ") and value in err, err
