"""``--tokens``: the amount of text per language, its table and its warnings."""

import json

import models
import pytest

from neurons.files.artifact import load_artifact


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return models.write_corpus(tmp_path_factory.mktemp("large"), lines=400)


def test_what_was_read_is_in_the_table_the_json_and_the_file(broca, checkpoint_of, large, tmp_path):
    out = tmp_path / "d.safetensors"
    command = ["direction", checkpoint_of(), "--corpus", large, "--source", "qaa", "--target", "qab"]
    status, printed, errors = broca(*command, "--tokens", 900, "--out", out)
    assert status == 0 and "few tokens" not in errors
    read = load_artifact(out, "direction").metadata["read"]
    assert set(read) == {"qaa", "qab"}
    for counts in read.values():
        assert 900 <= counts["tokens"] < 900 + 128 and counts["of"] == 400
        assert counts["cut"] == pytest.approx(1 - counts["texts"] / 400)
    assert f"{read['qaa']['tokens']:,}" in printed


def test_few_tokens_are_warned_of(broca, checkpoint_of, large, tmp_path):
    command = ["identify", checkpoint_of(), "--corpus", large, "--method", "gradient"]
    _, _, errors = broca(*command, "--tokens", 200, "--out", tmp_path / "n.safetensors")
    assert "few tokens" in errors and "qaa" in errors
    _, _, errors = broca(*command, "--tokens", 2000, "--out", tmp_path / "n.safetensors")
    assert "few tokens" not in errors


def test_a_plan_is_made_of_the_tokens_that_are_asked_for(broca, checkpoint_of, large, tmp_path):
    direction, out = tmp_path / "d.safetensors", tmp_path / "e.safetensors"
    text = ["--corpus", large]
    broca("direction", checkpoint_of(), *text, "--source", "qaa", "--target", "qab", "--out", direction)
    plan = ["edit", checkpoint_of(), *text, "--direction", direction, "--out", out]
    assert broca(*plan, "--tokens", 1200)[0] == 0
    read = load_artifact(out, "edit").metadata["read"]
    assert all(1200 <= counts["tokens"] < 1400 for counts in read.values())


def test_gradients_read_shorter_blocks(broca, tmp_path):
    model = models.build_checkpoint(tmp_path / "model", max_position_embeddings=2048)
    corpus = models.write_corpus(tmp_path / "corpus", lines=400)
    for method, block in (("lape", 2048), ("gradient", 512)):
        out = tmp_path / f"{method}.safetensors"
        status, printed, _ = broca(
            "record", model, "--corpus", corpus, "--for", method, "--json", "--out", out
        )
        assert status == 0
        assert json.loads(printed)["settings"]["block"] == block
