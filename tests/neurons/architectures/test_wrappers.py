"""Wrappers of a language model beside a tower for images: only the language model is edited.

That silencing a neuron at its site and in its weight is the same is tried in test_families.py.
"""

from importlib.util import find_spec

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_families import IDS, logits_of, random_plan, saved
from tiny_models import tiny_config
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from editing.checkpoints.adapter import export_adapter
from editing.checkpoints.export import export
from editing.plans.applied import applied
from editing.plans.weights import Weights
from neurons.architectures.anatomy import BLOCKS, anatomy_of
from neurons.architectures.layouts import LAYOUTS, WRAPPERS, row_of
from neurons.errors import BrocaError
from neurons.files.tensor_files import tensor_entries
from neurons.models.memory import sizes_of
from neurons.models.source import load_model, open_model, plan_model

IN_GRID = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm46v",
           "glm4v_moe")  # fmt: skip
WITH_IMAGES = (*IN_GRID, *WRAPPERS, "gemma3", "gemma4")
IMAGE_TOKEN = 2  # not in IDS
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "chat_template.json")


def wrapper_at(directory, model_type):
    saved(model_type, directory, image_token_id=IMAGE_TOKEN)
    for name in PROCESSOR:
        (directory / name).write_text(f'{{"made_for": "{name}"}}\n')
    return directory


def image_of(model_type):
    """A random image of 64 x 64 pixels, in patches of 16 where the model takes patches."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    if model_type in IN_GRID:
        return {"pixel_values": random(16, 3 * 2 * 16 * 16), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if model_type in ("idefics3", "smolvlm"):
        return {"pixel_values": random(1, 1, 3, 64, 64)}
    if model_type in ("llava_next", "llava_onevision"):
        return {"pixel_values": random(1, 2, 3, 64, 64), "image_sizes": torch.tensor([[64, 64]])}
    if model_type == "mistral3":
        return {"pixel_values": random(1, 3, 64, 64), "image_sizes": torch.tensor([[64, 64]])}
    if model_type == "gemma4":
        places = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="xy"), -1)
        return {"pixel_values": random(1, 9, 3 * 16 * 16), "image_position_ids": places.view(1, 9, 2)}
    return {"pixel_values": random(1, 3, 64, 64)}


def logits_with_image(model, anatomy):
    inputs = image_of(model.config.model_type)
    with torch.no_grad():
        made = model.get_image_features(**inputs).pooler_output
        rows = sum(each.numel() for each in (made if isinstance(made, list | tuple) else [made]))
        count = rows // anatomy.residual
        ids = torch.tensor([[5, 40, *[IMAGE_TOKEN] * count, 63, 70, 41]])
        kinds = (ids == IMAGE_TOKEN).long()
        if model.config.model_type in IN_GRID:
            inputs["mm_token_type_ids"] = kinds
        return model(input_ids=ids, use_cache=False, **inputs).logits


def reloaded(directory):
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def test_the_listed_wrappers_are_in_the_table():
    for model_type in WITH_IMAGES:
        assert model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        assert row_of(tiny_config(model_type)) is not None, model_type


@pytest.mark.parametrize("model_type", [*WITH_IMAGES, "llama4", "qianfan_ocr"])
def test_an_export_is_the_wrapper_with_other_weights_in_its_language_model(tmp_path, model_type):
    base, out = wrapper_at(tmp_path / "model", model_type), tmp_path / "edited"
    source, loaded = open_model(base), load_model(base, device="cpu")
    assert type(loaded.model).__name__ == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    plan = random_plan(source)
    export(source, plan, out)
    model = reloaded(out)
    anatomy = anatomy_of(model)
    sees = model_type in WITH_IMAGES
    plain = logits_with_image(loaded.model, loaded.anatomy) if sees else None
    with applied(loaded, plan):
        by_plan = logits_of(loaded.model, loaded.anatomy)
        with_image = logits_with_image(loaded.model, loaded.anatomy) if sees else None
    assert torch.equal(logits_of(model, anatomy), by_plan)
    assert not torch.equal(logits_of(loaded.model, loaded.anatomy), by_plan)
    if sees:
        torch.testing.assert_close(logits_with_image(model, anatomy), with_image, rtol=0, atol=1e-5)
        assert bool((with_image - plain).abs().max() > 1e-2)
    weights = Weights(source)
    edited = {entry.name for edit in plan.edits for _, entry in weights.pieces(edit.layer, edit.block)}
    before, after = (tensor_entries(directory) for directory in (base, out))
    assert before.keys() == after.keys() and len(edited) >= len(plan.edits)
    for name, entry in before.items():
        same = bytes_of(entry) == bytes_of(after[name])
        assert same != (name in edited), name
    assert not [name for name in edited if "vis" in name]
    for name in PROCESSOR:
        assert (out / name).read_bytes() == (base / name).read_bytes()


def bytes_of(entry):
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        return stream.read(entry.end - entry.begin)


def test_layers_are_found_by_structure_if_no_other_tower_has_as_many(tmp_path):
    anatomy = open_model(wrapper_at(tmp_path / "model", "qianfan_ocr")).anatomy
    assert anatomy.layout.examined
    tails = [anatomy.layout.stored[block][0].name for block in BLOCKS]
    mine = [f"odd.path.{layer}.{tail}" for layer in range(anatomy.layers) for tail in tails]
    other = [f"tower.{layer}.{tails[0]}" for layer in range(anatomy.layers + 1)]
    assert anatomy.tensor_name(1, "attn", [*mine, *other]) == f"odd.path.1.{tails[0]}"
    assert anatomy.stored(2, "mlp", [*mine, *other])[0].tensor == f"odd.path.2.{tails[1]}"
    with pytest.raises(BrocaError, match="names for this architecture are unknown"):
        anatomy.stored(2, "mlp", [*mine, *other[:-1]])


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava", "smolvlm", "llama4"])
def test_an_adapter_names_the_modules_of_the_wrapper(tmp_path, model_type):
    base = wrapper_at(tmp_path / "model", model_type)
    source = open_model(base)
    plan = random_plan(source, ("attn",) if source.anatomy.mixed else BLOCKS)
    export(source, plan, tmp_path / "edited")
    exported = export_adapter(source, plan, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(reloaded(base), str(tmp_path / "adapter")).eval()
    layers = [
        path for path, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    assert {path.removeprefix("base_model.model.") for path in layers} == set(exported.modules)
    with torch.no_grad():
        by_adapter, by_checkpoint = (
            model(input_ids=IDS, use_cache=False).logits for model in (adapted, reloaded(tmp_path / "edited"))
        )
    torch.testing.assert_close(by_adapter, by_checkpoint, rtol=1e-4, atol=1e-4)


def test_the_memory_of_a_dry_run_is_that_of_all_towers(tmp_path):
    base = wrapper_at(tmp_path / "model", "llava")
    planned = sizes_of(plan_model(str(base), "cpu"))
    stored = tensor_entries(base).values()
    assert planned.weights == sum(entry.end - entry.begin for entry in stored)
    assert any(entry.name.startswith("vision_tower.") for entry in stored)


def test_experts_are_edited_in_the_orientation_of_their_tensor(tmp_path):
    """Released files of Qwen3-VL's mixtures have [E, I, d], files that transformers saves [E, d, I]."""
    ours = wrapper_at(tmp_path / "saved", "qwen3_vl_moe")
    theirs = wrapper_at(tmp_path / "released", "qwen3_vl_moe")
    tensors = load_file(theirs / "model.safetensors")
    turned = {
        name: tensor.mT.contiguous() if name.endswith("experts.down_proj") else tensor
        for name, tensor in tensors.items()
    }
    save_file(turned, theirs / "model.safetensors", metadata={"format": "pt"})
    made = []
    for base in (ours, theirs):
        source = open_model(base)
        export(source, random_plan(source, ("mlp",)), base.with_name(f"{base.name}-edited"))
        edited = load_model(base.with_name(f"{base.name}-edited"), device="cpu")
        made.append(logits_of(edited.model, edited.anatomy))
    assert torch.equal(*made)
    plain = load_model(ours, device="cpu")
    assert not torch.equal(logits_of(plain.model, plain.anatomy), made[0])


@pytest.mark.parametrize(
    ("model_type", "named"),
    [
        ("blip", "blip"),
        pytest.param(
            "gemma3n", "timm", marks=pytest.mark.skipif(find_spec("timm") is not None, reason="has timm")
        ),
    ],
)
def test_a_wrapper_that_cannot_be_edited_ends_in_a_sentence(broca, tmp_path, model_type, named):
    transformers.CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    status, _, error = broca("inspect", tmp_path)
    assert status == 1 and len(error.splitlines()) == 1
    assert model_type in error and named in error


def test_the_rows_of_language_models_keep_their_class(tmp_path):
    """A type in both registries is its wrapper, its text type the language model alone."""
    for model_type, held in (("qwen3_5", "qwen3_5_text"), ("llama4", "llama4_text")):
        assert LAYOUTS[model_type].layers != LAYOUTS[held].layers
        text = load_model(saved(held, tmp_path / held), device="cpu")
        assert type(text.model).__name__.endswith("ForCausalLM")
