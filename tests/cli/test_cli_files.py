"""The commands without a model: convert, compare, plot, merge and inspect."""

import json

import pytest
import torch
from commands import one_sentence

from neurons.files.artifact import save_artifact
from neurons.neuron_sets.neuron_set import load_neuron_set, neuron_set
from neurons.statistics.statistics import Statistics, load_statistics

LAYERS, WIDTH = 2, 8


def rows(*pairs):
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def saved_neurons(path, members, experts=1, **metadata):
    scores = {k: torch.arange(len(v), dtype=torch.float64) for k, v in members.items()}
    metadata = {
        "method": "lape",
        "model": "m",
        "fingerprint": "f",
        "settings": {"top_rate": 0.01},
        **metadata,
    }
    if experts > 1:
        metadata["experts"] = experts
    neuron_set(members, scores, LAYERS, WIDTH, metadata).save(path)
    return path


def saved_statistics(path, languages=("en", "fr"), tokens=10, experts=0, digest="d"):
    positive = torch.arange(LAYERS * WIDTH * len(languages)).reshape(LAYERS, WIDTH, len(languages)) % (
        tokens + 1
    )
    routed = None
    if experts:
        routed = torch.full((LAYERS, experts, len(languages)), tokens)
    count = torch.full((len(languages),), tokens)
    metadata = {"model": "m", "settings": {"block": 128}, "corpora": [{"digest": digest}]}
    moments = {"mlp_act:positive": positive}
    Statistics(tuple(languages), count, count // 5, moments, "f", routed, metadata=metadata).save(path)
    return path


@pytest.fixture
def files(tmp_path):
    """A file of each kind, by name."""
    torch.save(
        [[torch.tensor([1, 3]), torch.tensor([7])], [torch.tensor([3]), torch.tensor([])]], tmp_path / "m.pth"
    )
    for k, (language, count) in enumerate({"en": 100, "zh": 200}.items()):
        over_zero = torch.arange(LAYERS * WIDTH).reshape(LAYERS, WIDTH) + k
        torch.save({"n": count, "over_zero": over_zero}, tmp_path / f"{language}.pth")
        torch.save({"n": 40, "over_zero": over_zero // 2}, tmp_path / f"prefix-{language}.pth")
    first = {"en": rows((0, 1), (0, 2), (1, 5)), "fr": rows((0, 2)), "zh": rows()}
    second = {"en": rows((0, 1), (1, 5), (1, 6)), "fr": rows((1, 1)), "sw": rows((1, 7))}
    saved_neurons(tmp_path / "first", first)
    saved_neurons(tmp_path / "second", second)
    saved_neurons(tmp_path / "other", second, fingerprint="g")
    saved_neurons(tmp_path / "experts", first, experts=2)
    saved_statistics(tmp_path / "statistics")
    saved_statistics(tmp_path / "more", digest="e")
    saved_statistics(tmp_path / "routed", experts=2)
    save_artifact(tmp_path / "direction", "direction", {}, {})
    (tmp_path / "text").write_text("no file of ours\n")
    return tmp_path


def test_masks_to_neurons_and_back(broca, files):
    status, out, err = broca(
        "convert", files / "m.pth", "--languages", "en,zh", "--width", WIDTH, "--out", files / "n.safetensors"
    )
    assert status == 0, err
    assert out.strip().splitlines()[-1] == str(files / "n.safetensors")
    neurons = load_neuron_set(files / "n.safetensors")
    assert neurons.of("en").tolist() == [[0, 1], [0, 3], [1, 7]]
    assert neurons.of("zh").tolist() == [[0, 3]]

    status, out, _ = broca("convert", files / "n.safetensors", "--out", files / "back.pth")
    assert status == 0
    assert "en, zh" in out
    assert out.strip().splitlines()[-1] == str(files / "back.pth")
    back = torch.load(files / "back.pth", weights_only=True)
    assert [[layer.tolist() for layer in layers] for layers in back] == [[[1, 3], [7]], [[3], []]]

    status, out, err = broca("convert", files / "n.safetensors", "--out", files / "back.pth", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["languages"] == ["en", "zh"]
    assert json.loads(out)["width"] == WIDTH


def test_counts_to_statistics(broca, files):
    counts = [f"en={files / 'en.pth'}", f"zh={files / 'zh.pth'}"]
    status, out, err = broca("convert", *counts, "--out", files / "s.safetensors", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["tokens"] == {"en": 100, "zh": 200}
    whole = load_statistics(files / "s.safetensors")
    assert whole.moments["mlp_act:positive"][1, 2].tolist() == [10, 11]

    # In another order than the counts.
    prefixes = [f"--subtract={k}={files / f'prefix-{k}.pth'}" for k in ("zh", "en")]
    status, out, _ = broca("convert", *counts, *prefixes, "--out", files / "s.safetensors")
    assert status == 0
    assert out.strip().splitlines()[-1] == str(files / "s.safetensors")
    rest = load_statistics(files / "s.safetensors")
    assert rest.languages == ("en", "zh")
    assert rest.tokens.tolist() == [60, 160]
    assert rest.moments["mlp_act:positive"][1, 2].tolist() == [5, 6]
    assert set(rest.metadata["subtracted_files"]) == {"en", "zh"}
    assert broca("plot", files / "s.safetensors", "--out", files / "s.svg")[0] == 0
    assert broca("inspect", files / "s.safetensors")[0] == 0


def test_a_path_with_an_equals_sign_is_a_path(broca, files):
    (files / "a=b").mkdir()
    (files / "a=b" / "m.pth").write_bytes((files / "m.pth").read_bytes())
    status, _, err = broca(
        "convert", files / "a=b" / "m.pth", "--languages", "en,zh", "--width", 8, "--out", files / "n"
    )
    assert status == 0, err


def test_compare_shows_and_draws(broca, files):
    status, out, err = broca("compare", files / "first", files / "second", "--plot", files / "o.png")
    assert status == 0
    assert "first: zh left out" in err and "second: sw left out" in err
    assert out.strip().splitlines()[-1] == str(files / "o.png")
    assert (files / "o.png").read_bytes().startswith(b"\x89PNG")
    assert "Jaccard" in out and out.count("┏") == 1 and "0.6667" not in out
    # Both have (0, 1) and (1, 5) of en, of the six that either has.
    (row,) = [line for line in out.splitlines() if line.startswith("│ first")]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["first", "second", *"442", "0.3333", "-"]

    status, out, _ = broca("compare", files / "first", files / "second", "--details")
    assert status == 0 and "0.6667" in out and "Jaccard of languages within second" in out

    status, out, _ = broca("compare", files / "first", files / "second", "--json")
    compared = json.loads(out)
    assert status == 0
    assert compared["languages"] == ["en", "fr"]
    assert compared["left_out"] == {"first": ["zh"], "second": ["sw"]}
    assert compared["sizes"] == [[3, 1], [3, 1]]
    (pair,) = compared["pairs"]
    assert pair["jaccard"] == [0.5, 0.0]
    assert pair["overall_jaccard"] == 2 / 6 and pair["mean_rank_correlation"] is None
    assert pair["first_in_second"] == [2 / 3, 0.0]
    assert pair["rank_correlation"] == [None, None]
    assert pair["by_layer"] == [[0.5, 0.5], [0.0, 0.0]]
    assert compared["across"][0][0][0] == [1.0, 1 / 3]


def test_files_of_one_name_are_told_apart(broca, files):
    (files / "d").mkdir()
    (files / "d" / "first").write_bytes((files / "first").read_bytes())
    status, out, _ = broca("compare", files / "first", files / "d" / "first", files / "second", "--json")
    assert status == 0
    assert json.loads(out)["sets"] == [str(files / name) for name in ("first", "d/first", "second")]


@pytest.mark.parametrize(
    ("file", "what", "drawn"),
    [
        ("first", None, "layers"),
        ("first", "overlap", "overlap"),
        ("statistics", None, "entropy"),
        ("routed", None, "entropy"),
        ("routed", "routing", "routing"),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_draws_every_picture(broca, files, file, what, drawn, suffix):
    picture = files / f"p.{suffix}"
    options = [] if what is None else ["--what", what]
    status, out, err = broca("plot", files / file, *options, "--out", picture)
    assert status == 0, err
    assert out.strip() == str(picture)
    before = picture.read_bytes()
    status, out, err = broca("plot", files / file, *options, "--out", picture, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["what"] == drawn
    assert picture.read_bytes() == before


def test_merge_adds_up(broca, files):
    saved_statistics(files / "swahili", ["sw"], tokens=7, digest="s")
    out_file = files / "merged"
    status, out, err = broca(
        "merge", files / "statistics", files / "more", files / "swahili", "--out", out_file
    )
    assert status == 0, err
    assert out.strip().splitlines()[-1] == str(out_file)
    merged = load_statistics(out_file)
    assert merged.languages == ("en", "fr", "sw")
    assert merged.tokens.tolist() == [20, 20, 7]
    single = load_statistics(files / "statistics").moments["mlp_act:positive"]
    assert torch.equal(merged.moments["mlp_act:positive"][..., :2], 2 * single)
    status, out, _ = broca("merge", files / "statistics", files / "more", "--out", out_file, "--json")
    assert json.loads(out)["tokens"] == {"en": 20, "fr": 20}


def test_inspect_shows_statistics(broca, files):
    status, out, err = broca("inspect", files / "routed")
    assert status == 0, err
    assert "mlp_act:positive" in out and "int64" in out and "2 experts" in out and "block 128" in out
    status, out, err = broca("inspect", files / "routed", "--json")
    assert (status, err) == (0, "")
    shown = json.loads(out)
    assert shown["tokens"] == {"en": 10, "fr": 10}
    assert shown["texts"] == {"en": 2, "fr": 2}
    assert shown["moments"] == {"mlp_act:positive": {"shape": [2, 8, 2], "dtype": "int64"}}
    assert (shown["experts"], shown["fingerprint"], shown["kind"]) == (2, "f", "statistics")


def test_inspect_counts_kinds_and_names_experts(broca, files):
    status, out, err = broca("inspect", files / "experts")
    assert status == 0, err
    assert "specific" in out and "2 experts" in out
    # Neuron 5 of 8 in two experts.
    assert "(1, 1)" in out
    shown = json.loads(broca("inspect", files / "experts", "--json")[1])
    assert shown["kinds"]["en"] == {"specific": 2, "related": 1, "general": 0}
    assert shown["members"]["en"] == [[0, 1], [0, 2], [1, 5]]
    assert shown["scores"]["en"] == [0.0, 1.0, 2.0]
    assert shown["member_kinds"]["en"].count("specific") == 2
    assert shown["expert_members"]["en"] == [[0, 0, 1], [0, 0, 2], [1, 1, 1]]
    dense = json.loads(broca("inspect", files / "first", "--json")[1])
    assert "expert_members" not in dense


# name -> (arguments from the files, exit status, value in the message)
REFUSALS = {
    "masks without names": (lambda f: ["convert", f / "m.pth", "--width", "8"], 2, "--languages"),
    "masks without width": (lambda f: ["convert", f / "m.pth", "--languages", "en,zh"], 2, "--width"),
    "too few names": (
        lambda f: ["convert", f / "m.pth", "--languages", "en", "--width", "8"], 2, "2 languages"),
    "too small a width": (
        lambda f: ["convert", f / "m.pth", "--languages", "en,zh", "--width", "7"], 2, "neuron 7"),
    "masks and counts": (lambda f: ["convert", f / "m.pth", f"en={f / 'en.pth'}"], 2, "LANGUAGE=FILE"),
    "two masks": (
        lambda f: ["convert", f / "m.pth", f / "m.pth", "--languages", "en,zh", "--width", "8"], 2, "2 files"),
    "counts as masks": (
        lambda f: ["convert", f / "en.pth", "--languages", "en", "--width", "8"], 1, "dictionary"),
    "masks as counts": (lambda f: ["convert", f"en={f / 'm.pth'}"], 1, "dictionary"),
    "counts with a width": (lambda f: ["convert", f"en={f / 'en.pth'}", "--width", "8"], 2, "--width"),
    "a language twice": (
        lambda f: ["convert", f"en={f / 'en.pth'}", f"en={f / 'zh.pth'}"], 2, "'en'"),
    "counts of no language": (lambda f: ["convert", f"={f / 'en.pth'}"], 2, "not LANGUAGE=FILE"),
    "half a prefix": (
        lambda f: ["convert", f"en={f / 'en.pth'}", f"zh={f / 'zh.pth'}", "--subtract", f"en={f / 'en.pth'}"],
        2, "--subtract of en"),
    "a prefix of no language": (
        lambda f: ["convert", f"en={f / 'en.pth'}", "--subtract", f / "en.pth"], 2, "not LANGUAGE=FILE"),
    "a prefix of masks": (
        lambda f: ["convert", f / "m.pth", "--languages", "en,zh", "--width", "8", "--subtract", "en=x"],
        2, "--subtract"),
    "neurons with names": (lambda f: ["convert", f / "first", "--languages", "en"], 2, "--languages"),
    "one set": (lambda f: ["compare", f / "first"], 2, "two"),
    "a picture of another kind": (
        lambda f: ["compare", f / "first", f / "second", "--plot", f / "p.pdf"], 2, ".png or .svg"),
    "entropy of neurons": (lambda f: ["plot", f / "first", "--what", "entropy"], 2, "--what entropy"),
    "layers of statistics": (lambda f: ["plot", f / "statistics", "--what", "layers"], 2, "--what layers"),
    "routing without experts": (
        lambda f: ["plot", f / "statistics", "--what", "routing"], 2, "experts"),
    "a neuron set's model": (lambda f: ["compare", f / "first", f / "second", "--model", "m"], 2, "--model"),
    "one file": (lambda f: ["merge", f / "statistics"], 2, "two"),
    "the same file twice": (lambda f: ["merge", f / "statistics", f / "statistics"], 2, "statistics"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_gets_one_sentence(broca, files, name):
    arguments, expected_status, value = REFUSALS[name]
    given = [str(argument) for argument in arguments(files)]
    out = files / "result.png"
    if given[0] != "compare":
        given += ["--out", str(out)]
    status, _, err = broca(*given)
    assert status == expected_status, err
    assert value in one_sentence(err)
    assert not out.exists() and not (files / "p.pdf").exists()


def test_a_picture_of_no_known_kind_is_refused_before_any_file_is_read(broca, files):
    status, _, err = broca("plot", files / "text", "--out", files / "p.gif")
    assert status == 2
    assert ".png or .svg" in one_sentence(err)


def test_a_file_that_would_run_code_is_refused(broca, files):
    trap = files / "trap"

    class Malicious:
        def __reduce__(self):
            import os

            return os.mkdir, (str(trap),)

    torch.save([[Malicious()]], files / "bad.pth")
    for given in (
        ["convert", files / "bad.pth", "--languages", "en", "--width", "8"],
        ["convert", f"en={files / 'bad.pth'}"],
    ):
        status, _, err = broca(*given, "--out", files / "out")
        assert status == 1
        assert "nothing in it was run" in one_sentence(err)
        assert not trap.exists() and not (files / "out").exists()
