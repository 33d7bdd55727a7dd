"""What stages need of the memory: computed beforehand, kept to, and refused by name where it is not there."""

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import models
import pytest
import torch
import transformers

from cli.dry_run import dry_run
from cli.screen import Screen
from editing.pipeline.needs import key_need
from neurons.errors import BrocaError
from neurons.models import memory
from neurons.models.memory import (
    Need,
    backward_bytes,
    batch_plan,
    batches_for,
    limit_memory,
    memory_limit,
    read_weights,
    sizes_of,
)
from neurons.models.placement import max_memory_per_device
from neurons.models.source import load_model, open_model, plan_model
from neurons.recording.corpus_recording import record_corpus
from neurons.recording.needs import text_of
from neurons.recording.record import record
from neurons.text.batches import common_tokens, language_batches, longest_row, text_batches
from neurons.text.corpus import read_corpus
from neurons.text.token_budget import Budget


@pytest.fixture(autouse=True)
def no_limit():
    yield
    limit_memory(None)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_what_a_backward_pass_keeps_is_foreseen(family, tmp_path):
    """Bytes that autograd saves, counted, beside the formula; wide enough that norms' scalars are nothing."""
    directory = models.build_checkpoint(
        tmp_path / "model",
        family,
        hidden_size=256,
        intermediate_size=704,
        head_dim=128,
        num_key_value_heads=2,
        num_hidden_layers=8,
    )
    loaded = load_model(str(directory), device="cpu")
    texts = [" ".join(models.sentences("qaa", count)) for count in (12, 11)]
    (batch,) = text_batches(texts, loaded.tokenizer, 120)[-1:]
    assert batch.padded
    weights = {p.untyped_storage()._cdata for p in loaded.model.parameters()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        record(loaded, {"qaa": [batch]}, ["mlp_in:attribution"])
    found = sum(size for key, size in saved.items() if key not in weights)
    tokens, sizes = batch.ids.numel(), sizes_of(loaded)
    held = 4 * sizes.inner * tokens * sizes.layers  # the product, which the gradient is multiplied with
    logits = 4 * sizes.vocabulary * tokens
    expected = backward_bytes(sizes, tokens) / memory.FRAGMENTATION
    assert expected == pytest.approx(found + held - logits, rel=0.25)


def test_sizes_are_the_same_from_disk_from_memory_and_planned(checkpoint_of):
    for family in ("llama", "gpt2", "qwen3_moe", "gemma3"):
        directory = str(checkpoint_of(family))
        loaded = sizes_of(load_model(directory, device="cpu"))
        assert sizes_of(plan_model(directory, "cpu")) == loaded
        stored = sizes_of(open_model(directory))
        assert stored.weights == pytest.approx(loaded.weights, rel=0.01)
        assert (stored.layers, stored.inner, stored.vocabulary) == (
            loaded.layers,
            loaded.inner,
            loaded.vocabulary,
        )


def test_batches_grow_with_the_room_and_are_recomputed_where_it_is_small(llama):
    sizes = replace(sizes_of(llama), layers=32)
    plans = [batch_plan(sizes, room, True, 64) for room in (2**24, 2**27, 2**32)]
    assert [tokens for tokens, _ in plans] == sorted(tokens for tokens, _ in plans)
    assert plans[-1] == (memory.MAX_TOKENS, False)
    small = backward_bytes(sizes, 128) + memory.logit_bytes(sizes, 128, True)
    tokens, recomputes = batch_plan(sizes, small, True, 1024)
    assert recomputes and tokens > 128


def test_a_row_that_cannot_fit_is_refused_with_what_would(llama):
    least = memory.LIBRARIES + sizes_of(llama).weights
    limit_memory(least + 2**20)
    with pytest.raises(BrocaError, match=r"a row of 100000 tokens needs .* rows of [0-9]+ tokens fit"):
        batches_for(llama, True, 100_000)
    limit_memory(least)
    with pytest.raises(BrocaError, match="weights"):
        batches_for(llama, False, 1)


@pytest.mark.parametrize("tokens_a_batch", [None, 16])
def test_a_row_of_text_that_cannot_fit_is_refused(llama, corpus, tokens_a_batch):
    longest = longest_row(language_batches(llama, corpus))
    sizes = sizes_of(llama)
    least = memory.LIBRARIES + sizes.weights + memory.forward_bytes(sizes, longest)
    limit_memory(least)
    language_batches(llama, corpus, tokens_a_batch=tokens_a_batch)
    limit_memory(least - 1)
    with pytest.raises(BrocaError, match=f"a row of {longest} tokens"):
        language_batches(llama, corpus, tokens_a_batch=tokens_a_batch)


@pytest.mark.parametrize("weights", [10**9, 6 * 10**9, 9 * 10**9, 10**10])
def test_work_on_a_gpu_fits_beside_its_weights(monkeypatch, weights):
    """Of two GPUs of 10 GB: the weights on the other do not count."""
    total = 10**10
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=total))
    own, other = torch.device("cuda", 0), torch.device("cuda", 1)
    parameters = [
        SimpleNamespace(nbytes=size, device=at) for size, at in ((weights, own), (8 * 10**9, other))
    ]
    loaded = SimpleNamespace(device=own, model=SimpleNamespace(parameters=lambda: parameters))
    left = total - memory.LIBRARIES - weights
    assert memory.room(loaded) == max(0, min(4 * 10**9, left))


@pytest.mark.parametrize(("dense", "expected"), [(50, 2 * 16 + 80), (200, 200)])
def test_active_neurons_are_those_of_the_widest_layer(tmp_path, dense, expected):
    """Two of four routed experts and the shared expert, or a layer without experts."""
    transformers.Qwen2MoeConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=dense,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=80,
        mlp_only_layers=[1],
    ).save_pretrained(tmp_path)  # fmt: skip
    assert sizes_of(plan_model(str(tmp_path), "cpu")).inner == expected


def test_a_long_row_is_recomputed_where_keeping_it_does_not_fit(llama):
    """No power of two between the batch and the row: 4,096 tokens fit, 8,000 only if they are recomputed."""
    sizes, row = sizes_of(llama), 8000
    needed = backward_bytes(sizes, row) + memory.logit_bytes(sizes, row, True)
    least = memory.LIBRARIES + sizes.weights
    limit_memory(least + needed - 1)
    assert batches_for(llama, True, row) == (row, True)
    limit_memory(least + needed)
    assert batches_for(llama, True, row) == (row, False)


@pytest.mark.parametrize("old", [False, True])
def test_pages_of_files_are_free_within_a_container(tmp_path, monkeypatch, old):
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    machine = SimpleNamespace(available=10**6)
    monkeypatch.setattr("psutil.virtual_memory", lambda: machine)
    assert memory.free_memory() == 10**6
    folder, prefix = (tmp_path / "memory", "total_") if old else (tmp_path, "")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text("1000\n")
    (folder / names[1]).write_text("900\n")
    assert memory.free_memory() == 100  # not every runtime has memory.stat
    (folder / "memory.stat").write_text(
        f"{prefix}anon 100\n{prefix}active_file 300\n{prefix}inactive_file 400\n"
    )
    assert memory.free_memory() == 800
    assert max_memory_per_device(721, torch.device("cpu")) == {"cpu": 720}
    machine.available = 700
    assert memory.free_memory() == 700
    machine.available = 10**6
    (folder / names[0]).write_text("max\n")
    assert memory.free_memory() == 10**6


def test_processes_cut_batches_by_the_least_memory(llama, corpus, monkeypatch):
    """Another process has room for 64 tokens, and recomputes."""
    other = {torch.minimum: 64, torch.maximum: 1}
    monkeypatch.setattr(memory, "all_reduce", lambda own, combine: combine(own, torch.tensor(other[combine])))
    assert memory.common_batches(llama, True, 1) == (64, True)
    assert all(
        batch.ids.numel() <= 64 for batch in language_batches(llama, corpus, 200, common_tokens(llama))["qaa"]
    )
    read = record_corpus(llama, corpus, ["mlp_in:sum"], block=16, tokens=100)
    assert read.metadata["settings"]["tokens_a_batch"] == 64


def test_the_limit_is_for_all_loaded_models(checkpoint_of):
    path = str(checkpoint_of())
    weights = sizes_of(load_model(path, "cpu")).weights
    gc.collect()
    limit_memory(memory.LIBRARIES + memory.MIN_WORK + weights)
    first = load_model(path)
    assert first.offload_note is None and memory.max_room(first) == memory.MIN_WORK
    second = load_model(path)
    assert second.offload_note is not None
    assert memory.max_room(first) == memory.MIN_WORK - sizes_of(second).weights == memory.max_room(second)
    del first, second
    gc.collect()
    assert load_model(path).offload_note is None


def test_a_model_larger_than_the_limit_is_planned_on_disk(checkpoint_of):
    """A dry run plans what loading with the same limit does."""
    limit_memory(memory.LIBRARIES + memory.MIN_WORK)
    planned, loaded = plan_model(str(checkpoint_of())), load_model(str(checkpoint_of()))
    of_layer = sum(parameter.nbytes for parameter in loaded.anatomy.blocks[0].parameters())
    assert sizes_of(planned).weights == sizes_of(loaded).weights == of_layer
    assert read_weights(planned, False) == of_layer


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_wait_on_disk_where_no_logits_are_made(checkpoint_of, tied):
    stored = plan_model(str(checkpoint_of(tied=tied, dtype="bfloat16")), dtype="bfloat16")
    of_all = sizes_of(stored).weights
    width, words = stored.anatomy.residual, stored.model.config.vocab_size
    assert of_all - read_weights(stored, False) == 2 * width * words * (1 if tied else 2)
    assert read_weights(stored, True) == of_all
    converted = plan_model(str(checkpoint_of(tied=tied, dtype="bfloat16")), dtype="float32")
    assert read_weights(converted, False) == sizes_of(converted).weights == 2 * of_all


def test_dry_run_says_what_each_stage_needs_and_does_nothing(
    broca, checkpoint_of, corpus_directory, tmp_path
):
    model, out = checkpoint_of(), tmp_path / "out.safetensors"
    for command in (
        ["record", model, "--corpus", corpus_directory],
        ["identify", model, "--corpus", corpus_directory, "--method", "lape"],
        ["direction", model, "--corpus", corpus_directory, "--source", "qaa", "--target", "qab"],
    ):
        status, printed, _ = broca(*command, "--dry-run", "--json", "--max-memory", "2GB", "--out", out)
        assert status == 0
        found = json.loads(printed)
        assert found["limit"] == 2 * 10**9
        (stage,) = found["stages"].values()
        assert stage["peak"] == sum(stage["parts"].values()) > stage["parts"]["weights"] > 0
        assert stage["fits"] and stage["tokens_at_once"] > 0
        assert not out.exists()
    assert stage["parts"]["kept"] == 0  # DiffMean needs sums alone
    _, printed, _ = broca(*command, "--winsorise", "0.9", "--dry-run", "--json", "--out", out)
    (stage,) = json.loads(printed)["stages"].values()
    assert stage["parts"]["kept"] > 0


@pytest.mark.parametrize(
    ("budget", "command"),
    [
        ("DIRECTIONS", ("direction", "--source", "qaa", "--target", "qab", "--unit-length")),
        ("KEYS", ("edit", "--method", "leace", "--languages", "qaa,qab")),
    ],
)
def test_a_dry_run_reads_as_much_as_the_command_reads_by_default(
    broca, checkpoint_of, corpus_directory, tmp_path, monkeypatch, budget, command
):
    name, *words = command
    peaks = []

    def plan(*tokens):
        given = [name, checkpoint_of(), *words, "--corpus", corpus_directory, *tokens, "--dry-run", "--json"]
        status, printed, errors = broca(*given, "--out", tmp_path / "out")
        assert status == 0, errors
        peaks.append([stage["peak"] for stage in json.loads(printed)["stages"].values()])

    plan()
    plan("--tokens", 20)
    monkeypatch.setattr(f"neurons.text.token_budget.{budget}", Budget(20, 1))
    plan()
    assert peaks[2] == peaks[1] < peaks[0]


def test_a_dry_run_reads_as_much_at_once_as_the_command(broca, checkpoint_of, corpus_directory, tmp_path):
    """The stages of ablate are those of its moments too, and of the prompts, which are longer than the text."""
    neurons, answer = tmp_path / "neurons.safetensors", models.WORDS["qaa"][0]
    common = [checkpoint_of(), "--corpus", corpus_directory]
    assert broca("identify", *common, "--top-rate", "0.1", "--out", neurons)[0] == 0
    (tmp_path / "prompts").mkdir()
    row = json.dumps({"prompt": " ".join(models.WORDS["qaa"]) * 2, "answer": answer})
    for language in models.LANGUAGES:
        (tmp_path / "prompts" / f"{language}.jsonl").write_text(row)

    def stages(command, *more):
        status, printed, errors = broca(*command, *more, "--dry-run", "--json", "--out", tmp_path / "out")
        assert status == 0, errors
        return json.loads(printed)["stages"]

    record, ablate = ["record", *common, "--for", "lape"], ["ablate", *common, "--neurons", neurons]
    for command, stage in ((record, "record"), (ablate, "record"), (ablate, "ablate")):
        few, many = (stages(command, "--batch-tokens", size)[stage] for size in (64, 4096))
        assert few["parts"]["activations"] < many["parts"]["activations"]
        assert few["tokens_at_once"] < many["tokens_at_once"]
    assert set(stages(ablate)) == {"record", "ablate"}
    assert set(stages(ablate, "--controls", "random")) == {"ablate"}
    asked = stages(ablate, "--batch-tokens", 1, "--prompts", tmp_path / "prompts")["ablate"]
    assert asked["peak"] > stages(ablate, "--batch-tokens", 1)["ablate"]["peak"]


def test_a_direction_of_all_languages_keeps_all_means(broca, checkpoint_of, corpus_directory, tmp_path):
    common = [
        "direction",
        checkpoint_of(),
        "--corpus",
        corpus_directory,
        "--source",
        "qaa",
        "--target",
        "qab",
    ]
    kept = []
    for method in ("pca", "language-subspace"):
        words = [*common, "--method", method, "--dry-run", "--json", "--out", tmp_path / "out"]
        status, printed, errors = broca(*words)
        assert status == 0, errors
        kept.append(json.loads(printed)["stages"]["direction"]["parts"]["kept"])
    assert 2 * kept[1] == 3 * kept[0] > 0


def test_dry_run_needs_no_weights(broca, tmp_path, corpus_directory):
    """A config alone, of a model that no machine here could hold."""
    config = models.tiny_model().config
    config.update(
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    )
    config.update({"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128})
    config.save_pretrained(tmp_path / "big")
    status, printed, _ = broca(
        "record", tmp_path / "big", "--corpus", corpus_directory, "--dry-run", "--json", "--dtype", "bfloat16",
        "--for", "gradient-contrast", "--max-memory", "24GB", "--out", tmp_path / "s.safetensors",
    )  # fmt: skip
    assert status == 0
    stage = json.loads(printed)["stages"]["record"]
    assert stage["parts"]["weights"] == pytest.approx(16.06e9, rel=0.01)
    assert stage["peak"] < 24e9


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("300m", 3 * 10**8), ("4096", 4096)]
)
def test_sizes_are_read(broca, checkpoint_of, corpus_directory, tmp_path, text, size):
    broca(
        "record",
        checkpoint_of(),
        "--corpus",
        corpus_directory,
        "--dry-run",
        "--max-memory",
        text,
        "--out",
        tmp_path / "s",
    )
    assert memory_limit() == size


@pytest.mark.parametrize("text", ["much", "-1GB", "0", "1.2.3G", "nan"])
def test_no_size_is_a_usage_error(broca, checkpoint_of, corpus_directory, tmp_path, text):
    status, _, errors = broca(
        "record", checkpoint_of(), "--corpus", corpus_directory, "--max-memory", text, "--out", tmp_path / "s"
    )
    assert status == 2 and text in errors


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_the_peak_does_not_grow_with_the_text(checkpoint_of, tmp_path):
    """Gradients of one and of four times as much text, each in a process of its own."""
    peaks = []
    for lines in (300, 1200):
        corpus = models.write_corpus(tmp_path / f"corpus-{lines}", lines=lines)
        command = [
            sys.executable,
            "-m",
            "cli.main",
            "identify",
            str(checkpoint_of()),
            "--corpus",
            str(corpus),
        ]
        command += ["--out", str(tmp_path / "n.safetensors"), "--method", "gradient"]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        peaks.append(usage.ru_maxrss)
    assert peaks[1] <= 1.05 * peaks[0]


def test_a_run_is_planned_stage_by_stage(broca, checkpoint_of, corpus_directory, tmp_path):
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(
        f'model = "{checkpoint_of()}"\ncorpus = "{corpus_directory}"\nsource = "qaa"\ntargets = ["qab"]\n'
        'values = "learned"\n'
    )
    status, printed, _ = broca("run", recipe, "--out", out, "--dry-run", "--json")
    assert status == 0 and not out.exists()
    stages = json.loads(printed)["stages"]
    assert list(stages) == sorted(["record", "direction", "key", "learn", "export", "evaluate"])
    assert all(stage["fits"] for stage in stages.values())


def test_a_key_needs_as_many_covariances_as_there_is_room_for(checkpoint_of, corpus_directory, monkeypatch):
    planned = plan_model(str(checkpoint_of()), "cpu")
    text = text_of(planned, read_corpus(corpus_directory))
    whole = key_need(planned, text).parts["covariances"]
    layer = 8 * 48**2 + 4 * memory.WAITING * 48
    assert whole == 3 * layer
    monkeypatch.setattr(memory, "WORK", 16 * 48**2 + layer)
    one = key_need(planned, text).parts
    assert one["covariances"] == layer and whole > one["covariances"]


def test_an_edit_is_planned_too(broca, checkpoint_of, corpus_directory, tmp_path):
    direction, out = tmp_path / "d.safetensors", tmp_path / "e.safetensors"
    text = ["--corpus", corpus_directory]
    assert (
        broca("direction", checkpoint_of(), *text, "--source", "qaa", "--target", "qab", "--out", direction)[
            0
        ]
        == 0
    )
    status, printed, _ = broca(
        "edit", checkpoint_of(), *text, "--direction", direction, "--set", "learn=yes", "--dry-run", "--json", "--out", out
    )  # fmt: skip
    assert status == 0 and not out.exists()
    assert set(json.loads(printed)["stages"]) == {"key", "learn"}


def test_a_stage_fits_where_its_peak_is_within_the_limit(checkpoint_of, capsys):
    limit_memory(3 * 10**9)
    needs = [
        Need("all of it", {"weights": 3 * 10**9}, tokens=8),
        Need("a byte more", {"weights": 2 * 10**9, "kept": 10**9 + 1}, tokens=8),
    ]
    planned_as = SimpleNamespace(model=str(checkpoint_of()), device="cpu", dtype="auto")
    dry_run(Screen(as_json=True), planned_as, lambda planned: needs)
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert {name: stage["fits"] for name, stage in stages.items()} == {
        "all of it": True,
        "a byte more": False,
    }
