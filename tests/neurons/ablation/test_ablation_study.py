"""The study: planted neurons, matrices against a plain loop, specificity, resuming, and the command."""

import json
import math
import shlex
from dataclasses import replace

import models
import numpy as np
import pytest
import torch
from click.exceptions import Abort
from click.testing import CliRunner

from cli.ablate import command
from neurons.ablation import pictures as ablation_pictures
from neurons.ablation.conditions import UNTOUCHED, Condition, TextLosses, condition_losses
from neurons.ablation.matrix import Changes, bootstrapped, clear_of, largest_is_own, specificity
from neurons.ablation.replacement import Replacement
from neurons.ablation.report import as_markdown
from neurons.ablation.study import Settings, ablation_study, dosed
from neurons.ablation.study_file import study_document, study_of
from neurons.errors import BrocaError, UsageError
from neurons.files.artifact import json_bytes
from neurons.models.source import load_model
from neurons.neuron_sets import pictures
from neurons.neuron_sets.neuron_set import neuron_set
from neurons.recording.corpus_recording import record_corpus
from neurons.text.batches import language_batches
from neurons.text.corpus import read_corpus

OWN = {"qaa": [(0, 1), (1, 5)], "qab": [(0, 9), (2, 3)], "qac": [(1, 11)]}


def set_of(places, layers=3, width=48, scores=None, **metadata):
    members = {k: torch.tensor(rows, dtype=torch.int64).view(-1, 2) for k, rows in places.items()}
    given = scores or {k: torch.arange(len(rows), dtype=torch.float64) for k, rows in members.items()}
    return neuron_set(members, given, layers, width, {"method": "planted", **metadata})


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A llama whose planted neurons, of each language, are all that predicts the language's letters.

    The gate of a planted neuron opens on the embeddings of its language alone, and its value points to
    their output embeddings; all other neurons and the attention write next to nothing.
    """
    model = models.tiny_model("llama", tied=False)
    owner = models.token_languages()
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    mark = {language: basis[:, k] for k, language in enumerate(OWN)}
    goal = {language: basis[:, 10 + k] for k, language in enumerate(OWN)}
    with torch.no_grad():
        embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
        embeddings.mul_(0.05)
        head.mul_(0.05)
        for index, language in enumerate(owner):
            if language is not None:
                embeddings[index] += mark[language]
                head[index] += goal[language]
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
            layer.post_attention_layernorm.weight.fill_(1)
        model.model.norm.weight.fill_(1)
        for language, places in OWN.items():
            for layer, neuron in places:
                mlp = model.model.layers[layer].mlp
                mlp.gate_proj.weight[neuron] = mark[language]
                mlp.up_proj.weight[neuron] = mark[language]
                mlp.down_proj.weight[:, neuron] = 0.1 * goal[language] / len(places)
    directory = models.save_checkpoint(model, tmp_path_factory.mktemp("planted"))
    return load_model(str(directory), device="cpu")


def test_planted_neurons_hurt_their_own_language_alone(planted, corpus):
    study = ablation_study(planted, corpus, {"planted": set_of(OWN)}, Settings(resamples=300))
    (one,) = study.sets
    own = one.own.change.diagonal()
    others = one.own.change[~torch.eye(3, dtype=torch.bool)]
    assert float(own.min()) > 0.1
    assert float(others.abs().max()) < 0.02 * float(own.min())
    assert largest_is_own(one.own) == [True] * 3
    for control in ("random", "matched"):
        assert len(one.controls[control]) == 3
        assert clear_of(one.own, one.controls[control]) == [True] * 3
    assert one.specificity.value > 50
    low, high = one.specificity.interval
    assert low <= one.specificity.value <= high


@pytest.fixture(scope="module")
def small(llama, corpus_directory):
    corpus = read_corpus(corpus_directory, part="report")
    sets = {
        "first": set_of(OWN, fingerprint=llama.fingerprint),
        "none for qab": set_of({**OWN, "qab": [], "qac": [(2, 40), (2, 41), (2, 42), (2, 7)]}),
    }
    settings = Settings(doses=(0.5, 1.0), draws=2, resamples=200)
    return corpus, sets, settings, ablation_study(llama, corpus, sets, settings)


def plain_nll(loaded, texts, places=()):
    """Mean over tokens of a language's texts, a text at a time, with columns zeroed for the while."""
    kept = [(loaded.anatomy.value(*place), loaded.anatomy.value(*place).clone()) for place in places]
    total, tokens = 0.0, 0
    for view, _ in kept:
        view.zero_()
    for text in texts:
        ids = [0, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            predicted = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
        total += float(models.naive_loss(predicted, ids))
        tokens += len(ids) - 1
    for view, before in kept:
        view.copy_(before)
    return total / tokens


def test_the_matrix_equals_a_plain_loop(llama, small):
    corpus, sets, _, study = small
    for j, language in enumerate(corpus.languages):
        texts = corpus.non_empty(language)
        assert float(study.baseline[j]) == pytest.approx(plain_nll(llama, texts), rel=1e-6)
        for name, outcome in zip(sets, study.sets, strict=True):
            for i, ablated in enumerate(corpus.languages):
                places = [tuple(row) for row in sets[name].of(ablated).tolist()]
                expected = plain_nll(llama, texts, places)
                assert float(outcome.own.nll[i, j]) == pytest.approx(expected, rel=1e-6)
                rise = expected - float(study.baseline[j])
                assert float(outcome.own.change[i, j]) == pytest.approx(rise, abs=1e-6)
                assert float(outcome.own.low[i, j]) <= rise + 1e-6
                assert float(outcome.own.high[i, j]) >= rise - 1e-6
        assert study.texts[j] == len(texts)


def test_doses_are_the_best_of_each_language(llama, small):
    corpus, sets, _, study = small
    half, full = study.sets[1].doses
    assert (half.share, half.sizes) == (0.5, (1, 0, 2))
    assert torch.equal(full.changes.nll, study.sets[1].own.nll)
    texts = corpus.non_empty("qac")
    rows = sets["none for qab"].of("qac").tolist()
    scores = sets["none for qab"].scores["qac"].tolist()
    best = sorted(zip(scores, rows, strict=True), reverse=True)[:2]
    expected = plain_nll(llama, texts, [tuple(row) for _, row in best])
    assert float(half.changes.nll[2, 2]) == pytest.approx(expected, rel=1e-6)


def test_doses_of_the_model_and_of_sets_without_scores():
    members = {"qaa": [(0, j) for j in range(20)], "qab": [(1, 1)]}
    one = set_of(members, scores={"qaa": torch.zeros(20).double(), "qab": torch.ones(1).double()})
    drawn = dosed(one, "qaa", 0.25, seed=0)
    assert len(drawn) == 5
    assert drawn.tolist() != [[0, j] for j in range(5)]
    assert torch.equal(drawn, dosed(one, "qaa", 0.25, seed=0))
    assert len(dosed(one, "qaa", 0.1, 0, of_model=True)) == round(0.1 * 144)
    with pytest.raises(UsageError, match=r"--top-rate 0\.2"):
        dosed(one, "qaa", 0.2, 0, of_model=True)
    uneven = set_of(members, scores=one.scores, neuron_counts=[20, 0, 30])
    assert len(dosed(uneven, "qaa", 0.1, 0, of_model=True)) == round(0.1 * 50)


@pytest.mark.parametrize(
    ("ends", "expected"), [("top", [1, 4, 5]), ("bottom", [0, 2, 3]), ("both", [1, 3, 4])]
)
def test_doses_begin_at_the_ends_that_were_selected(ends, expected):
    scores = {"qaa": torch.tensor([2.0, 6.0, 3.0, 1.0, 5.0, 4.0], dtype=torch.float64)}
    one = set_of({"qaa": [(0, j) for j in range(6)]}, scores=scores, settings={"ends": ends})
    assert dosed(one, "qaa", 0.5, 0).tolist() == [[0, j] for j in expected]
    assert dosed(one, "qaa", 1.0, 0).tolist() == [[0, j] for j in range(6)]


def test_controls_are_as_many_in_each_layer_and_none_of_the_set(llama, small):
    corpus, sets, settings, study = small
    statistics = record_corpus(llama, corpus, ("mlp_in:absolute",), "texts")
    given = ablation_study(llama, corpus, sets, settings, statistics)
    for one, other in zip(study.sets, given.sets, strict=True):
        assert torch.equal(one.controls["matched"][1].nll, other.controls["matched"][1].nll)
        assert not torch.equal(one.controls["matched"][0].nll, one.controls["random"][0].nll)
        assert not torch.equal(one.controls["random"][0].nll, one.controls["random"][1].nll)
    (again, _) = ablation_study(llama, corpus, sets, replace(settings, seed=1, doses=()), statistics).sets
    for control in ("random", "matched"):
        for drawn in again.controls[control]:
            assert not any(torch.equal(drawn.nll, of.nll) for of in study.sets[0].controls[control])


def test_a_language_without_neurons_changes_nothing(small):
    one = small[3].sets[1]
    assert one.own.change[1].tolist() == one.own.low[1].tolist() == one.own.high[1].tolist() == [0, 0, 0]


def test_means_are_those_of_all_text_or_of_one_language(llama, small):
    corpus, sets = small[0], {"first": small[1]["first"]}
    how = {"controls": (), "resamples": 10, "seed": -1}
    statistics = record_corpus(llama, corpus, ("mlp_in:sum",), "texts")
    every = ablation_study(llama, corpus, sets, Settings("mean", **how))
    one = ablation_study(llama, corpus, sets, Settings("mean", "qab", **how), statistics)
    assert not torch.equal(every.sets[0].own.nll, one.sets[0].own.nll)
    # With statistics of qab alone the mean of all text is qab's.
    alone = read_corpus_of(corpus, "qab")
    recorded = record_corpus(llama, alone, ("mlp_in:sum",), "texts")
    again = ablation_study(llama, corpus, sets, Settings("mean", **how), recorded)
    torch.testing.assert_close(again.sets[0].own.nll, one.sets[0].own.nll, rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="no language 'xx'"):
        ablation_study(llama, corpus, sets, Settings("mean", "xx", **how), statistics)


def read_corpus_of(corpus, language):
    from dataclasses import replace

    return replace(corpus, texts={language: corpus.texts[language]})


def losses_of(matrix, texts=6, seed=0):
    """Texts whose changes under condition i average to ``matrix[i]`` by language, untouched first."""
    generator = torch.Generator().manual_seed(seed)
    sums, tokens = {}, {}
    for j in range(len(matrix)):
        tokens[str(j)] = torch.randint(2, 9, (texts,), generator=generator)
        base = torch.rand(texts, 1, generator=generator, dtype=torch.float64)
        rises = torch.tensor([[row[j] for row in matrix]], dtype=torch.float64) * tokens[str(j)][:, None]
        sums[str(j)] = torch.cat([base, base + rises * (0.5 + base)], dim=1)
    return TextLosses(tokens, sums)


def test_specificity_by_hand():
    matrix = [[1.0, 0.1, 0.3], [0.2, 2.0, 0.1], [0.0, 0.2, 0.6]]
    losses = losses_of(matrix)
    changes, replicates = bootstrapped(losses, [1, 2, 3], draws=50, seed=4)
    own = changes.of([1, 2, 3])
    drawn = torch.stack([replicates[c] for c in (1, 2, 3)], dim=1)
    figures = specificity(own.change, drawn, 0.9)
    change = own.change.tolist()
    diagonal = sum(change[i][i] for i in range(3)) / 3
    rest = sum(change[i][j] for i in range(3) for j in range(3) if i != j) / 6
    assert figures.value == pytest.approx(diagonal / rest)
    assert (figures.own, figures.other) == pytest.approx((diagonal, rest))
    quotients = []
    for b in range(50):
        d = drawn[b].tolist()
        off = sum(d[i][j] for i in range(3) for j in range(3) if i != j) / 6
        quotients.append(sum(d[i][i] for i in range(3)) / 3 / off)
    expected = np.quantile(quotients, [0.05, 0.95])
    assert figures.interval == pytest.approx(tuple(expected))
    for j in range(3):
        sums, tokens = losses.sums[str(j)], losses.tokens[str(j)]
        chosen = np.random.default_rng(4 * 3 + j).integers(0, 6, (50, 6))
        for i in range(3):
            rise = sum(float(sums[d, i + 1] - sums[d, 0]) for d in chosen[7]) / sum(
                int(tokens[d]) for d in chosen[7]
            )
            assert float(drawn[7, i, j]) == pytest.approx(rise)


def test_specificity_without_side_effects_and_without_effect():
    none = torch.zeros(5, 2, 2, dtype=torch.float64)
    sharp = torch.tensor([[1.0, -0.1], [0.0, 1.0]], dtype=torch.float64)
    found = specificity(sharp, none + sharp)
    assert found.interval == (found.value,) * 2 == (math.inf,) * 2
    assert specificity(-sharp, none - sharp).value == 0


def changes(change, width):
    values = torch.tensor(change, dtype=torch.float64)
    return Changes(values, values, values - width, values + width)


def test_clear_of_every_control():
    own = changes([[1.0, 0.0], [0.0, 0.5]], 0.1)
    quiet, loud = changes([[0.1, 9.0], [9.0, 0.1]], 0.1), changes([[0.2, 0.0], [0.0, 0.35]], 0.1)
    assert clear_of(own, [quiet]) == [True, True]
    assert clear_of(own, [quiet, loud]) == [True, False]
    assert largest_is_own(changes([[1.0, 2.0], [0.0, 0.5]], 0)) == [False, True]
    # A language without neurons, and one whose ablation makes every language more likely.
    assert largest_is_own(changes([[0.0, 0.0], [0.0, 0.5]], 0)) == [False, True]
    assert largest_is_own(changes([[-1.0, -2.0], [0.0, 0.5]], 0)) == [False, True]


def test_what_does_not_fit_is_refused(llama, small):
    corpus, sets = small[0], small[1]
    with pytest.raises(UsageError, match="no language qab"):
        ablation_study(llama, corpus, {"a": set_of({k: OWN[k] for k in ("qaa", "qac")})})
    with pytest.raises(BrocaError, match="fingerprint"):
        ablation_study(llama, corpus, {"a": set_of(OWN, fingerprint="0" * 16)})
    with pytest.raises(UsageError, match="no neuron set"):
        ablation_study(llama, corpus, {})
    crowded = set_of({**OWN, "qaa": [(0, j) for j in range(30)]})
    with pytest.raises(UsageError, match=r"layer 0: .*\(0 draws\)"):
        ablation_study(llama, corpus, {"a": crowded})
    other = record_corpus(llama, corpus, ("mlp_in:sum",), "texts")
    with pytest.raises(UsageError, match="mlp_in:absolute"):
        ablation_study(llama, corpus, sets, Settings(), other)
    for wrong, message in (
        ({"way": "median"}, "choose zero"),
        ({"mean_of": "qaa"}, "take 'mean'"),
        ({"controls": ("best",)}, "'best' is unknown"),
        ({"doses": (0.0,)}, "a dose"),
        ({"draws": -1}, "0 times or more"),
        ({"confidence": 1.0}, "confidence"),
    ):
        with pytest.raises(UsageError, match=message):
            Settings(**wrong)


def test_the_document_and_the_tables(small):
    study = small[3]
    content = json_bytes(study_document(study))
    document = json.loads(content)
    assert json_bytes(study_document(study_of(document, "a.json"))) == content
    assert set(document["baseline"]) == set(document["ablated"]) == set(models.LANGUAGES)
    one = study.sets[0]
    mean = (one.controls["random"][0].nll[1, 2] + one.controls["random"][1].nll[1, 2]) / 2
    assert document["random"]["qab"]["qac"] == pytest.approx(float(mean))
    assert len(document["random_draws"]) == len(document["matched_draws"]) == 2
    assert document["ablated"]["qab"]["qac"] == float(one.own.nll[1, 2])
    assert document["perplexity"]["qab"]["qac"] == pytest.approx(math.exp(float(one.own.nll[1, 2])))
    assert document["intervals"]["qab"]["qac"] == [float(one.own.low[1, 2]), float(one.own.high[1, 2])]
    assert [item["name"] for item in document["sets"]] == ["first", "none for qab"]
    assert document["sets"][1]["ablated"] != document["ablated"] == document["sets"][0]["ablated"]
    assert document["corpus"]["digest"] and document["packages"]["torch"] and document["fingerprint"]
    text = as_markdown(study)
    lines = text.splitlines()
    assert sum(line.startswith("| ablated qa") for line in lines) == 6
    widths = {line.count("|") for line in lines if line.startswith("| ablated")}
    assert widths == {1 + 2 + 3 + 2}
    assert f"**{float(one.own.change[0, 0]):+.3f} [" in text


def test_pictures_hold_every_number(small, tmp_path):
    study = small[3]
    figure = ablation_pictures.matrix_figure(study)
    panels = [axis for axis in figure.axes if axis.get_xlabel() == "measured language"]
    assert len(panels) == 2
    assert panels[0].images[0].get_array().shape == (3, 5)
    assert float(panels[0].images[0].get_array()[1, 1]) == float(study.sets[0].own.change[1, 1])
    curves = ablation_pictures.doses_figure(study)
    one = study.sets[0]
    for named, title in (("mine", f"mine ({one.method})"), (one.method, one.method)):
        renamed = replace(study, sets=(replace(one, name=named),))
        drawn = (ablation_pictures.matrix_figure(renamed), ablation_pictures.doses_figure(renamed))
        assert [picture.axes[0].get_title().split("\n")[0] for picture in drawn] == [title, title]
    assert len(curves.axes[0].lines) == 2 * 3 + 1
    for suffix in ("png", "svg"):
        pictures.save_figure(figure, tmp_path / f"m.{suffix}")
        pictures.save_figure(curves, tmp_path / f"d.{suffix}")


@pytest.fixture
def arguments(llama, small, corpus_directory, tmp_path):
    sets = small[1]
    paths = [tmp_path / f"{name.replace(' ', '-')}.safetensors" for name in sets]
    for path, one in zip(paths, sets.values(), strict=True):
        one.save(path)
    common = [llama.name, "--corpus", corpus_directory, "--part", "report", "--resamples", "50"]
    return [str(part) for part in [*common, "--device", "cpu", "--draws", "1", "--neurons", *paths]]


def run(arguments):
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_the_command_streams_resumes_and_repeats(arguments, small, tmp_path, monkeypatch):
    out, again = tmp_path / "study.json", tmp_path / "again.json"
    extra = [
        "--doses",
        "50%,1",
        "--picture",
        str(tmp_path / "m.svg"),
        "--dose-picture",
        str(tmp_path / "d.png"),
    ]
    done = run([*arguments, *extra, "--out", str(out), "--json"])
    assert done.exit_code == 0
    printed, written = json.loads(done.stdout), json.loads(out.read_text())
    assert {key: value for key, value in printed.items() if key != "out"} == written
    for j, language in enumerate(models.LANGUAGES):
        assert written["baseline"][language] == float(small[3].baseline[j])
    assert [item["name"] for item in written["sets"]] == ["first", "none-for-qab"]
    assert (tmp_path / "m.svg").is_file() and (tmp_path / "d.png").is_file()
    unfinished = tmp_path / ".again.json.unfinished"
    assert not (tmp_path / ".study.json.unfinished").exists()

    from neurons.ablation import ledger as ablation_ledger

    put, count = ablation_ledger.LedgerFile.put, []

    def stop(self, *key):
        if len(count) == 9:
            raise KeyboardInterrupt
        count.append(key)
        put(self, *key)

    repeat = shlex.split(written["command"].replace(str(out), str(again)))
    assert repeat[:2] == ["broca", "ablate"]
    with monkeypatch.context() as patched, pytest.raises(Abort):
        patched.setattr(ablation_ledger.LedgerFile, "put", stop)
        command.main(repeat[2:], standalone_mode=False)
    assert len(unfinished.read_text().splitlines()) == 10
    assert not again.exists()
    resumed = run(repeat[2:])
    assert resumed.exit_code == 0 and "| ablated qaa" in resumed.output
    assert not unfinished.exists()
    repeated = json.loads(again.read_text())
    assert {**repeated, "command": ""} == {**written, "command": ""}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--dose-picture", "d.png"], "needs --doses"),
        (["--picture", "m.jpg"], ".png or .svg"),
        (["--controls", "random", "--statistics", __file__], "--statistics"),
    ],
)
def test_the_command_refuses(arguments, extra, message):
    with pytest.raises(UsageError, match=message):
        run([*arguments, *extra])


def test_the_language_of_the_mean_is_read_as_every_language(arguments):
    done = run([*arguments, "--way", "mean", "--mean-of", "QAB", "--draws", "0"])
    assert done.exit_code == 0 and "mean of qab" in done.output


@pytest.mark.parametrize("doses", ["many", "5%x", "1%,,2%", "nan"])
def test_doses_are_shares(arguments, doses):
    refused = run([*arguments, "--doses", doses])
    assert refused.exit_code == 2 and "--doses" in refused.output


def test_a_set_named_twice_or_none_is_refused(arguments):
    with pytest.raises(UsageError, match="given twice"):
        run([*arguments, arguments[-1]])
    with pytest.raises(UsageError, match="--neurons is missing"):
        run(arguments[:-3])


def test_heads_and_neurons_in_one_study(llama, corpus):
    """Controls of heads are other heads of the same layers; the matrix is that of condition_losses."""
    places = {"qaa": [(0, 1)], "qab": [(2, 0)], "qac": [(1, 1)]}
    heads = set_of(places, width=2, unit="head", heads=[2, 2, 2])
    small = replace(corpus, texts={k: texts[:6] for k, texts in corpus.texts.items()})
    settings = Settings(way="mean", draws=1, resamples=50)
    assert settings.moments([heads]) == ("attn_in:absolute", "attn_in:sum")
    study = ablation_study(llama, small, {"heads": heads, "neurons": set_of(OWN)}, settings)
    one, other = study.sets
    assert (one.unit, other.unit) == ("head", "neuron")
    batches = language_batches(llama, small)
    means = record_corpus(llama, small, ("attn_in:sum",), "texts")
    mean = (means.moment("attn_in:sum").sum(-1) / means.tokens.sum()).float()
    for control in ("random", "matched"):
        # With two heads a layer, the control is the other head.
        other_heads = {k: [(layer, 1 - head) for layer, head in rows] for k, rows in places.items()}
        for found, rows in ((one.own, places), (one.controls[control][0], other_heads)):
            for i, language in enumerate(small.languages):
                columns = llama.anatomy.unit_columns("head", torch.tensor(rows[language]))
                condition = Condition(columns, Replacement("mean", mean), "attn_in")
                losses = condition_losses(llama, batches, [UNTOUCHED, condition])
                for j, measured in enumerate(small.languages):
                    before, after = (losses.sums[measured].sum(0) / losses.tokens[measured].sum()).tolist()
                    assert float(found.change[i, j]) == pytest.approx(after - before, abs=1e-5)
    written = json.loads(json_bytes(study_document(study)))
    assert (written["unit"], written["sets"][0]["unit"]) == ("nats a token", "head")
    assert study_of(written, "a.json").sets[0].unit == "head"
    text = as_markdown(study)
    assert "| neuron set | method | neurons or heads |" in text and "|  | heads |" in text
