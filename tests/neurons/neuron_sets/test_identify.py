"""Recorded statistics to neuron sets: what is refused before anything is chosen."""

import pytest
import torch

from neurons.errors import UsageError
from neurons.neuron_sets.identify import neurons_from
from neurons.statistics.statistics import Statistics


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
