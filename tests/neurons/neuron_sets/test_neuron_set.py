"""Neuron sets: saved and read back, their kinds, and their random controls."""

from dataclasses import replace

import pytest
import torch

from neurons.errors import BrocaError, UsageError
from neurons.files.artifact import load_artifact, save_artifact
from neurons.neuron_sets.identify import identify, random_set
from neurons.neuron_sets.neuron_set import load_neuron_set, neuron_set
from neurons.scorers.selection import KINDS

LAYERS, WIDTH = 4, 12
MEMBERS = {
    "uk": torch.tensor([[2, 1], [0, 11], [2, 0], [0, 3]]),
    "ko": torch.zeros(0, 2, dtype=torch.int64),
    "fa": torch.tensor([[3, 11], [2, 0]]),
}
SCORES = {
    "uk": torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64),
    "ko": torch.zeros(0, dtype=torch.float64),
    "fa": torch.tensor([1 / 3, 0.0], dtype=torch.float64),
}
METADATA = {"method": "lape", "model": "m", "fingerprint": "0" * 16, "settings": {"top_rate": 0.01}}


@pytest.fixture
def chosen():
    return neuron_set(MEMBERS, SCORES, LAYERS, WIDTH, METADATA)


def test_rows_are_in_layer_neuron_order_with_their_scores(chosen):
    assert chosen.of("uk").tolist() == [[0, 3], [0, 11], [2, 0], [2, 1]]
    assert chosen.scores["uk"].tolist() == [0.4, 0.2, 0.3, 0.1]
    assert [layer.tolist() for layer in chosen.by_layer("uk")] == [[3, 11], [], [0, 1], []]
    assert chosen.languages == ("uk", "ko", "fa")
    assert chosen.empty_languages == ("ko",)


def test_an_unknown_language_is_named(chosen):
    with pytest.raises(UsageError, match="no language 'en': it has uk, ko, fa"):
        chosen.of("en")
    with pytest.raises(UsageError, match="'en'"):
        chosen.by_layer("en")


def test_round_trip(chosen, tmp_path):
    chosen.save(tmp_path / "one")
    again = load_neuron_set(tmp_path / "one")
    assert (again.layers, again.neurons, again.languages) == (LAYERS, WIDTH, chosen.languages)
    assert {key: again.metadata[key] for key in METADATA} == METADATA
    for language in chosen.languages:
        assert again.of(language).dtype == torch.int64
        assert torch.equal(again.of(language), chosen.of(language))
        assert again.scores[language].dtype == torch.float64
        assert torch.equal(again.scores[language], chosen.scores[language])
    again.save(tmp_path / "two")
    chosen.save(tmp_path / "three")
    one, two, three = ((tmp_path / name).read_bytes() for name in ("one", "two", "three"))
    assert one == two == three
    assert load_artifact(tmp_path / "one").kind == "neurons"


def kinds_of(neurons, language):
    return [KINDS[kind] for kind in neurons.kinds[language].tolist()]


def test_kinds_that_are_given_stay_with_their_rows(tmp_path):
    kinds = {"uk": torch.tensor([0, 1, 2, 0]), "ko": torch.zeros(0), "fa": torch.tensor([1, 0])}
    chosen = neuron_set(MEMBERS, SCORES, LAYERS, WIDTH, METADATA, kinds)
    # Rows (2, 1), (0, 11), (2, 0), (0, 3) in (layer, neuron) order.
    assert kinds_of(chosen, "uk") == ["specific", "related", "general", "specific"]
    assert kinds_of(chosen, "fa") == ["specific", "related"]
    assert chosen.kind_counts("uk") == {"specific": 2, "related": 1, "general": 1}
    assert chosen.kind_counts("ko") == {"specific": 0, "related": 0, "general": 0}
    chosen.save(tmp_path / "one")
    again = load_neuron_set(tmp_path / "one")
    for language in chosen.languages:
        assert again.kinds[language].dtype == torch.int64
        assert torch.equal(again.kinds[language], chosen.kinds[language])
    again.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_kinds_are_counted_where_none_are_given(chosen):
    assert kinds_of(chosen, "uk") == ["specific", "specific", "related", "specific"]
    assert kinds_of(chosen, "fa") == ["related", "specific"]
    assert kinds_of(chosen, "ko") == []
    assert chosen.kind_counts("uk") == {"specific": 3, "related": 1, "general": 0}


@pytest.mark.parametrize("seed", range(5))
def test_counted_kinds_equal_counting(seed):
    generator = torch.Generator().manual_seed(seed)
    languages = [f"l{k}" for k in range(seed + 1)]
    members = {
        k: (torch.rand(LAYERS, WIDTH, generator=generator) < 0.6)
        .nonzero()[torch.randperm(5, generator=generator)]
        .clone()
        for k in languages
    }
    chosen = neuron_set(members, {k: torch.zeros(5) for k in languages}, LAYERS, WIDTH, {})
    for language in languages:
        for row, kind in zip(chosen.of(language).tolist(), kinds_of(chosen, language), strict=True):
            owners = sum(row in rows.tolist() for rows in members.values())
            expected = "specific" if owners == 1 else "general" if owners == len(languages) else "related"
            assert kind == expected


def test_a_file_without_kinds_has_them_counted(chosen, tmp_path):
    tensors = {f"members.{i}": rows for i, rows in enumerate(chosen.members.values())}
    tensors |= {f"scores.{i}": values for i, values in enumerate(chosen.scores.values())}
    fields = {"languages": list(chosen.languages), "layers": LAYERS, "neurons": WIDTH}
    save_artifact(tmp_path / "old", "neurons", tensors, {**METADATA, **fields})
    again = load_neuron_set(tmp_path / "old")
    for language in chosen.languages:
        assert torch.equal(again.of(language), chosen.of(language))
        assert torch.equal(again.kinds[language], chosen.kinds[language])


def test_kind_counts_of_an_unknown_language(chosen):
    with pytest.raises(UsageError, match="no language 'en'"):
        chosen.kind_counts("en")


def test_groups_are_saved_by_language_whatever_their_order(chosen, tmp_path):
    backwards = {
        "scores": dict(reversed(chosen.scores.items())),
        "kinds": dict(reversed(chosen.kinds.items())),
    }
    replace(chosen, **backwards).save(tmp_path / "one")
    chosen.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_experts_are_remembered(chosen, tmp_path):
    assert chosen.experts == 1
    mixture = neuron_set(MEMBERS, SCORES, LAYERS, WIDTH, {**METADATA, "experts": 4})
    mixture.save(tmp_path / "set")
    assert mixture.experts == load_neuron_set(tmp_path / "set").experts == 4


@pytest.mark.parametrize("count", [0, 1, 3])
def test_scores_and_kinds_are_one_a_neuron(count):
    rows = {"uk": torch.tensor([[0, 1], [0, 2]])}
    with pytest.raises(BrocaError, match=f"'uk' has 2 neurons, but {count} scores"):
        neuron_set(rows, {"uk": torch.zeros(count)}, LAYERS, WIDTH, {})
    kinds = {"uk": torch.zeros(count, dtype=torch.int64)}
    with pytest.raises(BrocaError, match=f"'uk' has 2 neurons, but {count} kinds"):
        neuron_set(rows, {"uk": torch.zeros(2)}, LAYERS, WIDTH, {}, kinds)


def test_a_language_without_scores_or_kinds_is_refused():
    rows = {"uk": torch.tensor([[0, 1]])}
    with pytest.raises(BrocaError, match="'uk' has 1 neurons, but 0 scores"):
        neuron_set(rows, {}, LAYERS, WIDTH, {})
    with pytest.raises(BrocaError, match="'uk' has 1 neurons, but 0 kinds"):
        neuron_set(rows, {"uk": torch.zeros(1)}, LAYERS, WIDTH, {}, {})


@pytest.mark.parametrize("kind", [-1, 3])
def test_a_kind_that_does_not_exist_is_refused(kind):
    with pytest.raises(BrocaError, match="specific, related, general"):
        neuron_set(
            {"uk": torch.tensor([[0, 1]])},
            {"uk": torch.zeros(1)},
            LAYERS,
            WIDTH,
            {},
            {"uk": torch.tensor([kind])},
        )


@pytest.mark.parametrize("row", [[4, 0], [0, 12], [-1, 0], [0, -1]])
def test_a_neuron_that_the_model_does_not_have_is_refused(row):
    with pytest.raises(BrocaError, match="'uk' names a neuron outside 4 x 12"):
        neuron_set({"uk": torch.tensor([[0, 0], row])}, {"uk": torch.zeros(2)}, LAYERS, WIDTH, {})


def test_a_neuron_named_twice_is_refused():
    rows = torch.tensor([[1, 2], [0, 0], [1, 2]])
    with pytest.raises(BrocaError, match="'uk' names a neuron twice"):
        neuron_set({"uk": rows}, {"uk": torch.zeros(3)}, LAYERS, WIDTH, {})


def places(rows):
    return {tuple(row) for row in rows.tolist()}


@pytest.mark.parametrize("seed", range(5))
def test_the_control_has_as_many_neurons_in_each_layer_and_none_of_the_language(chosen, seed):
    control = random_set(chosen, seed)
    assert control.languages == chosen.languages
    for language in chosen.languages:
        own, other = chosen.of(language), control.of(language)
        assert other[:, 0].tolist() == own[:, 0].tolist()
        assert not places(own) & places(other)
        assert torch.equal(other, random_set(chosen, seed).of(language))
    assert control.empty_languages == ("ko",)
    assert control.metadata["fingerprint"] == chosen.metadata["fingerprint"]


def test_controls_of_other_seeds_differ_and_reach_every_neuron(chosen):
    reached = set().union(*(places(random_set(chosen, seed).of("uk")) for seed in range(200)))
    assert reached == {(layer, neuron) for layer in (0, 2) for neuron in range(WIDTH)} - places(
        chosen.of("uk")
    )


def test_no_control_is_left_above_half_a_layer():
    rows = torch.tensor([[1, neuron] for neuron in range(7)])
    chosen = neuron_set({"uk": rows}, {"uk": torch.zeros(7)}, LAYERS, WIDTH, {})
    with pytest.raises(UsageError, match="more than half of layer 1"):
        random_set(chosen)


def test_what_identify_finds_says_where_it_comes_from(llama, corpus, tmp_path):
    done = []
    identify(llama, corpus, "lape", 0.1, tokens=100, block=21, progress=done.append).save(tmp_path / "set")
    found = load_neuron_set(tmp_path / "set")
    assert found.languages == corpus.languages
    assert (found.layers, found.neurons) == (3, 48)
    assert found.metadata["fingerprint"] == llama.fingerprint
    assert found.metadata["model"] == llama.label == llama.checkpoint.name
    (origin,) = found.metadata["corpora"]
    assert (origin["digest"], origin["part"]) == (corpus.digest, "all")
    assert found.metadata["tokens"] == dict.fromkeys(corpus.languages, 100)
    assert found.metadata["settings"]["top_rate"] == 0.1
    assert found.metadata["recording"]["block"] == 21
    assert sum(done) == 300


def test_an_unknown_method_is_named(llama, corpus):
    with pytest.raises(UsageError, match="'magic' is unknown: choose from lape, "):
        identify(llama, corpus, "magic")
