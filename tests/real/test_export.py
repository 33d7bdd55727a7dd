"""The exported checkpoint: what of it is new, and what it writes in stock transformers and over chat."""

import torch
import transformers

from neurons.files.tensor_files import read_tensor, tensor_entries

NEW_TOKENS = 20
QUESTIONS = ("How do I make a cup of tea?", "What is a volcano?", "Was ist ein Vulkan?")


def test_only_the_edited_tensors_change(model, export):
    before, after = tensor_entries(model), tensor_entries(export.out)
    assert {name: entry.shape for name, entry in after.items()} == {
        name: entry.shape for name, entry in before.items()
    }
    changed = {
        name
        for name, entry in before.items()
        if not torch.equal(read_tensor(entry).view(torch.int16), read_tensor(after[name]).view(torch.int16))
    }
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(30)}


def test_every_other_file_is_the_same(model, export):
    weights = "model.safetensors"
    for file in model.iterdir():
        if file.name != weights:
            assert (export.out / file.name).read_bytes() == file.read_bytes()
    assert (export.out / weights).stat().st_size == (model / weights).stat().st_size


@torch.inference_mode()
def test_transformers_writes_what_the_plan_writes_in_memory(run, model, edit, export):
    asked = ["--prompts", *QUESTIONS, "--new-tokens", NEW_TOKENS, "--dtype", "float32"]
    written = run("generate", model, "--edit", edit.out, "--compare", *asked, name="written.json").value
    tokenizer = transformers.AutoTokenizer.from_pretrained(export.out)
    steered = transformers.AutoModelForCausalLM.from_pretrained(export.out, dtype=torch.float32)
    for question, texts in zip(QUESTIONS, written["texts"], strict=True):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = steered.generate(**chat, do_sample=False, max_new_tokens=NEW_TOKENS)[0]
        answer = tokenizer.decode(ids[chat["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == texts["edited"]
    assert all(texts["edited"] != texts["unedited"] for texts in written["texts"][:2])
