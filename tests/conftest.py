"""Checkpoints, loaded models and a corpus that all tests share; none of them may be changed."""

import json
import shutil
import sys
from weakref import WeakKeyDictionary

import models
import pytest
import torch
from conversations import CHATML

from cli.main import main
from neurons.models.source import load_model, open_model
from neurons.text.corpus import read_corpus

# The models are tiny: threads cost more than they bring, above all on a busy machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    # The file that takes longest first: at the end all other processes would wait for it.
    items.sort(key=lambda item: item.path.name != "test_demo.py")


@pytest.fixture(autouse=True)
def no_other_models(monkeypatch):
    """Models of other tests leave their memory to this one's."""
    monkeypatch.setattr("neurons.models.memory._of_models", WeakKeyDictionary())


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
def chatting(checkpoint_of):
    """A llama with a chat template, loaded."""
    loaded = load_model(str(checkpoint_of()), device="cpu")
    loaded.tokenizer.chat_template = CHATML
    return loaded


@pytest.fixture
def chat_model(checkpoint_of, tmp_path):
    """The directory of a llama with a chat template."""
    directory = shutil.copytree(checkpoint_of(), tmp_path / "model")
    (directory / "chat_template.jinja").write_text(CHATML)
    return directory


@pytest.fixture
def few_questions(tmp_path):
    """A directory of questions in en, fr and de, eight of each."""
    directory = tmp_path / "questions"
    directory.mkdir()
    for language, letters in (("en", "abc"), ("fr", "def"), ("de", "ghi")):
        rows = [{"question_id": str(i), "text": f"{letters} {letters[i % 3]} {i}?"} for i in range(8)]
        (directory / f"{language}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return directory


@pytest.fixture(scope="session")
def llama(checkpoint_of):
    """The untied float32 llama, loaded."""
    return load_model(str(checkpoint_of()), device="cpu")


@pytest.fixture(scope="session")
def corpus_directory(tmp_path_factory):
    """<language>.txt of three languages."""
    return models.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def known_text(tmp_path_factory):
    """<language>.txt of invented text under the names of languages that can be identified: en, de, fr."""
    written = models.write_corpus(tmp_path_factory.mktemp("text"), lines=40)
    for invented, known in zip(models.LANGUAGES, ("en", "de", "fr"), strict=True):
        (written / f"{invented}.txt").rename(written / f"{known}.txt")
    return written


@pytest.fixture(scope="session")
def parts(known_text):
    """part -> Corpus of three known languages."""
    return {part: read_corpus(known_text, part=part) for part in ("estimate", "choose", "report")}


@pytest.fixture(scope="module")
def material(llama, parts):
    """What methods steer from en to fr with."""
    from editing.methods.material import Material

    return Material(llama, parts["estimate"], "en", "fr")


@pytest.fixture(scope="module")
def edit(plan, tmp_path_factory):
    """A file of the plan that the module makes for the llama."""
    path = tmp_path_factory.mktemp("edit") / "edit.safetensors"
    plan.save(path)
    return path


@pytest.fixture(scope="module")
def steered(llama, plan, tmp_path_factory):
    """A checkpoint with that plan."""
    from editing.checkpoints.export import export

    path = tmp_path_factory.mktemp("steered") / "checkpoint"
    export(open_model(llama.name), plan, path)
    return path


@pytest.fixture(scope="session")
def corpus(corpus_directory):
    return read_corpus(corpus_directory)
