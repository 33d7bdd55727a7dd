"""Two real processes record what one process records."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neurons.models.source import load_model
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


def record_in_two(directory, arguments):
    """Run ``broca record`` in two processes under torch's launcher; gives what they printed."""
    script = directory / "command.py"
    script.write_text("from cli.main import main\n\nmain()\n")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, *launcher, str(script), "record", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        cwd=directory,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def one_and_two(checkpoint_of, corpus_directory, tmp_path_factory):
    """(directory, statistics of one process, statistics of two, what the two printed)."""
    directory = tmp_path_factory.mktemp("processes")
    out = directory / "two.safetensors"
    arguments = [checkpoint_of(), "--corpus", corpus_directory, "--for", METHODS, "--out", out]
    printed = record_in_two(directory, [*arguments, "--batch-tokens", BATCH, "--device", "cpu"])
    loaded = load_model(str(checkpoint_of()), device="cpu")
    moments, reads = moments_of(tuple(METHODS.split(",")))
    one = record_corpus(loaded, read_corpus(corpus_directory), moments, reads, batch_tokens=BATCH)
    return directory, one, load_statistics(out), printed


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
