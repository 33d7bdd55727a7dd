"""Thousands of damaged checkpoints: each is refused by name or copied whole, and nothing else is touched.

Every case goes through ``tensor_entries``, the reading of every tensor and ``write_checkpoint`` with one tensor
replaced.  What Broca takes, the safetensors library must take too, with the same values.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save

from editing.checkpoints.checkpoint import write_checkpoint
from neurons.errors import BrocaError
from neurons.files.tensor_files import READABLE_DTYPES, read_tensor, tensor_entries, weight_files

# Milliseconds are usual; a busy machine may make a hundred times as much of them.
SECONDS_A_CASE = 20
CASES = {"header": 900, "bytes": 500, "index": 700, "index bytes": 180, "shards": 220}
# A string that Broca echoes may be cut, and a sentence stays a sentence.
LONGEST_MESSAGE = 1500


class HungError(BaseException):
    """Not an Exception, so that no clause in the product can take it for a damaged file."""


@contextmanager
def time_bound() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise HungError(f"a case took more than {SECONDS_A_CASE} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_A_CASE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- JSON with everything that JSON should not have -------------------------------------------------


class Raw(str):
    """JSON text that stands for itself, valid or not."""


class Members(list[Any]):
    """An object as [name, value] lists: names may come twice."""


def taken_apart(value: Any) -> Any:
    if isinstance(value, dict):
        return Members([name, taken_apart(member)] for name, member in value.items())
    return [taken_apart(item) for item in value] if isinstance(value, list) else value


def written(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Members):
        inside = (f"{n if isinstance(n, Raw) else json.dumps(n)}:{written(v)}" for n, v in value)
        return "{" + ",".join(inside) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value)


def places(value: Any) -> Iterator[tuple[Any, int]]:
    """Every value inside, as (its holder, its index there)."""
    for index, item in enumerate(value):
        if isinstance(value, Members):
            yield item, 1
            item = item[1]
        else:
            yield value, index
        if isinstance(item, list):
            yield from places(item)


def objects(value: Any) -> list[Members]:
    inside = [holder[index] for holder, index in places(value)]
    return [item for item in [value, *inside] if isinstance(item, Members)]


VALUES = [
    *(
        "-1",
        "-0",
        "0",
        "1",
        "2",
        "3",
        "4",
        "8",
        "1.0",
        "1e2",
        "1e400",
        "-1e400",
        "NaN",
        "Infinity",
        "-Infinity",
    ),
    *("true", "false", "null", "[]", "{}", "[[]]", "[0,0]", "[8,0]", "[0,8]", "[2,2]", "[0,8,8]", "[-2,-2]"),
    *(
        str(2**31),
        str(2**32),
        str(2**62),
        str(2**63 - 1),
        str(2**63),
        str(2**64),
        "9" * 40,
        "9" * 4300,
        "9" * 5000,
    ),
    *("[" * 500 + "]" * 500, "[" * 50_000 + "]" * 50_000, '{"a":' * 900 + "1" + "}" * 900, "[" * 3000, "nul"),
    "[" + ",".join(["99999999999"] * 5000) + "]",
    "[" + ",".join(["1"] * 5000) + "]",
    "[" + ",".join(["0"] + [str(2**62)] * 20) + "]",
    "[" + ",".join(["1"] * 65) + "]",
    f"[0,{2**62}]",
    f"[{2**62},4]",
    f"[0,{2**40}]",
    *(
        '"F32"',
        '"BF16"',
        '"F16"',
        '"F64"',
        '"I8"',
        '"F4"',
        '"F6_E2M3"',
        '"F5_NEW"',
        '"f32"',
        '""',
        '"\\ud800"',
    ),
    *('"\\udc80"', '"\\u0000"', '"a\\u0000b"', '"\\n"', '"\\u001b[31m"', '"' + "x" * 300 + '"'),
    *('"' + "y" * 100_000 + '"', '"é"', '"\\"'),
    *('"../outside/model.safetensors"', '"/etc/passwd"', '"sub/x.safetensors"', '"."', '".."', '"a\\\\b"'),
    *(
        '"config.json"',
        '"model.safetensors.index.json"',
        '"folder"',
        '"one.safetensors"',
        '"two.safetensors"',
    ),
    *('"~"', '"one.safetensors "', '"ONE.SAFETENSORS"', '"/dev/zero"', '"file:one.safetensors"'),
]
NAMES = [
    *(
        "",
        "a",
        "b",
        "up",
        "a/b",
        "../../escaped",
        "/escaped",
        "a\\b",
        "a\nb",
        "\x1b[31m",
        "\x00",
        "é",
        "..",
        ".",
    ),
    *("__metadata__", "dtype", "shape", "data_offsets", "weight_map", "metadata", "z" * 3000, "\u202ename"),
    *(Raw('"\\ud800"'), Raw('"x\\udfff"'), Raw('"\\ud83d\\ude00"'), Raw("name"), Raw("1"), Raw('"open')),
]


def damage(root: Any, chance: random.Random) -> None:
    """One change at one place."""
    holder, index = chance.choice(list(places(root)))
    value = holder[index]
    inside = chance.choice(objects(root))
    kind = chance.randrange(9)
    if kind <= 2:
        holder[index] = Raw(chance.choice(VALUES))
    elif kind == 3 and type(value) is int:
        holder[index] = chance.choice([value - 1, value + 1, -value, value * 2, value + 2**40, float(value)])
    elif kind == 4 and isinstance(value, list) and value:
        if chance.random() < 0.5:
            del value[chance.randrange(len(value))]
        else:
            value.append(copy.deepcopy(chance.choice(value)))
    elif kind == 5 and inside:
        member = chance.choice(inside)
        inside.insert(chance.randrange(len(inside) + 1), [chance.choice(NAMES), copy.deepcopy(member[1])])
    elif kind == 6 and inside:
        chance.choice(inside)[0] = chance.choice(NAMES)
    elif kind == 7 and inside:
        chance.choice(inside)[0] = chance.choice(inside)[0]
    else:
        other, there = chance.choice(list(places(root)))
        holder[index], other[there] = copy.deepcopy(other[there]), copy.deepcopy(value)


def scratched(content: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut out, put in or cut off, mostly near the start, where the header is."""
    damaged = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5, 30])):
        place = min(int(chance.expovariate(4 / max(1, len(damaged)))), max(0, len(damaged) - 1))
        kind = chance.randrange(5)
        if kind <= 1 and damaged:
            damaged[place] ^= 1 << chance.randrange(8)
        elif kind == 2 and damaged:
            damaged[place] = chance.choice([0, 0x80, 0xC0, 0xED, 0xFF, 0x22, 0x2C, 0x5D, 0x7D, 0x39])
        elif kind == 3:
            del damaged[place : place + chance.choice([1, 2, 8, len(damaged)])]
        else:
            damaged[place:place] = chance.randbytes(chance.choice([1, 2, 8]))
    return bytes(damaged)


# ---- checkpoints -------------------------------------------------------------------------------------


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        "cube": torch.randn(2, 3, 2, generator=generator).half(),
        "double": torch.randn(3, generator=generator).double(),
        "down": torch.randn(4, 3, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 2),
        "mask": torch.ones(3, 3, dtype=torch.int8),
        "scalar": torch.tensor(0.5),
        "up": torch.randn(3, 4, generator=generator),
    }


SHARDS = {"one.safetensors": ("cube", "down", "empty"), "two.safetensors": ("double", "mask", "scalar", "up")}


def split(content: bytes) -> tuple[Any, bytes]:
    """A file's header and what follows it."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def damaged_header(content: bytes, chance: random.Random) -> bytes:
    header, data = split(content)
    root = taken_apart(header)
    kind = chance.randrange(12)
    if kind == 0:
        lengths = [0, 1, 2, 7, len(content), 2**31, 2**32, 2**63, 2**64 - 1, 10**8, 10**8 + 1]
        return with_header(written(root).encode(), data, chance.choice(lengths))
    if kind == 1:
        text, encodings = written(root), ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7")
        around = (f" {text}", f"{text}   ", f"[{text}]", f"{text}{text}", f"\n\t{text}", text[:-1], "")
        if chance.random() < 0.5:
            return with_header(text.encode(chance.choice(encodings)), data)
        return with_header(chance.choice(around).encode(), data)
    if kind == 2:
        # Nothing wrong but the order of the members, more data, or data gone.
        chance.shuffle(root)
        return with_header(
            written(root).encode(), chance.choice([data, data + b"\0", data[:-1], b"", data * 2])
        )
    if kind == 3:
        # Bytes that belong to no tensor, before one or instead of one.
        del root[chance.randrange(len(root))]
        return with_header(written(root).encode(), data)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        damage(root, chance)
    return with_header(written(root).encode("utf-8", "surrogatepass"), data)


def damaged_index(content: bytes, chance: random.Random) -> bytes:
    root = taken_apart(json.loads(content))
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        damage(root, chance)
    return written(root).encode("utf-8", "surrogatepass")


def write_shards(source: Path) -> None:
    for file, names in SHARDS.items():
        (source / file).write_bytes(
            save({name: tensors()[name] for name in names}, metadata={"format": "pt"})
        )
    weight_map = {name: file for file, names in SHARDS.items() for name in names}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def rearranged(source: Path, chance: random.Random) -> None:
    """Shards gone, doubled, exchanged, or links to places good and bad."""
    shard = source / chance.choice(list(SHARDS))
    content = shard.read_bytes()
    kind = chance.randrange(9)
    if kind == 0:
        shard.unlink()
    elif kind == 1:
        shard.unlink()
        shard.mkdir()
    elif kind == 2:
        # As in a hub cache: the file itself lies outside the directory.
        blob = source.parent / "outside" / "blob"
        blob.write_bytes(content if chance.random() < 0.5 else scratched(content, chance))
        shard.unlink()
        shard.symlink_to(chance.choice([blob, Path("../outside/blob")]))
    elif kind == 3:
        shard.unlink()
        shard.symlink_to(
            chance.choice(["gone", "/dev/zero", "/dev/null", "..", ".", shard.name, "config.json"])
        )
    elif kind == 4:
        one, two = (source / name for name in SHARDS)
        one.rename(source / "between")
        two.rename(one)
        (source / "between").rename(two)
    elif kind == 5:
        one, two = (source / name for name in SHARDS)
        shutil.copyfile(one, two)
    elif kind == 6:
        shard.write_bytes(damaged_header(content, chance))
    elif kind == 7:
        # A tensor of one shard is in the other one too.
        shard.write_bytes(save({**tensors(), "new": torch.zeros(chance.randrange(3))}))
    else:
        (source / "model.safetensors").write_bytes(
            chance.choice([b"", content, content[:-1], scratched(content, chance)])
        )


def make_case(source: Path, kind: str, chance: random.Random) -> None:
    (source.parent / "outside").mkdir()
    (source.parent / "outside" / "model.safetensors").write_bytes(b"mine")
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "folder").mkdir()
    (source / "folder" / "notes.txt").write_text("kept")
    if kind in ("header", "bytes"):
        whole = save(tensors(), metadata={"format": "pt"})
        change: Callable[[bytes, random.Random], bytes] = damaged_header if kind == "header" else scratched
        (source / "model.safetensors").write_bytes(change(whole, chance))
        return
    write_shards(source)
    index = source / "model.safetensors.index.json"
    if kind == "index":
        index.write_bytes(damaged_index(index.read_bytes(), chance))
    elif kind == "index bytes":
        index.write_bytes(scratched(index.read_bytes(), chance))
    else:
        rearranged(source, chance)


def digest(root: Path, without: Path) -> str:
    """Of all names, links and bytes below a directory."""
    found = hashlib.sha256()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if Path(folder, name) != without)
        for name in [*folders, *sorted(files)]:
            path = Path(folder, name)
            link = path.readlink() if path.is_symlink() else ""
            found.update(f"{path}\0{link}\0".encode())
            if not link and path.is_file():
                found.update(path.read_bytes())
    return found.hexdigest()


def reason(error: BrocaError) -> str:
    """What was refused, without the names and numbers."""
    return re.sub(r"/\S+|\d+|'[^']*'|(?<=tensor )\S+|(?<= as ).*", "*", str(error))[:60]


def sentence(error: BrocaError) -> None:
    """The message can be shown: short, on one line, without half characters or terminal codes."""
    text = str(error)
    assert text.isprintable() and len(text) < LONGEST_MESSAGE, text[:300]


def by_safetensors(source: Path) -> dict[str, bytes]:
    """The tensors as the safetensors library finds them; none if it does not know a dtype."""
    try:
        parts = [safetensors.deserialize(file.read_bytes()) for file in weight_files(source)]
    except safetensors.SafetensorError as error:
        assert "unknown variant" in str(error)
        return {}
    return {name: bytes(tensor["data"]) for part in parts for name, tensor in part}


def doubled(block: torch.Tensor, first: int) -> torch.Tensor:
    return block.double() * 2


def go_through(source: Path, target: Path) -> str:
    """Read and copy one checkpoint; the reason of the refusal, or "copied"."""
    try:
        entries = tensor_entries(source)
    except BrocaError as error:
        sentence(error)
        assert str(source) in str(error), "the message names no file"
        return reason(error)
    theirs = by_safetensors(source)
    values = {}
    for name, entry in entries.items():
        try:
            values[name] = read_tensor(entry)
        except BrocaError as error:
            sentence(error)
            assert entry.dtype not in READABLE_DTYPES
            continue
        assert values[name].shape == entry.shape
        if theirs:
            assert values[name].reshape(-1).view(torch.uint8).numpy().tobytes() == theirs[name]
    edited = next((name for name, value in values.items() if value.numel()), None)
    try:
        write_checkpoint(source, target, {edited: doubled} if edited is not None else {}, {})
    except BrocaError as error:
        assert not target.exists()
        return reason(error)
    written_entries = tensor_entries(target)
    assert list(written_entries) == list(entries)
    for name, value in values.items():
        expected = doubled(value, 0).to(value.dtype) if name == edited else value
        stored = read_tensor(written_entries[name])
        assert stored.dtype == expected.dtype
        assert torch.equal(stored.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    assert not any(path.is_symlink() for path in target.rglob("*"))
    return "copied"


@pytest.fixture
def workplace() -> Iterator[Path]:
    """In memory where the system has such a place: thousands of small files would wait for a busy disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder).resolve()


@pytest.mark.parametrize("kind", CASES)
def test_damaged_checkpoints_are_refused_by_name_or_copied(
    kind: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Thousands of waits for the disk would show nothing here.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    (workplace / "elsewhere").mkdir()
    monkeypatch.chdir(workplace / "elsewhere")
    found: Counter[str] = Counter()
    for number in range(CASES[kind]):
        root = workplace / "case"
        root.mkdir()
        source, target = root / "source", root / "target"
        make_case(source, kind, random.Random(f"{kind} {number}"))
        before = digest(workplace, target)
        try:
            with time_bound():
                found[go_through(source, target)] += 1
        except (Exception, HungError) as error:
            raise AssertionError(f"{kind} {number}: {type(error).__name__}: {str(error)[:500]}") from error
        assert digest(workplace, target) == before, f"{kind} {number} changed what is not the target"
        shutil.rmtree(root)
    # The cases are neither all hopeless nor all harmless, and hit many checks.
    assert found["copied"] > CASES[kind] / 40
    assert found["copied"] < CASES[kind] * 0.9
    assert len(found) > {"header": 12, "bytes": 8, "index": 5, "index bytes": 4, "shards": 6}[kind]


def test_undamaged_checkpoints_are_copied(tmp_path: Path) -> None:
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    whole.mkdir()
    (whole / "model.safetensors").write_bytes(save(tensors()))
    shards.mkdir()
    write_shards(shards)
    for source in (whole, shards):
        assert go_through(source, tmp_path / f"{source.name} copied") == "copied"
