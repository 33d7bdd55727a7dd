"""What is computed from files is computed once for each state of them, and no change goes unnoticed."""

import os
import shutil
import time
from pathlib import Path

import pytest

from neurons.files import digest as digests
from neurons.files.file_states import TICK, OncePerState
from neurons.models import fingerprint as fingerprints


@pytest.fixture
def kept():
    return OncePerState()


def reader(files):
    """(compute, what it was called for): the files' bytes in hexadecimal."""
    calls = []

    def compute():
        calls.append(1)
        return b"".join(file.read_bytes() for file in files).hex()

    return compute, calls


def test_a_file_is_read_once_while_it_stays(kept, tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"1")
    compute, calls = reader([file])
    assert [kept.get(tmp_path, [file], compute) for _ in range(3)] == [b"1".hex()] * 3
    assert len(calls) == 1


def rewritten(file):
    file.write_bytes(b"2")


def rewritten_with_its_old_time(file):
    before = file.stat()
    file.write_bytes(b"2")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file):
    other = file.with_name("other")
    other.write_bytes(b"2")
    before = file.stat()
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


@pytest.mark.parametrize("change", [rewritten, rewritten_with_its_old_time, replaced])
def test_a_change_of_the_same_size_is_noticed_however_soon(kept, tmp_path, change):
    for turn in range(20):
        file = tmp_path / str(turn)
        file.write_bytes(b"1")
        compute, _ = reader([file])
        assert kept.get(file, [file], compute) == b"1".hex()
        change(file)
        assert kept.get(file, [file], compute) == b"2".hex()


def test_the_tick_of_a_change_is_over_when_a_file_is_read(kept, tmp_path):
    file, read = tmp_path / "a", []
    file.write_bytes(b"1")
    kept.get(file, [file], lambda: read.append(time.time_ns()) or "")
    assert read[0] >= file.stat().st_ctime_ns + TICK


def test_a_file_that_comes_or_goes_is_noticed(kept, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    for files, expected in (([first], "31"), ([first, second], "3132"), ([second], "32")):
        assert kept.get(tmp_path, files, reader(files)[0]) == expected


def test_what_changes_while_it_is_read_is_not_kept(kept, tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"1")

    def changing():
        text = file.read_bytes().hex()
        file.write_bytes(b"22")
        return text

    assert kept.get(file, [file], changing) == b"1".hex()
    assert kept.get(file, [file], reader([file])[0]) == b"22".hex()


def test_what_could_not_be_computed_is_tried_again(kept, tmp_path):
    def fails():
        raise ValueError

    file = tmp_path / "a"
    file.write_bytes(b"1")
    with pytest.raises(ValueError):
        kept.get(file, [file], fails)
    assert kept.get(file, [file], reader([file])[0]) == b"1".hex()


def test_a_checkpoint_and_a_stages_files_are_hashed_once(checkpoint_of, tmp_path, monkeypatch):
    place = Path(shutil.copytree(checkpoint_of(), tmp_path / "copy"))
    read = []
    entries, digest = fingerprints.tensor_entries, digests._digest_of_file
    monkeypatch.setattr(fingerprints, "tensor_entries", lambda path: read.append(path) or entries(path))
    monkeypatch.setattr(digests, "_digest_of_file", lambda path: read.append(path) or digest(path))
    before = fingerprints.fingerprint(place), digests.digest(place)
    assert (fingerprints.fingerprint(place), digests.digest(place)) == before
    files = sorted(path for path in place.rglob("*") if path.is_file())
    assert sorted(map(Path, read)) == sorted([place, *files])
    weights = place / "model.safetensors"
    with weights.open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\x01\x02\x03\x04")
    read.clear()
    after = fingerprints.fingerprint(place), digests.digest(place)
    assert sorted(read) == sorted([place, weights])
    assert after[0] != before[0] and after[1] != before[1]
