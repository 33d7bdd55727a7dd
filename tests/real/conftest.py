"""SmolLM2-135M-Instruct through ``broca``: the main commands, each in a process of its own; see ``make test-real``."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from neurons.models.own_dtype import own_dtype

if "REAL" not in os.environ:  # the main suite has no such model
    collect_ignore_glob = ["test_*.py"]

ROOT = Path(__file__).parents[2]
QUESTIONS = Path(__file__).parent / "questions"
LINES = 96  # of 204 a language, to be quick
BROCA = Path(sys.executable).parent / "broca"


@dataclass(frozen=True)
class Ran:
    """``value``: what --json printed; ``errors``: stderr; ``peak``: bytes of memory; ``out``: what was made."""

    value: dict
    errors: str
    peak: int
    out: Path


@pytest.fixture(scope="session")
def model():
    return Path(os.environ["REAL"]) / "model"


@pytest.fixture(scope="session")
def work():
    """Emptied and kept: `make test-vllm` reads the export that lies there."""
    directory = Path(os.environ["REAL"]) / "made"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


@pytest.fixture(scope="session")
def text(work):
    """Three languages of the shipped corpus."""
    directory = work / "corpus"
    directory.mkdir()
    for language in ("en", "fr", "de"):
        lines = (ROOT / f"artifacts/demo/corpus/{language}.txt").read_text(encoding="utf-8").splitlines()
        (directory / f"{language}.txt").write_text("\n".join(lines[:LINES]) + "\n", encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def run(work):
    """Run ``broca COMMAND ARGUMENTS --out WORK/name --json`` as a user would; the status must be this."""

    def called(command, *arguments, name, status=0):
        line = [BROCA, command, *arguments, "--out", work / name, "--json"]
        # Files, not pipes: wait4, which tells the memory of this one process, reads nothing.
        stdout, stderr = work / f"{name}.stdout", work / f"{name}.stderr"
        with stdout.open("w") as out, stderr.open("w") as err:
            process = subprocess.Popen([*map(str, line)], stdout=out, stderr=err, cwd=ROOT)
            _, ended, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(ended)
        printed, errors = (file.read_text(encoding="utf-8") for file in (stdout, stderr))
        assert process.returncode == status, errors[-3000:]
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Ran(json.loads(printed) if printed else {}, errors, peak, work / name)

    return called


@pytest.fixture(scope="session")
def dtype(model):
    """bfloat16, or float32 on a processor that takes ten times as long for it."""
    return own_dtype(str(model), "cpu")


@pytest.fixture(scope="session")
def estimated(model, text, dtype):
    """What every command that learns from text is called with."""
    return [model, "--corpus", text, "--part", "estimate", "--dtype", dtype, "--device", "cpu"]


@pytest.fixture(scope="session")
def reported(model, text, dtype):
    """What every command that measures is called with."""
    return [model, "--corpus", text, "--part", "report", "--dtype", dtype, "--device", "cpu"]


@pytest.fixture(scope="session")
def contrast(run, estimated):
    method = ["--method", "gradient-contrast", "--block", 128]
    return run("identify", *estimated, *method, name="contrast.safetensors")


@pytest.fixture(scope="session")
def lape(run, estimated):
    return run("identify", *estimated, "--method", "lape", "--block", 128, name="lape.safetensors")


@pytest.fixture(scope="session")
def direction(run, estimated):
    pair = ["--source", "en", "--target", "fr"]
    return run("direction", *estimated, *pair, name="direction.safetensors")


@pytest.fixture(scope="session")
def edit(run, estimated, direction):
    return run("edit", *estimated, "--direction", direction.out, name="edit.safetensors")


@pytest.fixture(scope="session")
def export(run, model, edit):
    return run("export", model, "--edit", edit.out, name="steered")


@pytest.fixture(scope="session")
def ablate(run, reported, contrast, lape):
    sets = ["--neurons", contrast.out, lape.out]
    controls = ["--controls", "random", "--draws", 1]
    return run("ablate", *reported, *sets, *controls, name="ablation.json")


@pytest.fixture(scope="session")
def evaluate(run, reported, export):
    asked = ["--source", "en", "--target", "fr", "--questions", QUESTIONS, "--others", "--new-tokens", 20]
    # Greedy answers of so small a model go round in circles.
    how = ["--temperature", 0.7, "--samples", 2, "--relevance", "none"]
    return run("evaluate", *reported, "--against", export.out, *asked, *how, name="measured.json")
