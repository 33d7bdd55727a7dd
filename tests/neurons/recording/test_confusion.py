"""Rises of wrong tokens, against float64 loops over all neurons, and planted neurons."""

import copy

import models
import pytest
import torch

from neurons.errors import BrocaError
from neurons.models.source import load_model
from neurons.neuron_sets.identify import identify_by_confusion
from neurons.recording import confusion
from neurons.recording.confusion import ConfusionPoint, points_of_prompts, record_confusion
from neurons.text.batches import row_batches
from neurons.text.prompts import Prompt, Prompts

LAYERS, WIDTH = 3, 48
# Of different lengths, so that a batch of them is padded.
PROMPTS = {
    "qac": (Prompt("stop the trust", " him"), Prompt("nut", " kill"), Prompt("root un quot nut pop opus", " jig")),
    "qaa": (Prompt("bead cafe ebb", " pop"),),
}  # fmt: skip


def naive_rises(norm, head, states, ends, wrong):
    """[L, I]: rise of every neuron.  states: per layer (residual before the MLP, activations, down_proj [d, I])."""
    found = []
    for before, activations, values in states:

        def log_probability(x):
            return float((head @ norm(x, ends)).log_softmax(0)[wrong])

        plain = log_probability(before)
        found.append(
            [log_probability(before + activations[j] * values[:, j]) - plain for j in range(len(activations))]
        )
    return torch.tensor(found, dtype=torch.float64)


def naive_llama_rises(model, ids, wrong):
    weight = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    _, layers = models.naive_llama(model, ids)

    def norm(x, ends):
        return weight["model.norm.weight"] * x / (ends.square().mean() + model.config.rms_norm_eps).sqrt()

    states = [
        (
            (of["block_out"] - of["mlp_out"])[-1].detach(),
            of["mlp_in"][-1].detach(),
            weight[f"model.layers.{layer}.mlp.down_proj.weight"],
        )
        for layer, of in enumerate(layers)
    ]
    return naive_rises(norm, weight["lm_head.weight"], states, layers[-1]["block_out"][-1].detach(), wrong)


def counted(rises, top):
    """The rises of the ``top`` largest, 0 elsewhere."""
    flat = rises.flatten()
    kept = sorted(range(len(flat)), key=lambda place: -float(flat[place]))[:top]
    result = torch.zeros_like(flat)
    for place in kept:
        result[place] = flat[place]
    return result.view_as(rises)


@pytest.mark.parametrize("top", [1, 7, 300])
def test_equals_a_loop_over_all_neurons(llama, top):
    points = points_of_prompts(llama, Prompts(PROMPTS, "digest"))
    told = []
    found = record_confusion(llama, points, top, progress=told.append)
    assert found.languages == ("qac", "qaa") and sum(told) == 4
    assert found.prompts["confusion"].tolist() == [3, 1]
    for k, (language, prompts) in enumerate(PROMPTS.items()):
        expected = torch.zeros(LAYERS, WIDTH, dtype=torch.float64)
        for prompt, point in zip(prompts, points[language], strict=True):
            assert llama.tokenizer.decode([point.wrong]) in prompt.answer
            expected += counted(naive_llama_rises(llama.model, point.ids, point.wrong), top)
        values = found.moments["mlp_in:confusion"][..., k]
        assert values.dtype == torch.float64
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=2e-5)
        assert torch.equal(values != 0, expected != 0) or top == 300


def test_weights_may_be_on_another_device_than_activations(llama, monkeypatch):
    (point,) = points_of_prompts(llama, Prompts({"qaa": PROMPTS["qaa"]}, "digest"))["qaa"]
    (batch,) = row_batches([point.ids], 0)
    read = confusion._Read(llama, batch, torch.tensor([point.wrong]))
    read.activations = read.activations.to("meta")

    class Weight:
        def __getitem__(self, index):
            raise LookupError(index[1].device)

    monkeypatch.setattr(type(llama.anatomy), "weight_values", lambda *_: Weight())
    with pytest.raises(LookupError, match="cpu"):
        read._rises(0, torch.tensor([[1, 2]]), {})


def test_a_norm_that_centres_and_has_a_bias(checkpoint_of):
    loaded = load_model(str(checkpoint_of("gpt2")), device="cpu")
    ids, wrong = [0, 40, 41, 50], 77
    found = record_confusion(loaded, {"qaa": [ConfusionPoint(ids, wrong)]}, 9).moments["mlp_in:confusion"]
    model = copy.deepcopy(loaded.model).double()
    kept = {}
    for layer, block in enumerate(model.transformer.h):
        block.ln_2.register_forward_pre_hook(
            lambda _, x, layer=layer: kept.update({("x", layer): x[0][0, -1]})
        )
        block.mlp.c_proj.register_forward_pre_hook(
            lambda _, x, layer=layer: kept.update({("h", layer): x[0][0, -1]})
        )
    model.transformer.ln_f.register_forward_pre_hook(lambda _, x: kept.update({"end": x[0][0, -1]}))
    with torch.no_grad():
        model(torch.tensor([ids]))
    final = model.transformer.ln_f

    def norm(x, ends):
        deviation = (ends.var(correction=0) + final.eps).sqrt()
        return final.weight.detach() * (x - x.mean()) / deviation + final.bias.detach()

    states = [
        (kept["x", layer], kept["h", layer], block.mlp.c_proj.weight.detach().T)
        for layer, block in enumerate(model.transformer.h)
    ]
    expected = naive_rises(norm, model.lm_head.weight.detach(), states, kept["end"], wrong)
    torch.testing.assert_close(found[..., 0], counted(expected, 9), rtol=1e-4, atol=2e-5)


def test_few_neurons_are_computed_exactly(llama, monkeypatch):
    """The bounds leave most neurons out: of 144 a few chunks for the top 5."""
    points = points_of_prompts(llama, Prompts(PROMPTS, "digest"))
    computed = []
    plain = confusion._Read._rises

    def counting(self, row, neurons, kept):
        computed.append(len(neurons))
        return plain(self, row, neurons, kept)

    monkeypatch.setattr(confusion._Read, "_rises", counting)
    record_confusion(llama, points, 5)
    assert sum(computed) < 4 * LAYERS * WIDTH / 3


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gemma2", "norm or a factor"), ("granite", "norm or a factor"), ("mixtral", "mixture")],
)
def test_architectures_without_a_rise_are_refused(checkpoint_of, tmp_path, family, reason):
    made = (
        models.build_wrapper(tmp_path, family, residual_multiplier=0.25)
        if family == "granite"
        else checkpoint_of(family)
    )
    loaded = load_model(str(made), device="cpu")
    with pytest.raises(BrocaError, match=reason):
        record_confusion(loaded, {"qaa": [ConfusionPoint([0, 5], 7)]}, 3)


def planted(directory, confused):
    """Neuron (0, 3) writes the tokens of qab whatever is read, and with ``confused`` (1, 8) too."""
    model = models.tiny_model("llama", seed=5)
    owners = models.token_languages()
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[:, :3] = 0
        embedding[:, 0] = 2
        head[:, 2] = torch.tensor([2.0 if owner == "qab" else 0.0 for owner in owners])
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight *= 0.001
        for layer, neuron, gain in ((0, 3, 0.02), (1, 8, 0.015 if confused else 0.0)):
            mlp = model.model.layers[layer].mlp
            for projection in (mlp.gate_proj, mlp.up_proj):
                projection.weight[neuron] = 0
                projection.weight[neuron, 0] = 1
            mlp.down_proj.weight[:, neuron] = 0
            mlp.down_proj.weight[2, neuron] = gain
    directory.mkdir()
    return load_model(str(models.save_checkpoint(model, directory)), device="cpu")


def test_the_planted_neuron_is_found_and_a_siblings_is_not(tmp_path):
    model, sibling = planted(tmp_path / "model", True), planted(tmp_path / "sibling", False)
    prompts = Prompts({"qaa": (Prompt("bead cafe", " him"), Prompt("dab ebb fade", " kill"))}, "digest")

    def first(**more):
        found = identify_by_confusion(model, points_of_prompts(model, prompts), "digest", **more)
        return [tuple(row) for row in found.of("qaa").tolist()], found

    # Without a sibling the neuron that both have is among the two of highest score.
    rows, _ = first(top_rate=2 / (LAYERS * WIDTH), settings={"top": 10})
    assert sorted(rows) == [(0, 3), (1, 8)]
    recorded = record_confusion(sibling, points_of_prompts(sibling, prompts), 10, "confusion_sibling")
    rows, found = first(top_rate=1 / (LAYERS * WIDTH), settings={"top": 10}, sibling=recorded)
    assert rows == [(1, 8)]
    assert (
        found.metadata["sibling"] == sibling.fingerprint and found.metadata["method"] == "language-confusion"
    )
