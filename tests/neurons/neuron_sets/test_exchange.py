"""Other projects' masks and counts: exact both ways, and refused in one sentence where they are not such files."""

import hashlib
import os
import re

import pytest
import torch

from neurons.errors import BrocaError, UsageError
from neurons.files.artifact import save_artifact
from neurons.neuron_sets.exchange import MOMENT, is_torch_file, read_counts, read_masks, write_masks
from neurons.neuron_sets.neuron_set import load_neuron_set, neuron_set
from neurons.statistics.statistics import load_statistics, merge, subtract

LANGUAGES = ("en", "zh", "sw")
WIDTH = 11


def indices(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


# Two languages share neuron 10 of layer 2; sw has none at all.
MASKS = [
    [indices(0, 3, 10), indices(), indices(7, 10)],
    [indices(), indices(1), indices(2, 4, 10)],
    [indices(), indices(), indices()],
]


@pytest.fixture
def masks(tmp_path):
    def written(content=MASKS, name="masks.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return written


def same(one, other):
    assert [len(layers) for layers in one] == [len(layers) for layers in other]
    for layers, others in zip(one, other, strict=True):
        for a, b in zip(layers, others, strict=True):
            assert a.dtype == b.dtype == torch.int64
            assert a.tolist() == b.tolist()


def test_masks_become_a_neuron_set(masks):
    path = masks()
    found = read_masks(path, LANGUAGES, WIDTH)
    assert found.languages == LANGUAGES
    assert (found.layers, found.neurons) == (3, WIDTH)
    assert found.of("en").tolist() == [[0, 0], [0, 3], [0, 10], [2, 7], [2, 10]]
    assert found.of("zh").tolist() == [[1, 1], [2, 2], [2, 4], [2, 10]]
    assert found.empty_languages == ("sw",)
    assert found.scores["en"].tolist() == [0.0] * 5
    assert found.kind_counts("en") == {"specific": 4, "related": 1, "general": 0}
    assert found.metadata["method"] == "foreign masks"
    assert found.metadata["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "fingerprint" not in found.metadata


def test_masks_come_back_as_they_were(masks, tmp_path):
    found = read_masks(masks(), LANGUAGES, WIDTH)
    found.save(tmp_path / "set")
    write_masks(load_neuron_set(tmp_path / "set"), tmp_path / "back.pth")
    same(torch.load(tmp_path / "back.pth", weights_only=True), MASKS)
    write_masks(found, tmp_path / "again.pth")
    assert (tmp_path / "back.pth").read_bytes() == (tmp_path / "again.pth").read_bytes()


@pytest.mark.parametrize("seed", range(5))
def test_random_masks_come_back(masks, tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    content = [
        [(torch.rand(50, generator=generator) < rate).nonzero()[:, 0] for _ in range(4)]
        for rate in (0.3, 0.0, 0.05, 1.0)
    ]
    write_masks(read_masks(masks(content), "abcd", 50), tmp_path / "back.pth")
    same(torch.load(tmp_path / "back.pth", weights_only=True), content)


def test_a_written_file_holds_no_more_than_its_indices(tmp_path):
    rows = torch.stack([torch.arange(40) % 20, torch.arange(40) // 20], dim=1)
    write_masks(neuron_set({"en": rows}, {"en": torch.zeros(40)}, 20, 2, {}), tmp_path / "m.pth")
    back = torch.load(tmp_path / "m.pth", weights_only=True)
    assert all(layer.untyped_storage().nbytes() == 8 * len(layer) == 16 for layer in back[0])


def test_what_other_writers_do_is_read(masks):
    unsorted = [[torch.tensor([5, 1], dtype=torch.int32), torch.tensor([])], (indices(2), torch.tensor([]))]
    found = read_masks(masks(unsorted), ["en", "zh"], WIDTH)
    assert found.of("en").tolist() == [[0, 1], [0, 5]]
    assert found.of("zh").tolist() == [[0, 2]]


# name -> (content, languages, what the sentence says)
BAD_MASKS = {
    "a tensor": (torch.zeros(3), LANGUAGES, "list of languages.*a tensor"),
    "a dictionary": ({"en": MASKS[0]}, LANGUAGES, "dictionary of en"),
    "nothing": ([], LANGUAGES, "a list of 0"),
    "one level too few": ([indices(1), indices(2), indices(3)], LANGUAGES, "list of 3 .Tensor"),
    "one level too many": ([[[indices(1)]]] * 3, LANGUAGES, "language 'en', layer 0.*a list of 1"),
    "lists of numbers": ([[[1, 2]]] * 3, LANGUAGES, "language 'en', layer 0.*a list of 2"),
    "a matrix": ([[torch.ones(2, 2, dtype=torch.int64)]] * 3, LANGUAGES, r"a tensor \[2, 2\]"),
    "floats": ([[torch.tensor([1.0, 2.0])]] * 3, LANGUAGES, "'en', layer 0.*integers, but these are float32"),
    "booleans": ([[torch.ones(5, dtype=torch.bool)]] * 3, LANGUAGES, "integers, but these are bool"),
    "sparse": ([[torch.ones(5, dtype=torch.int64).to_sparse()]] * 3, LANGUAGES, "a tensor"),
    "negative": ([[indices(0)], [indices(-1)], [indices(0)]], LANGUAGES, "'zh', layer 0: neuron -1 is neg"),
    "too large": ([[indices(), indices(3, 11)]] * 3, LANGUAGES, "layer 1: neuron 11 is outside.*11"),
    "too many": ([[torch.arange(12)]] * 3, LANGUAGES, "12 neurons, but a layer has 11"),
    "twice": ([[indices(3, 4, 3)]] * 3, LANGUAGES, "neuron 3 is named twice"),
    "too few names": (MASKS, ["en", "zh"], "has 3 languages, but 2 .*en, zh"),
    "too many names": (MASKS, [*LANGUAGES, "fr"], "has 3 languages, but 4"),
    "a name twice": (MASKS, ["en", "zh", "en"], "'en' is named twice"),
    "an empty name": (MASKS, ["en", "", "zh"], "empty name"),
    "uneven layers": ([MASKS[0], MASKS[1][:2], MASKS[2]], LANGUAGES, "en 3, zh 2, sw 3"),
    "no layers": ([[], [], []], LANGUAGES, "number of layers"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_what_is_no_mask_file_is_refused(masks, name):
    content, languages, said = BAD_MASKS[name]
    with pytest.raises(BrocaError, match=said) as refusal:
        read_masks(masks(content), languages, WIDTH)
    assert "\n" not in str(refusal.value)


def test_layers_without_neurons_are_refused(masks):
    with pytest.raises(UsageError, match="width is 0"):
        read_masks(masks(), LANGUAGES, 0)


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path, zipped):
    trap = tmp_path / "trap"
    for place, content in enumerate(
        ([[Malicious(trap)]], {"n": Malicious(trap), "over_zero": torch.ones(1, 1)})
    ):
        path = tmp_path / f"{place}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            BrocaError, match=re.escape(f"{path}: not a torch file of plain tensors")
        ) as refusal:
            read_masks(path, ["en"], WIDTH)
        assert "\n" not in str(refusal.value)
        with pytest.raises(BrocaError, match="nothing in it was run"):
            read_counts({"en": path})
        assert not trap.exists()
        # The trap is one: a reader that trusts the file would make it.
        torch.load(path, weights_only=False)
        assert trap.exists()
        trap.rmdir()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 and no more", b"\x80\x02", b"plain text\n", b"\0" * 100]
)
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(BrocaError, match=r"x\.pth: not a torch file"):
        read_masks(path, ["en"], WIDTH)
    with pytest.raises(BrocaError, match="no such file"):
        read_masks(tmp_path / "none.pth", ["en"], WIDTH)


def test_torch_files_are_told_from_ours(masks, tmp_path):
    assert is_torch_file(masks())
    torch.save(MASKS, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert is_torch_file(tmp_path / "old")
    # A header of 0x80 or 0x4b50 bytes would begin as theirs do.
    for length in (b"\x80\0", b"PK"):
        (tmp_path / "ours").write_bytes(length + b"\0" * 6 + b'{"x":1}')
        assert not is_torch_file(tmp_path / "ours")
    save_artifact(tmp_path / "real", "neurons", {"x": torch.ones(1)}, {})
    assert not is_torch_file(tmp_path / "real")
    with pytest.raises(BrocaError, match="no such file"):
        is_torch_file(tmp_path / "none")


def counts(tmp_path, name="en.pth", **content):
    torch.save(content, tmp_path / name)
    return tmp_path / name


COUNT = torch.tensor([[0, 5, 100], [1, 2, 3]], dtype=torch.int32)


def test_counts_become_statistics(tmp_path):
    paths = {
        "en": counts(tmp_path, n=100, over_zero=COUNT),
        "zh": counts(tmp_path, "zh.pth", total_tokens=torch.tensor(300), over_zero=COUNT.float() * 3),
    }
    found = read_counts(paths)
    assert found.languages == ("en", "zh")
    assert found.tokens.tolist() == [100, 300]
    assert found.texts.tolist() == [0, 0]
    assert found.tokens.dtype == found.texts.dtype == torch.int64
    assert found.moments[MOMENT].dtype == torch.int64
    for layer in range(2):
        for neuron in range(3):
            number = int(COUNT[layer, neuron])
            assert found.moments[MOMENT][layer, neuron].tolist() == [number, 3 * number]
    assert (found.fingerprint, found.routed) == ("", None)
    assert found.metadata["method"] == "foreign counts"
    digests = {k: hashlib.sha256(path.read_bytes()).hexdigest() for k, path in paths.items()}
    assert found.metadata["files"] == digests
    found.save(tmp_path / "s")
    again = load_statistics(tmp_path / "s")
    assert torch.equal(again.moments[MOMENT], found.moments[MOMENT])
    assert again.metadata["files"] == digests


def test_one_file_does_not_count_twice(tmp_path):
    found = read_counts({"en": counts(tmp_path, n=100, over_zero=COUNT)})
    other = read_counts({"en": counts(tmp_path, "b.pth", n=101, over_zero=COUNT)})
    assert merge(found, other).tokens.tolist() == [201]
    with pytest.raises(UsageError, match="twice"):
        merge(found, found)


def test_what_follows_a_prefix(tmp_path):
    whole = read_counts({"en": counts(tmp_path, n=100, over_zero=COUNT)})
    prefix = torch.tensor([[0, 2, 60], [4, 0, 3]])
    rest = subtract(whole, read_counts({"en": counts(tmp_path, "p.pth", n=60, over_zero=prefix)}))
    assert rest.tokens.tolist() == [40]
    assert rest.moments[MOMENT][..., 0].tolist() == [[0, 3, 40], [0, 2, 0]]


# name -> (content, what the sentence says)
BAD_COUNTS = {
    "a list": ([1, COUNT], "dictionary, but this is a list of 2"),
    "no tokens": ({"over_zero": COUNT}, "has over_zero and n or total_tokens, but this has over_zero"),
    "no counts": ({"n": 100}, "but this has n"),
    "two numbers of tokens": ({"n": 100, "total_tokens": 101, "over_zero": COUNT}, "n is 100, but total_tok"),
    "tokens of a float": ({"n": 100.0, "over_zero": COUNT}, "n is a number of tokens"),
    "tokens of a truth": ({"n": True, "over_zero": COUNT}, "n is a number of tokens"),
    "none": ({"n": 0, "over_zero": COUNT * 0}, "over 0 tokens"),
    "a vector": ({"n": 100, "over_zero": COUNT[0]}, r"layers x neurons, but this is a tensor \[3\]"),
    "empty": ({"n": 100, "over_zero": COUNT[:, :0]}, r"tensor \[2, 0\]"),
    "lists": ({"n": 100, "over_zero": COUNT.tolist()}, "layers x neurons"),
    "above n": ({"n": 99, "over_zero": COUNT}, "count 100 of neuron 2 in layer 0 is more than its 99"),
    "negative": ({"n": 100, "over_zero": -COUNT}, "count -5 of neuron 1 in layer 0 is negative"),
    "not a number": ({"n": 100, "over_zero": COUNT / torch.tensor(0)}, "nan of neuron 0 in layer 0"),
    "a half": ({"n": 100, "over_zero": COUNT.float() / 2}, "2.5 of neuron 1 in layer 0 is not a whole"),
    "truths": ({"n": 100, "over_zero": COUNT > 0}, "holds bool"),
    "rounded": ({"n": 2**26, "over_zero": torch.full((1, 1), 2.0**24)}, "float32.* 16777216"),
    "half floats": ({"n": 5000, "over_zero": torch.full((1, 1), 4096.0).half()}, "from 2048"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_COUNTS)
def test_what_is_no_count_file_is_refused(tmp_path, name):
    content, said = BAD_COUNTS[name]
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(BrocaError, match=said) as refusal:
        read_counts({"en": tmp_path / "c.pth"})
    assert "\n" not in str(refusal.value)


def test_floats_below_the_limit_are_exact(tmp_path):
    exact = torch.tensor([[2.0**24 - 1, 2.0**23 + 1]])
    found = read_counts({"en": counts(tmp_path, n=2**25, over_zero=exact)})
    assert found.moments[MOMENT][..., 0].tolist() == [[2**24 - 1, 2**23 + 1]]
    double = torch.tensor([[2.0**24 + 1]], dtype=torch.float64)
    found = read_counts({"en": counts(tmp_path, n=2**25, over_zero=double)})
    assert found.moments[MOMENT].item() == 2**24 + 1


def test_counts_of_other_shapes_are_refused(tmp_path):
    one = counts(tmp_path, n=100, over_zero=COUNT)
    other = counts(tmp_path, "zh.pth", n=100, over_zero=COUNT.T.contiguous())
    with pytest.raises(UsageError, match=r"zh\.pth: counts of 3 x 2 neurons for 'zh', but 2 x 3 for 'en'"):
        read_counts({"en": one, "zh": other})
    with pytest.raises(UsageError, match="no language"):
        read_counts({})
