"""Steering vectors from other people's files: every format, its layers, and what is refused in each."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from editing.directions.direction import Direction
from editing.directions.vectors import read_vectors
from neurons.errors import BrocaError, UsageError
from neurons.models.source import open_model

GENERATOR = torch.Generator().manual_seed(3)
VECTORS = {layer: torch.randn(64, generator=GENERATOR) for layer in (1, 2)}


@pytest.fixture(scope="module")
def source(checkpoint_of):
    """3 layers, residual 64."""
    return open_model(str(checkpoint_of()))


def write_gguf(path, tensors, architecture="controlvector"):
    """As repeng writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(tensors))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same(found, expected):
    assert list(found) == sorted(expected)
    for layer, vector in expected.items():
        assert found[layer].dtype == torch.float64
        assert torch.equal(found[layer], vector.double())


def test_gguf(source, tmp_path):
    named = {f"direction.{layer}": vector.numpy() for layer, vector in reversed(VECTORS.items())}
    path = write_gguf(tmp_path / "v.gguf", {**named, "other": np.ones(3, dtype=np.float32)})
    found = read_vectors(path, source)
    assert_same(found, VECTORS)
    path.unlink()  # nothing is left mapped to the file
    assert_same(found, VECTORS)


def test_gguf_in_half_precision(source, tmp_path):
    halves = {layer: vector.half() for layer, vector in VECTORS.items()}
    path = write_gguf(tmp_path / "v.gguf", {f"direction.{k}": v.numpy() for k, v in halves.items()})
    assert_same(read_vectors(path, source), halves)


def test_gguf_of_a_model_is_refused(source, tmp_path):
    path = write_gguf(tmp_path / "v.gguf", {"direction.1": VECTORS[1].numpy()}, "llama")
    with pytest.raises(BrocaError, match="'llama'"):
        read_vectors(path, source)


def test_gguf_without_directions_is_refused(source, tmp_path):
    path = write_gguf(tmp_path / "v.gguf", {"other": np.ones(64, dtype=np.float32)})
    with pytest.raises(BrocaError, match="no vector"):
        read_vectors(path, source)


@pytest.mark.parametrize("prefix", ["direction.", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors(source, tmp_path, prefix, dtype):
    cast = {layer: vector.to(dtype) for layer, vector in VECTORS.items()}
    save_file({f"{prefix}{layer}": vector for layer, vector in cast.items()}, tmp_path / "v.safetensors")
    assert_same(read_vectors(tmp_path / "v.safetensors", source), cast)


def test_safetensors_with_other_names_are_refused(source, tmp_path):
    save_file({"model.layers.1.weight": VECTORS[1]}, tmp_path / "v.safetensors")
    with pytest.raises(BrocaError, match=r"'model\.layers\.1\.weight' names no layer"):
        read_vectors(tmp_path / "v.safetensors", source)


def test_our_own_direction(source, tmp_path):
    vectors = {"block_out": torch.randn(3, 64).double(), "mlp_out": torch.randn(3, 64).double()}
    path = tmp_path / "d.safetensors"
    Direction("en", "fr", vectors, {}, {"fingerprint": source.fingerprint}).save(path)
    assert_same(read_vectors(path, source), dict(enumerate(vectors["block_out"])))
    assert_same(read_vectors(path, source, [2], "mlp_out"), {2: vectors["mlp_out"][2]})
    with pytest.raises(UsageError, match="no vectors at attn_out: it has"):
        read_vectors(path, source, site="attn_out")
    Direction("en", "fr", vectors, {}, {"fingerprint": "another"}).save(path)
    with pytest.raises(BrocaError, match="fingerprint"):
        read_vectors(path, source)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("name", [int, str, "direction.{}".format])
def test_torch_dictionaries(source, tmp_path, suffix, name):
    path = tmp_path / f"v{suffix}"
    torch.save({name(layer): vector for layer, vector in VECTORS.items()}, path)
    assert_same(read_vectors(path, source), VECTORS)


def test_torch_files_that_run_code_are_refused(source, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(Payload(), tmp_path / "v.pt")
    with pytest.raises(BrocaError, match="without running code"):
        read_vectors(tmp_path / "v.pt", source)
    assert not (tmp_path / "ran").exists()


def test_torch_files_of_other_things_are_refused(source, tmp_path):
    torch.save({1: [1.0, 2.0]}, tmp_path / "v.pt")
    with pytest.raises(BrocaError, match="other than tensors"):
        read_vectors(tmp_path / "v.pt", source)


def test_numpy_arrays_of_objects_are_refused(source, tmp_path):
    np.save(tmp_path / "v.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BrocaError, match=r"\.npy"):
        read_vectors(tmp_path / "v.npy", source)
    np.save(tmp_path / "v.npy", np.ones(64, dtype=np.complex64))
    with pytest.raises(BrocaError, match=r"\.npy"):
        read_vectors(tmp_path / "v.npy", source, [1])


def save_array(path, array):
    if path.suffix == ".npy":
        np.save(path, array.numpy())
    else:
        torch.save(array, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_one_vector_needs_its_layer(source, tmp_path, suffix):
    path = save_array(tmp_path / f"v{suffix}", VECTORS[1])
    assert_same(read_vectors(path, source, [2]), {2: VECTORS[1]})
    for layers in (None, [1, 2]):
        with pytest.raises(UsageError, match="one vector"):
            read_vectors(path, source, layers)
    with pytest.raises(UsageError, match="layers 0-2"):
        read_vectors(path, source, [3])


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_an_array_has_a_row_a_layer(source, tmp_path, suffix):
    rows = torch.stack([torch.zeros(64), VECTORS[1], VECTORS[2]])
    path = save_array(tmp_path / f"v{suffix}", rows)
    assert_same(read_vectors(path, source), VECTORS)
    assert_same(read_vectors(path, source, [2]), {2: VECTORS[2]})
    with pytest.raises(UsageError, match="no vector for layer 0: it has layers 1, 2"):
        read_vectors(path, source, [0])


@pytest.mark.parametrize("rows", [4, 2])
def test_an_array_of_hidden_states_is_refused(source, tmp_path, rows):
    path = save_array(tmp_path / "v.npy", torch.ones(rows, 64))
    with pytest.raises(UsageError, match=rf"\[{rows}, 64\] .* model's 3 layers"):
        read_vectors(path, source)


def test_vectors_of_another_model_are_refused(source, tmp_path):
    torch.save({1: torch.ones(48)}, tmp_path / "v.pt")
    with pytest.raises(UsageError, match=r"layer 1 has shape \[48\] .* 64 dimensions: .* another model"):
        read_vectors(tmp_path / "v.pt", source)
    torch.save({1: torch.ones(64), 30: torch.ones(64)}, tmp_path / "v.pt")
    with pytest.raises(UsageError, match="layer 30 where the model has layers 0-2"):
        read_vectors(tmp_path / "v.pt", source)


def test_numbers_that_are_not_finite_are_refused(source, tmp_path):
    torch.save({1: torch.full((64,), float("nan"))}, tmp_path / "v.pt")
    with pytest.raises(BrocaError, match="finite"):
        read_vectors(tmp_path / "v.pt", source)


def test_zeros_are_refused(source, tmp_path):
    torch.save({1: torch.zeros(64)}, tmp_path / "v.pt")
    with pytest.raises(BrocaError, match="zeros"):
        read_vectors(tmp_path / "v.pt", source)


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors", ".pt", ".npy"])
def test_damaged_and_missing_files_are_refused(source, tmp_path, suffix):
    path = tmp_path / f"v{suffix}"
    with pytest.raises(BrocaError, match="no such file"):
        read_vectors(path, source)
    for content in (b"", b"nonsense", b"GGUF\x03\x00\x00\x00nonsense", b"\x80\x02."):
        path.write_bytes(content)
        with pytest.raises(BrocaError, match=r"v\."):
            read_vectors(path, source)


def test_other_suffixes_are_refused_by_name(source, tmp_path):
    with pytest.raises(UsageError, match=r"\.gguf, \.safetensors, \.pt"):
        read_vectors(tmp_path / "v.bin", source)
