"""Two real processes record what one process records, and train what one trains."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from editing.plans.plan import load_plan
from neurons.models.source import load_model, open_model
from neurons.neuron_sets.neuron_set import neuron_set
from neurons.recording.corpus_recording import record_corpus
from neurons.scorers.registry import moments_of
from neurons.statistics.statistics import load_statistics
from neurons.text.corpus import read_corpus

ROOT = Path(__file__).parents[3]
METHODS = "lape,random-matched,plnd"
BATCH = 256  # tokens: several batches a language


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def in_two(directory, *arguments):
    """Run a command in two processes under torch's launcher."""
    script = directory / "command.py"
    script.write_text("from cli.main import main\n\nmain()\n")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *launcher, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        cwd=directory,
    )


@pytest.fixture(scope="module")
def one_and_two(checkpoint_of, corpus_directory, tmp_path_factory):
    """(directory, statistics of one process, statistics of two, what the two printed)."""
    directory = tmp_path_factory.mktemp("processes")
    out = directory / "two.safetensors"
    arguments = [checkpoint_of(), "--corpus", corpus_directory, "--for", METHODS, "--out", out]
    run = in_two(directory, "record", *arguments, "--batch-tokens", BATCH, "--device", "cpu")
    assert run.returncode == 0, run.stderr
    loaded = load_model(str(checkpoint_of()), device="cpu")
    moments, reads = moments_of(tuple(METHODS.split(",")))
    one = record_corpus(loaded, read_corpus(corpus_directory), moments, reads, batch_tokens=BATCH)
    return directory, one, load_statistics(out), run.stdout


def test_two_processes_record_what_one_does(one_and_two):
    _, one, two, _ = one_and_two
    assert one.languages == two.languages
    assert torch.equal(one.tokens, two.tokens)
    assert torch.equal(one.texts, two.texts)
    assert one.fingerprint == two.fingerprint
    assert one.moments.keys() == two.moments.keys()
    assert {"mlp_act:positive", "mlp_in:worst_rank"} <= one.moments.keys()
    for name, expected in one.moments.items():
        found = two.moments[name]
        assert found.dtype == expected.dtype
        if expected.dtype == torch.int64:
            assert torch.equal(found, expected), name
        else:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert bool(expected.ne(0).any())


def test_only_the_first_process_speaks_and_nothing_is_left(one_and_two):
    directory, _, two, printed = one_and_two
    assert printed.count("statistics of") == 1
    assert two.metadata["corpora"][0]["tokens"] == dict(zip(two.languages, two.tokens.tolist(), strict=True))
    assert {path.name for path in directory.iterdir()} == {"command.py", "two.safetensors"}


def test_two_processes_train_what_one_does(broca, checkpoint_of, corpus_directory, tmp_path):
    source = open_model(str(checkpoint_of()))
    about = {"fingerprint": source.fingerprint, "method": "m", "settings": {}}
    rows = torch.tensor([[0, 3], [0, 11], [2, 0], [2, 47]])
    language = read_corpus(corpus_directory).languages[0]
    neurons = tmp_path / "neurons.safetensors"
    neuron_set({language: rows}, {language: torch.ones(4)}, 3, 48, about).save(neurons)
    arguments = ["train", source.checkpoint, "--neurons", neurons, "--languages", language]
    # An odd number of blocks: in the last step one process has none.
    arguments += ["--corpus", corpus_directory, "--block", 32, "--tokens", 224, "--rate", 0.01, "--passes", 2]
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert broca(*arguments, "--out", one)[0] == 0
    before = {path.name for path in tmp_path.iterdir()}
    run = in_two(tmp_path, *arguments, "--device", "cpu", "--out", two)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("NLL on held-out text") == 1
    assert {path.name for path in tmp_path.iterdir()} == before | {"command.py", two.name}
    plans = [load_plan(path) for path in (one, two)]
    learned, of_two = (plan.metadata.pop("learning") for plan in plans)
    for name in ("settings", "read", "languages"):
        assert plans[0].metadata[name] == plans[1].metadata[name]
    for name in ("learned_on", "held_out"):
        torch.testing.assert_close(torch.tensor(of_two[name]), torch.tensor(learned[name]), rtol=1e-6, atol=0)
    for expected, found in zip(plans[0].edits, plans[1].edits, strict=True):
        for name in ("row_deltas", "column_deltas"):
            deltas = getattr(expected, name)
            if deltas is not None:
                torch.testing.assert_close(getattr(found, name), deltas, rtol=1e-4, atol=1e-6)
                assert bool(deltas.ne(0).any())


def test_a_command_of_one_process_says_so(broca, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = broca("export", "MODEL")
    assert status == 2 and err.count("\n") == 1 and "broca export" in err and "without the launcher" in err
