"""``broca generate``."""

import json
import shutil
import signal
import sys
from contextlib import suppress
from types import SimpleNamespace

import commands
import models
import pytest
import torch

from cli.generate import command
from editing.directions.diffmean import diffmean_direction
from editing.evaluation.generation import generate
from editing.evaluation.vllm_generation import VllmWriter
from editing.methods.directional_ablation import directional_ablation_plan
from editing.plans.applied import applied
from neurons.errors import UsageError

TEXTS = ["beef cab", "stop milk"]


@pytest.fixture(scope="module")
def plan(llama, corpus):
    direction = diffmean_direction(llama, corpus, "qaa", "qab")
    return directional_ablation_plan(llama, direction, strength=-3.0)


def run(*arguments):
    return commands.run(command, *arguments).output


def texts_of(output):
    return json.loads(output)["texts"]


def written(loaded, seed=0, **settings):
    return [item.text for item in generate(loaded, TEXTS, 6, 0.0, seed)]


def written_by_vllm(loaded, prompts):
    with VllmWriter(loaded.name, loaded.tokenizer) as write:
        return write(prompts)


def test_the_model_alone(llama):
    texts = texts_of(run(llama.name, "--prompts", *TEXTS, "--new-tokens", 6, "--json"))
    assert texts == [
        {"prompt": prompt, "unedited": text} for prompt, text in zip(TEXTS, written(llama), strict=True)
    ]


def test_base_and_edited_side_by_side(llama, plan, edit, steered, tmp_path):
    common = ["--prompts", *TEXTS, "--new-tokens", 6, "--compare", "--json"]
    out = tmp_path / "texts.json"
    compared = texts_of(run(llama.name, "--edit", edit, *common, "--out", out))
    with applied(llama, plan):
        edited = written(llama)
    unedited = written(llama)
    assert edited != unedited
    assert compared == [
        {"prompt": prompt, "unedited": a, "edited": b}
        for prompt, a, b in zip(TEXTS, unedited, edited, strict=True)
    ]
    assert json.loads(out.read_text())["texts"] == compared
    assert texts_of(run(llama.name, "--against", steered, *common)) == compared
    alone = texts_of(run(llama.name, "--edit", edit, "--prompts", *TEXTS, "--new-tokens", 6, "--json"))
    assert alone == [{"prompt": row["prompt"], "edited": row["edited"]} for row in compared]


def test_the_table_has_a_column_each(llama, edit):
    output = run(llama.name, "--edit", edit, "--compare", "--prompts", "beef cab", "--new-tokens", 3)
    assert all(word in output for word in ("prompt", "unedited", "edited", "beef cab"))


def test_prompts_from_files(llama, tmp_path):
    (tmp_path / "p.txt").write_text("beef cab\n\nstop milk\n", encoding="utf-8")
    questions = [{"question_id": i, "text": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    (tmp_path / "my prompts").mkdir()
    for name in ("p.txt", "q.jsonl"):
        shutil.copy(tmp_path / name, tmp_path / "my prompts" / f"copied {name}")
    for name in ("p.txt", "q.jsonl", "my prompts/copied p.txt", "my prompts/copied q.jsonl"):
        rows = texts_of(run(llama.name, "--prompts", tmp_path / name, "--new-tokens", 1, "--json"))
        assert [row["prompt"] for row in rows] == TEXTS
    mixed = texts_of(
        run(llama.name, "--prompts", tmp_path / "p.txt", "See a file.txt", "--new-tokens", 1, "--json")
    )
    assert [row["prompt"] for row in mixed] == [*TEXTS, "See a file.txt"]
    long = " ".join(["beef"] * 200) + ".txt"
    alone = texts_of(run(llama.name, "--prompts", long, "--new-tokens", 1, "--json"))
    assert [row["prompt"] for row in alone] == [long]


def test_prompts_that_are_not_utf8_are_named(llama, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"beef\ncaf\xe9\n")
    with pytest.raises(UsageError, match=r"latin\.txt: line 2 is not UTF-8"):
        run(llama.name, "--prompts", tmp_path / "latin.txt")


def test_sampling_has_a_seed(llama):
    few = ["--prompts", *TEXTS, "--new-tokens", 8, "--temperature", 1.0, "--json"]
    assert run(llama.name, *few, "--seed", 1) == run(llama.name, *few, "--seed", 1)
    assert texts_of(run(llama.name, *few, "--seed", 1)) != texts_of(run(llama.name, *few, "--seed", 2))


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--compare"], "--compare"),
        (["--edit", __file__, "--against", "c"], "--edit and --against"),
        (["--engine", "vllm", "--edit", __file__], "--edit"),
        (["--engine", "vllm", "--device", "cpu"], "--device"),
        (["--chat"], "--chat"),
    ],
)
def test_invalid_options_are_rejected(llama, arguments, value):
    with pytest.raises(UsageError, match=value):
        run(llama.name, "--prompts", "beef", *arguments)


@pytest.mark.parametrize("prompts", [["none.txt"], [" "]])
def test_prompts_that_are_not_there(llama, prompts):
    with pytest.raises(UsageError, match="prompt"):
        run(llama.name, "--prompts", *prompts)


def test_vllm_that_is_not_installed_is_one_sentence(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match="pip install vllm"):
        run(llama.name, "--prompts", "beef", "--engine", "vllm")


class StandIn:
    """A stand-in for the package vllm: it always generates " high" and records its calls."""

    __version__ = "0"

    def __init__(self, tokenizer):
        self.started, self.stopped, self.rows, self.settings = [], [], None, None
        stand_in = self

        class LLM:
            def __init__(self, **settings):
                stand_in.started.append(settings)
                core = SimpleNamespace(shutdown=lambda: stand_in.stopped.append(settings["model"]))
                self.llm_engine = SimpleNamespace(engine_core=core)

            def generate(self, rows, settings, use_tqdm):
                stand_in.rows, stand_in.settings = rows, settings
                ids = [tokenizer(" high", add_special_tokens=False)["input_ids"] + [1]] * len(rows)
                return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=row)]) for row in ids]

        self.LLM, self.SamplingParams = LLM, dict

    @property
    def models(self):
        return [settings["model"] for settings in self.started]


@pytest.fixture
def vllm(llama, monkeypatch):
    stand_in = StandIn(llama.tokenizer)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    return stand_in


def test_vllm_is_asked_for_the_same_tokens(llama, steered, vllm):
    few = ["--prompts", *TEXTS, "--new-tokens", 6, "--engine", "vllm", "--json"]
    texts = texts_of(run(llama.name, "--against", steered, "--compare", *few))
    assert texts == [{"prompt": prompt, "unedited": " high", "edited": " high"} for prompt in TEXTS]
    assert vllm.models == vllm.stopped == [str(llama.checkpoint), str(steered)]
    tokens = [models.tiny_tokenizer()(text)["input_ids"] for text in TEXTS]
    assert vllm.rows == [{"prompt_token_ids": ids} for ids in tokens]
    for settings in vllm.settings:
        del settings["seed"]
        assert settings == {"temperature": 0.0, "max_tokens": 6, "stop_token_ids": [1]}
    assert written_by_vllm(llama, []) == []
    assert len(vllm.started) == 2


def test_an_engine_of_vllm_serves_until_another_checkpoint_or_a_longer_text_comes(llama, steered, vllm):
    """The tiny model reads 128 tokens."""
    a_hundred = [5] * 100
    with VllmWriter(llama.name, llama.tokenizer) as write:
        assert vllm.started == []
        write(["beef"], 6)
        with write.writing_with(str(steered)):
            pass
        write([a_hundred], 28)
        assert [settings["max_model_len"] for settings in vllm.started] == [128]
        # vLLM itself rejects texts that are too long.
        write([a_hundred, [5]], 50)
        assert [settings["max_model_len"] for settings in vllm.started] == [128, 150]
        assert vllm.stopped == [llama.name]
        with write.writing_with(str(steered)):
            write(["beef"], 6)
            write(["cab"], 6)
        write(["beef"], 6)
        assert vllm.models == [llama.name, llama.name, str(steered), llama.name]
        assert vllm.stopped == vllm.models[:3]
    assert vllm.stopped == vllm.models
    with pytest.raises(KeyboardInterrupt), VllmWriter(llama.name, llama.tokenizer) as write:
        write(["beef"], 6)
        raise KeyboardInterrupt
    assert vllm.stopped == vllm.models


def test_a_model_that_reads_on_has_room_for_longer_texts_to_come(llama, vllm, tmp_path):
    long = tmp_path / "long"
    shutil.copytree(llama.checkpoint, long)
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    with VllmWriter(str(long), llama.tokenizer) as write:
        for length, started in ((10, [512]), (506, [512]), (507, [512, 1026]), (4090, [512, 1026, 4096])):
            write([[5] * length], 6)
            assert [settings["max_model_len"] for settings in vllm.started] == started


def test_a_prompt_asked_twice_has_two_seeds_and_another_seed_has_others(llama, vllm):
    seeds = []
    with VllmWriter(llama.name, llama.tokenizer) as write:
        for seed in (0, 0, 1):
            write(["beef", "beef", "cab"], 6, 0.7, seed)
            seeds.append([settings["seed"] for settings in vllm.settings])
    first, again, other = seeds
    assert first == again
    assert len({*first, *other}) == 6
    assert all(0 <= seed < 2**63 for seed in (*first, *other))


def test_vllm_takes_of_the_memory_what_the_model_in_it_leaves(llama, vllm, monkeypatch):
    free = SimpleNamespace(available=6, total=24)
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(virtual_memory=lambda: free))
    written_by_vllm(llama, ["beef"])
    monkeypatch.setattr("editing.evaluation.vllm_generation.pick_device", lambda: torch.device("cuda"))
    written_by_vllm(llama, ["beef"])
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (30, 80))
    written_by_vllm(llama, ["beef"])
    fractions = [settings.get("gpu_memory_utilization") for settings in vllm.started]
    assert fractions == [pytest.approx(0.2), None, pytest.approx(0.3)]


@pytest.fixture
def interrupts():
    """Enable SIGINT as in a terminal, because background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_an_engine_starts_is_not_lost(llama, vllm, interrupts):
    """vLLM swallows an interrupt during its start."""

    def swallowing(**settings):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    vllm.LLM = swallowing
    with pytest.raises(KeyboardInterrupt):
        written_by_vllm(llama, ["beef"])
    assert signal.getsignal(signal.SIGINT) is interrupts


def test_a_model_with_a_template_goes_on_with_plain_text_where_no_chat_is_asked_for(llama, chat_model):
    arguments = [chat_model, "--prompts", *TEXTS, "--new-tokens", 6, "--json"]
    plain = [row["unedited"] for row in texts_of(run(*arguments, "--no-chat"))]
    assert plain == written(llama)
    assert [row["unedited"] for row in texts_of(run(*arguments))] != plain
