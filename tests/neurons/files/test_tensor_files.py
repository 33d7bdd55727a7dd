"""Where tensors lie in a checkpoint directory, and every way in which such a directory can be broken."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file

from neurons.errors import BrocaError
from neurons.files.tensor_files import TensorEntry, read_tensor, tensor_entries, weight_files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {f"layer.{name}": torch.randn(5, 3, generator=generator).to(DTYPES[name]) for name in DTYPES}
    made["scalar"] = torch.tensor(2.5)
    made["cube"] = torch.randn(4, 2, 3, generator=generator)
    made["empty"] = torch.zeros(0, 7)
    return made


def raw(file: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(content) if length is None else length).to_bytes(8, "little") + content + data)


def sharded(folder: Path, shards: Mapping[str, dict[str, torch.Tensor]], index: str = "model") -> None:
    for file, content in shards.items():
        save_file(content, folder / file)
    weight_map = {name: file for file, content in shards.items() for name in content}
    (folder / f"{index}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_entries_are_in_name_order_and_point_at_the_bytes(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = tensor_entries(tmp_path)
    assert list(entries) == sorted(tensors())
    content = (tmp_path / "model.safetensors").read_bytes()
    for name, tensor in tensors().items():
        entry = entries[name]
        assert (entry.name, entry.shape) == (name, tuple(tensor.shape))
        assert entry.file == tmp_path / "model.safetensors"
        stored = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[entry.begin : entry.end] == stored
    assert {entries[f"layer.{name}"].dtype for name in DTYPES} == set(DTYPES)


def test_read_tensor_gives_values_and_dtype(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    for name, entry in tensor_entries(tmp_path).items():
        value = read_tensor(entry)
        assert value.dtype == tensors()[name].dtype
        assert value.shape == tensors()[name].shape
        assert torch.equal(value, tensors()[name])


@pytest.mark.parametrize("rows", [slice(1, 3), slice(0, 99), slice(3, None), slice(-2, None), slice(4, 2)])
def test_read_rows(tmp_path: Path, rows: slice) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    entries = tensor_entries(tmp_path)
    for name in ("layer.BF16", "layer.F64", "cube", "empty"):
        assert torch.equal(read_tensor(entries[name], rows), tensors()[name][rows])


def test_rows_read_only_their_own_bytes(tmp_path: Path) -> None:
    save_file({"w": torch.arange(12.0).reshape(4, 3)}, tmp_path / "model.safetensors")
    entry = tensor_entries(tmp_path)["w"]
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(entry.begin + 24)
    assert torch.equal(read_tensor(entry, slice(0, 2)), torch.arange(6.0).reshape(2, 3))
    with pytest.raises(BrocaError, match="ends inside tensor w"):
        read_tensor(entry, slice(1, 3))


def test_rows_need_a_first_dimension_and_no_step(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    entries = tensor_entries(tmp_path)
    with pytest.raises(BrocaError, match="scalar"):
        read_tensor(entries["scalar"], slice(0, 1))
    with pytest.raises(BrocaError, match="cube"):
        read_tensor(entries["cube"], slice(0, 4, 2))


def test_other_dtypes_have_an_entry_and_are_not_read(tmp_path: Path) -> None:
    save_file({"q": torch.zeros(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    entry = tensor_entries(tmp_path)["q"]
    assert (entry.dtype, entry.end - entry.begin) == ("I8", 4)
    with pytest.raises(BrocaError, match=r"tensor q .* I8"):
        read_tensor(entry)


def test_shards_of_any_name_are_found_through_the_index(tmp_path: Path) -> None:
    first, second = {"b": torch.ones(2)}, {"a": torch.zeros(3), "c": torch.ones(1)}
    sharded(tmp_path, {"weird name.bin": first, "zz-part": second}, index="weights")
    assert weight_files(tmp_path) == [tmp_path / "weird name.bin", tmp_path / "zz-part"]
    entries = tensor_entries(tmp_path)
    assert {name: entry.file.name for name, entry in entries.items()} == {
        "a": "zz-part",
        "b": "weird name.bin",
        "c": "zz-part",
    }
    assert list(entries) == ["a", "b", "c"]
    assert torch.equal(read_tensor(entries["b"]), torch.ones(2))


def test_index_decides_which_of_two_shards_holds_a_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "old.safetensors")
    save_file({"a": torch.ones(1), "unlisted": torch.ones(1)}, tmp_path / "new.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "new.safetensors"}}))
    assert list(tensor_entries(tmp_path)) == ["a"]
    assert read_tensor(tensor_entries(tmp_path)["a"]).item() == 1
    assert weight_files(tmp_path) == [tmp_path / "new.safetensors"]


def test_model_safetensors_beside_an_index_of_other_files(tmp_path: Path) -> None:
    sharded(tmp_path, {"part.safetensors": {"a": torch.zeros(1)}})
    save_file({"whole": torch.zeros(1)}, tmp_path / "model.safetensors")
    for look in (tensor_entries, weight_files):
        with pytest.raises(BrocaError, match=r"model\.safetensors\.index\.json"):
            look(tmp_path)


def test_usual_index_comes_before_another(tmp_path: Path) -> None:
    sharded(tmp_path, {"a.safetensors": {"a": torch.zeros(1)}}, index="other")
    sharded(tmp_path, {"b.safetensors": {"b": torch.zeros(1)}})
    assert list(tensor_entries(tmp_path)) == ["b"]


def test_several_unusual_indexes_are_refused(tmp_path: Path) -> None:
    sharded(tmp_path, {"a.safetensors": {"a": torch.zeros(1)}}, index="one")
    sharded(tmp_path, {"b.safetensors": {"b": torch.zeros(1)}}, index="two")
    with pytest.raises(BrocaError, match=r"one\.safetensors\.index\.json, two\.safetensors\.index\.json"):
        tensor_entries(tmp_path)


def test_a_single_file_of_another_name_is_taken(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "gpt.safetensors")
    (tmp_path / "nested").mkdir()
    save_file({"b": torch.zeros(1)}, tmp_path / "nested" / "other.safetensors")
    assert tensor_entries(tmp_path)["a"].file == tmp_path / "gpt.safetensors"


def test_several_files_without_an_index_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(BrocaError, match=r"one\.safetensors, two\.safetensors"):
        weight_files(tmp_path)


def test_links_are_followed_and_not_resolved(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blobs" / "0123abcd")
    link = tmp_path / "snapshot" / "model.safetensors"
    link.symlink_to("../blobs/0123abcd")
    entry = tensor_entries(tmp_path / "snapshot")["a"]
    assert entry.file == link
    assert torch.equal(read_tensor(entry), torch.ones(2))


@pytest.mark.parametrize("name", ["model.safetensors", "gpt.safetensors"])
def test_link_to_a_blob_that_is_gone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("../blobs/gone")
    with pytest.raises(BrocaError, match=f"{name} .*link"):
        tensor_entries(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, {"one.safetensors": {"a": torch.zeros(1)}, "two.safetensors": {"b": torch.zeros(1)}})
    (tmp_path / "two.safetensors").unlink()
    for look in (tensor_entries, weight_files):
        with pytest.raises(BrocaError, match=r"two\.safetensors is missing"):
            look(tmp_path)


def test_tensor_missing_from_its_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, {"one.safetensors": {"a": torch.zeros(1), "b": torch.zeros(1)}})
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    with pytest.raises(BrocaError, match=r"tensor b is not in .*one\.safetensors"):
        tensor_entries(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "sub/x.safetensors", "/x.safetensors", "..", 3]
)
def test_index_may_not_lead_out_of_the_directory(tmp_path: Path, shard: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(BrocaError, match=r"index.* tensor a "):
        tensor_entries(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "\udc80"])
def test_damaged_index(tmp_path: Path, content: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(BrocaError, match=r"index\.json (is not valid JSON|has no weight_map)"):
        tensor_entries(tmp_path)


def test_other_formats_are_named_with_the_mend(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BrocaError, match=r"only pytorch_model\.bin: convert it to safetensors first"):
        tensor_entries(tmp_path)


def test_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(BrocaError, match="only nothing"):
        tensor_entries(tmp_path)
    for number in range(7):
        (tmp_path / f"file{number}").write_text("")
    with pytest.raises(BrocaError, match=r"file0, .*file4 and 2 more: download"):
        tensor_entries(tmp_path)
    with pytest.raises(BrocaError, match="not a directory"):
        tensor_entries(tmp_path / "absent")


@pytest.mark.parametrize("kept", [0, 5, 8, 40])
def test_download_cut_short_in_the_header(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(BrocaError, match=r"model\.safetensors .*truncated"):
        tensor_entries(tmp_path)


def test_download_cut_short_in_the_weights(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BrocaError, match=r"truncated.*tensor b"):
        tensor_entries(tmp_path)


def test_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(BrocaError, match="git lfs pull"):
        tensor_entries(tmp_path)


def test_header_longer_than_any_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write((150_000_000).to_bytes(8, "little"))
        stream.truncate(200_000_000)
    with pytest.raises(BrocaError, match="safetensors"):
        tensor_entries(tmp_path)


def described(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    "header",
    [
        described(shape=[3]),
        described(dtype="BF16"),
        described(dtype=None),
        described(shape=[-2]),
        described(shape=2),
        described(shape=[2, True]),
        described(data_offsets=[0]),
        described(data_offsets=[8, 0]),
        described(data_offsets=[0.0, 8]),
        described(data_offsets=[-8, 0]),
        described(data_offsets=[0, 8, 8]),
        described(data_offsets=[2**70, 2**70 + 8]),
        described(shape=[2**32, 2**32]),
        described(shape=[2**63]),
        described(shape=[99_999_999_999] * 100_000),
        described(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
        described(shape=[2] + [1] * 64),
        described(shape=["2"]),
        described(shape=[None]),
        described(shape=[[2]]),
        described(shape=2.0),
        described(dtype="f32"),
        described(dtype=""),
        described(dtype="F32\x1b[31m"),
        described(dtype=["F32"]),
        {"a": "F32"},
        {"a": None},
        {"a": 3},
        {"a": {}},
    ],
)
def test_header_that_contradicts_itself(tmp_path: Path, header: object) -> None:
    raw(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(BrocaError, match=r"damaged: its header describes tensor a"):
        tensor_entries(tmp_path)


@pytest.mark.parametrize("header", [b"{no json", b"\xff\xfe{}", b"[]"])
def test_header_that_is_no_object(tmp_path: Path, header: bytes) -> None:
    raw(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(BrocaError, match="header"):
        tensor_entries(tmp_path)


REPEATED = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        (REPEATED, "the name a "),
        ('{"a": {"dtype": "F32", "dtype": "F32"}}', "the name dtype "),
        ('{"a": {"shape": [NaN]}}', "NaN is not"),
        ('{"a": {"shape": [-Infinity]}}', "-Infinity is not"),
        ('{"a": {"shape": [%s]}}' % ("9" * 5000), "4300 digits"),
        ('{"a": %s}' % ("[" * 100_000 + "]" * 100_000), "too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "too deeply"),
        ('{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', r"\ud800' is not"),
        ('{"__metadata__": {"a": "\\udc00"}}', r"\udc00' is not"),
        ('{"__metadata__": {"a": 1}}', "names no tensors"),
        ('{"__metadata__": []}', "names no tensors"),
    ],
)
def test_header_that_only_python_would_read(tmp_path: Path, header: str, fault: str) -> None:
    for content in (header, header.encode("utf-16")):
        raw(
            tmp_path / "model.safetensors",
            content if isinstance(content, bytes) else content.encode(),
            bytes(8),
        )
        with pytest.raises(BrocaError, match=r"model\.safetensors has a (damaged )?header") as caught:
            tensor_entries(tmp_path)
        assert len(str(caught.value)) < 400 + len(str(tmp_path))
        assert str(caught.value).isprintable()
        if content is header:
            assert fault in str(caught.value)
        # Of two tensors with one name the library takes the last; Broca does not guess.
        if content != REPEATED:
            with pytest.raises(SafetensorError):
                deserialize((tmp_path / "model.safetensors").read_bytes())


def test_bytes_that_belong_to_no_tensor(tmp_path: Path) -> None:
    two = described() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}}
    for header, data, fault in (
        (described(data_offsets=[4, 12]), bytes(12), "4 bytes between the header and tensor a belong"),
        (two, bytes(20), "4 bytes between a and tensor b belong"),
        (described(), bytes(9), "1 bytes after a belong"),
        ({}, bytes(1), "1 bytes after the header belong"),
        (
            described() | {"b": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}},
            bytes(8),
            "a and b overlap",
        ),
    ):
        raw(tmp_path / "model.safetensors", header, data)
        with pytest.raises(SafetensorError):
            deserialize((tmp_path / "model.safetensors").read_bytes())
        with pytest.raises(BrocaError, match=fault):
            tensor_entries(tmp_path)


@pytest.mark.parametrize("name", ["a/b", "../../escaped", "/etc/x", "a\\b", "", " ", "\x00", "ü", "😀"])
def test_a_tensor_may_have_any_name_that_is_text(tmp_path: Path, name: str) -> None:
    save_file({name: torch.ones(2)}, tmp_path / "model.safetensors")
    entry = tensor_entries(tmp_path)[name]
    assert entry.file == tmp_path / "model.safetensors"
    assert torch.equal(read_tensor(entry), torch.ones(2))


def test_names_are_shown_short_and_harmless(tmp_path: Path) -> None:
    raw(tmp_path / "model.safetensors", {"\x1b[31m" + "x" * 9000: "y" * 9000}, bytes(8))
    with pytest.raises(BrocaError) as caught:
        tensor_entries(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_a_tensor_in_two_shards_of_the_index(tmp_path: Path) -> None:
    both = {"a": torch.zeros(1), "b": torch.ones(1)}
    sharded(tmp_path, {"one.safetensors": both, "two.safetensors": {"a": torch.ones(1)}})
    with pytest.raises(BrocaError, match=r"tensor a .*one\.safetensors and .*two\.safetensors"):
        tensor_entries(tmp_path)


@pytest.mark.parametrize(
    "shard", ["x" * 300, "a\0b", "\\udc80", "folder", "loop", "\n", "/dev/zero", "one.safetensors "]
)
def test_an_index_of_shards_that_are_no_files(tmp_path: Path, shard: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    text = json.dumps({"weight_map": {"a": shard}}).replace("\\\\u", "\\u")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BrocaError, match=r"missing or not a file|link|not the name|not valid text") as caught:
        tensor_entries(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"weight_map": {"a": "x", "a": "y"}}', "the name a "),
        ('{"weight_map": %s}' % ("[" * 100_000 + "]" * 100_000), "too deeply"),
        ('{"weight_map": {"a": NaN}}', "NaN is not"),
        ('{"weight_map": {"a": ["x"]}}', "not the name of a file"),
        ('{"weight_map": {"a": null}}', "not the name of a file"),
        ('{"weight_map": "x"}', "no weight_map"),
    ],
)
def test_index_that_only_python_would_read(tmp_path: Path, content: str, fault: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BrocaError, match=rf"model\.safetensors\.index\.json .*{fault}"):
        tensor_entries(tmp_path)


def test_an_index_larger_than_any_is_refused_unread(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    with index.open("wb") as stream:
        stream.truncate(2**31)
    with pytest.raises(BrocaError, match=r"index\.json .* is too large"):
        tensor_entries(tmp_path)


def test_a_tensor_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    raw(file, described(shape=[2**38], data_offsets=[0, 2**40]))
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size + 2**40)
    entry = tensor_entries(tmp_path)["a"]
    assert torch.equal(read_tensor(entry, slice(2**37, 2**37 + 3)), torch.zeros(3))

    def refuse(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(BrocaError, match=r"tensor a in .* 1099\.5 GB, which do not fit in memory"):
        read_tensor(entry)


def test_a_disk_that_fails_and_a_file_that_may_not_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4)}, file)
    entry = tensor_entries(tmp_path)["a"]

    def denied(*arguments: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    for look in (lambda: tensor_entries(tmp_path), lambda: read_tensor(entry)):
        with pytest.raises(BrocaError, match=r"model\.safetensors cannot be read \(Permission denied\)"):
            look()


def test_memory_that_is_given_is_used(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    memory = torch.full((1000,), 255, dtype=torch.uint8)
    for name, entry in tensor_entries(tmp_path).items():
        value = read_tensor(entry, into=memory)
        assert torch.equal(value, tensors()[name])
        assert value.numel() == 0 or value.data_ptr() == memory.data_ptr()
    entry = tensor_entries(tmp_path)["layer.BF16"]
    assert torch.equal(read_tensor(entry, slice(1, 3), memory), tensors()["layer.BF16"][1:3])


def test_overlapping_tensors_are_named(tmp_path: Path) -> None:
    header = described() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}
    raw(tmp_path / "model.safetensors", header, bytes(12))
    with pytest.raises(BrocaError, match="tensors a and b overlap"):
        tensor_entries(tmp_path)


def test_an_unknown_dtype_is_placed_all_the_same(tmp_path: Path) -> None:
    raw(tmp_path / "model.safetensors", described(dtype="F5_NEW"), bytes(8))
    assert tensor_entries(tmp_path)["a"].dtype == "F5_NEW"
    raw(tmp_path / "model.safetensors", described(dtype="F5_NEW", data_offsets=[0, 9]), bytes(8))
    with pytest.raises(BrocaError, match="truncated"):
        tensor_entries(tmp_path)


def test_sub_byte_dtypes_are_measured_in_bits(tmp_path: Path) -> None:
    raw(tmp_path / "model.safetensors", described(dtype="F4", shape=[16]), bytes(8))
    assert tensor_entries(tmp_path)["a"] == TensorEntry(
        "a",
        tmp_path / "model.safetensors",
        "F4",
        (16,),
        8 + len(json.dumps(described(dtype="F4", shape=[16]))),
        16 + len(json.dumps(described(dtype="F4", shape=[16]))),
    )


def test_a_shard_is_no_path_on_any_system(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "folder\\one.safetensors")
    text = json.dumps({"weight_map": {"a": "folder\\one.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BrocaError, match="not the name of a file"):
        tensor_entries(tmp_path)
