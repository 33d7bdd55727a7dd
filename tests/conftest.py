"""Checkpoints, loaded models and a corpus that all tests share; none of them may be changed."""

import sys

import models
import pytest
import torch

from cli.main import main
from neurons.corpus import read_corpus
from neurons.source import load_model

# The models are tiny: threads cost more than they bring, above all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture
def broca(monkeypatch, capsys):
    """Run ``broca ARGUMENTS`` in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["broca", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """(model_type, tied, dtype) -> a checkpoint directory, built once."""
    built = {}

    def build(model_type="llama", tied=False, dtype="float32"):
        key = (model_type, tied, dtype)
        if key not in built:
            directory = tmp_path_factory.mktemp(f"{model_type}-{'tied' if tied else 'untied'}-{dtype}")
            built[key] = models.build_checkpoint(directory, *key)
        return built[key]

    return build


@pytest.fixture(scope="session")
def llama(checkpoint_of):
    """The untied float32 llama, loaded."""
    return load_model(str(checkpoint_of()), device="cpu")


@pytest.fixture(scope="session")
def corpus_directory(tmp_path_factory):
    """<language>.txt of three languages."""
    return models.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def corpus(corpus_directory):
    return read_corpus(corpus_directory)
