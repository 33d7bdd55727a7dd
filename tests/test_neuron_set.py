"""Neuron sets: saved and read back, and their random controls."""

import pytest
import torch

from neurons.artifact import load_artifact
from neurons.errors import BrocaError, UsageError
from neurons.identify import identify, random_neurons
from neurons.neuron_set import load_neuron_set, neuron_set

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


@pytest.mark.parametrize("row", [[4, 0], [0, 12], [-1, 0], [0, -1]])
def test_a_neuron_that_the_model_does_not_have_is_refused(row):
    with pytest.raises(BrocaError, match="'uk' names a neuron outside 4 x 12"):
        neuron_set({"uk": torch.tensor([[0, 0], row])}, {"uk": torch.zeros(2)}, LAYERS, WIDTH, {})


def test_a_neuron_named_twice_is_refused():
    rows = torch.tensor([[1, 2], [0, 0], [1, 2]])
    with pytest.raises(BrocaError, match="'uk' names a neuron twice"):
        neuron_set({"uk": rows}, {"uk": torch.zeros(3)}, LAYERS, WIDTH, {})


@pytest.mark.parametrize("seed", range(10))
def test_the_control_has_as_many_neurons_in_each_layer_and_none_of_the_language(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [
        [layer, int(neuron)]
        for layer in range(LAYERS)
        for neuron in torch.randperm(WIDTH, generator=generator)[: (6, 0, 1, 4)[layer]]
    ]
    members = {"uk": torch.tensor(rows), "fa": MEMBERS["fa"]}
    chosen = neuron_set(members, {"uk": torch.zeros(11), "fa": torch.zeros(2)}, LAYERS, WIDTH, {})
    control = random_neurons(chosen, "uk", seed)
    assert control.dtype == torch.int64
    assert [int((control[:, 0] == layer).sum()) for layer in range(LAYERS)] == [6, 0, 1, 4]
    places = {tuple(row) for row in control.tolist()}
    assert len(places) == 11
    assert not places & {tuple(row) for row in rows}
    assert all(0 <= neuron < WIDTH for _, neuron in places)
    assert torch.equal(control, random_neurons(chosen, "uk", seed))


def test_controls_of_other_seeds_differ_and_reach_every_neuron(chosen):
    places = {tuple(row) for seed in range(200) for row in random_neurons(chosen, "uk", seed).tolist()}
    own = {tuple(row) for row in chosen.of("uk").tolist()}
    assert places == {(layer, neuron) for layer in (0, 2) for neuron in range(WIDTH)} - own


def test_no_control_is_left_above_half_a_layer():
    rows = torch.tensor([[1, neuron] for neuron in range(7)])
    chosen = neuron_set({"uk": rows}, {"uk": torch.zeros(7)}, LAYERS, WIDTH, {})
    with pytest.raises(UsageError, match="'uk' has more than half of layer 1"):
        random_neurons(chosen, "uk")


def test_the_control_of_an_empty_language_is_empty(chosen):
    assert random_neurons(chosen, "ko").shape == (0, 2)


def test_what_identify_finds_says_where_it_comes_from(llama, corpus, tmp_path):
    done = []
    identify(llama, corpus, "lape", 0.1, tokens=100, block=21, progress=done.append).save(tmp_path / "set")
    found = load_neuron_set(tmp_path / "set")
    assert found.languages == corpus.languages
    assert (found.layers, found.neurons) == (3, 48)
    assert found.metadata["fingerprint"] == llama.fingerprint
    assert found.metadata["model"] == llama.label == llama.checkpoint.name
    assert found.metadata["corpus"] == {"digest": corpus.digest, "part": "all"}
    assert found.metadata["tokens"] == dict.fromkeys(corpus.languages, 100)
    assert found.metadata["settings"] == {"top_rate": 0.1, "block": 21}
    assert sum(done) == 300


def test_an_unknown_method_is_named(llama, corpus):
    with pytest.raises(UsageError, match="'magic' is unknown: choose from lape, gradient-contrast"):
        identify(llama, corpus, "magic")
