"""Checkpoints copied with some tensors replaced: the bytes, the rounding, and every way to fail."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from editing.checkpoints import checkpoint, staging
from editing.checkpoints.checkpoint import write_checkpoint
from editing.checkpoints.staging import check_target
from neurons.errors import BrocaError
from neurons.files.tensor_files import read_tensor, tensor_entries, weight_files

OTHER_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"a": 1}\r\n',
    "chat_template.jinja": b"{{ x }}",
    "README.md": b"old card",
    "onnx/deep/model.bin": bytes(range(256)),
}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "down": torch.randn(9, 4, generator=generator).to(dtype),
        "experts": torch.randn(3, 4, 5, generator=generator).to(dtype),
        "norm": torch.randn(6, generator=generator).to(dtype),
        "up": torch.randn(4, 9, generator=generator).to(dtype),
    }


def make(folder: Path, dtype: torch.dtype = torch.float32, shards: bool = False) -> Path:
    folder.mkdir(parents=True)
    for name, content in OTHER_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "empty directory").mkdir()
    if shards:
        parts = {"odd name.safetensors": ["down", "norm"], "part-b.safetensors": ["experts", "up"]}
        for file, names in parts.items():
            save_file({name: weights(dtype)[name] for name in names}, folder / file)
        weight_map = {name: file for file, names in parts.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(weights(dtype), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def snapshot(folder: Path) -> dict[str, Any]:
    """Every path below a folder with its bytes, mode and time of change."""
    return {
        str(path.relative_to(folder)): (
            path.is_symlink(),
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(folder.rglob("*"))
    }


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(entry) for name, entry in tensor_entries(folder).items()}


def halved(block: torch.Tensor, first: int) -> torch.Tensor:
    return block.float() / 2


def fails(block: torch.Tensor, first: int) -> torch.Tensor:
    raise AssertionError("nothing may be computed before the refusals")


def test_only_the_named_tensors_bytes_differ(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source", torch.bfloat16), tmp_path / "target"
    before = snapshot(source)
    write_checkpoint(source, target, {"down": halved, "norm": halved}, {})
    assert snapshot(source) == before
    assert {str(path.relative_to(target)) for path in target.rglob("*")} == set(before)
    for name in OTHER_FILES:
        assert (target / name).read_bytes() == OTHER_FILES[name]
    old, new = (bytearray((folder / "model.safetensors").read_bytes()) for folder in (source, target))
    assert old != new
    for name in ("down", "norm"):
        entry = tensor_entries(source)[name]
        assert old[entry.begin : entry.end] != new[entry.begin : entry.end]
        del_range = slice(entry.begin, entry.end)
        old[del_range] = new[del_range] = bytes(entry.end - entry.begin)
    assert old == new
    loaded = load_file(target / "model.safetensors")
    for name, value in weights(torch.bfloat16).items():
        expected = (value.float() / 2).bfloat16() if name in ("down", "norm") else value
        assert torch.equal(loaded[name], expected)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_without_replacements_the_copy_is_equal(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source"), tmp_path / "new" / "parents" / "target"
    write_checkpoint(source, target, {}, {})
    assert {name: item[3] for name, item in snapshot(source).items()} == {
        name: item[3] for name, item in snapshot(target).items()
    }


def test_shards_of_odd_names(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source", shards=True), tmp_path / "target"
    write_checkpoint(source, target, {"up": halved}, {})
    assert [file.name for file in weight_files(target)] == ["odd name.safetensors", "part-b.safetensors"]
    assert (target / "odd name.safetensors").read_bytes() == (source / "odd name.safetensors").read_bytes()
    for name, value in values(target).items():
        assert torch.equal(value, weights()[name] / 2 if name == "up" else weights()[name])
    index = "model.safetensors.index.json"
    assert (target / index).read_bytes() == (source / index).read_bytes()


def test_hub_cache_of_links_to_read_only_blobs(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", shards=True)
    blobs, source = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    for number, file in enumerate(path for path in sorted(plain.rglob("*")) if path.is_file()):
        shutil.copyfile(file, blobs / str(number))
        (blobs / str(number)).chmod(0o444)
        link = source / file.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    before = snapshot(tmp_path / "hub")
    write_checkpoint(source, tmp_path / "target", {"down": halved, "up": halved}, {})
    assert snapshot(tmp_path / "hub") == before
    inodes = {path.stat().st_ino for path in blobs.iterdir()}
    for path in (tmp_path / "target").rglob("*"):
        assert not path.is_symlink()
        if path.is_file():
            assert path.stat().st_mode & 0o200
            assert path.stat().st_nlink == 1
            assert path.stat().st_ino not in inodes
    assert torch.equal(values(tmp_path / "target")["down"], weights()["down"] / 2)


def test_linked_directories_are_copied_and_caches_left_out(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "vocab.txt").write_text("word")
    (source / "assets").symlink_to(tmp_path / "elsewhere")
    for name in (".git", ".cache"):
        (source / name).mkdir()
        (source / name / "big").write_text("x")
    (source / ".gitattributes").write_text("kept")
    write_checkpoint(source, tmp_path / "target", {}, {})
    target = tmp_path / "target"
    assert (target / "assets" / "vocab.txt").read_text() == "word"
    assert not (target / "assets").is_symlink()
    assert not (target / ".git").exists()
    assert not (target / ".cache").exists()
    assert (target / ".gitattributes").read_text() == "kept"


def test_permissions_are_the_usual_ones(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "file").write_text("")
    write_checkpoint(make(tmp_path / "source"), tmp_path / "target", {}, {})
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "usual").stat().st_mode
    file = tmp_path / "target" / "model.safetensors"
    assert file.stat().st_mode == (tmp_path / "usual" / "file").stat().st_mode


def test_extra_files_are_added_and_replace_copies(tmp_path: Path) -> None:
    extras = {"README.md": b"new card", "steering/plan.json": b"{}", "./note": b"n"}
    source, target = make(tmp_path / "source"), tmp_path / "target"
    write_checkpoint(source, target, {}, extras)
    for name, content in extras.items():
        assert (target / name).read_bytes() == content
    assert (source / "README.md").read_bytes() == b"old card"


@pytest.mark.parametrize("name", ["../escape", "/etc/broca", "", ".", "a/../../b"])
def test_extra_files_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(BrocaError, match="not a path inside the checkpoint"):
        write_checkpoint(make(tmp_path / "source"), tmp_path / "target", {}, {name: b""})
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_extra_files_do_not_replace_weights(tmp_path: Path) -> None:
    with pytest.raises(BrocaError, match=r"model\.safetensors would replace weights"):
        write_checkpoint(make(tmp_path / "source"), tmp_path / "target", {}, {"model.safetensors": b""})


def rounded_once(value: float, bits: int, smallest: int) -> float:
    """A float64 rounded to nearest even with ``bits`` of precision and spacing of at least 2**smallest."""
    if value == 0:
        return value
    spacing = 2.0 ** max(math.frexp(value)[1] - bits, smallest)
    return round(value / spacing) * spacing


def awkward_numbers() -> torch.Tensor:
    """Random numbers of many sizes, and numbers a hair beside the middle of two 16-bit neighbours."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(-30, 12, (600,), generator=generator).double()
    wide = torch.randn(600, generator=generator, dtype=torch.float64) * 2**sizes
    middles = [1 + (2 * k + 1) * 2.0**-bits for k in range(4) for bits in (8, 11)]
    hairs = [0.0, 2.0**-40, -(2.0**-40), 2.0**-25, -(2.0**-25)]
    beside = torch.tensor([sign * m + hair for m in middles for hair in hairs for sign in (1, -1)])
    beside64 = torch.tensor(
        [sign * (m + hair) for m in middles for hair in hairs for sign in (1, -1)], dtype=torch.float64
    )
    tiny = torch.tensor(
        [2.0**-25, 2.0**-25 + 2.0**-60, 2.0**-134, 1e-50, -1e-300, 0.0, -0.0], dtype=torch.float64
    )
    return torch.cat([wide, beside.double(), beside64, tiny])


@pytest.mark.parametrize(
    ("dtype", "bits", "smallest"),
    [
        (torch.bfloat16, 8, -133),
        (torch.float16, 11, -24),
        (torch.float32, 24, -149),
        (torch.float64, 53, -1074),
    ],
)
@pytest.mark.parametrize("computed", [torch.float32, torch.float64])
def test_values_are_rounded_once_to_nearest_even(
    tmp_path: Path, dtype: torch.dtype, bits: int, smallest: int, computed: torch.dtype
) -> None:
    numbers = awkward_numbers().to(computed)
    source = tmp_path / "source"
    source.mkdir()
    save_file({"w": torch.zeros(numbers.numel(), 1, dtype=dtype)}, source / "model.safetensors")

    def replace(block: torch.Tensor, first: int) -> torch.Tensor:
        return numbers[first : first + len(block)].reshape(-1, 1)

    write_checkpoint(source, tmp_path / "target", {"w": replace}, {})
    stored = values(tmp_path / "target")["w"].double().reshape(-1)
    expected = [rounded_once(number, bits, smallest) for number in numbers.double().tolist()]
    assert stored.tolist() == expected
    assert torch.equal(torch.signbit(stored), torch.signbit(numbers))
    if dtype == torch.float16:
        assert np.array_equal(stored.numpy(), numbers.double().numpy().astype(np.float16).astype(np.float64))


def test_the_numbers_would_expose_a_second_rounding() -> None:
    numbers = awkward_numbers()
    for dtype, bits, smallest in ((torch.bfloat16, 8, -133), (torch.float16, 11, -24)):
        once = [rounded_once(number, bits, smallest) for number in numbers.tolist()]
        assert numbers.float().to(dtype).double().tolist() != once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_blocks_of_a_few_rows_equal_one_block(tmp_path: Path, dtype: torch.dtype) -> None:
    source = make(tmp_path / "source", dtype)
    seen: dict[str, list[tuple[int, tuple[int, ...]]]] = {}

    def scaled(name: str) -> Callable[[torch.Tensor, int], torch.Tensor]:
        def replace(block: torch.Tensor, first: int) -> torch.Tensor:
            assert block.dtype == dtype
            assert torch.equal(block, weights(dtype)[name][first : first + len(block)])
            seen.setdefault(name, []).append((first, tuple(block.shape)))
            rows = torch.arange(first, first + len(block)).reshape(-1, *[1] * (block.dim() - 1))
            return block.double() * (1 + rows / 7)

        return replace

    for chunk_bytes in (1, 4 * 4 * dtype.itemsize, 1 << 20):
        seen.clear()
        target = tmp_path / f"target{chunk_bytes}"
        write_checkpoint(
            source, target, {name: scaled(name) for name in weights()}, {}, chunk_bytes=chunk_bytes
        )
        if chunk_bytes == 4 * 4 * dtype.itemsize:
            assert seen["down"] == [(0, (4, 4)), (4, (4, 4)), (8, (1, 4))]
            assert seen["experts"] == [(0, (1, 4, 5)), (1, (1, 4, 5)), (2, (1, 4, 5))]
            assert seen["norm"] == [(0, (6,))]
        if chunk_bytes == 1:
            assert len(seen["down"]) == 9
    files = [(path / "model.safetensors").read_bytes() for path in sorted(tmp_path.glob("target*"))]
    assert files[0] == files[1] == files[2] != (source / "model.safetensors").read_bytes()
    rows = torch.arange(9).reshape(-1, 1)
    expected = weights(dtype)["down"].double() * (1 + rows / 7)
    if dtype == torch.float64:
        assert torch.equal(values(tmp_path / "target1")["down"], expected)


def test_tensors_without_dimensions_or_elements(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file({"scale": torch.tensor(3.0), "none": torch.zeros(0, 4)}, source / "model.safetensors")
    write_checkpoint(source, tmp_path / "target", {"scale": halved, "none": fails}, {})
    assert values(tmp_path / "target")["scale"].item() == 1.5
    assert values(tmp_path / "target")["scale"].shape == ()


def test_rounding_in_pieces_covers_the_whole_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_ROUNDED_AT_ONCE", 5)
    write_checkpoint(make(tmp_path / "source"), tmp_path / "target", {"down": halved}, {})
    assert torch.equal(values(tmp_path / "target")["down"], weights()["down"] / 2)


def test_progress_counts_all_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot_share(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "ioctl", cannot_share)
    calls: list[tuple[int, int]] = []
    source = make(tmp_path / "source")
    write_checkpoint(
        source,
        tmp_path / "target",
        {"down": halved},
        {"README.md": b"x"},
        chunk_bytes=32,
        progress=lambda done, total: calls.append((done, total)),
    )
    copied = sum(path.stat().st_size for path in source.rglob("*") if path.is_file()) - len(b"old card")
    assert {total for _, total in calls} == {copied + 9 * 4 * 4}
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1][0] == calls[-1][1]
    # Five files whole, one around its edited tensor (two gaps and what they leave out), five blocks.
    assert len(calls) == 5 + 3 + 5


def test_the_source_is_shared_only_copy_on_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[int] = []

    def clone(writer: Any, request: int, reader: int) -> int:
        # What the ioctl does on a disk that can: the new file has the content of the other.
        assert request == 0x40049409
        writer.write(os.pread(reader, 1 << 30, 0))
        shared.append(reader)
        return 0

    def no_copy(*_: object) -> None:
        raise AssertionError("copied although the disk can share")

    monkeypatch.setattr(fcntl, "ioctl", clone)
    monkeypatch.setattr(os, "sendfile", no_copy)
    source = make(tmp_path / "source")
    write_checkpoint(source, tmp_path / "target", {"down": halved}, {})
    assert len(shared) == 7
    assert torch.equal(values(tmp_path / "target")["down"], weights()["down"] / 2)
    assert torch.equal(values(source)["down"], weights()["down"])


# ---- tensors that the source lacks, files that are left out or renamed --------------------------------


BIASES = {"down.bias": torch.arange(9.0), "a.bias": torch.tensor([1.5, -2.0]).bfloat16()}


def read_by_index(folder: Path) -> dict[str, torch.Tensor]:
    """As index readers do: each tensor from the shard that the index names, by the safetensors library."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}


@pytest.mark.parametrize("shards", [False, True])
def test_added_tensors_lie_in_a_shard_of_their_own(tmp_path: Path, shards: bool) -> None:
    source, target = make(tmp_path / "source", shards=shards), tmp_path / "target"
    before = snapshot(source)
    write_checkpoint(source, target, {"down": halved}, {}, added=BIASES)
    assert snapshot(source) == before
    wanted = {**weights(), "down": weights()["down"] / 2, **BIASES}
    for found in (values(target), read_by_index(target)):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in wanted.values())
    files = {path.name for path in target.glob("*.safetensors")}
    assert files == (
        {"odd name.safetensors", "part-b.safetensors", "model-added.safetensors"}
        if shards
        else {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    )
    if shards:
        name = "part-b.safetensors"
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_the_one_file_may_have_any_name(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source"), tmp_path / "target"
    (source / "model.safetensors").rename(source / "weights.safetensors")
    write_checkpoint(source, target, {}, {}, added=BIASES)
    assert read_by_index(target).keys() == {*weights(), *BIASES}
    assert (target / "weights.safetensors").read_bytes() == (source / "weights.safetensors").read_bytes()


def test_an_index_keeps_its_name_and_what_else_it_says(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source", shards=True), tmp_path / "target"
    old = json.loads((source / "model.safetensors.index.json").read_text())
    old["metadata"] = {"total_size": 1000, "author": "me"}
    (source / "model.safetensors.index.json").unlink()
    (source / "big.safetensors.index.json").write_text(json.dumps(old))
    write_checkpoint(source, target, {}, {}, added=BIASES)
    new = json.loads((target / "big.safetensors.index.json").read_text())
    assert new["metadata"] == {"total_size": 1000 + 9 * 4 + 2 * 2, "author": "me"}
    assert not (target / "model.safetensors.index.json").exists()
    assert values(target).keys() == {*weights(), *BIASES}


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"up": torch.ones(2)}, "has a tensor up already"),
        ({"b": torch.ones(2, dtype=torch.int8)}, "new tensor b is torch.int8"),
        ({"b": torch.tensor([math.nan])}, "not finite"),
    ],
)
def test_added_tensors_that_are_refused(tmp_path: Path, added: dict[str, torch.Tensor], message: str) -> None:
    source = make(tmp_path / "source")
    with pytest.raises(BrocaError, match=message):
        write_checkpoint(source, tmp_path / "target", {"up": fails}, {}, added=added)
    assert not (tmp_path / "target").exists()


def test_a_file_in_the_way_of_added_tensors(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    # A shard of an older save that no index names.
    save_file({"other": torch.zeros(1)}, source / "model-00001-of-00002.safetensors")
    with pytest.raises(BrocaError, match=r"model-00001-of-00002\.safetensors is in the way"):
        write_checkpoint(source, tmp_path / "target", {}, {}, added=BIASES)


def test_files_that_are_left_out_or_renamed(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source"), tmp_path / "target"
    write_checkpoint(
        source,
        target,
        {"down": halved},
        {},
        left_out=["onnx/deep/model.bin", "README.md"],
        renamed={"model.safetensors": "one.safetensors", "tokenizer.json": "words.json"},
    )
    assert torch.equal(values(target)["down"], weights()["down"] / 2)
    assert {str(path.relative_to(target)) for path in target.rglob("*")} == {
        "config.json",
        "generation_config.json",
        "words.json",
        "chat_template.jinja",
        "one.safetensors",
        "empty directory",
    }


def test_completing_comes_last_and_can_stop_it(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source"), tmp_path / "target"

    def complete(staged: Path) -> None:
        assert torch.equal(values(staged)["down"], weights()["down"] / 2)
        assert (staged / "note").read_bytes() == b"x"
        assert not target.exists()
        (staged / "more").write_text("y")

    write_checkpoint(source, target, {"down": halved}, {"note": b"x"}, complete=complete)
    assert (target / "more").read_text() == "y"

    def stop(staged: Path) -> None:
        raise BrocaError("wrong")

    before = snapshot(tmp_path)
    with pytest.raises(BrocaError, match="wrong"):
        write_checkpoint(source, target, {"down": halved}, {}, complete=stop, overwrite=True)
    assert snapshot(tmp_path) == before


# ---- the moment of the overwrite --------------------------------------------------------------------


def test_an_overwritten_target_is_there_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = make(tmp_path / "source"), make(tmp_path / "target", torch.bfloat16)
    other = [tmp_path / "a", tmp_path / "b"]
    for folder in other:
        folder.mkdir()
    if not staging.exchange(*other):
        pytest.skip("this disk cannot exchange two names")
    for folder in other:
        folder.rmdir()

    def no_rename(self: Path, place: Path) -> Path:
        raise AssertionError("moved away although the names can be exchanged")

    monkeypatch.setattr(Path, "rename", no_rename)
    write_checkpoint(source, target, {"up": halved}, {}, overwrite=True)
    assert torch.equal(values(target)["up"], weights()["up"] / 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_exchange_exchanges(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / folder.name).write_text("")
    if not staging.exchange(one, other):
        pytest.skip("this disk cannot exchange two names")
    assert (one / "other").exists() and (other / "one").exists()
    with pytest.raises(OSError, match="No such file"):
        staging.exchange(one, tmp_path / "none")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL])
def test_where_names_cannot_be_exchanged_there_are_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    source, target = make(tmp_path / "source"), make(tmp_path / "target", torch.bfloat16)
    monkeypatch.setattr(staging.ctypes, "get_errno", lambda: number)
    monkeypatch.setattr(staging.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=lambda *_: -1))
    write_checkpoint(source, target, {"up": halved}, {}, overwrite=True)
    monkeypatch.setattr(staging.ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    write_checkpoint(source, target, {"up": halved}, {}, overwrite=True)
    assert torch.equal(values(target)["up"], weights()["up"] / 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_place_is_asked_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_target(tmp_path / "new" / "target")
    assert list(tmp_path.iterdir()) == []
    old = make(tmp_path / "old")
    check_target(old, overwrite=True)
    with pytest.raises(BrocaError, match="add --overwrite"):
        check_target(old)
    with pytest.raises(BrocaError, match="cannot be written to"):
        check_target(tmp_path / ("x" * 250))
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != old)
    with pytest.raises(BrocaError, match="not be replaced"):
        check_target(old, overwrite=True)
    monkeypatch.setattr(Path, "is_mount", lambda self: True)
    with pytest.raises(BrocaError, match="mounted"):
        check_target(old, overwrite=True)


# ---- failures in the middle ------------------------------------------------------------------------


def interrupt(block: torch.Tensor, first: int) -> torch.Tensor:
    if first:
        raise KeyboardInterrupt
    return block.float() * 3


def disk_full(block: torch.Tensor, first: int) -> torch.Tensor:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(block: torch.Tensor, first: int) -> torch.Tensor:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("replace", "error"),
    [(interrupt, KeyboardInterrupt), (disk_full, BrocaError), (broken, ZeroDivisionError)],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_in_the_middle_leaves_what_was_there(
    tmp_path: Path,
    replace: Callable[[torch.Tensor, int], torch.Tensor],
    error: type[BaseException],
    overwrite: bool,
) -> None:
    source = make(tmp_path / "source")
    target = tmp_path / "target" if overwrite else tmp_path / "new" / "parents" / "target"
    if overwrite:
        make(target, torch.bfloat16)
    before = snapshot(tmp_path)
    with pytest.raises(error):
        write_checkpoint(
            source, target, {"down": halved, "up": replace}, {}, overwrite=overwrite, chunk_bytes=40
        )
    assert snapshot(tmp_path) == before


def test_full_disk_while_copying_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "source")
    before = snapshot(tmp_path)
    real = os.sendfile

    def copy(place: int, origin: int, begin: int, count: int) -> int:
        if os.path.samestat(os.fstat(origin), (source / "model.safetensors").stat()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(place, origin, begin, count)

    def cannot_share(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "sendfile", copy)
    monkeypatch.setattr(fcntl, "ioctl", cannot_share)
    with pytest.raises(BrocaError, match=r"target could not be written \(.*No space left"):
        write_checkpoint(source, tmp_path / "target", {}, {})
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken disk"), KeyboardInterrupt()])
def test_old_target_returns_when_the_second_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    source, target = make(tmp_path / "source"), make(tmp_path / "target", torch.bfloat16)
    before = snapshot(tmp_path)
    monkeypatch.setattr(staging, "exchange", lambda *_: False)
    real, moves = Path.rename, []

    def rename(self: Path, place: Path) -> Path:
        moves.append((self.name, Path(place).name))
        if self.name == "checkpoint":
            raise error
        return real(self, place)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((BrocaError, KeyboardInterrupt)):
        write_checkpoint(source, target, {"up": halved}, {}, overwrite=True)
    assert moves == [("target", "previous"), ("checkpoint", "target"), ("previous", "target")]
    assert snapshot(tmp_path) == before


def test_old_target_that_cannot_return_is_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = make(tmp_path / "source"), make(tmp_path / "target", torch.bfloat16)
    before = snapshot(target)
    real = Path.rename

    def rename(self: Path, place: Path) -> Path:
        if self.name in ("checkpoint", "previous"):
            raise OSError(errno.EIO, "broken disk")
        return real(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr(staging, "exchange", lambda *_: False)
        with pytest.raises(BrocaError, match=r"could not be put back.*move it back from .*previous"):
            write_checkpoint(source, target, {"up": halved}, {}, overwrite=True)
    (shelter,) = tmp_path.glob(".target.broca-*")
    assert snapshot(shelter / "previous") == before
    with pytest.raises(BrocaError, match="add --overwrite"):
        write_checkpoint(source, target, {"up": halved}, {})
    assert snapshot(target) == before
    assert not shelter.exists()


def test_overwrite_replaces_the_whole_old_checkpoint(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source"), make(tmp_path / "target", torch.bfloat16, shards=True)
    write_checkpoint(source, target, {"up": halved}, {}, overwrite=True)
    assert torch.equal(values(target)["up"], weights()["up"] / 2)
    assert not (target / "part-b.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    real = os.fsync
    source, target = make(tmp_path / "source"), tmp_path / "target"
    rename = Path.rename

    def fsync(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        real(handle)

    def checked(self: Path, place: Path) -> Path:
        assert {path.stat().st_ino for path in [self, *self.rglob("*")]} <= synced
        synced.clear()
        return rename(self, place)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", checked)
    write_checkpoint(source, target, {"up": halved}, {"note": b"x"})
    assert synced == {tmp_path.stat().st_ino}


STOPS = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from editing.checkpoints.checkpoint import write_checkpoint

    def replace(block, first):
        if first:
            print("in the middle", flush=True)
            time.sleep(120)
        return block.float() * 3

    source, target, overwrite = sys.argv[1:]
    write_checkpoint(
        Path(source), Path(target), {"down": replace}, {}, overwrite=bool(overwrite), chunk_bytes=16
    )
    """
)


def stopped_in_the_middle(source: Path, target: Path, overwrite: bool = False) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS, str(source), str(target), "yes" if overwrite else ""],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in the middle\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_run_leaves_no_target_and_the_next_clears_up(tmp_path: Path, overwrite: bool) -> None:
    source, target = make(tmp_path / "source"), tmp_path / "target"
    if overwrite:
        make(target, torch.bfloat16)
    before = snapshot(target)
    kill(stopped_in_the_middle(source, target, overwrite))
    assert snapshot(target) == before
    assert target.exists() == overwrite
    (left,) = tmp_path.glob(".target.broca-*")
    assert (left / "checkpoint" / "model.safetensors").exists()
    write_checkpoint(source, target, {"down": halved}, {}, overwrite=overwrite)
    assert torch.equal(values(target)["down"], weights()["down"] / 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_the_directory_of_a_living_run_is_left_alone(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source"), tmp_path / "target"
    process = stopped_in_the_middle(source, target)
    try:
        (living,) = tmp_path.glob(".target.broca-*")
        assert (living / "owner").read_text() == f"{process.pid}\n"
        before = snapshot(living)
        write_checkpoint(source, target, {"down": halved}, {})
        assert snapshot(living) == before
    finally:
        kill(process)


def test_only_directories_of_killed_runs_for_this_target_are_cleared(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    kept = [".target.broca-notes", ".target.broca-y.broca-abcdefgh", ".other.broca-abcdefgh"]
    for name in [*kept, ".target.broca-abcdefgh", ".target.broca-starting"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "owner").write_text("" if name == ".target.broca-starting" else "1\n")
    (tmp_path / ".target.broca-nomark12").mkdir()
    write_checkpoint(source, tmp_path / "target", {}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "source", "target"])


def test_a_place_that_another_run_takes_for_a_killed_runs_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both moments at which a run has no lock yet: before its mark is made, and before it is locked."""
    source, target = make(tmp_path / "source"), tmp_path / "target"
    make_directory, lock = tempfile.mkdtemp, fcntl.flock
    seen: list[str] = []

    def mkdtemp(*args: Any, **options: Any) -> str:
        found = make_directory(*args, **options)
        seen.append(found)
        if len(seen) == 2:  # the first is the trial of check_target
            check_target(target)
        return found

    def flock(owner: Any, how: int) -> None:
        if how == fcntl.LOCK_EX and len(seen) == 4:  # 3 was the trial of the other run
            monkeypatch.setattr(fcntl, "flock", lock)
            check_target(target)
        lock(owner, how)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    monkeypatch.setattr(fcntl, "flock", flock)
    write_checkpoint(source, target, {"down": halved}, {})
    assert len(seen) == 6  # 5 was the other run's trial again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


# Is killed at every third step that touches the disk; after each kill another run clears up.
KILLED_EVERYWHERE = textwrap.dedent(
    """
    import os
    import shutil
    import signal
    import sys
    from pathlib import Path
    from editing.checkpoints.checkpoint import write_checkpoint

    STEPS = ("open", "os.", "shutil.", "tempfile.", "fcntl.")
    source, target, overwrite = Path(sys.argv[1]), Path(sys.argv[2]), bool(sys.argv[3])
    left = None

    def step(event, _):
        global left
        if left is not None and event.startswith(STEPS):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def write():
        if not overwrite:
            shutil.rmtree(target, ignore_errors=True)
        write_checkpoint(
            source, target, {"down": lambda block, first: block.float() * 3}, {}, overwrite=overwrite
        )

    sys.addaudithook(step)
    write()
    kills, status = int(overwrite), 1
    while status:
        kills += 3
        child = os.fork()
        if child == 0:
            left = kills
            try:
                write()
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        kept = len(list(target.parent.iterdir()))
        write()
        print(kills, kept, *sorted(path.name for path in target.parent.iterdir()))
        for left_over in target.parent.glob(".*"):
            shutil.rmtree(left_over)
    """
)


@pytest.mark.parametrize("overwrite", [False, True])
def test_wherever_a_run_is_killed_the_next_clears_up(tmp_path: Path, overwrite: bool) -> None:
    source, folder = make(tmp_path / "source", shards=True), tmp_path / "folder"
    folder.mkdir()
    told = subprocess.run(
        [sys.executable, "-c", KILLED_EVERYWHERE, str(source), str(folder / "target"), "yes" * overwrite],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(told) > 40
    assert any(line.split()[1] == "2" for line in told)
    assert [line for line in told if line.split()[2:] != ["target"]] == []


def test_target_moved_away_by_a_killed_run_is_put_back(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    shelter = tmp_path / ".target.broca-abcdefgh"
    make(shelter / "previous", torch.bfloat16)
    (shelter / "owner").write_text("1\n")
    before = snapshot(shelter / "previous")
    with pytest.raises(BrocaError, match="add --overwrite"):
        write_checkpoint(source, tmp_path / "target", {"up": fails}, {})
    assert snapshot(tmp_path / "target") == before
    assert not shelter.exists()


def test_target_that_appears_meanwhile_is_not_lost(tmp_path: Path) -> None:
    source, target = make(tmp_path / "source"), tmp_path / "target"

    def replace(block: torch.Tensor, first: int) -> torch.Tensor:
        make(target, torch.bfloat16)
        return block.float()

    with pytest.raises(BrocaError, match="could not be written"):
        write_checkpoint(source, target, {"up": replace}, {})
    assert values(target)["up"].dtype == torch.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


# ---- new values that are refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        (torch.float32, math.nan),
        (torch.float32, math.inf),
        (torch.bfloat16, -math.inf),
        (torch.float16, 65520.0),
        (torch.bfloat16, 3.4e38),
        (torch.float32, 1e39),
    ],
)
def test_values_that_are_not_finite_in_the_stored_dtype(
    tmp_path: Path, dtype: torch.dtype, bad: float
) -> None:
    source = make(tmp_path / "source", dtype)
    before = snapshot(tmp_path)

    def replace(block: torch.Tensor, first: int) -> torch.Tensor:
        new = block.double()
        new[-1, -1] = bad
        return new

    with pytest.raises(BrocaError, match="tensor up are not all finite"):
        write_checkpoint(source, tmp_path / "target", {"up": replace}, {})
    assert snapshot(tmp_path) == before


def test_largest_finite_value_is_kept(tmp_path: Path) -> None:
    source = make(tmp_path / "source", torch.float16)
    write_checkpoint(
        source,
        tmp_path / "target",
        {"up": lambda block, _: torch.full_like(block, 65519.0, dtype=torch.float64)},
        {},
    )
    assert values(tmp_path / "target")["up"].tolist() == [[65504.0] * 9] * 4


@pytest.mark.parametrize(
    "change", [lambda block: block[:1], lambda block: block.reshape(-1), lambda block: block.T]
)
def test_another_shape(tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    source = make(tmp_path / "source")
    before = snapshot(tmp_path)
    with pytest.raises(BrocaError, match=r"tensor up have shape .* not \[4, 9\]"):
        write_checkpoint(source, tmp_path / "target", {"up": lambda block, _: change(block)}, {})
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32])
def test_values_computed_in_too_narrow_a_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    source = make(tmp_path / "source", torch.bfloat16)
    with pytest.raises(BrocaError, match="tensor up are torch"):
        write_checkpoint(source, tmp_path / "target", {"up": lambda block, _: block.to(dtype)}, {})


# ---- refusals before anything is written ------------------------------------------------------------


def refused(source: Path, target: Path, message: str, name: str = "up", overwrite: bool = False) -> None:
    root = source.parent
    before = snapshot(root)
    with pytest.raises(BrocaError, match=message):
        write_checkpoint(source, target, {name: fails}, {}, overwrite=overwrite)
    assert snapshot(root) == before


def test_existing_target(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    make(tmp_path / "old")
    refused(source, tmp_path / "old", "add --overwrite")
    (tmp_path / "file").write_text("mine")
    refused(source, tmp_path / "file", "is a file")


def test_overwrite_spares_what_is_no_checkpoint(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(make(tmp_path / "old"))
    (tmp_path / "nowhere").symlink_to("gone")
    refused(source, tmp_path / "documents", "has no config.json", overwrite=True)
    refused(source, tmp_path / "file", "is a file", overwrite=True)
    for name in ("link", "nowhere"):
        for overwrite in (False, True):
            refused(source, tmp_path / name, "symbolic link", overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_source_and_target_inside_each_other(tmp_path: Path, overwrite: bool) -> None:
    outer = make(tmp_path / "outer")
    source = make(outer / "source")
    (tmp_path / "alias").symlink_to(outer)
    refused(source, source, "is the source itself", overwrite=overwrite)
    refused(source, tmp_path / "alias" / "source" / "new", "one inside the other", overwrite=overwrite)
    refused(source, source / ".." / "source" / "deep" / "new", "one inside the other", overwrite=overwrite)
    refused(source, outer, "one inside the other", overwrite=overwrite)
    refused(tmp_path / "alias" / "source", source, "is the source itself", overwrite=overwrite)


def test_source_of_links_into_the_target(tmp_path: Path) -> None:
    old, source = make(tmp_path / "old"), make(tmp_path / "source")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(old / "model.safetensors")
    refused(source, old, "is a link into", overwrite=True)


@pytest.mark.parametrize(
    "settings", [{"quantization_config": {"bits": 4}}, {"text_config": {"quantization_config": {"bits": 4}}}]
)
def test_quantised_source(tmp_path: Path, settings: object) -> None:
    source = make(tmp_path / "source")
    (source / "config.json").write_text(json.dumps(settings))
    refused(source, tmp_path / "target", "is quantised")


def test_a_quantisation_that_is_null_is_none(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    (source / "config.json").write_text('{"quantization_config": null}')
    write_checkpoint(source, tmp_path / "target", {}, {})
    assert (tmp_path / "target").is_dir()


def test_damaged_config(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    (source / "config.json").write_text("{")
    refused(source, tmp_path / "target", r"config\.json is not valid JSON")


def test_unknown_name_and_unreadable_dtype(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    refused(source, tmp_path / "target", "no tensor model.up", name="model.up")
    save_file({"up": torch.zeros(3, dtype=torch.int8)}, source / "model.safetensors")
    refused(source, tmp_path / "target", "tensor up is stored as I8")


def test_broken_links_loops_and_pipes_in_the_source(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    (source / "vocab.json").symlink_to("../blobs/gone")
    refused(source, tmp_path / "target", r"vocab\.json .* link")
    (source / "vocab.json").unlink()
    (source / "onnx" / "loop").symlink_to("..")
    refused(source, tmp_path / "target", "loop is a link")
    (source / "onnx" / "loop").unlink()
    os.mkfifo(source / "pipe")
    refused(source, tmp_path / "target", "pipe is not a regular file")


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "source")
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    free, asked = size + size // 100 - 1, []

    def usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    refused(source, tmp_path / "new" / "target", r"GB but .* GB free")
    free += 1
    write_checkpoint(source, tmp_path / "new" / "target", {}, {})
    assert asked == [tmp_path, tmp_path]


def test_parent_that_cannot_hold_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "source")
    (tmp_path / "file").write_text("mine")
    refused(source, tmp_path / "file" / "target", "is a file, so")
    # The tests may run as root, whom no permission stops.
    monkeypatch.setattr(os, "access", lambda folder, mode: not (folder == tmp_path and mode & os.W_OK))
    refused(source, tmp_path / "target", "cannot be written to")
