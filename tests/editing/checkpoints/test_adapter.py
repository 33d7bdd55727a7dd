"""A plan as a LoRA adapter: its factors against loops over numbers, and in PEFT against the exported checkpoint."""

import json
import warnings
from dataclasses import replace

import models
import peft
import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_model

from editing.checkpoints.adapter import SERVED_RANKS, export_adapter, factors, rank_of
from editing.checkpoints.export import export
from editing.plans.plan import ModuleEdit, load_plan, make_plan
from neurons.errors import BrocaError, UsageError
from neurons.models.source import open_model

NOTES = {"change_norm": 1.0, "weight_norm": 5.0}
# family -> (modules of layer 1, width of its MLP)
MODULES = {
    "llama": ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj", 48),
    "phi3": ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj", 48),
    "gpt2": ("transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj", 48),
    "opt": ("model.decoder.layers.1.self_attn.out_proj", "model.decoder.layers.1.fc2", 48),
    "bloom": ("transformer.h.1.self_attention.dense", "transformer.h.1.mlp.dense_4h_to_h", 256),
    "gpt_neox": ("gpt_neox.layers.1.attention.dense", "gpt_neox.layers.1.mlp.dense_4h_to_h", 48),
    "gemma3": (
        "model.language_model.layers.1.self_attn.o_proj",
        "model.language_model.layers.1.mlp.down_proj",
        48,
    ),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scale(width, at, seed=0):
    made = torch.ones(width)
    made[list(at)] = 1 + draw(len(at), seed=seed)
    return made


def low_rank(layer, block, width, rank=1, seed=0):
    left, right = 0.1 * draw(64, rank, seed=seed), draw(width, rank, seed=seed + 50)
    return ModuleEdit(layer, block, (0, 1), left=left, right=right, notes=NOTES)


def plan_for(source, *edits, **metadata):
    about = {
        "model": source.label,
        "fingerprint": source.fingerprint,
        "method": "steer2edit",
        "source": "qaa",
        "target": "qab",
        "settings": {"rho": 0.25},
    }
    return make_plan(list(edits), about | metadata)


def rank_one_plan(source, width):
    return plan_for(source, low_rank(1, "attn", 64), low_rank(1, "mlp", width, seed=1))


def many_ranks_plan(source, width):
    """A rank of its own in each module, and every way of changing a weight."""
    return plan_for(
        source,
        low_rank(0, "attn", 64, rank=3),
        replace(low_rank(0, "mlp", width, seed=1), column_scale=scale(width, [4, 7, 9])),
        ModuleEdit(1, "attn", (0,), row_scale=scale(64, [5, 60]), notes=NOTES),
        ModuleEdit(1, "mlp", (2,), column_scale=scale(width, [2], seed=3), notes=NOTES),
        replace(
            low_rank(2, "mlp", width, rank=2, seed=2),
            row_scale=scale(64, [1, 2, 3], seed=4),
            column_scale=scale(width, [0, 1], seed=5),
        ),
        ModuleEdit(2, "attn", (1,), column_scale=scale(64, range(32, 64), seed=6), notes=NOTES),
    )


PLANS = {"rank 1": rank_one_plan, "many ranks": many_ranks_plan}


@torch.inference_mode()
def logits(model):
    ids = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(8))
    return model(input_ids=ids).logits


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def source(checkpoint_of):
    return open_model(str(checkpoint_of()))


def naive_change(edit, weight):
    """W' - W, number by number."""
    d, n = weight.shape
    change = torch.zeros(d, n, dtype=torch.float64)
    for i in range(d):
        for j in range(n):
            r = 1.0 if edit.row_scale is None else edit.row_scale[i].item()
            c = 1.0 if edit.column_scale is None else edit.column_scale[j].item()
            outer = sum(edit.left[i, k].item() * edit.right[j, k].item() for k in range(edit.rank))
            change[i, j] = r * weight[i, j].item() * c + outer - weight[i, j].item()
    return change


@pytest.mark.parametrize(
    ("parts", "rank"),
    [
        (["low_rank"], 2),
        (["columns"], 3),
        (["rows"], 1),
        (["low_rank", "columns"], 5),
        (["rows", "columns"], 4),
        (["low_rank", "rows", "columns"], 6),
        (["low_rank", "all rows"], 9),
        (["all columns"], 9),
    ],
    ids=lambda value: " and ".join(value) if isinstance(value, list) else str(value),
)
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)], ids=["wide", "tall"])
def test_the_factors_are_the_change(parts, rank, shape):
    d, n = shape
    given = {
        "low_rank": {"left": draw(d, 2), "right": draw(n, 2, seed=1)},
        "columns": {"column_scale": scale(n, [0, 3, 8], seed=2)},
        "rows": {"row_scale": scale(d, [4], seed=3)},
        "all rows": {"row_scale": 2 + draw(d, seed=4).abs()},
        "all columns": {"column_scale": 2 + draw(n, seed=5).abs()},
    }
    edit = ModuleEdit(0, "mlp", (0,), **{name: part for p in parts for name, part in given[p].items()})
    weight = draw(d, n, seed=6).double()
    B, A = factors(edit, weight)
    assert B.shape == (d, rank) and A.shape == (rank, n) and rank_of(edit, d, n) == rank
    torch.testing.assert_close(B @ A, naive_change(edit, weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("name", PLANS)
def test_peft_computes_what_the_checkpoint_does(checkpoint_of, tmp_path, family, name):
    base = checkpoint_of(family)
    model = open_model(str(base))
    plan = PLANS[name](model, MODULES[family][2])
    export(model, plan, tmp_path / "checkpoint")
    found = export_adapter(model, plan, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "adapter")).eval()
    card = (tmp_path / "adapter" / "README.md").read_text()
    served = family not in ("gpt2", "bloom")
    assert ("vllm serve" in card) == served and ("vLLM takes no adapters" in card) == (not served)
    expected, plain = logits(load(tmp_path / "checkpoint")), logits(load(base))
    size = expected.abs().max()
    torch.testing.assert_close(logits(adapted) / size, expected / size, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 0.05 * size
    # Every tensor of the file was taken up, and no module beside those named.
    where = {f"base_model.model.{module}" for module in found.modules}
    layers = {
        path: layer
        for path, layer in adapted.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert set(layers) == where and set(MODULES[family][:2]) <= set(found.modules)
    assert {path: layer.r["default"] for path, layer in layers.items()} == {
        f"base_model.model.{module}": rank for module, rank in found.modules.items()
    }
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}
    # Merged for good it is the exported checkpoint.
    merged, stored = adapted.merge_and_unload(), load(tmp_path / "checkpoint")
    for (path, ours), (_, theirs) in zip(merged.named_parameters(), stored.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=path)


def test_the_attention_of_a_mixture_can_be_adapted(checkpoint_of, tmp_path):
    base = checkpoint_of("qwen3_moe")
    model = open_model(str(base))
    plan = plan_for(model, low_rank(1, "attn", 96))
    export(model, plan, tmp_path / "checkpoint")
    export_adapter(model, plan, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(adapted), logits(load(tmp_path / "checkpoint")), rtol=1e-5, atol=1e-4)


def test_ranks_and_files(source, tmp_path):
    found = export_adapter(source, many_ranks_plan(source, 48), tmp_path / "adapter")
    name = "model.layers.{}.{}".format
    assert found.modules == {
        name(0, "self_attn.o_proj"): 3,
        name(0, "mlp.down_proj"): 4,
        name(1, "self_attn.o_proj"): 2,
        name(1, "mlp.down_proj"): 1,
        name(2, "self_attn.o_proj"): 32,
        name(2, "mlp.down_proj"): 7,
    }
    assert (found.rank, found.served_rank) == (32, 32)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 32 and config["bias"] == "none"
    assert config["target_modules"] == list(found.modules)
    assert (
        config["rank_pattern"]
        == config["alpha_pattern"]
        == {module: rank for module, rank in found.modules.items() if rank != 32}
    )
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 12
    assert not [path for path in tmp_path.rglob("*") if ".broca-" in path.name]


def test_modules_of_one_rank_need_no_pattern(source, tmp_path):
    found = export_adapter(source, rank_one_plan(source, 48), tmp_path / "adapter")
    assert (found.rank, found.served_rank) == (1, 1)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_twenty_modules_and_more(tmp_path):
    # PEFT shortens a long list of names to their ends: layer 1 is not to become layers 1 and 11.
    base = models.build_checkpoint(tmp_path / "base", num_hidden_layers=22)
    model = open_model(str(base))
    edits = [low_rank(layer, "mlp", 48, seed=layer) for layer in range(22) if layer != 11]
    plan = plan_for(model, *edits, low_rank(1, "attn", 64))
    export(model, plan, tmp_path / "checkpoint")
    found = export_adapter(model, plan, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(load(base), str(tmp_path / "adapter")).eval()
    layers = [path for path, m in adapted.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == len(found.modules) == 22
    expected = logits(load(tmp_path / "checkpoint"))
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_plan_travels_along(source, tmp_path):
    plan = rank_one_plan(source, 48)
    out = tmp_path / "adapter"
    export_adapter(source, plan, out)
    again = load_plan(out / "broca" / "edit.safetensors")
    assert again.metadata["fingerprint"] == source.fingerprint
    torch.testing.assert_close(again.edits[1].left, plan.edits[1].left, rtol=0, atol=0)
    with safe_open(str(out / "adapter_model.safetensors"), framework="pt") as stream:
        about = json.loads(stream.metadata()["broca"])
    assert about["method"] == "steer2edit" and about["settings"] == {"rho": 0.25}


def test_a_plan_without_norms_and_settings_of_several_values(source, tmp_path):
    """As of ``compose`` without the model, and of a lock."""
    plan = rank_one_plan(source, 48)
    settings = {"instructions": {"en": "Respond in French."}, "questions": "0a" * 32, "others": {}}
    bare = make_plan([replace(edit, notes={}) for edit in plan.edits], plan.metadata | {"settings": settings})
    export_adapter(source, bare, tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "Settings: instructions en=Respond in French., questions 0a0a0a0a0a0a, others none." in text
    assert text.count("| 1 | - |") == len(plan.edits)


def test_the_card(source, tmp_path):
    export_adapter(source, many_ranks_plan(source, 48), tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    fields = yaml.safe_load(text.split("---")[1])
    assert fields == {
        "library_name": "peft",
        "tags": ["lora", "broca"],
    }  # a local base has no name for others
    assert source.fingerprint in text and "--max-lora-rank 32" in text and "steer2edit" in text
    assert "| `model.layers.2.mlp.down_proj` | 2 neurons | 7 | 0.2 |" in text
    hub = replace(source, name="someone/some-model")
    export_adapter(hub, rank_one_plan(hub, 48), tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "someone/some-model"
    config = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/some-model"


def test_another_dtype(source, tmp_path):
    plan = rank_one_plan(source, 48)
    export_adapter(source, plan, tmp_path / "adapter", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    assert torch.equal(tensors[name], plan.edits[1].left.bfloat16())
    with pytest.raises(UsageError, match="float32"):
        export_adapter(source, plan, tmp_path / "other", dtype=torch.int8)
    large = ModuleEdit(0, "mlp", (0,), left=torch.full((64, 1), 1e6), right=torch.ones(48, 1), notes=NOTES)
    with pytest.raises(BrocaError, match=r"layers\.0\.mlp.*float32"):
        export_adapter(source, plan_for(source, large), tmp_path / "other", dtype=torch.float16)


def test_what_a_lora_cannot_say(source, tmp_path):
    out = tmp_path / "adapter"
    constant = replace(low_rank(1, "attn", 64), bias=draw(64))
    with pytest.raises(BrocaError, match=r"layer 1, attn: .*constant"):
        export_adapter(source, plan_for(source, constant), out)
    assert not out.exists()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_in_peft_are_the_exported_ones(checkpoint_of, tmp_path, model_type):
    """Every way of changing experts: some not at all, some by fewer ranks than others, beside attention."""
    base = str(checkpoint_of(model_type))
    mixture = open_model(base)
    width = mixture.anatomy.width("mlp_in", 0)
    own = width // 3
    right = torch.zeros(width, 2)
    right[:own, 0], right[2 * own :, 1] = draw(own, seed=1), draw(own, seed=2)
    ranks = ModuleEdit(0, "mlp", (0,), left=0.1 * draw(64, 2), right=right, notes=NOTES)
    scales = ModuleEdit(1, "mlp", (1,), column_scale=scale(width, [0, own, own + 3]), notes=NOTES)
    rows = ModuleEdit(2, "mlp", (2,), row_scale=scale(64, [7]), notes=NOTES)
    heads = low_rank(1, "attn", mixture.anatomy.width("attn_in", 1))
    plan = plan_for(mixture, ranks, scales, rows, heads)
    exported = export_adapter(mixture, plan, tmp_path / "adapter")
    assert sorted(exported.modules.values()) == [1, 2, 2, 2]
    assert "vLLM does not" in (tmp_path / "adapter" / "README.md").read_text()
    plain = load(base)
    before = logits(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with_adapter = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    export(mixture, plan, tmp_path / "edited")
    expected = logits(load(tmp_path / "edited"))
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(with_adapter), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(with_adapter.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_experts_that_peft_reads_otherwise(tmp_path):
    tiny_model(tiny_config("llama4_text")).save_pretrained(tmp_path / "llama4")
    source = open_model(str(tmp_path / "llama4"))
    width = source.anatomy.parts(0, "mlp")[0].width
    right = torch.zeros(source.anatomy.width("mlp_in", 0), 1)
    right[:width] = 1.0
    edit = ModuleEdit(0, "mlp", (0,), left=draw(64, 1), right=right, notes=NOTES)
    with pytest.raises(BrocaError, match=r"layer 0, mlp: the experts of llama4_text .*transposed"):
        export_adapter(source, plan_for(source, edit), tmp_path / "adapter")
    both = replace(edit, right=torch.ones_like(right))
    with pytest.raises(BrocaError, match="shared expert"):
        export_adapter(source, plan_for(source, both), tmp_path / "adapter")
    # A router that is a linear module and returns two tensors.
    path = source.anatomy.layout.router.path
    router = ModuleEdit(0, path, (), rows=torch.tensor([0]), row_deltas=draw(1, 64))
    with pytest.raises(BrocaError, match=f"{path}.* takes no LoRA adapter"):
        export_adapter(source, plan_for(source, router), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_bias_of_zeros_is_no_constant(source, tmp_path):
    plan = plan_for(
        source,
        replace(low_rank(1, "attn", 64), bias=torch.zeros(64)),
        ModuleEdit(2, "attn", (), column_scale=torch.ones(64), notes=NOTES),
    )
    assert list(export_adapter(source, plan, tmp_path / "a").modules) == ["model.layers.1.self_attn.o_proj"]
    nothing = plan_for(source, ModuleEdit(2, "attn", (), bias=torch.zeros(64), notes=NOTES))
    with pytest.raises(BrocaError, match="no adapter"):
        export_adapter(source, nothing, tmp_path / "b")


def test_the_largest_rank(tmp_path):
    base = models.build_checkpoint(
        tmp_path / "base", hidden_size=520, intermediate_size=530, num_hidden_layers=1, num_attention_heads=10
    )
    model = open_model(str(base))
    assert SERVED_RANKS[-1] == 512
    fits = plan_for(model, ModuleEdit(0, "mlp", (0,), column_scale=scale(530, range(512)), notes=NOTES))
    assert export_adapter(model, fits, tmp_path / "fits").served_rank == 512
    large = plan_for(model, ModuleEdit(0, "mlp", (0,), column_scale=scale(530, range(513)), notes=NOTES))
    with pytest.raises(BrocaError, match=r"layer 0, mlp: .*rank 513.*512"):
        export_adapter(model, large, tmp_path / "large")
    assert not (tmp_path / "large").exists()


def test_refuses_what_does_not_fit(source, tmp_path):
    out = tmp_path / "adapter"
    with pytest.raises(BrocaError, match="49 entries where 48"):
        export_adapter(source, plan_for(source, low_rank(0, "mlp", 49)), out)
    with pytest.raises(BrocaError, match="layer 3"):
        export_adapter(source, plan_for(source, low_rank(3, "mlp", 48)), out)
    with pytest.raises(BrocaError, match="made for the model"):
        export_adapter(source, plan_for(source, low_rank(0, "mlp", 48), fingerprint="0" * 16), out)
    assert not out.exists()


def test_where_it_is_written(source, tmp_path):
    out, plan = tmp_path / "deep" / "adapter", rank_one_plan(source, 48)
    export_adapter(source, plan, out)
    with pytest.raises(BrocaError, match="--overwrite"):
        export_adapter(source, plan, out)
    (out / "left.txt").write_text("from before")
    export_adapter(source, many_ranks_plan(source, 48), out, overwrite=True)
    assert not (out / "left.txt").exists()
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 32
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(BrocaError, match="has no adapter_config"):
        export_adapter(source, plan, mine, overwrite=True)
    assert (mine / "letter.txt").read_text() == "dear"
    with pytest.raises(BrocaError, match="of its own"):
        export_adapter(source, plan, source.checkpoint / "adapter")
    (tmp_path / "file").write_text("")
    with pytest.raises(BrocaError, match="is a file"):
        export_adapter(source, plan, tmp_path / "file" / "adapter")


def test_a_failure_leaves_the_old_adapter(source, tmp_path, monkeypatch):
    out = tmp_path / "adapter"
    export_adapter(source, rank_one_plan(source, 48), out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    def full(self, content):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(BrocaError, match="no space left"):
            export_adapter(source, many_ranks_plan(source, 48), out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
