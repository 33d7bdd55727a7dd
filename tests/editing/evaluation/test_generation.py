"""Batched continuations against a loop that appends one token at a time."""

import math

import models
import pytest
import torch

from editing.evaluation.generation import generate, prompts_at_once, writing_bytes
from neurons.models.memory import limit_memory, sizes_of
from neurons.models.source import load_model

PROMPTS = ["beef", "stop milk hill pop trust bead", "a", "cafe decaf face, fade? "]


@pytest.fixture
def loaded(checkpoint_of):
    """A model for one test, whose generation config may be changed."""
    return load_model(str(checkpoint_of()), device="cpu")


def prompt_ids(prompt):
    return [0, *models.tiny_tokenizer()(prompt, add_special_tokens=False)["input_ids"]]


def naive_greedy(model, prompt, count, ends=()):
    ids, written = prompt_ids(prompt), []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
        ids.append(token)
    return tuple(written)


def test_greedy_equals_one_token_at_a_time(llama, monkeypatch):
    monkeypatch.setattr("editing.evaluation.generation.PROMPTS_A_BATCH", 3)
    continuations = generate(llama, PROMPTS, 12, temperature=0)
    expected = [naive_greedy(llama.model, prompt, 12, {1}) for prompt in PROMPTS]
    assert [item.ids for item in continuations] == expected
    assert len(set(expected)) == 4 and all(len(ids) == 12 for ids in expected)
    assert [item.text for item in continuations] == [models.tiny_tokenizer().decode(ids) for ids in expected]


def test_a_batch_has_as_many_prompts_as_memory_allows(llama, monkeypatch):
    longest = max(len(prompt_ids(prompt)) for prompt in PROMPTS)
    room = writing_bytes(sizes_of(llama), 3, longest, 12)
    monkeypatch.setattr("editing.evaluation.generation.max_room", lambda loaded: room)
    assert [prompts_at_once(llama, longest, tokens) for tokens in (12, 12_000)] == [2, 1]
    batches, write = [], llama.model.generate

    def counted(**arguments):
        batches.append(len(arguments["input_ids"]))
        return write(**arguments)

    monkeypatch.setattr(llama.model, "generate", counted)
    continuations = generate(llama, PROMPTS, 12, temperature=0)
    assert batches == [2, 2]
    assert [item.ids for item in continuations] == [
        naive_greedy(llama.model, one, 12, {1}) for one in PROMPTS
    ]


def test_one_prompt_is_written_also_where_no_memory_is_left(llama):
    limit_memory(1)
    try:
        assert prompts_at_once(llama, 10, 12) == 1
    finally:
        limit_memory(None)


@pytest.mark.parametrize(
    "advice",
    [{"do_sample": True, "temperature": 0.6, "top_p": 0.5, "top_k": 20}, {"repetition_penalty": 1.5}],
    ids=["sampling", "repetition penalty"],
)
def test_greedy_takes_the_likeliest_token_whatever_the_checkpoint_advises(loaded, advice):
    # Published generation_config.json have both: Qwen2.5-Instruct penalises repetition.
    expected = [naive_greedy(loaded.model, prompt, 12, {1}) for prompt in PROMPTS]
    loaded.model.generation_config.update(**advice)
    assert [item.ids for item in generate(loaded, PROMPTS, 12, temperature=0)] == expected


@pytest.mark.parametrize("several", [False, True])
def test_a_continuation_ends_before_the_end_token(loaded, several):
    whole = [naive_greedy(loaded.model, prompt, 12) for prompt in PROMPTS]
    end = whole[1][4]
    loaded.model.generation_config.eos_token_id = [end, 1] if several else end
    continuations = generate(loaded, PROMPTS, 12, temperature=0)
    expected = [naive_greedy(loaded.model, prompt, 12, {end, 1} if several else {end}) for prompt in PROMPTS]
    assert [item.ids for item in continuations] == expected
    assert len(expected[1]) <= 4 and max(map(len, expected)) > len(expected[1])


def test_the_same_seed_writes_the_same(llama):
    one, same, other = (generate(llama, PROMPTS, 10, 0.7, seed) for seed in (3, 3, 4))
    assert one == same
    assert one != other


def test_repeated_prompts_are_sampled_apart(llama):
    continuations = generate(llama, ["beef"] * 4, 10, 1.0, 0)
    assert len({item.ids for item in continuations}) > 1


def test_samples_follow_the_tempered_distribution(loaded):
    # Whatever top-k or top-p the checkpoint advises.
    loaded.model.generation_config.update(top_k=1, top_p=0.1)
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(0.1)
        logits = loaded.model(torch.tensor([prompt_ids("beef")])).logits[0, -1].double()
    temperature, count = 0.5, 4000
    expected = (logits / temperature).softmax(0)
    frequencies = torch.zeros(len(expected), dtype=torch.float64)
    for item in generate(loaded, ["beef"] * count, 1, temperature, seed=1):
        frequencies[item.ids[0] if item.ids else 1] += 1 / count
    top = expected.topk(5).indices
    for token in top.tolist():
        p = float(expected[token])
        assert abs(float(frequencies[token]) - p) < 5 * math.sqrt(p * (1 - p) / count)
    assert float(expected[top[0]]) < 0.6 and int((frequencies > 0).sum()) > 20


def test_without_prompts_nothing_is_written(llama):
    assert generate(llama, [], 5) == []


def test_the_head_reads_whole_rows(llama):
    """torch multiplies a strided view row by row, with a copy of the weight for each."""
    whole = []
    handle = llama.model.lm_head.register_forward_hook(
        lambda _, inputs, __: whole.append(inputs[0].is_contiguous())
    )
    generate(llama, ["stop milk hill", "pop trust"], 3, 0.0)
    handle.remove()
    assert whole and all(whole)
