"""Every hook against the intervention written out at the modules themselves, and gone afterwards."""

from contextlib import ExitStack, contextmanager
from functools import partial

import models
import pytest
import torch

from editing.directions.direction import Direction
from editing.hooks.austeer import AusteerHook
from editing.hooks.clas import ClasHook
from editing.hooks.language_arithmetic import DifferenceArithmetic, LanguageArithmetic
from editing.hooks.residual import DiffMean
from editing.hooks.scaled_inputs import scaled_inputs
from editing.hooks.subspace_removal import Removal, middle_layers, subspace_removal, top_layers
from editing.methods.austeer import AusteerEdit
from editing.methods.material import Material
from editing.plans.applied import applied
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.scorers.momentum import MomentumRates

IDS = torch.tensor([[0, 5, 80, 33, 7], [0, 90, 91, 17, 2]])
LAYERS, NEURONS = 3, 48


def random_neurons(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(loaded):
    with torch.no_grad():
        return loaded.model(IDS).logits.double()


@contextmanager
def at(modules, change, before=False):
    """Change what modules are given or give back, layer by layer: ``change(layer, values)``."""
    with ExitStack() as undo:
        for layer, module in enumerate(modules):

            def hook(_, given, output=None, layer=layer):
                if before:
                    return (change(layer, given[0]),)
                if isinstance(output, tuple):
                    return (change(layer, output[0]), *output[1:])
                return change(layer, output)

            handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
            undo.callback(handle.remove)
        yield


def same_as_by_hand(loaded, way, by_hand):
    base = run(loaded)
    with by_hand:
        expected = run(loaded)
    with way():
        found = run(loaded)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - base).abs().max() > 0.01
    assert torch.equal(run(loaded), base)
    with pytest.raises(ZeroDivisionError), way():
        raise ZeroDivisionError
    assert torch.equal(run(loaded), base)


def test_residual_diffmean(llama):
    vector = random_neurons(1, 64)

    def add(layer, values):
        return values + 1.5 * vector.float() if layer == 1 else values

    way = DiffMean(layer=1, strength=1.5).hooks((llama, vector))
    same_as_by_hand(llama, way, at(llama.model.model.layers, add))


def test_of_several_streams_the_first_is_steered(tmp_path):
    loaded = load_model(str(models.build_wrapper(tmp_path, "gemma3n_text")), device="cpu")
    vector, kept = random_neurons(1, 64).float(), []
    handle = loaded.anatomy.blocks[2].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        loaded.model(IDS)
        with DiffMean(layer=1, strength=1.5).hooks((loaded, vector))():
            loaded.model(IDS)
    handle.remove()
    torch.testing.assert_close(kept[1][0], kept[0][0] + 1.5 * vector)
    assert torch.equal(kept[1][1:], kept[0][1:])


@pytest.fixture(scope="module")
def masks():
    on, off = random_neurons(2, LAYERS, NEURONS) > 0.5, random_neurons(3, LAYERS, NEURONS) > 0.5
    on[0], off[0] = False, False  # a layer that nothing is done to
    assert (on & off).any() and (on & ~off).any() and (off & ~on).any()
    return on, off


@pytest.mark.parametrize("mode", ["additive", "replacement", "difference"])
@pytest.mark.parametrize("fill", [0.0, -0.5])
def test_language_arithmetic_acts_on_the_activation(llama, masks, mode, fill):
    """By hand at the activation function, before the linear branch multiplies it."""
    on, off = masks
    target, other = random_neurons(4, LAYERS, NEURONS), random_neurons(5, LAYERS, NEURONS)
    way = LanguageArithmetic(llama, target, other, on, off, mode, 2.0, fill)

    def change(layer, values):
        values = values.clone()
        for neuron in range(NEURONS):
            if off[layer, neuron]:
                values[..., neuron] = fill
            if on[layer, neuron]:
                mean = float(target[layer, neuron])
                if mode == "additive":
                    values[..., neuron] += 2.0 * mean
                elif mode == "replacement":
                    values[..., neuron] = 2.0 * mean
                else:
                    values[..., neuron] += 2.0 * (mean - float(other[layer, neuron]))
        return values

    functions = [layer.mlp.act_fn for layer in llama.model.model.layers]
    assert len(set(map(id, functions))) == LAYERS
    same_as_by_hand(llama, way, at(functions, change))


def test_language_arithmetic_without_gates(checkpoint_of, masks):
    loaded = load_model(str(checkpoint_of("gpt2")), device="cpu")
    on, off = masks
    target = random_neurons(4, LAYERS, NEURONS)
    way = LanguageArithmetic(loaded, target, target, on, off, "additive", 1.0)

    def change(layer, values):
        kept = torch.where(off[layer], 0.0, values.double())
        return torch.where(on[layer], kept + target[layer], kept).float()

    same_as_by_hand(
        loaded, way, at([block.mlp.c_proj for block in loaded.model.transformer.h], change, before=True)
    )


def test_language_arithmetic_refuses(llama, masks):
    means = random_neurons(4, LAYERS, NEURONS)
    with (
        pytest.raises(UsageError, match="mode 'loud'"),
        LanguageArithmetic(llama, means, means, *masks, "loud")(),
    ):
        pass


@pytest.mark.parametrize("strength", [2.0, -5.0])
def test_clas_mixes_what_it_scaled(llama, strength):
    classes = torch.randint(0, 4, (LAYERS, NEURONS), generator=torch.Generator().manual_seed(6))
    way = ClasHook(strength=strength).hooks((llama, classes))

    def change(layer, values):
        if layer < 2:  # the last quarter of three layers is one
            return values
        scaled = values.clone()
        for neuron in range(NEURONS):
            kind = int(classes[layer, neuron])
            scaled[..., neuron] *= {1: 1 - 0.2, 2: 1 + 0.4}.get(kind, 1.0)
        return (1 - strength) * values + strength * scaled

    same_as_by_hand(
        llama, way, at([layer.mlp.down_proj for layer in llama.model.model.layers], change, before=True)
    )


@pytest.fixture(scope="module")
def rates():
    def of(width, seed):
        up = random_neurons(seed, LAYERS, width).abs() % 1
        return MomentumRates(up, (1 - up) * 0.9, random_neurons(seed + 1, LAYERS, width).abs())

    return {"attn": of(64, 7), "mlp": of(NEURONS, 9)}


def test_austeer_is_its_permanent_edit(llama, rates):
    plan = AusteerEdit(channels=30, alpha=2.0).plan((Material(llama, languages=("en", "fr")), rates))
    same_as_by_hand(llama, AusteerHook(channels=30, alpha=2.0).hooks((llama, rates)), applied(llama, plan))


def test_austeer_scales_the_channels_of_most_momentum(llama, rates):
    ranked = []
    for block, own in rates.items():
        for layer in range(LAYERS):
            for channel in range(own.rate_up.shape[1]):
                up, down = float(own.rate_up[layer, channel]), float(own.rate_down[layer, channel])
                ranked.append((max(up, down), block, layer, channel, up if up >= down else -down))
    factors = {block: torch.ones(LAYERS, own.rate_up.shape[1]) for block, own in rates.items()}
    for _, block, layer, channel, gamma in sorted(ranked, reverse=True)[:20]:
        factors[block][layer, channel] = 1 + 1.5 * gamma
    modules = llama.model.model.layers

    @contextmanager
    def by_hand():
        attention = at(
            [m.self_attn.o_proj for m in modules], lambda i, x: x * factors["attn"][i], before=True
        )
        mlp = at([m.mlp.down_proj for m in modules], lambda i, x: x * factors["mlp"][i], before=True)
        with attention, mlp:
            yield

    same_as_by_hand(llama, AusteerHook(channels=20, alpha=1.5).hooks((llama, rates)), by_hand())


def test_scaled_inputs_reach_the_right_expert(checkpoint_of):
    loaded = load_model(str(checkpoint_of("mixtral")), device="cpu")
    factors = torch.ones(LAYERS, loaded.anatomy.neurons)
    factors[1, NEURONS : 2 * NEURONS] = 0.0  # all of layer 1's expert 1
    base = run(loaded)
    with scaled_inputs(loaded, {"mlp": factors}):
        found = run(loaded)
    assert (found - base).abs().max() > 0.001
    silenced = load_model(str(checkpoint_of("mixtral")), device="cpu")
    silenced.anatomy.parts(1, "mlp")[0].weight[1].zero_()
    torch.testing.assert_close(run(silenced), found, rtol=1e-4, atol=1e-4)


def test_subspace_removal(llama):
    bases = [torch.linalg.qr(random_neurons(20 + layer, 64, 2))[0] for layer in range(LAYERS)]
    direction = Direction("en", "fr", {}, {}, {}, {"block_out": torch.stack(bases)})
    strengths = {0: 0.7, 2: -0.4}
    way = partial(subspace_removal, llama, direction, strengths)

    def change(layer, values):
        if layer not in strengths:
            return values
        changed = values.double()
        for column in bases[layer].T:
            changed = changed - strengths[layer] * (values.double() @ column)[..., None] * column
        return changed.float()

    same_as_by_hand(llama, way, at(llama.model.model.layers, change))
    with (
        pytest.raises(BrocaError, match="subspace"),
        subspace_removal(llama, Direction("a", "b", {}, {}, {}), {0: 1.0}),
    ):
        pass


@pytest.mark.parametrize(
    ("layers", "middle", "top"),
    [
        (8, (2, 3, 4, 5), (6, 7)),
        (3, (0, 1), (2,)),
        (1, (0,), ()),
        (2, (0,), (1,)),
        (32, tuple(range(8, 24)), tuple(range(24, 32))),
    ],
)
def test_which_layers_a_subspace_leaves(layers, middle, top):
    assert middle_layers(layers) == middle
    assert top_layers(layers) == top


def test_the_tiny_model_is_as_the_tests_think():
    assert models.tiny_model("llama").config.intermediate_size == NEURONS


def test_a_study_takes_the_subspace_from_the_middle_and_gives_it_back_on_top(llama):
    way = Removal(strength=0.5).hooks((llama, Direction("en", "fr", {}, {}, {})))
    assert way.args[-1] == {0: 0.5, 1: 0.5, 2: -0.5}


def test_language_arithmetic_of_a_study_takes_what_is_each_languages_own(llama, material, monkeypatch):
    masks = {"en": random_neurons(11, LAYERS, NEURONS) > 0, "fr": random_neurons(12, LAYERS, NEURONS) > 0}
    monkeypatch.setattr(Material, "mask", lambda _, method, language: masks[language])
    way = DifferenceArithmetic().prepare(material)(1.0)
    assert way.deactivated is masks["en"] and way.activated is masks["fr"]
    for language, found in (("en", way.other_means), ("fr", way.target_means)):
        rows = []
        handle = llama.model.model.layers[1].mlp.act_fn.register_forward_hook(
            lambda _, __, output, rows=rows: rows.append(output[0, 1:].double())
        )
        for text in material.text.non_empty(language):
            with torch.no_grad():
                llama.model(torch.tensor([llama.tokenizer(text)["input_ids"]]))
        handle.remove()
        torch.testing.assert_close(found[1], torch.cat(rows).mean(0), rtol=1e-3, atol=1e-5)
