"""Taking directions: recorded texts, length, neutral mean, winsorising, files and the command, against loops."""

import json
from dataclasses import replace
from itertools import product

import models
import numpy
import pytest
import torch
from conversations import counted_by_hand, said, written

from cli.direction import command
from editing.directions.diffmean import diffmean_direction
from editing.directions.direction import Direction, load_direction
from editing.directions.estimation import direction_of
from editing.directions.length import along, into, unit, without_neutral
from editing.directions.recorded import record_texts
from editing.directions.registry import METHODS
from editing.directions.winsorise import winsorise
from editing.methods.steer2edit import steer2edit_plan
from neurons.errors import BrocaError, UsageError
from neurons.files.artifact import artifact_bytes
from neurons.models.memory import LIBRARIES, forward_bytes, sizes_of
from neurons.models.source import load_model
from neurons.text.batches import language_batches
from neurons.text.corpus import Corpus, read_corpus

SITES = ("attn_out", "mlp_out", "block_out")
BY_TEXT = [name for name, method in METHODS.items() if "text" in method.needs and not method.autoencoders]


@pytest.fixture(scope="module")
def parallel():
    """Line-parallel texts of very different lengths; one line is blank in one language."""
    texts = {language: tuple(models.sentences(language, 9, 3, (1, 9))) for language in models.LANGUAGES}
    texts["qaa"] = (*texts["qaa"][:4], "", *texts["qaa"][5:])
    return Corpus(texts, "digest", "all")


@pytest.fixture(scope="module")
def naive(llama, parallel):
    """language -> line -> site -> [L, d], each text's mean, by a model written out by hand."""
    found = {}
    for language, texts in parallel.texts.items():
        found[language] = {}
        for line, text in enumerate(texts):
            if text:
                ids = [0, *llama.tokenizer(text, add_special_tokens=False)["input_ids"]]
                _, layers = models.naive_llama(llama.model, ids)
                found[language][line] = {
                    site: torch.stack([layer[site][1:].detach().mean(0) for layer in layers])
                    for site in (*SITES, "attn_in", "mlp_in")
                }
    return found


@pytest.fixture(scope="module")
def taken(llama, parallel):
    """method -> its direction with no option."""
    return {name: direction_of(llama, parallel, "qaa", "qab", name) for name in BY_TEXT}


def close(found, expected, rtol=1e-3, atol=1e-4):
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)


def test_recorded_texts_are_the_means_of_their_tokens(llama, parallel, naive):
    told = []
    recorded = record_texts(llama, language_batches(llama, parallel), told.append)
    assert recorded.texts == {"qaa": 8, "qab": 9, "qac": 9}
    assert sum(told) == int(recorded.tokens.sum())
    for language, lines in naive.items():
        assert recorded.lines[language].tolist() == sorted(lines)
        for place, line in enumerate(sorted(lines)):
            for site in SITES:
                close(recorded.outputs[language][site][place], lines[line][site])
        for site in (*SITES, "attn_in", "mlp_in"):
            close(recorded.mean(site, language), sum(of[site] for of in lines.values()) / len(lines))
    places = recorded.common("qaa", "qab")
    assert [recorded.lines["qaa"][places[0]].tolist(), recorded.lines["qab"][places[1]].tolist()] == [
        [0, 1, 2, 3, 5, 6, 7, 8]
    ] * 2


def test_more_texts_than_memory_holds_are_refused(llama, parallel, monkeypatch):
    batches, sizes = language_batches(llama, parallel), sizes_of(llama)
    kept = 4 * 3 * 3 * 64 * 26  # float32, three layers and sites, of 8 + 9 + 9 texts
    largest = max(batch.ids.numel() for of_language in batches.values() for batch in of_language)
    limit = LIBRARIES + sizes.weights + forward_bytes(sizes, largest) + kept
    monkeypatch.setattr("neurons.models.memory._limit", limit)
    record_texts(llama, batches)
    monkeypatch.setattr("neurons.models.memory._limit", limit - 1)
    with pytest.raises(UsageError, match=r"26 texts .* at most 8 texts of each"):
        record_texts(llama, batches)


def test_a_mixture_is_recorded_too(checkpoint_of, parallel):
    mixture = load_model(str(checkpoint_of("mixtral")), device="cpu")
    plain = diffmean_direction(mixture, parallel, "qaa", "qab")
    found = direction_of(mixture, parallel, "qaa", "qab", "pca")
    for site, means in plain.input_means.items():
        assert torch.equal(found.input_means[site], means)
    assert found.vectors["mlp_out"].shape == plain.vectors["mlp_out"].shape


@pytest.mark.parametrize("method", BY_TEXT)
def test_every_method_serves_every_edit(llama, taken, method):
    found = taken[method]
    plan = steer2edit_plan(llama, found, range(3), 0.01, 0.01, 0.0)
    assert {(edit.layer, edit.block) for edit in plan.edits} == set(product(range(3), ("attn", "mlp")))
    for site in SITES:
        assert found.vectors[site].shape == (3, 64)
        assert found.vectors[site].dtype == torch.float64
        assert torch.isfinite(found.vectors[site]).all()
        # To the target: the vector goes the way the means go.
        products = (found.vectors[site] * taken["diffmean"].vectors[site]).sum(1)
        assert (products > 0).all()
        # As far as DiffMean goes along it and no farther.
        torch.testing.assert_close(products, found.vectors[site].square().sum(1), rtol=1e-6, atol=1e-9)
    for site, width in (("attn_in", 64), ("mlp_in", 48)):
        assert found.input_means[site].shape == (3, width)
        assert torch.equal(found.input_means[site], taken["diffmean"].input_means[site])
    assert found.metadata["method"] == method


@pytest.mark.parametrize("in_rows", [False, True])
def test_diffmean_stays_as_it_is(llama, parallel, tmp_path, in_rows):
    if in_rows:  # of a text in several rows, each row counts as a text
        long = " ".join(models.sentences("qaa", 70, 4, (8, 9)))
        parallel = replace(parallel, texts={**parallel.texts, "qaa": (long, *parallel.texts["qaa"][1:])})
    found, plain = (
        direction_of(llama, parallel, "qaa", "qab"),
        diffmean_direction(llama, parallel, "qaa", "qab"),
    )
    found.save(tmp_path / "found")
    plain.save(tmp_path / "plain")
    assert (tmp_path / "found").read_bytes() == (tmp_path / "plain").read_bytes()
    # The pass that keeps texts apart sums the same numbers.
    clipped_nowhere = direction_of(llama, parallel, "qaa", "qab", winsorised=1.0)
    for site, vectors in plain.vectors.items():
        close(clipped_nowhere.vectors[site], vectors, 1e-6, 1e-6)


@pytest.mark.parametrize("site", SITES)
def test_pca_reads_the_lines_that_both_have(taken, naive, site):
    lines = sorted(set(naive["qaa"]) & set(naive["qab"]))
    for layer in range(3):
        rows = numpy.array(
            [(naive["qab"][line][site][layer] - naive["qaa"][line][site][layer]).tolist() for line in lines]
        )
        second = sum(numpy.outer(row, row) for row in rows)
        values, vectors = numpy.linalg.eigh(second)
        line = torch.from_numpy(vectors[:, -1])
        delta = torch.stack([of[site][layer] for of in naive["qab"].values()]).mean(0)
        delta = delta - torch.stack([of[site][layer] for of in naive["qaa"].values()]).mean(0)
        close(taken["pca"].vectors[site][layer], (line @ delta) * line, 1e-2, 1e-3)
        explained = taken["pca"].metadata["measures"][site]["explained"][layer]
        assert explained == pytest.approx(values[-1] / values.sum(), rel=1e-3)


def test_subspaces(taken, llama, parallel, tmp_path):
    shift, language = taken["low-rank-shift"], taken["language-subspace"]
    assert language.subspaces["block_out"].shape == (3, 64, 2)
    for found in (shift, language):
        for site in SITES:
            for layer in range(3):
                basis = found.subspace(site, layer)
                rank = found.metadata["measures"][site]["rank"][layer]
                torch.testing.assert_close(basis.T @ basis, torch.eye(rank).double())
                padded = found.subspaces[site][layer]
                torch.testing.assert_close(padded @ padded.T, basis @ basis.T)
                delta = taken["diffmean"].vectors[site][layer]
                torch.testing.assert_close(
                    found.vectors[site][layer], into(basis, delta), rtol=1e-5, atol=1e-6
                )
        found.save(tmp_path / "direction")
        read = load_direction(tmp_path / "direction")
        assert read.subspaces.keys() == found.subspaces.keys()
        for site, bases in found.subspaces.items():
            assert torch.equal(read.subspaces[site], bases)
        assert read.metadata["measures"] == found.metadata["measures"]
    for site, (first, last) in shift.metadata["window"].items():
        assert (site in SITES, first, last) == (True, 0, 2)
    with pytest.raises(BrocaError, match="no subspace at block_out"):
        taken["pca"].subspace("block_out", 0)


def test_old_files_still_load_and_strange_ones_are_refused(tmp_path):
    tensors = {"vectors.block_out": torch.ones(1, 2), "input_means.mlp_in": torch.ones(1, 3)}
    fields = {"source": "en", "target": "fr"}
    (tmp_path / "old").write_bytes(artifact_bytes("direction", tensors, fields))
    assert load_direction(tmp_path / "old").subspaces == {}
    (tmp_path / "odd").write_bytes(artifact_bytes("direction", {"scores.x": torch.ones(1)}, fields))
    with pytest.raises(BrocaError, match=r"scores\.x"):
        load_direction(tmp_path / "odd")


def test_length_of_lines_subspaces_and_units():
    line, delta = torch.tensor([0.6, 0.8]).double(), torch.tensor([-5.0, 0.0]).double()
    torch.testing.assert_close(along(line, delta), torch.tensor([-1.8, -2.4]).double())
    torch.testing.assert_close(along(-line, delta), along(line, delta))
    torch.testing.assert_close(into(line[:, None], delta), along(line, delta))
    assert unit(delta).tolist() == [-1, 0]
    assert unit(torch.zeros(2)).tolist() == [0, 0]


def test_the_neutral_mean_is_taken_off():
    vector, neutral = torch.tensor([3.0, 4.0, 1.0]).double(), torch.tensor([0.0, 5.0, 0.0]).double()
    assert without_neutral(vector, neutral).tolist() == [3, 0, 1]
    assert without_neutral(vector, torch.zeros(3).double()).tolist() == [3, 4, 1]


@pytest.mark.parametrize("method", ["diffmean", "lda"])
def test_options_of_a_direction(llama, parallel, taken, naive, method):
    found = direction_of(llama, parallel, "qaa", "qab", method, project_neutral=True, unit_length=True)
    for site in SITES:
        for layer in range(3):
            both = [
                torch.stack([of[site][layer] for of in naive[language].values()]).mean(0)
                for language in ("qaa", "qab")
            ]
            neutral = (both[0] + both[1]) / 2
            vector = found.vectors[site][layer]
            assert float(vector.norm()) == pytest.approx(1)
            assert abs(float(vector @ neutral / neutral.norm())) < 1e-4
            plain = taken[method].vectors[site][layer]
            expected = plain - (plain @ neutral) / (neutral @ neutral) * neutral
            close(vector, expected / expected.norm())
    assert found.metadata["settings"]["project_neutral"] is True


def naive_quantile(values, q):
    """Linear between order statistics."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def test_winsorising_clips_each_coordinate():
    values = torch.randn(11, 4, generator=torch.Generator().manual_seed(0)).double()
    values[3, 2] = 1e6
    found = winsorise(values, 0.85)
    for i in range(4):
        column = values[:, i].tolist()
        low, high = naive_quantile(column, 0.15), naive_quantile(column, 0.85)
        expected = torch.tensor([min(max(x, low), high) for x in column], dtype=torch.float64)
        torch.testing.assert_close(found[:, i], expected)
    assert torch.equal(winsorise(values, 1.0), values)
    for quantile in (0.5, 1.1):
        with pytest.raises(UsageError, match="winsorising"):
            winsorise(values, quantile)


def test_winsorised_diffmean(llama, parallel, naive):
    found = direction_of(llama, parallel, "qaa", "qab", winsorised=0.8)
    for site in SITES:
        means = [
            winsorise(torch.stack([of[site][1] for of in naive[language].values()]), 0.8).mean(0)
            for language in ("qaa", "qab")
        ]
        close(found.vectors[site][1], means[1] - means[0])


def test_fewer_tokens(llama, parallel):
    found = direction_of(llama, parallel, "qaa", "qab", tokens=20)
    assert 0 < found.metadata["texts"]["qaa"] < 8
    assert found.metadata["settings"]["most_tokens"] == 20


@pytest.mark.parametrize("method", ["pca", "low-rank-shift"])
def test_refuses_text_that_is_not_parallel(llama, parallel, method):
    texts = {**parallel.texts, "qab": parallel.texts["qab"][:-1]}
    with pytest.raises(UsageError, match=r"parallel text.*qaa 9, qab 8"):
        direction_of(llama, Corpus(texts, "digest", "all"), "qaa", "qab", method)


def test_refuses_parallel_files_without_a_common_line(llama):
    corpus = Corpus({"qaa": ("abe cab", ""), "qab": ("", "high hill")}, "digest", "all")
    with pytest.raises(UsageError, match="no line has a text in 'qaa' and in 'qab'"):
        direction_of(llama, corpus, "qaa", "qab", "pca")


def test_refusals(llama, parallel):
    for arguments, match in (
        (("qaa", "xx"), "'xx'"),
        (("qaa", "qaa"), "both"),
        (("qaa", "qab", "cca"), "unknown"),
    ):
        with pytest.raises(UsageError, match=match):
            direction_of(llama, parallel, *arguments)
    for settings, match in (({"penaltee": 1}, "penaltee"), ({"rank": 1.5}, "'rank'")):
        with pytest.raises(UsageError, match=match):
            direction_of(llama, parallel, "qaa", "qab", "probe", settings=settings)
    with pytest.raises(UsageError, match="whole number"):
        direction_of(llama, parallel, "qaa", "qab", "language-subspace", settings={"rank": 1.5})
    same = Corpus({"qaa": parallel.texts["qaa"], "qab": parallel.texts["qaa"]}, "digest", "all")
    with pytest.raises(BrocaError, match=r"do not differ.*attn_out of layer 0"):
        direction_of(llama, same, "qaa", "qab", "pca")


@pytest.fixture
def run(checkpoint_of, corpus_directory):
    """Call the command; gives what it printed, or raises."""
    from click.testing import CliRunner

    def call(*arguments):
        common = [
            str(checkpoint_of()),
            "--corpus",
            str(corpus_directory),
            "--source",
            "qaa",
            "--target",
            "qab",
        ]
        result = CliRunner().invoke(command, [*common, *map(str, arguments)], standalone_mode=False)
        if result.exception is not None:
            raise result.exception
        return result.output

    return call


def test_command(run, tmp_path):
    out = tmp_path / "direction.safetensors"
    printed = run("--method", "low-rank-shift", "--winsorise", "0.9", "--set", "bootstraps=3", "--out", out)
    for word in ("mass", "stability", "block_out: strongest and most stable in layers 0-2"):
        assert word in printed
    settings = load_direction(out).metadata["settings"]
    assert (settings["winsorised"], settings["bootstraps"], settings["seed"]) == (0.9, 3, 0)
    told = run("--method", "probe", "--tokens", "200", "--json", "--out", out)
    assert "few tokens" in told
    told = json.loads(told[told.index("{") :])
    assert len(told["measures"]["block_out"]["cosine"]) == len(told["norms"]["block_out"]) == 3


def test_command_lists_and_refuses(run, tmp_path):
    listed = run("--method", "list")
    assert all(name in listed for name in METHODS)
    assert set(json.loads(run("--method", "list", "--json"))) == set(METHODS)
    for arguments, match in (
        (("--method", "cca", "--out", tmp_path / "d"), "cca"),
        ((), "--out is missing"),
        (("--set", "x", "--out", tmp_path / "d"), "--set x"),
        (("--method", "sae", "--sae", tmp_path, "--out", tmp_path / "d"), "holds no autoencoder"),
        (("--method", "sae", "--sae", tmp_path, "--sae-layer", 1, "--sae-layer", 2, "--out", tmp_path / "d"),
         "1 --sae and 2"),
        (("--method", "sae", "--out", tmp_path / "d"), "--sae PATH"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=match):
            run(*arguments)


def test_direction_is_made_as_before():
    made = Direction("en", "fr", {}, {}, {})
    assert made.subspaces == {}


@pytest.mark.parametrize("roles", [("before-answer",), ("header", "answer"), ("user",)])
def test_directions_of_conversations_are_means_over_the_tokens_of_the_roles(chatting, tmp_path, roles):
    # The questions are the same in both languages, so a direction of their tokens is 0.
    answers = {"qaa": ("a bad cab", "fed"), "qab": ("high hill", "kill him")}
    questions = ("bad cab", "him")
    pairs = {k: list(zip(questions, of_language, strict=True)) for k, of_language in answers.items()}
    rows = {
        k: [said(("user", q), ("assistant", a)) for q, a in of_language] for k, of_language in pairs.items()
    }
    corpus = read_corpus(written(tmp_path / "text", rows), roles=roles)
    means = {}
    for k, of_language in pairs.items():
        of_texts = []
        for question, answer in of_language:
            pieces = [
                ("template", "<|system|>\nbe good<|end|>\n<|user|>\n"),
                ("user", question),
                ("template", "<|end|>\n<|assistant|>\n"),
                ("answer", answer),
                ("template", "<|end|>\n"),
            ]
            ids, counted = counted_by_hand(chatting.tokenizer, pieces, roles)
            _, layers = models.naive_llama(chatting.model, ids)
            of_texts.append(
                {site: torch.stack([of[site].detach()[counted].mean(0) for of in layers]) for site in SITES}
            )
        means[k] = {site: sum(of[site] for of in of_texts) / len(of_texts) for site in SITES}
    for direction in (
        diffmean_direction(chatting, corpus, "qaa", "qab"),
        direction_of(chatting, corpus, "qaa", "qab", unit_length=False, tokens=1000),
    ):
        for site in SITES:
            close(direction.vectors[site], means["qab"][site] - means["qaa"][site])
            assert bool(direction.vectors[site].abs().max() > 1e-3) == (roles != ("user",))
        assert direction.metadata["corpus"]["roles"] == list(corpus.roles)
