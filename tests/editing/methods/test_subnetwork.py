"""Trained neurons: gradients against whole weights, planted truth, equal bytes."""

import copy
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch

from editing.evaluation.likelihood import language_losses
from editing.methods.subnetwork import (
    ALL,
    LORA,
    RANDOM,
    SET,
    NextTokens,
    Training,
    control_neurons,
    subnetwork_plan,
    untrained,
)
from editing.methods.trained_factors import _add, computing_with, factors_of, with_factors
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.neuron_sets.identify import identify
from neurons.neuron_sets.neuron_set import neuron_set
from neurons.recording.recomputation import recomputing
from neurons.text.corpus import read_corpus

ROWS = torch.tensor([[0, 3], [0, 11], [2, 0], [2, 5], [2, 47]])
SHORT = Training(block=32, tokens=400, rate=0.01)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    directory = models.write_corpus(tmp_path_factory.mktemp("text"))
    return [read_corpus(directory, part=part) for part in ("estimate", "choose", "report")]


def neurons_of(loaded, rows=ROWS):
    anatomy = loaded.anatomy
    return neuron_set(
        {"qaa": rows},
        {"qaa": torch.ones(len(rows))},
        anatomy.layers,
        anatomy.neurons,
        {"fingerprint": loaded.fingerprint, "method": "m"},
    )


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_gradients_are_those_of_the_whole_weights(checkpoint_of, corpora, family):
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    text = corpora[0].only("qaa")
    objective = NextTokens(loaded, text, text, Training(block=24, tokens=80))
    batch = next(objective.steps(torch.Generator().manual_seed(0)))[0]
    edits = untrained(loaded, ROWS)
    generator = torch.Generator().manual_seed(1)
    deltas = [0.05 * torch.randn(zeros.shape, generator=generator) for zeros in factors_of(edits)]

    found = []
    for recomputed in (False, True):
        leaves = [delta.clone().requires_grad_(True) for delta in deltas]
        with computing_with(loaded, with_factors(edits, leaves)):
            if recomputed:
                with recomputing(loaded.anatomy):
                    objective.loss(batch).backward()
            else:
                loss = objective.loss(batch)
                loss.backward()
        found.append([leaf.grad for leaf in leaves])

    # All weights of a copy in float64, changed in place, and the gradient of its own logits.
    naive = copy.deepcopy(loaded.model).double().requires_grad_(True)
    anatomy = loaded.anatomy
    expected = []
    with torch.no_grad():
        for edit, delta in zip(with_factors(edits, deltas), deltas, strict=True):
            path = anatomy.layout.outputs["mlp"] if edit.block == "mlp" else edit.block
            weight = naive.get_submodule(anatomy.layout.layers)[edit.layer].get_submodule(path).weight
            W = weight.T if family == "gpt2" else weight
            if edit.block == "mlp":
                W[:, edit.columns] += delta.double().T
            else:
                W[edit.rows] += delta.double()
            expected.append((weight, edit))
    ids = batch.tokens.ids.long()
    logp = naive(ids).logits[:, :-1].log_softmax(-1)
    whole = -logp.gather(-1, ids[:, 1:, None])[..., 0]
    total = whole[batch.tokens.counted[:, 1:]].sum()
    total.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    for gradients in found:
        for gradient, (weight, edit) in zip(gradients, expected, strict=True):
            full = weight.grad.T if family == "gpt2" else weight.grad
            part = full[:, edit.columns].T if edit.block == "mlp" else full[edit.rows]
            torch.testing.assert_close(
                gradient.double(), part, rtol=1e-3, atol=1e-4 * float(part.abs().max())
            )


def test_deltas_may_be_on_another_device_than_their_module(llama):
    """As of a model on several GPUs."""
    edit = next(edit for edit in untrained(llama, ROWS) if edit.column_deltas is not None)
    width = llama.anatomy.neurons
    hidden, output = (torch.zeros(2, size, device="meta") for size in (width, llama.anatomy.residual))
    added = _add(edit, slice(0, width), torch.nn.Identity(), (hidden,), output)
    assert added.device.type == "meta" and added.shape == output.shape


def test_neurons_of_a_language_help_it_more_than_random_ones():
    """The demo model, whose French neurons are known from its text."""
    artifacts = Path(__file__).parents[3] / "artifacts" / "demo"
    loaded = load_model(str(artifacts / "model"), device="cpu")
    text, held_out, report = (
        read_corpus(artifacts / "corpus", ["fr", "en"], part) for part in ("estimate", "choose", "report")
    )
    neurons = identify(loaded, text, "gradient-contrast", tokens=2000)
    training = Training(block=128, tokens=2500, rate=2e-3)
    plans = {
        control: subnetwork_plan(loaded, neurons, ["fr"], text, held_out, training, control)
        for control in (SET, RANDOM)
    }
    assert plans[SET].components == plans[RANDOM].components
    losses = language_losses(loaded, report, plans)["fr"]
    assert losses[SET] < losses[RANDOM] < losses["base"]


@pytest.mark.parametrize("control", [SET, RANDOM, ALL, LORA])
def test_only_the_chosen_weights_change_and_the_same_seed_gives_the_same_bytes(llama, corpora, control):
    text, held_out, report = corpora
    made = [
        subnetwork_plan(llama, neurons_of(llama), ["qaa"], text, held_out, SHORT, control).to_bytes()
        for _ in range(2)
    ]
    assert made[0] == made[1]
    plan = subnetwork_plan(llama, neurons_of(llama), ["qaa"], text, held_out, SHORT, control)
    rows = control_neurons(llama, ROWS, control, 0)
    per_layer = [int((rows[:, 0] == layer).sum()) for layer in range(3)]
    assert per_layer == ([48] * 3 if control == ALL else [2, 0, 3])
    for edit in plan.edits:
        of_layer = rows[rows[:, 0] == edit.layer, 1]
        if control == LORA:
            assert edit.rank == max(1, round(len(of_layer) * 3 * 64 / (3 * (64 + 48)))) and not edit.dense
        else:
            assert edit.components == tuple(of_layer.tolist()) and edit.dense == len(of_layer)
    learning = plan.metadata["learning"]
    assert learning["held_out"][learning["passes"]] == min(learning["held_out"]) < learning["held_out"][0]
    losses = language_losses(llama, report, {"trained": plan})
    assert losses["qaa"]["trained"] < losses["qaa"]["base"]
    assert all(
        not parameter.requires_grad and parameter.grad is None for parameter in llama.model.parameters()
    )


@pytest.mark.parametrize("stop", [2, 9])
def test_a_stopped_training_goes_on_and_ends_in_the_same_bytes(llama, corpora, tmp_path, monkeypatch, stop):
    monkeypatch.setattr("neurons.recording.resume.Unfinished.is_due", lambda self: True)
    text, held_out, _ = corpora
    training, out, done = replace(SHORT, passes=2), tmp_path / "plan.safetensors", []

    def train(progress, **given):
        return subnetwork_plan(
            llama, neurons_of(llama), ["qaa"], text, held_out, training, progress=progress, **given
        ).to_bytes()

    def stopped(count):
        done.append(count)
        if len(done) == stop:
            raise KeyboardInterrupt

    steps = []
    whole = train(steps.append)
    assert len(steps) == 14  # so one stop is in each pass
    with pytest.raises(KeyboardInterrupt):
        train(stopped, out=out)
    again = []
    assert train(again.append, out=out) == whole
    # What is reported before a stop may not be on disk.
    assert again == [sum(steps[: stop - 1]), *steps[stop - 1 :]]
    again.clear()
    assert train(again.append, out=out) == whole and again == [sum(steps)]
    again.clear()
    with monkeypatch.context() as patched:
        # Another process has reached a further step, where it was stopped.
        patched.setattr(
            "neurons.recording.training.all_reduce",
            lambda values, combine: values + (combine is torch.maximum and values.numel() == 2),
        )
        assert train(again.append, out=out) == whole and again == steps
    again.clear()
    training = replace(training, seed=1)
    train(again.append, out=out)
    assert len(again) == len(steps)  # another training


def test_refusals(llama, corpora, checkpoint_of):
    text, held_out, _ = corpora
    for languages, training, error, named in (
        (["qab"], SHORT, UsageError, "qab"),
        (["qaa"], Training(passes=0), UsageError, "0 passes"),
        (["qaa"], Training(block=32, tokens=64, rate=1e-30), BrocaError, "no pass lowers"),
    ):
        with pytest.raises(error, match=named):
            subnetwork_plan(llama, neurons_of(llama), languages, text, held_out, training)
    heads = replace(neurons_of(llama), metadata={"unit": "head", "fingerprint": llama.fingerprint})
    with pytest.raises(UsageError, match="set is of heads"):
        subnetwork_plan(llama, heads, ["qaa"], text, held_out, SHORT)
    mixture = load_model(str(checkpoint_of("mixtral")), device="cpu")
    with pytest.raises(BrocaError, match="neuron 3 of layer 0 belongs to a routed expert"):
        subnetwork_plan(mixture, neurons_of(mixture), ["qaa"], text, held_out, SHORT)


@pytest.mark.parametrize(
    ("model_type", "into"),
    [("apertus", ["mlp.up_proj"]), ("gemma3n_text", ["mlp.gate_proj", "mlp.up_proj"])],
)
def test_neurons_behind_an_activation_are_computed_by_the_linear_modules_before_it(
    tmp_path, model_type, into
):
    loaded = load_model(str(models.build_wrapper(tmp_path, model_type)), device="cpu")
    edits = untrained(loaded, torch.tensor([[0, 3]]))
    assert [edit.block for edit in edits] == ["mlp", *into]
    assert all(edit.rows.tolist() == [3] for edit in edits[1:])
    assert all(loaded.anatomy.computes_neurons(0, path) for path in into)


@pytest.mark.parametrize(
    ("model_type", "rows", "allowed"),
    [
        # A dense layer, then mixtures of four experts of 32 with a shared one.
        ("deepseek_v3", [[0, 3], [0, 90], [2, 130]], {0: range(96), 1: range(128, 160), 2: range(128, 160)}),
        ("gemma4_text", [[0, neuron] for neuron in range(20)], {0: range(96), 2: range(192), 3: range(192)}),
    ],
)
def test_controls_have_only_neurons_that_every_token_reaches(tmp_path, model_type, rows, allowed):
    wide = {"use_double_wide_mlp": True} if model_type == "gemma4_text" else {}
    loaded = load_model(str(models.build_wrapper(tmp_path, model_type, **wide)), device="cpu")
    rows = torch.tensor(rows)
    for seed in range(5):
        drawn = control_neurons(loaded, rows, RANDOM, seed)
        assert drawn[:, 0].tolist() == rows[:, 0].tolist()
        assert all(neuron in allowed[layer] for layer, neuron in drawn.tolist())
        assert not {*map(tuple, drawn.tolist())} & {*map(tuple, rows.tolist())}
        assert untrained(loaded, drawn)
    whole = control_neurons(loaded, rows, ALL, 0)
    for layer, neurons in allowed.items():
        assert whole[whole[:, 0] == layer, 1].tolist() == list(neurons)
