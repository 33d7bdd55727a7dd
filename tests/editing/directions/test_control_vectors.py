"""Directions as control vectors of llama.cpp."""

import json
import sys

import gguf
import pytest
import torch

from cli.main import main
from editing.directions.control_vectors import write_control_vectors
from editing.directions.direction import Direction
from editing.directions.vectors import read_vectors
from neurons.errors import BrocaError, UsageError
from neurons.models.source import open_model


def direction_of(vectors, site="block_out"):
    return Direction("en", "fr", {site: vectors}, {}, {"model": "tiny"})


@pytest.fixture
def direction():
    """Four layers, of which the third has no vector."""
    vectors = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors[2] = 0
    return direction_of(vectors)


def test_a_file_has_what_llama_cpp_reads(direction, tmp_path):
    path = tmp_path / "vectors.gguf"
    assert write_control_vectors(direction, path) == [1, 3]
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {"direction.1", "direction.3"}  # llama.cpp refuses layer 0
    for layer in (1, 3):
        tensor = tensors[f"direction.{layer}"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and list(tensor.shape) == [64]
        assert torch.equal(torch.tensor(tensor.data), direction.vectors["block_out"][layer].float())


def test_what_is_written_is_read_back(checkpoint_of, tmp_path):
    source = open_model(str(checkpoint_of()))  # 3 layers, residual 64
    vectors = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    write_control_vectors(direction_of(vectors), tmp_path / "vectors.gguf")
    found = read_vectors(tmp_path / "vectors.gguf", source)
    assert list(found) == [1, 2]
    assert all(torch.equal(found[layer], vectors[layer].float().double()) for layer in found)


def test_the_same_direction_gives_the_same_bytes(direction, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write_control_vectors(direction, tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_unusable_directions_and_names_are_refused(direction, tmp_path):
    with pytest.raises(UsageError, match="bin"):
        write_control_vectors(direction, tmp_path / "vectors.bin")
    with pytest.raises(UsageError, match="attn_out"):
        write_control_vectors(direction_of(torch.ones(4, 64), "attn_out"), tmp_path / "vectors.gguf")
    first_only = torch.zeros(4, 64)
    first_only[0] = 1
    with pytest.raises(BrocaError, match="0 in every layer"):
        write_control_vectors(direction_of(first_only), tmp_path / "vectors.gguf")
    assert not list(tmp_path.iterdir())


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["broca", "direction", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_command(direction, tmp_path, monkeypatch, capsys):
    direction.save(tmp_path / "direction.safetensors")
    out = tmp_path / "vectors.gguf"
    given = ["--convert", tmp_path / "direction.safetensors"]
    assert run(monkeypatch, *given, "--out", out, "--json") in (0, None)
    assert json.loads(capsys.readouterr().out)["layers"] == [1, 3] and out.is_file()
    assert run(monkeypatch, *given) == 2 and "--out" in capsys.readouterr().err
    assert run(monkeypatch, "model", *given, "--out", out) == 2 and "MODEL" in capsys.readouterr().err


def test_a_direction_is_not_estimated_into_a_gguf(tmp_path, monkeypatch, capsys):
    estimate = ["model", "--corpus", tmp_path, "--source", "en", "--target", "fr"]
    assert run(monkeypatch, *estimate, "--out", tmp_path / "direction.gguf") == 2
    assert "--convert" in capsys.readouterr().err


def test_a_vector_for_vllm_hook_acts_as_the_direction(direction, tmp_path, monkeypatch, capsys):
    direction.save(tmp_path / "direction.safetensors")
    out = tmp_path / "vector.pt"
    given = ["--convert", tmp_path / "direction.safetensors", "--out", out]
    assert run(monkeypatch, *given, "--layer", "3", "--json") in (0, None)
    config = json.loads((tmp_path / "vector.json").read_text())["steering"]
    assert json.loads(capsys.readouterr().out)["config"] == str(tmp_path / "vector.json")
    # What its worker does with the output of layer ``optimal_layer``.
    vector = torch.load(config["vector_path"], weights_only=True)["dir"]
    assert (config["method"], config["optimal_layer"], config["apply_at_all_positions"]) == (
        "add_vector",
        3,
        True,
    )
    hidden = torch.randn(2, 5, 64)
    shifted = hidden + config["coefficient"] * vector.view(1, -1)
    torch.testing.assert_close(shifted, (hidden.double() + direction.vectors["block_out"][3]).float())
    again = out.read_bytes()
    assert run(monkeypatch, *given, "--layer", "3") in (0, None) and out.read_bytes() == again
    for layer in ("2", "4"):  # without a vector, and beyond the model
        assert run(monkeypatch, *given, "--layer", layer) == 2 and layer in capsys.readouterr().err
    assert run(monkeypatch, *given) == 2 and "--layer" in capsys.readouterr().err
