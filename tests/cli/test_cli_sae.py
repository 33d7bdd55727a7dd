"""``broca sae``: the same bytes again, files that `broca direction` reads, and what is refused."""

import json

import models
import pytest

from editing.directions.direction import load_direction
from editing.directions.sae_files import read_autoencoder


@pytest.fixture
def arguments(checkpoint_of, tmp_path):
    corpus = models.write_corpus(tmp_path / "text", lines=20)
    return [checkpoint_of(), "--corpus", corpus, "--features", 24, "--epochs", 2, "--states", 300]


def test_trains_what_broca_direction_reads(broca, arguments, tmp_path):
    out = tmp_path / "saes"
    status, printed, err = broca("sae", *arguments, "--layers", "0,2", "--out", out, "--json")
    assert status == 0, err
    result = json.loads(printed)
    assert {of_layer["states"] for of_layer in result["layers"].values()} == {270}
    found = read_autoencoder(out / "layer_2")
    assert (found.layer, found.features, found.unit) == (2, 24, True)
    again = tmp_path / "again"
    assert broca("sae", *arguments, "--layers", "0,2", "--out", again)[0] == 0
    assert broca("sae", *arguments, "--layers", "2", "--seed", 1, "--out", tmp_path / "other")[0] == 0
    for file in ("layer_0/sae_weights.safetensors", "layer_2/sae_weights.safetensors", "layer_2/cfg.json"):
        assert (again / file).read_bytes() == (out / file).read_bytes()
        assert (
            file == "layer_0/sae_weights.safetensors"
            or (tmp_path / "other" / file).read_bytes() != (out / file).read_bytes()
        )
    direction = tmp_path / "direction.safetensors"
    pair = (
        "--corpus",
        arguments[2],
        "--source",
        "qaa",
        "--target",
        "qab",
        "--set",
        "prompts=3",
        "--out",
        direction,
    )
    both = ("--sae", out / "layer_0", "--sae", out / "layer_2")
    status, printed, err = broca(
        "direction", arguments[0], *pair, *both, "--method", "sae-shift", "--dry-run", "--json"
    )
    assert json.loads(printed)["stages"]["direction"]["parts"]["autoencoders"] == 2 * 2 * 4 * 24 * 64, err
    status, _, err = broca(
        "direction", arguments[0], *pair, *both, "--method", "sae-shift", "--set", "alphas=1,5"
    )
    assert status == 0, err
    made = load_direction(direction).metadata
    assert [sae["layer"] for sae in made["autoencoders"]] == [0, 2]
    assert made["measures"]["block_out"]["read"] == [1, 0, 1]


def test_the_memory_is_said_beforehand(broca, arguments, tmp_path):
    needs = []
    for states in (300, 1300):
        changed = [*arguments[:-1], states, "--layers", "0,2", "--out", tmp_path / "saes"]
        status, printed, err = broca("sae", *changed, "--dry-run", "--json")
        assert status == 0, err
        needs.append(json.loads(printed)["stages"]["sae"]["parts"])
    assert needs[1]["states"] - needs[0]["states"] == 4 * 2 * 1000 * 64
    assert not (tmp_path / "saes").exists()


def test_an_old_autoencoder_is_replaced_only_where_asked(broca, arguments, tmp_path):
    arguments += ["--layers", "0,1", "--out", tmp_path]
    (tmp_path / "layer_1").mkdir()
    for files, named in ([], "--overwrite"), (["--overwrite"], "cfg.json"):
        status, _, err = broca("sae", *arguments, *files)
        assert status == 1 and named in err and not (tmp_path / "layer_0").exists(), err
    (tmp_path / "layer_1" / "cfg.json").write_text("{}")
    assert broca("sae", *arguments, "--overwrite")[0] == 0
    assert [read_autoencoder(tmp_path / f"layer_{layer}").layer for layer in (0, 1)] == [0, 1]


@pytest.mark.parametrize(
    ("changed", "status", "named"),
    [
        (["--layers", "3"], 2, "0-2"),
        (["--layers", "x"], 2, "x"),
        (["--states", "2"], 2, "states"),
        (["--states", "15"], 1, "15 states"),
        (["--rate", "0"], 2, "rate"),
        (["--rate", "1"], 1, "lower --rate"),
        (["--features", "0"], 2, "features"),
    ],
)
def test_refuses_what_it_cannot_train(broca, arguments, tmp_path, changed, status, named):
    out = tmp_path / "saes"
    found, _, err = broca("sae", *arguments, "--layers", "1", *changed, "--out", out)
    assert found == status and named in err and err.count("\n") == 1, err
    assert not out.exists()
