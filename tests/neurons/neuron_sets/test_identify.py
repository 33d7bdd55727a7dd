"""Recorded statistics to neuron sets: what is refused before anything is chosen, and layers with fewer neurons."""

import pytest
import torch

from neurons.errors import UsageError
from neurons.neuron_sets.identify import neurons_from
from neurons.statistics.statistics import Statistics

METHODS = {
    "lape": {"filter_rate": 0.5, "activation_rate": 0.6},
    "lape-gradient": {"filter_rate": 0.5, "activation_rate": 0.6},
    "lape-general": {"activation_rate": 0.6},
    "gradient": {},
    "momentum": {},
    "average-precision": {},
    "culnig": {"recognition_rate": 0.3, "least_z": -9.0},
    "plnd": {},
    "head-gradient": {},
}


def recorded():
    generator = torch.Generator().manual_seed(0)
    return Statistics(
        languages=("qaa", "qab"),
        tokens=torch.tensor([100, 80]),
        texts=torch.tensor([5, 4]),
        moments={
            "mlp_act:positive": torch.randint(0, 80, (3, 10, 2), generator=generator),
            "mlp_in:attribution": torch.rand(3, 10, 2, generator=generator, dtype=torch.float64),
        },
        fingerprint="f",
    )


@pytest.mark.parametrize("method", ["lape", "gradient"])
def test_a_rate_that_keeps_no_neuron_is_refused(method):
    with pytest.raises(UsageError, match=r"top rate 0\.01"):
        neurons_from(recorded(), method, 0.01)


def test_a_rate_that_keeps_one_is_not():
    found = neurons_from(recorded(), "gradient-contrast", 0.04)
    assert [len(found.of(language)) for language in found.languages] == [1, 1]


def test_languages_of_unknown_tokens_stay_known():
    statistics = recorded()
    statistics.metadata["unknown"] = {"qab": 0.4}
    assert neurons_from(statistics, "gradient-contrast", 0.04).metadata["unknown"] == {"qab": 0.4}


def test_a_rate_that_keeps_no_neuron_of_the_chosen_layers_is_refused():
    assert neurons_from(recorded(), "gradient-contrast", 0.04)
    with pytest.raises(UsageError, match=r"keeps none of 10 neurons"):
        neurons_from(recorded(), "gradient-contrast", 0.04, selection={"layers": (2,)})
    with pytest.raises(UsageError, match="no layers"):
        neurons_from(recorded(), "gradient-contrast", 0.04, selection={"layers": ()})


@pytest.mark.parametrize("given", [{"ends": "bottom"}, {"scope": "global"}])
def test_a_choice_that_the_method_does_not_make_is_refused(given):
    with pytest.raises(UsageError, match=f"'plnd' .*leave out {next(iter(given))}"):
        neurons_from(recorded(), "plnd", selection=given)


def everything(counts, width):
    """Statistics of two layers with neurons, with an empty one and places without a neuron where counts say so."""
    generator = torch.Generator().manual_seed(0)
    own = [layer for layer, count in enumerate(counts) if count]

    def padded(values):
        wide = values.new_zeros(*values.shape[:-3], len(counts), width, values.shape[-1])
        wide[..., own, : values.shape[-2], :] = values
        return wide

    fires = torch.randint(0, 80, (2, 10, 3), generator=generator)
    draw = [torch.rand(2, 10, 3, generator=generator, dtype=torch.float64) for _ in range(4)]
    ranks = torch.stack([torch.rand(2, 2, 10, generator=generator).argsort(-1).amax(0) for _ in range(3)], -1)
    worst = padded(ranks)
    worst[own, 10:] = torch.arange(10, width)[:, None]  # of no effect, so after all neurons
    responses = torch.randn(3, 6, 2, 10, 1, generator=generator)
    languages = ("qaa", "qab", "qac")
    prompts = torch.tensor([4, 5, 6])
    return Statistics(
        languages=languages,
        tokens=torch.tensor([100, 80, 90]),
        texts=torch.tensor([6, 6, 6]),
        moments={
            "mlp_act:positive": padded(fires),
            "mlp_in:attribution": padded(draw[0]),
            "attn_in:attribution": padded(draw[0]),
            "mlp_act:answer": padded(draw[1] - 1),
            "mlp_act:answer_control": padded(draw[2]),
            "mlp_act:answer_recognition": padded(draw[3] - 1),
            "mlp_in:worst_rank": worst,
        },
        fingerprint="f",
        responses=dict(zip(languages, padded(responses)[..., 0], strict=True)),
        lines={language: torch.arange(6) for language in languages},
        prompts=dict.fromkeys(("answer", "answer_control", "answer_recognition"), prompts),
        metadata={"neuron_counts": counts, "heads": counts},
    )


@pytest.mark.parametrize(
    ("method", "ends"),
    [
        (method, ends)
        for method in METHODS
        for ends in (None, "bottom", "both")
        if ends is None or method not in ("culnig", "plnd")
    ],
)
def test_places_without_a_neuron_change_nothing(method, ends):
    selection = {"kinds": ("specific", "related", "general"), "ends": ends}
    given = method, 0.3, METHODS[method], selection
    found, expected = (
        neurons_from(everything(*size), *given) for size in (([10, 0, 10], 14), ([10, 10], 10))
    )
    assert sum(len(expected.of(language)) for language in expected.languages) > 3
    for language in expected.languages:
        rows = expected.of(language)
        assert found.of(language).tolist() == [[2 * layer, neuron] for layer, neuron in rows.tolist()]
        assert torch.equal(found.scores[language], expected.scores[language])
        assert torch.equal(found.kinds[language], expected.kinds[language])
    assert found.metadata["notes"] == expected.metadata["notes"]


@pytest.mark.parametrize(("layers", "count"), [(None, 12), ((0, 1), 4), ((1, 2), 8)])
def test_a_rate_is_of_the_neurons_that_exist(layers, count):
    statistics = recorded()
    statistics.moments["mlp_in:attribution"] = torch.ones(3, 8, 2, dtype=torch.float64)
    statistics.metadata["neuron_counts"] = [4, 0, 8]
    found = neurons_from(statistics, "gradient", 0.5, selection={"layers": layers})
    assert [len(found.of(language)) for language in found.languages] == [round(0.5 * count)] * 2
    with pytest.raises(UsageError, match="keeps none of 0 neurons: choose layers that have some"):
        neurons_from(statistics, "gradient", 0.5, selection={"layers": (1,)})


def test_the_rate_of_plnd_is_of_each_layers_neurons():
    statistics = recorded()
    worst = torch.arange(8)[None, :, None].repeat(3, 1, 2)
    worst[1] = 0
    statistics.moments["mlp_in:worst_rank"] = worst
    statistics.metadata["neuron_counts"] = [4, 0, 8]
    found = neurons_from(statistics, "plnd", 0.5, selection={"kinds": ("general",)})
    assert found.of("qaa").tolist() == [[0, 0], [0, 1], [2, 0], [2, 1], [2, 2], [2, 3]]
    assert found.scores["qaa"].tolist() == [1, 0.75, 1, 0.875, 0.75, 0.625]
