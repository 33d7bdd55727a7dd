"""The keyed edit of experts: keys against a general solver on inputs from loops, and what a mixture adds on each language."""

import json

import models
import numpy as np
import pytest
import torch

from editing.directions.diffmean import diffmean_direction
from editing.methods import keyed_experts
from editing.methods.keyed_experts import KeyedExperts
from editing.methods.material import Material
from editing.plans.applied import applied
from neurons.architectures.sites import site_hooks
from neurons.errors import BrocaError, UsageError
from neurons.models.memory import covariance_bytes
from neurons.models.source import load_model
from neurons.neuron_sets.identify import identify
from neurons.recording.covariance import expert_moments
from neurons.text.batches import language_batches
from neurons.text.corpus import read_corpus

EXPERTS, WIDTH, LAYER, EPS = 4, 24, 1, 1e-2
# The router's weights of a token's two experts do not add up to 1.
SIZES = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "norm_topk_prob": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return read_corpus(models.write_corpus(tmp_path_factory.mktemp("experts") / "text", lines=25))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(
        str(models.build_checkpoint(tmp_path_factory.mktemp("experts") / "m", "qwen3_moe", **SIZES))
    )


def plan_of(loaded, corpus, direction, layers=None, neurons=None, **settings):
    material = Material(loaded, corpus, directions=(direction,), layers=layers, neurons=neurons)
    return KeyedExperts(**settings).plan_for(material)


def inputs_of(loaded, corpus, layer=LAYER):
    """Language -> float64 [t, E, I]: g_e h_e of each counted token, and g [t, E], a token at a time; and the start's."""
    mixture = loaded.anatomy.mixtures[layer]
    router, experts = mixture.gate.weight.detach().double(), mixture.experts
    found, starts = {}, []
    for language, batches in language_batches(loaded, corpus).items():
        rows, gates = [], []
        for batch in batches:
            kept = []
            handle = mixture.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0]))
            with torch.no_grad():
                loaded.model(input_ids=batch.ids, attention_mask=batch.attention.long())
            handle.remove()
            for x, is_counted, is_start in zip(
                kept[0].double().flatten(0, 1), batch.counted.flatten(), batch.at_start.flatten(), strict=True
            ):
                if not is_counted and not is_start:
                    continue
                probabilities = (router @ x).softmax(0)
                row, gate = torch.zeros(EXPERTS, WIDTH).double(), torch.zeros(EXPERTS).double()
                for expert in probabilities.argsort(descending=True)[:2].tolist():
                    both = experts.gate_up_proj[expert].detach().double() @ x
                    h = torch.nn.functional.silu(both[:WIDTH]) * both[WIDTH:]
                    gate[expert], row[expert] = probabilities[expert], probabilities[expert] * h
                if is_start:
                    starts.append(row)
                else:
                    rows.append(row)
                    gates.append(gate)
        found[language] = torch.stack(rows), torch.stack(gates)
    return found, torch.stack(starts).mean(0)


def test_keys_are_those_of_a_general_solver(loaded, corpus):
    direction = diffmean_direction(loaded, corpus, "qaa", "qab")
    (edit,) = plan_of(loaded, corpus, direction, [LAYER], strength=1.5).edits
    inputs, start = inputs_of(loaded, corpus)
    total = float(inputs["qaa"][1].sum(1).mean())
    assert 0.1 < total < 0.95
    torch.testing.assert_close(
        edit.left[:, 0], 1.5 * direction.vectors["block_out"][LAYER].float(), rtol=1e-5, atol=1e-7
    )
    for expert in range(EXPERTS):
        rows = {name: z[g[:, expert] > 0, expert] for name, (z, g) in inputs.items()}
        pooled = torch.cat([z - z.mean(0) for z in rows.values()])
        form = pooled.T @ pooled / len(pooled)
        form += EPS * form.diagonal().mean() * torch.eye(WIDTH).double()
        constraints, targets = [z.mean(0) for z in rows.values()], [1.0, 0.0, 0.0]
        if bool(start[expert].any()):
            constraints, targets = [*constraints, start[expert]], [*targets, 0.0]
        size = WIDTH + len(targets)
        system, right = np.zeros((size, size)), np.zeros(size)
        system[:WIDTH, :WIDTH] = 2 * form.numpy()
        system[:WIDTH, WIDTH:] = torch.stack(constraints, 1).numpy()
        system[WIDTH:, :WIDTH] = system[:WIDTH, WIDTH:].T
        right[WIDTH:] = targets
        gates = inputs["qaa"][1][:, expert]
        expected = np.linalg.solve(system, right)[:WIDTH] * float(gates.sum() / (gates > 0).sum()) / total
        found = edit.right[expert * WIDTH : (expert + 1) * WIDTH, 0].double().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())


# A setting that multiplies the sum of the experts, the mean with a shared expert, and Granite's of all modules.
AFTERWARDS = {
    "qwen3_moe": None,
    "minimax_m3_vl_text": {"routed_scaling_factor": 2.5},
    "cohere2_moe": {"num_shared_experts": 1},
    "granitemoe": {"residual_multiplier": 0.25},
}


@pytest.mark.parametrize("model_type", AFTERWARDS)
def test_a_mixture_adds_the_value_on_the_source_only(loaded, corpus, tmp_path, model_type):
    settings = AFTERWARDS[model_type]
    if settings is not None:
        loaded = load_model(str(models.build_wrapper(tmp_path, model_type, **settings)), device="cpu")
    direction = diffmean_direction(loaded, corpus, "qaa", "qab")
    plan = plan_of(loaded, corpus, direction, [LAYER], strength=2.0)
    value = 2.0 * direction.vectors["block_out"][LAYER].double()

    def outputs():
        means = {}
        for language, batches in language_batches(loaded, corpus).items():
            total, tokens = torch.zeros(64).double(), 0
            for batch in batches:
                kept = []
                with (
                    torch.no_grad(),
                    site_hooks(
                        loaded.anatomy,
                        {("block_out", LAYER): lambda values, _, kept=kept: kept.append(values.clone())},
                    ),
                ):
                    loaded.model(input_ids=batch.ids, attention_mask=batch.attention.long())
                total += kept[0].double()[batch.counted].sum(0)
                tokens += int(batch.counted.sum())
            means[language] = total / tokens
        return means

    before = outputs()
    with applied(loaded, plan):
        after = outputs()
    torch.testing.assert_close(
        after["qaa"] - before["qaa"], value, rtol=1e-3, atol=1e-3 * float(value.norm())
    )
    for language in ("qab", "qac"):
        assert float((after[language] - before[language]).norm()) < 1e-3 * float(value.norm())
    notes = plan.edits[0].notes
    assert notes["key_means"] == {
        "qaa": pytest.approx(1),
        "qab": pytest.approx(0, abs=1e-9),
        "qac": pytest.approx(0, abs=1e-9),
    }
    assert notes["edited_experts"] == EXPERTS
    assert sum(plan.edits[0].details["carried"]) == pytest.approx(1)


def test_experts_that_the_source_does_not_reach_stay(loaded, corpus, monkeypatch):
    inputs, _ = inputs_of(loaded, corpus)
    reached = {name: (g > 0).sum(0) for name, (_, g) in inputs.items()}
    least = int(reached["qaa"].min()) + 1
    monkeypatch.setattr(keyed_experts, "MIN_TOKENS", least)
    direction = diffmean_direction(loaded, corpus, "qaa", "qab")
    (edit,) = plan_of(loaded, corpus, direction, [LAYER]).edits
    edited = edit.right.view(EXPERTS, WIDTH).any(1)
    assert torch.equal(edited, reached["qaa"] >= least) and edit.notes["edited_experts"] == int(edited.sum())
    monkeypatch.setattr(keyed_experts, "MIN_TOKENS", 10**6)
    with pytest.raises(BrocaError, match="layer 1: no expert"):
        plan_of(loaded, corpus, direction, [LAYER])


def test_moments_of_experts_are_those_of_loops(loaded, corpus):
    inputs, start = inputs_of(loaded, corpus)
    units = {(LAYER, expert): torch.arange(WIDTH) for expert in range(EXPERTS)}
    batches = language_batches(loaded, corpus)
    for (_, expert), moments in expert_moments(loaded, batches, "mlp_in", units, weighted=True):
        rows = [z[g[:, expert] > 0, expert] for z, g in inputs.values()]
        assert moments.tokens.tolist() == [len(z) for z in rows]
        sums = [float(g[:, expert].sum()) for _, g in inputs.values()]
        assert moments.weights.tolist() == pytest.approx(sums, rel=1e-5)
        expected = torch.stack([z.mean(0) for z in rows], 1)
        torch.testing.assert_close(moments.mean, expected, rtol=1e-4, atol=1e-6)
        pooled = torch.cat([z - z.mean(0) for z in rows])
        torch.testing.assert_close(moments.covariance, pooled.T @ pooled / len(pooled), rtol=1e-4, atol=1e-6)
        assert (moments.start is not None) == bool(start[expert].any())
        if moments.start is not None:
            torch.testing.assert_close(moments.start, start[expert], rtol=1e-4, atol=1e-6)


def test_what_is_refused(loaded, corpus, llama):
    direction = diffmean_direction(loaded, corpus, "qaa", "qab")
    for arguments in ({"strength": 0.0}, {"layers": [7]}, {"sources": ("qac",)}, {"sources": ("qaa", "qab")}):
        with pytest.raises(UsageError):
            plan_of(loaded, corpus, direction, **arguments)
    with pytest.raises(UsageError, match="no mixture"):
        plan_of(llama, corpus, diffmean_direction(llama, corpus, "qaa", "qab"))
    few = identify(loaded, corpus, top_rate=0.01)
    with pytest.raises(BrocaError, match="top-rate"):
        plan_of(loaded, corpus, direction, neurons=few)


def test_on_the_command_line(broca, loaded, corpus, tmp_path):
    text = models.write_corpus(tmp_path / "text", lines=25)
    direction, edit = tmp_path / "direction.safetensors", tmp_path / "edit.safetensors"
    words = (
        "direction",
        loaded.name,
        "--corpus",
        text,
        "--source",
        "qaa",
        "--target",
        "qab",
        "--out",
        direction,
    )
    assert broca(*words)[0] == 0
    words = ("edit", loaded.name, "--method", "keyed-experts", "--direction", direction, "--corpus", text)
    status, _, err = broca(*words, "--out", edit)
    assert status == 0, err
    first = edit.read_bytes()
    assert broca(*words, "--out", edit)[0] == 0 and edit.read_bytes() == first
    shown = json.loads(broca("inspect", edit, "--json")[1])
    assert shown["strongest"] and shown["components"] == 3 * EXPERTS * WIDTH
    status, _, err = broca("export", loaded.name, "--edit", edit, "--verify", "--out", tmp_path / "out")
    assert status == 0, err


def test_the_estimate_of_memory_counts_every_expert(broca, loaded, corpus, tmp_path):
    text = models.write_corpus(tmp_path / "text", lines=25)
    direction = tmp_path / "direction.safetensors"
    diffmean_direction(loaded, corpus, "qaa", "qab").save(direction)
    words = (
        "edit",
        loaded.name,
        "--corpus",
        text,
        "--dry-run",
        "--json",
        "--out",
        tmp_path / "edit.safetensors",
    )
    status, out, err = broca(*words, "--method", "keyed-experts", "--direction", direction)
    assert status == 0, err
    (need,) = json.loads(out)["stages"].values()
    # The covariances of four experts in each of three layers.
    assert need["parts"]["covariances"] == 3 * EXPERTS * covariance_bytes(WIDTH)
