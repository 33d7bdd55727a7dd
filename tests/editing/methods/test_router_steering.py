"""Router steering: every number against plain loops over tokens, and what the edit does to the routers' scores."""

import json

import models
import numpy as np
import pytest
import torch

from editing.methods.material import Material
from editing.methods.router_steering import RouterSteering, expert_scores, mean_scores, middle_layers
from editing.plans.applied import applied
from editing.plans.plan import load_plan
from neurons.errors import BrocaError, UsageError
from neurons.models.source import load_model
from neurons.recording.corpus_recording import record_corpus
from neurons.scorers.method import TEXTS
from neurons.statistics.routing import ROUTING
from neurons.text.batches import language_batches
from neurons.text.corpus import read_corpus

FAMILIES = ("qwen3_moe", "gpt_oss")
EXPERTS = 5
LAYER = 1


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return models.write_corpus(tmp_path_factory.mktemp("router") / "text", lines=12)


@pytest.fixture(scope="module")
def loaded_of(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            sizes = {"num_local_experts" if family == "gpt_oss" else "num_experts": EXPERTS}
            directory = tmp_path_factory.mktemp("router") / family
            made[family] = load_model(str(models.build_checkpoint(directory, family, **sizes)))
        return made[family]

    return of


def tokens_of(loaded, corpus):
    """Per language the router's inputs float64 [t, d] of the counted tokens, and those of the start tokens."""
    router = loaded.anatomy.blocks[LAYER].mlp.get_submodule(
        loaded.anatomy.layout.router.path.removeprefix("mlp.")
    )
    inputs, starts = {}, []
    for language, batches in language_batches(loaded, corpus).items():
        rows = []
        for batch in batches:
            kept = []
            handle = router.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0]))
            with torch.no_grad():
                loaded.model(input_ids=batch.ids, attention_mask=batch.attention.long())
            handle.remove()
            values = kept[0].double().view(*batch.ids.shape, -1)
            rows.append(values[batch.counted])
            starts.append(values[batch.at_start])
        inputs[language] = torch.cat(rows)
    return inputs, torch.cat(starts), router


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_the_one_of_loops(loaded_of, text, family):
    loaded, corpus, strength, threshold = loaded_of(family), read_corpus(text), 0.7, 0.35
    inputs, starts, router = tokens_of(loaded, corpus)
    bias = router.bias.detach().double().tolist() if family == "gpt_oss" else [0.0] * EXPERTS
    weight = router.weight.detach().double().tolist()
    counts = {language: [0] * EXPERTS for language in inputs}
    sizes, tokens = [0.0] * EXPERTS, 0
    for language, rows in inputs.items():
        for row in rows.tolist():
            r = [sum(w * x for w, x in zip(weight[e], row, strict=True)) + bias[e] for e in range(EXPERTS)]
            for expert in sorted(range(EXPERTS), key=lambda e: -r[e])[:2]:
                counts[language][expert] += 1
            sizes = [size + abs(score) for size, score in zip(sizes, r, strict=True)]
            tokens += 1
    kept = {
        language: sorted(range(EXPERTS), key=lambda e: (-of[e], e))[:3] for language, of in counts.items()
    }
    expected = []
    for expert in range(EXPERTS):
        f = {k: counts[k][expert] / len(inputs[k]) if expert in kept[k] else 0.0 for k in inputs}
        share = f["qab"] / sum(f.values()) if sum(f.values()) else 0.0
        expected.append(share if share >= threshold else 0.0)
    assert any(expected) and not all(expected)
    added = [strength * s * size / tokens for s, size in zip(expected, sizes, strict=True)]

    statistics = record_corpus(loaded, corpus, [ROUTING], TEXTS)
    assert [statistics.routed[LAYER, :EXPERTS, k].tolist() for k in range(3)] == list(counts.values())
    scores = expert_scores(statistics, ["qab"], 3, threshold)
    assert scores[LAYER].tolist() == pytest.approx(expected, abs=1e-12)
    plan = RouterSteering(strength=strength).raised(
        Material(loaded, corpus), [LAYER], scores, mean_scores(statistics)
    )
    (edit,) = plan.edits
    assert edit.block == loaded.anatomy.layout.router.path and edit.components == ()
    assert edit.notes["experts"] == {str(e): pytest.approx(s) for e, s in enumerate(expected) if s}
    if family == "gpt_oss":
        assert edit.left is None and edit.bias.tolist() == pytest.approx(added, rel=1e-5)
        assert edit.notes["bias_norm"] == pytest.approx(np.linalg.norm(added), rel=1e-5)
        return
    assert edit.left[:, 0].tolist() == pytest.approx(added, rel=1e-5)
    # The stationarity conditions of the key, with the covariance of all tokens about their mean.
    x = torch.cat([*inputs.values()])
    covariance = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    form = covariance + 1e-2 * covariance.diagonal().mean() * torch.eye(x.shape[1]).double()
    constraints = torch.stack([x.mean(0), starts.mean(0)], 1)
    system = torch.zeros(x.shape[1] + 2, x.shape[1] + 2).double()
    system[: x.shape[1], : x.shape[1]] = 2 * form
    system[: x.shape[1], x.shape[1] :] = constraints
    system[x.shape[1] :, : x.shape[1]] = constraints.T
    solution = np.linalg.solve(system.numpy(), np.concatenate([np.zeros(x.shape[1]), np.ones(2)]))
    np.testing.assert_allclose(
        edit.right[:, 0].double().numpy(), solution[: x.shape[1]], rtol=2e-3, atol=1e-5
    )
    key = edit.right[:, 0].double()
    assert edit.notes["spread"] == pytest.approx(float((x @ key).std(correction=0)), rel=1e-3)
    assert edit.notes["change_norm"] == pytest.approx(
        float(torch.outer(edit.left[:, 0], edit.right[:, 0]).norm())
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_scores_move_by_the_edit_and_targets_get_more_tokens(loaded_of, text, family):
    """The mean of r over the text rises by lambda s E|r| and that of other experts stays."""
    loaded, corpus = loaded_of(family), read_corpus(text)
    before = record_corpus(loaded, corpus, [ROUTING, "router_out:sum"], TEXTS)
    scores = torch.zeros(3, EXPERTS, dtype=torch.float64)
    scores[LAYER, 2] = 0.9
    means = mean_scores(before)
    plan = RouterSteering(strength=3.0).raised(Material(loaded, corpus), [LAYER], scores, means)
    with applied(loaded, plan):
        after = record_corpus(loaded, corpus, [ROUTING, "router_out:sum"], TEXTS)
    moved = (after.moments["router_out:sum"] - before.moments["router_out:sum"])[LAYER].sum(
        -1
    ) / before.tokens.sum()
    torch.testing.assert_close(moved, 3.0 * scores[LAYER] * means[LAYER], rtol=1e-3, atol=1e-4)
    assert bool((after.routed[LAYER, 2] > before.routed[LAYER, 2]).all())
    with applied(loaded, plan.scaled(-1)):
        assert int(record_corpus(loaded, corpus, [ROUTING], TEXTS).routed[LAYER, 2].sum()) < int(
            before.routed[LAYER, 2].sum()
        )


def test_what_is_refused(loaded_of, text, checkpoint_of):
    loaded, corpus = loaded_of("qwen3_moe"), read_corpus(text)
    statistics = record_corpus(loaded, corpus, [ROUTING], TEXTS)
    for targets, named in (((), "qaa"), (("fr",), "fr"), (("qaa", "qab", "qac"), "all")):
        with pytest.raises(UsageError, match=named):
            expert_scores(statistics, targets)
    with pytest.raises(UsageError, match="threshold"):
        expert_scores(statistics, ["qaa"], threshold=1.5)
    zeros = torch.zeros(3, EXPERTS)
    with pytest.raises(BrocaError, match="changes nothing"):
        RouterSteering().raised(Material(loaded, corpus), middle_layers(loaded), zeros, zeros)
    dense = load_model(str(checkpoint_of("llama")))
    with pytest.raises(UsageError, match="no router"):
        middle_layers(dense)
    with pytest.raises(UsageError, match="layer 0 has no router"):
        RouterSteering().raised(Material(dense, corpus), [0], zeros, zeros)


@pytest.mark.parametrize("family", FAMILIES)
def test_on_the_command_line(broca, loaded_of, text, tmp_path, family):
    model = loaded_of(family).name
    statistics, edit = tmp_path / "statistics.safetensors", tmp_path / "edit.safetensors"
    assert broca("record", model, "--corpus", text, "--out", statistics)[0] == 0
    status, out, _ = broca("inspect", statistics, "--json")
    routing = json.loads(out)["routing"]
    assert status == 0 and len(routing["divergence"]) == 3
    assert np.array(routing["share"]).shape == np.array(routing["fraction"]).shape == (3, EXPERTS, 3)
    assert "divergence" in broca("inspect", statistics)[1]
    words = ("edit", model, "--method", "steer-router", "--corpus", text, "--set", "targets=qab")
    words = (*words, "--set", "threshold=0.2", "--layers", "1-2", "--statistics", statistics)
    status, _, err = broca(*words, "--out", edit)
    assert status == 0, err
    first = edit.read_bytes()
    assert broca(*words, "--out", edit)[0] == 0 and edit.read_bytes() == first
    assert {e.block for e in load_plan(edit).edits} == {loaded_of(family).anatomy.layout.router.path}
    status, _, err = broca(
        "export", model, "--edit", edit, "--verify", "--undoable", "--out", tmp_path / "out"
    )
    assert status == 0, err
    assert broca("export", tmp_path / "out", "--undo", "--out", tmp_path / "back")[0] == 0
    weights = [
        (directory / "model.safetensors").read_bytes() for directory in (tmp_path / "out", tmp_path / "back")
    ]
    assert weights[1] != weights[0]
    status, _, err = broca("export", model, "--edit", edit, "--format", "lora", "--out", tmp_path / "lora")
    assert status == 1 and "LoRA" in err
    assert broca("inspect", edit)[0] == 0
    status, _, err = broca(*words[:-2], "--set", "targets=fr", "--out", edit)
    assert status == 2
