"""FP8 blocks to bf16, against the definition number by number, and every other kind refused."""

import json
import math
import tracemalloc

import models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from editing.checkpoints.checkpoint import write_checkpoint
from editing.checkpoints.dequantise import dequantise, open_for_export
from editing.checkpoints.fp8_tiles import dequantised
from editing.checkpoints.mxfp4 import dequantised_blocks
from neurons.architectures.quantisation import quantised_remedy
from neurons.errors import BrocaError
from neurons.files.tensor_files import read_bytes, tensor_entries
from neurons.models.source import open_model

SETTINGS = {
    "quant_method": "fp8",
    "weight_block_size": [32, 16],
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
}


def to_blocks(weight, block):
    """Quantised as DeepSeek does: each block's largest number becomes 448."""
    rows, columns = (math.ceil(size / step) for size, step in zip(weight.shape, block, strict=True))
    quantised = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            own = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[own].abs().max() / 448
            quantised[own] = (weight[own] / scales[i, j]).to(torch.float8_e4m3fn)
    return quantised, scales


def quantise(directory, block=(32, 16), shards=1, scale_dtype=torch.float32):
    """A llama checkpoint whose linear layers are FP8 blocks; widths are no multiples of the blocks."""
    models.build_checkpoint(
        directory, dtype="bfloat16", hidden_size=72, intermediate_size=50, num_attention_heads=2, head_dim=32
    )
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors[name], scales = to_blocks(tensor.float(), block)
            tensors[f"{name}_scale_inv"] = scales.to(scale_dtype)
        else:
            tensors[name] = tensor
    tensors["model.layers.0.correction"] = torch.randn(5)
    (directory / "model.safetensors").unlink()
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        # Scales apart from their weights, and one shard of nothing but scales.
        weight_map = {
            name: "scales.safetensors" if name.endswith("_inv") else f"part{i % shards}.safetensors"
            for i, name in enumerate(sorted(tensors))
        }
        for file in set(weight_map.values()):
            save_file({n: tensors[n] for n in tensors if weight_map[n] == file}, directory / file)
        index = {"metadata": {"total_size": 1, "kept": "yes"}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {**SETTINGS, "weight_block_size": list(block)}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "extra").mkdir()
    (directory / "extra" / "notes").write_bytes(b"kept")
    (directory / "extra" / "consolidated.safetensors").write_bytes(b"served by vLLM instead")
    return tensors


@pytest.mark.parametrize("block", [(2, 3), (4, 4), (128, 128)])
def test_each_number_is_its_product(block):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 10, generator=generator)
    quantised, scales = to_blocks(weight, block)
    found = dequantised(quantised, scales, block)
    for i in range(7):
        for j in range(10):
            assert found[i, j] == float(quantised[i, j]) * float(scales[i // block[0], j // block[1]])
    assert float((found - weight).norm()) < 0.05 * float(weight.norm())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_whole_checkpoint(tmp_path, shards, scale_dtype, monkeypatch):
    monkeypatch.setattr("editing.checkpoints.fp8_tiles._CHUNK_BYTES", 700)
    tensors = quantise(tmp_path / "fp8", shards=shards, scale_dtype=scale_dtype)
    told = []
    found = dequantise(tmp_path / "fp8", tmp_path / "out", progress=lambda *counts: told.append(counts))
    stored = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(file)
    assert set(stored) == {name for name in tensors if not name.endswith("_inv")}
    assert set(found.tensors) == {name for name in tensors if name.endswith("_proj.weight")}
    assert found.left_out == ("extra/consolidated.safetensors",)
    for name, tensor in stored.items():
        if name in found.tensors:
            assert tensor.dtype == torch.bfloat16
            exact = dequantised(tensors[name], tensors[f"{name}_scale_inv"], (32, 16))
            # bfloat16 has 8 bits: a rounding is off by at most one part in 512 of the next power of two.
            halves = 2.0 ** (torch.frexp(exact)[1] - 9)
            assert bool(((tensor.double() - exact).abs() <= halves).all())
        else:
            assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["hidden_size"] == 72
    assert [path.name for path in (tmp_path / "out" / "extra").iterdir()] == ["notes"]
    assert (tmp_path / "out" / "extra" / "notes").read_bytes() == b"kept"
    size = sum(e.end - e.begin for e in tensor_entries(tmp_path / "out").values())
    assert found.bytes == size and told[-1] == (size, size)
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": size, "kept": "yes"}
        assert set(index["weight_map"]) == set(stored)
        assert not (tmp_path / "out" / "scales.safetensors").exists()


def test_the_result_loads_and_can_be_edited(tmp_path):
    quantise(tmp_path / "fp8")
    dequantise(tmp_path / "fp8", tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and model.dtype == torch.bfloat16
    assert open_model(str(tmp_path / "out")).anatomy.residual == 72
    write_checkpoint(tmp_path / "out", tmp_path / "edited", {}, {})


def test_no_shard_is_in_memory_at_once(tmp_path, monkeypatch):
    import editing.checkpoints.fp8_tiles as module

    read = []
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(module, "read_bytes", lambda *a: read.append(read_bytes(*a)) or read[-1])
    (tmp_path / "fp8").mkdir()
    weight = torch.randn(4096, 1024).to(torch.float8_e4m3fn)
    save_file({"w": weight, "w_scale_inv": torch.ones(32, 8)}, tmp_path / "fp8" / "model.safetensors")
    settings = {"quantization_config": {**SETTINGS, "weight_block_size": [128, 128]}}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(settings))
    # The allocations of Python, through which everything else that is read from a file goes.
    tracemalloc.start()
    try:
        dequantise(tmp_path / "fp8", tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20 < weight.numel()
    assert len(read) == 32 and {content.numel() for content in read} == {1 << 17}
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"].float(), weight.float())


def refused(source, message, target=None):
    target = target or source.parent / "out"
    with pytest.raises(BrocaError, match=message):
        dequantise(source, target)
    assert target == source or not target.exists()
    assert not list(source.parent.glob(".*"))


def settings_of(source, **changes):
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {**config["quantization_config"], **changes}
    (source / "config.json").write_text(json.dumps(config))


def test_other_kinds_are_refused_and_told_the_way(tmp_path):
    source = tmp_path / "fp8"
    quantise(source)
    settings_of(source, quant_method="mxfp4")
    refused(source, "no MXFP4 tensor")
    settings_of(source, quant_method="gptq")
    refused(source, "quantised by gptq.*the unquantised checkpoint")
    settings_of(source, quant_method="fp8", weight_block_size=None)
    refused(source, r"FP8 with a weight_block_size.*FineGrainedFP8Config")
    models.build_checkpoint(tmp_path / "plain")
    refused(tmp_path / "plain", "is not quantised")


def test_editing_a_quantised_checkpoint_says_how(tmp_path):
    quantise(tmp_path / "fp8")
    with pytest.raises(BrocaError, match="broca export MODEL --dequantise bf16 --out"):
        write_checkpoint(tmp_path / "fp8", tmp_path / "out", {}, {})
    settings_of(tmp_path / "fp8", quant_method="bitsandbytes")
    with pytest.raises(BrocaError, match=r"model\.dequantize\(\)"):
        write_checkpoint(tmp_path / "fp8", tmp_path / "out", {}, {})
    nested = {"text_config": {"quantization_config": SETTINGS}}
    assert "--dequantise" in quantised_remedy(nested)


def rewrite(source, change):
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def test_scales_that_do_not_fit(tmp_path):
    source, name = tmp_path / "fp8", "model.layers.0.mlp.up_proj.weight"
    quantise(source)
    rewrite(source, lambda tensors: tensors.update({f"{name}_scale_inv": torch.ones(2, 2)}))
    refused(source, r"up_proj\.weight_scale_inv .* does not fit")
    rewrite(source, lambda tensors: tensors.pop(f"{name}_scale_inv"))
    refused(source, r"model\.layers\.0\.mlp\.up_proj\.weight_scale_inv")
    rewrite(source, lambda tensors: tensors.update({f"{name}_scale_inv": torch.full((2, 5), torch.nan)}))
    refused(source, "is not finite")


def test_the_target_is_kept_unless_told(tmp_path):
    quantise(tmp_path / "fp8")
    refused(tmp_path / "fp8", "is the source itself", tmp_path / "fp8")
    models.build_checkpoint(tmp_path / "old")
    before = (tmp_path / "old" / "config.json").read_bytes()
    with pytest.raises(BrocaError, match="add --overwrite"):
        dequantise(tmp_path / "fp8", tmp_path / "old")
    assert (tmp_path / "old" / "config.json").read_bytes() == before
    dequantise(tmp_path / "fp8", tmp_path / "old", overwrite=True)
    assert open_model(str(tmp_path / "old")).anatomy.residual == 72


def test_the_fingerprint_of_the_copy_is_known_before_it_is_written(tmp_path):
    for shards in (1, 2):
        source, out = tmp_path / f"fp8-{shards}", tmp_path / f"out-{shards}"
        quantise(source, shards=shards)
        dequantise(source, out)
        assert open_for_export(str(source)).fingerprint == open_model(str(out)).fingerprint
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    rewrite(tmp_path / "fp8-1", lambda tensors: tensors.update({name: tensors[name] * 2}))
    changed = open_for_export(str(tmp_path / "fp8-1")).fingerprint
    assert changed != open_model(str(tmp_path / "out-1")).fingerprint
    plain = str(tmp_path / "out-1")
    assert open_for_export(plain).fingerprint == open_model(plain).fingerprint


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_each_number_of_mxfp4_is_its_product():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.tensor([[0, 1, 127], [120, 130, 252]], dtype=torch.uint8)
    found = dequantised_blocks(blocks, scales)
    assert found.shape == (2, 96)
    for row in range(2):
        for place in range(96):
            byte = int(blocks[row, place // 32, place % 32 // 2])
            half = byte >> 4 if place % 2 else byte & 15
            number = E2M1[half & 7] * (-1) ** (half >> 3)
            assert float(found[row, place]) == number * 2.0 ** (int(scales[row, place // 32]) - 127)
    assert torch.equal(found.bfloat16().float(), found)  # exact, also below the normal numbers
    assert not bool(dequantised_blocks(blocks, torch.full_like(scales, 255)).isfinite().any())


def mxfp4(directory):
    """A tiny gpt-oss whose experts are MXFP4, as its checkpoints are stored."""
    models.build_checkpoint(directory, "gpt_oss", dtype="bfloat16", intermediate_size=64)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if name.endswith(("experts.down_proj", "experts.gate_up_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(
                256, (*shape, 16), dtype=torch.uint8, generator=generator
            )
            tensors[f"{name}_scales"] = torch.randint(118, 125, shape, generator=generator).to(torch.uint8)
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(config))
    return tensors


def test_a_checkpoint_of_mxfp4_experts_becomes_the_model_that_transformers_loads(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = mxfp4(tmp_path / "mxfp4")
    found = dequantise(tmp_path / "mxfp4", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert len(found.tensors) == 6 and {*found.tensors} < {*stored}
    for name, tensor in stored.items():
        blocks = tensors.get(f"{name}_blocks")
        if blocks is None:
            assert torch.equal(tensor, tensors[name])
        else:
            assert torch.equal(tensor, convert_moe_packed_tensors(blocks, tensors[f"{name}_scales"]))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(loaded.get_parameter(name), stored[name])
    assert open_model(str(tmp_path / "out")).anatomy.model_type == "gpt_oss"
    rewrite(tmp_path / "mxfp4", lambda tensors: tensors[f"{name}_scales"].fill_(255))
    refused(tmp_path / "mxfp4", "is not finite", tmp_path / "other")
    rewrite(tmp_path / "mxfp4", lambda tensors: tensors.pop(f"{name}_scales"))
    refused(tmp_path / "mxfp4", f"without {name}_scales", tmp_path / "other")
