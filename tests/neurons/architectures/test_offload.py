"""A model that is larger than what is allowed: partly or wholly on disk, it gives the very same figures."""

import gc
import tempfile
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate.utils.offload import OffloadedWeightsLoader
from test_anatomy import logits_of, silencing_plan
from test_self_check import NEW, save_new
from torch.multiprocessing.reductions import StorageWeakRef

from editing.directions.diffmean import diffmean_direction
from editing.evaluation.evaluation import Evaluation
from editing.methods.bake_bias import bake_bias_plan
from editing.methods.keyed import keyed_plan
from editing.methods.learned_values import learned_values
from editing.plans.applied import applied
from neurons.architectures.layouts import LAYOUTS
from neurons.architectures.sites import site_hooks
from neurons.errors import UsageError
from neurons.models.memory import LIBRARIES, MIN_WORK, WORK, room, sizes_of
from neurons.models.source import load_model
from neurons.neuron_sets.neuron_report import neuron_report
from neurons.recording.record import loss_sum, record
from neurons.text.batches import text_batches

FAMILIES = ["llama", "gpt2", "mixtral", "gpt_oss", "gemma3"]
MOMENTS = ["mlp_act:positive", "mlp_in:sum", "mlp_in:text_mean", "mlp_in:worst_rank", "mlp_in:attribution"]


def size_of(loaded):
    return sum(parameter.nbytes for parameter in loaded.model.parameters())


def batches_of(loaded, corpus):
    return {
        language: text_batches(corpus.texts[language][:8], loaded.tokenizer, 64, tokens_a_batch=128)
        for language in corpus.languages
    }


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where everything temporary of this test goes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module", params=["all on disk", "half on disk"])
def both(request, checkpoint_of):
    """family, dtype on disk -> (the model in memory, the same with a part on disk), float32."""

    def load(family="llama", dtype="bfloat16"):
        path = str(checkpoint_of(family, family == "gpt2", dtype))
        whole = load_model(path, device="cpu")
        allowed = 0 if request.param == "all on disk" else size_of(whole) // 2
        other = load_model(path, max_memory=allowed)
        places = set(other.model.hf_device_map.values())
        assert places == ({"cpu", "disk"} if allowed else {"disk"})
        return whole, other

    return load


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_and_gradients_are_the_same(both, corpus, family):
    whole, other = both(family)
    batches = batches_of(whole, corpus)
    expected, found = (record(loaded, batches, MOMENTS) for loaded in (whole, other))
    for name in MOMENTS:
        assert torch.equal(found.moments[name], expected.moments[name]), name
        assert expected.moments[name].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_is_applied_and_taken_back(both, family, temporary):
    whole, other = both(family)
    before = set(temporary.iterdir())
    plain = logits_of(other)
    assert torch.equal(plain, logits_of(whole))
    plan, readers = silencing_plan(whole)
    with applied(whole, plan), applied(other, plan):
        edited = logits_of(other)
        assert torch.equal(edited, logits_of(whole))
    assert torch.equal(edited, logits_of(other, readers))
    assert not torch.equal(edited, plain)
    assert torch.equal(logits_of(other), plain)
    assert set(temporary.iterdir()) == before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_bias_is_added_or_changed_and_taken_back(both, family):
    """A llama's modules have none, a GPT-2's do."""
    whole, other = both(family)
    plain = logits_of(other)
    plan = bake_bias_plan(whole, {1: torch.linspace(-1, 1, whole.anatomy.residual)}, 2.0, "attn")
    with applied(whole, plan), applied(other, plan):
        assert torch.equal(logits_of(other), logits_of(whole))
        assert not torch.equal(logits_of(other), plain)
    assert torch.equal(logits_of(other), plain)
    assert (other.anatomy.output_bias(1, "attn") is None) == (family == "llama")


def test_directions_plans_and_evaluations_are_the_same(both, parts):
    whole, other = both()
    figures = []
    for loaded in (whole, other):
        direction = diffmean_direction(loaded, parts["estimate"], "en", "fr")
        plan = keyed_plan(loaded, parts["estimate"], direction, jointly=True)
        texts = parts["estimate"].texts
        learned = learned_values(loaded, plan, texts["en"], texts["fr"], passes=1)
        evaluation = Evaluation(loaded, parts["report"], "en", "fr", samples=1, new_tokens=6)
        outcomes = [
            evaluation.base,
            evaluation.measure("edited", partial(applied, loaded, learned), kl=True),
        ]
        figures.append((direction, plan, learned, outcomes))
    (direction, plan, learned, outcomes), other_figures = figures
    for site, vectors in direction.vectors.items():
        assert torch.equal(vectors, other_figures[0].vectors[site]), site
    for expected, found in ((plan, other_figures[1]), (learned, other_figures[2])):
        for own, theirs in zip(expected.edits, found.edits, strict=True):
            assert torch.equal(own.left, theirs.left) and torch.equal(own.right, theirs.right)
    assert outcomes == other_figures[3]
    assert outcomes[1].kl["de"] > 0


def test_a_neuron_is_told_the_same(both, corpus):
    whole, other = both()
    assert neuron_report(other, corpus, 1, 3) == neuron_report(whole, corpus, 1, 3)


def test_an_unknown_architecture_is_checked_too(tmp_path, monkeypatch):
    """On a small model, also if all weights are in memory, but on several devices, whose values cannot be compared."""
    monkeypatch.delitem(LAYOUTS, "stablelm", raising=False)
    save_new(tmp_path, *NEW["stablelm"][:2])
    layout = load_model(str(tmp_path), device="cpu").anatomy.layout
    assert layout.examined
    monkeypatch.setattr("neurons.models.source.checked", None)
    assert load_model(str(tmp_path), max_memory=0).anatomy.layout == layout
    monkeypatch.setattr("neurons.models.source.max_memory_per_device", lambda *_: {"cpu": 10**9})
    assert load_model(str(tmp_path)).anatomy.layout == layout


def test_a_backward_pass_does_not_hold_the_weights_since_the_forward(checkpoint_of, corpus, monkeypatch):
    loaded = load_model(str(checkpoint_of(dtype="bfloat16")), max_memory=0)
    batch = batches_of(loaded, corpus)["qaa"][0]
    read = []
    own = OffloadedWeightsLoader.__getitem__

    def noted(self, key):
        values = own(self, key)
        read.append(StorageWeakRef(values.untyped_storage()))
        return values

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", noted)
    values = loaded.anatomy.outputs["mlp"][0].register_forward_pre_hook(
        lambda _, inputs: (inputs[0].detach().requires_grad_(True),)
    )
    loss = loss_sum(loaded.model, batch)
    values.remove()
    gc.collect()
    assert len(read) > 20 and all(storage.expired() for storage in read)
    forward = len(read)
    loss.backward()
    assert len(read) > forward


def test_what_fits_stays_on_one_device(checkpoint_of, temporary):
    loaded = load_model(str(checkpoint_of()), max_memory=10**9)
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"cpu"}
    assert not any(hasattr(module, "_hf_hook") for module in loaded.model.modules())
    assert not list(temporary.iterdir())


def test_the_folder_of_fused_experts_goes_with_the_model(checkpoint_of, temporary):
    loaded = load_model(str(checkpoint_of("mixtral")), max_memory=0)
    (folder,) = temporary.iterdir()
    assert list(folder.iterdir())
    del loaded
    gc.collect()
    assert not list(temporary.iterdir())


def test_a_device_that_was_named_is_not_left_for_the_disk(checkpoint_of):
    with pytest.raises(UsageError, match="--device auto"):
        load_model(str(checkpoint_of()), device="cpu", max_memory=1000)


def test_little_free_memory_is_no_death(checkpoint_of, monkeypatch):
    free = 250_000
    monkeypatch.setattr("neurons.models.placement.free_memory", lambda: free)
    loaded = load_model(str(checkpoint_of()))
    assert set(loaded.model.hf_device_map.values()) == {"cpu", "disk"}
    live = sum(p.nbytes for p in loaded.model.parameters() if p.device.type == "cpu")
    assert 0 < live <= free


@pytest.mark.parametrize("family", ["llama", "mixtral", "phi3"])
def test_values_that_are_moved_to_one_device_count_the_same(checkpoint_of, corpus, monkeypatch, family):
    """As between GPUs, of which there are none here: what is moved is copied."""
    whole = load_model(str(checkpoint_of(family)), device="cpu")
    spread = replace(whole, anatomy=replace(whole.anatomy, gathered_on=torch.device("cpu")))
    moved = []
    monkeypatch.setattr(
        "neurons.architectures.sites._moved", lambda values, _: moved.append(1) or values.clone()
    )
    batches = batches_of(whole, corpus)
    expected = record(whole, batches, MOMENTS)
    assert not moved
    found = record(spread, batches, MOMENTS)
    assert moved
    for name in MOMENTS:
        assert torch.equal(found.moments[name], expected.moments[name]), name
    _, readers = silencing_plan(whole)
    assert torch.equal(logits_of(spread, readers), logits_of(whole, readers))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_values_are_handed_over_on_the_device_that_they_are_gathered_on(checkpoint_of, family):
    loaded = load_model(str(checkpoint_of(family)), device="cpu")
    anatomy = replace(loaded.anatomy, gathered_on=torch.device("meta"))
    seen = []

    def see(values, routed):
        seen.extend([values.device, *([routed.tokens.device, routed.weights.device] if routed else [])])

    with site_hooks(anatomy, {("mlp_in", 2): see}):
        logits_of(loaded)
    assert {*seen} == {torch.device("meta")}


def test_a_person_is_told_what_waits_on_disk(broca, checkpoint_of, corpus_directory, tmp_path, monkeypatch):
    asked = ["record", checkpoint_of(), "--corpus", corpus_directory, "--out", tmp_path / "s.safetensors"]
    status, _, said = broca(*asked)
    assert status == 0 and "disk" not in said
    monkeypatch.setattr("neurons.models.placement.free_memory", lambda: 250_000)
    status, _, said = broca(*asked)
    assert status == 0 and "disk" in said and str(checkpoint_of().name) in said.replace("\n", "")


def test_a_memory_limit_changes_no_byte(broca, checkpoint_of, corpus_directory, tmp_path, monkeypatch):
    """Statistics, direction and plan of a model on disk are the files of a model in memory."""
    monkeypatch.setattr("neurons.models.memory._limit", None)  # restored afterwards
    model = checkpoint_of()
    limit = LIBRARIES + MIN_WORK + size_of(load_model(str(model), device="cpu")) // 2
    files = {}
    for name, limited in (("whole", []), ("limited", ["--max-memory", str(limit)])):
        folder = tmp_path / name
        folder.mkdir()
        statistics, direction, plan = (folder / f"{part}.safetensors" for part in ("s", "d", "e"))
        text = [model, "--corpus", corpus_directory, *limited]
        for command in (
            ["record", *text, "--out", statistics],
            ["direction", *text, "--source", "qaa", "--target", "qab", "--out", direction],
            ["edit", *text, "--direction", direction, "--blocks", "attn,mlp", "--out", plan],
        ):
            status, _, said = broca(*command)
            assert status == 0, said
            assert command[0] == "edit" or ("read from" in said) == bool(limited)
        files[name] = [path.read_bytes() for path in (statistics, direction, plan)]
    assert files["limited"] == files["whole"]


def test_the_weights_of_a_model_on_disk_leave_the_memory_to_the_work(checkpoint_of, monkeypatch):
    whole, other = (
        load_model(str(checkpoint_of()), **where) for where in ({"device": "cpu"}, {"max_memory": 0})
    )
    layer = sum(parameter.nbytes for parameter in whole.anatomy.blocks[0].parameters())
    assert sizes_of(other).weights == layer < sizes_of(whole).weights == size_of(whole)
    monkeypatch.setattr("neurons.models.memory._limit", LIBRARIES + WORK + layer)
    monkeypatch.setattr("neurons.models.memory._of_models", {})  # each alone
    assert room(other) == WORK > room(whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_computed_again_give_the_same_gradients(both, corpus, family):
    whole, other = both(family)
    batches = batches_of(whole, corpus)
    expected, found = (record(loaded, batches, MOMENTS, recomputes=True) for loaded in (whole, other))
    for name in MOMENTS:
        assert torch.equal(found.moments[name], expected.moments[name]), name
    assert expected.moments["mlp_in:attribution"].any()
