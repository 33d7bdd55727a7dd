"""``broca generate``, called as a command."""

import json
import shutil
import signal
import sys
from contextlib import suppress
from types import SimpleNamespace

import models
import pytest
import torch
from click.testing import CliRunner

from cli.generate import command
from editing.directions.diffmean import diffmean_direction
from editing.evaluation.generation import generate
from editing.evaluation.vllm_generation import VllmWriter, generate_by_vllm
from editing.methods.directional_ablation import directional_ablation_plan
from editing.plans.applied import applied
from neurons.errors import UsageError

TEXTS = ["beef cab", "stop milk"]


@pytest.fixture(scope="module")
def plan(llama, corpus):
    direction = diffmean_direction(llama, corpus, "qaa", "qab")
    return directional_ablation_plan(llama, direction, strength=-3.0)


def run(*arguments):
    found = CliRunner().invoke(command, list(map(str, arguments)))
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output


def texts_of(output):
    return json.loads(output)["texts"]


def written(loaded, seed=0, **settings):
    return [item.text for item in generate(loaded, TEXTS, 6, 0.0, seed)]


def test_the_model_alone(llama):
    found = texts_of(run(llama.name, "--prompts", *TEXTS, "--new-tokens", 6, "--json"))
    assert found == [
        {"prompt": prompt, "unedited": text} for prompt, text in zip(TEXTS, written(llama), strict=True)
    ]


def test_base_and_edited_side_by_side(llama, plan, edit, steered, tmp_path):
    common = ["--prompts", *TEXTS, "--new-tokens", 6, "--compare", "--json"]
    out = tmp_path / "texts.json"
    live = texts_of(run(llama.name, "--edit", edit, *common, "--out", out))
    with applied(llama, plan):
        edited = written(llama)
    own = written(llama)
    assert edited != own
    assert live == [
        {"prompt": prompt, "unedited": a, "edited": b}
        for prompt, a, b in zip(TEXTS, own, edited, strict=True)
    ]
    assert json.loads(out.read_text())["texts"] == live
    assert texts_of(run(llama.name, "--against", steered, *common)) == live
    alone = texts_of(run(llama.name, "--edit", edit, "--prompts", *TEXTS, "--new-tokens", 6, "--json"))
    assert alone == [{"prompt": row["prompt"], "edited": row["edited"]} for row in live]


def test_the_table_has_a_column_each(llama, edit):
    output = run(llama.name, "--edit", edit, "--compare", "--prompts", "beef cab", "--new-tokens", 3)
    assert all(word in output for word in ("prompt", "unedited", "edited", "beef cab"))


def test_prompts_from_files(llama, tmp_path):
    (tmp_path / "p.txt").write_text("beef cab\n\nstop milk\n", encoding="utf-8")
    rows = [{"question_id": i, "text": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "my prompts").mkdir()
    for name in ("p.txt", "q.jsonl"):
        shutil.copy(tmp_path / name, tmp_path / "my prompts" / f"own {name}")
    for name in ("p.txt", "q.jsonl", "my prompts/own p.txt", "my prompts/own q.jsonl"):
        found = texts_of(run(llama.name, "--prompts", tmp_path / name, "--new-tokens", 1, "--json"))
        assert [row["prompt"] for row in found] == TEXTS
    mixed = texts_of(
        run(llama.name, "--prompts", tmp_path / "p.txt", "See a file.txt", "--new-tokens", 1, "--json")
    )
    assert [row["prompt"] for row in mixed] == [*TEXTS, "See a file.txt"]
    long = " ".join(["beef"] * 200) + ".txt"
    alone = texts_of(run(llama.name, "--prompts", long, "--new-tokens", 1, "--json"))
    assert [row["prompt"] for row in alone] == [long]


def test_sampling_has_a_seed(llama):
    few = ["--prompts", *TEXTS, "--new-tokens", 8, "--temperature", 1.0, "--json"]
    assert run(llama.name, *few, "--seed", 1) == run(llama.name, *few, "--seed", 1)
    assert texts_of(run(llama.name, *few, "--seed", 1)) != texts_of(run(llama.name, *few, "--seed", 2))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--compare"], "--compare needs"),
        (["--edit", __file__, "--against", "c"], "give one"),
        (["--engine", "vllm", "--edit", __file__], "export"),
        (["--engine", "vllm", "--device", "cpu"], "--device"),
        (["--chat"], "chat template"),
    ],
)
def test_what_is_refused(llama, arguments, named):
    with pytest.raises(UsageError, match=named):
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
    """For the package vllm: writes " high" always, and down what it is asked."""

    __version__ = "0"

    def __init__(self, tokenizer):
        self.started, self.stopped, self.rows, self.settings = [], [], None, None
        asked = self

        class LLM:
            def __init__(self, **settings):
                asked.started.append(settings)
                core = SimpleNamespace(shutdown=lambda: asked.stopped.append(settings["model"]))
                self.llm_engine = SimpleNamespace(engine_core=core)

            def generate(self, rows, settings, use_tqdm):
                asked.rows, asked.settings = rows, settings
                ids = [tokenizer(" high", add_special_tokens=False)["input_ids"] + [1]] * len(rows)
                return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=one)]) for one in ids]

        self.LLM, self.SamplingParams = LLM, dict

    @property
    def models(self):
        return [settings["model"] for settings in self.started]


@pytest.fixture
def asked(llama, monkeypatch):
    stand_in = StandIn(llama.tokenizer)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    return stand_in


def test_vllm_is_asked_for_the_same_tokens(llama, steered, asked):
    few = ["--prompts", *TEXTS, "--new-tokens", 6, "--engine", "vllm", "--json"]
    found = texts_of(run(llama.name, "--against", steered, "--compare", *few))
    assert found == [{"prompt": prompt, "unedited": " high", "edited": " high"} for prompt in TEXTS]
    assert asked.models == asked.stopped == [str(llama.checkpoint), str(steered)]
    tokens = [models.tiny_tokenizer()(text)["input_ids"] for text in TEXTS]
    assert asked.rows == [{"prompt_token_ids": ids} for ids in tokens]
    for settings in asked.settings:
        del settings["seed"]
        assert settings == {"temperature": 0.0, "max_tokens": 6, "stop_token_ids": [1]}
    assert generate_by_vllm(llama.name, llama.tokenizer, []) == []
    assert len(asked.started) == 2


def test_an_engine_of_vllm_serves_until_another_checkpoint_or_a_longer_text_comes(llama, steered, asked):
    """The tiny model reads 128 tokens."""
    a_hundred = [5] * 100
    with VllmWriter(llama.name, llama.tokenizer) as write:
        assert asked.started == []
        write(["beef"], 6)
        with write.writing_with(str(steered)):
            pass
        write([a_hundred], 28)
        assert [settings["max_model_len"] for settings in asked.started] == [128]
        # Whether so much can be read is vLLM's to say.
        write([a_hundred, [5]], 50)
        assert [settings["max_model_len"] for settings in asked.started] == [128, 150]
        assert asked.stopped == [llama.name]
        with write.writing_with(str(steered)):
            write(["beef"], 6)
            write(["cab"], 6)
        write(["beef"], 6)
        assert asked.models == [llama.name, llama.name, str(steered), llama.name]
        assert asked.stopped == asked.models[:3]
    assert asked.stopped == asked.models
    with pytest.raises(KeyboardInterrupt), VllmWriter(llama.name, llama.tokenizer) as write:
        write(["beef"], 6)
        raise KeyboardInterrupt
    assert asked.stopped == asked.models


def test_a_model_that_reads_on_has_room_for_longer_texts_to_come(llama, asked, tmp_path):
    long = tmp_path / "long"
    shutil.copytree(llama.checkpoint, long)
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    with VllmWriter(str(long), llama.tokenizer) as write:
        for length, started in ((10, [512]), (506, [512]), (507, [512, 1026]), (4090, [512, 1026, 4096])):
            write([[5] * length], 6)
            assert [settings["max_model_len"] for settings in asked.started] == started


def test_a_prompt_asked_twice_has_two_seeds_and_another_seed_has_others(llama, asked):
    found = []
    with VllmWriter(llama.name, llama.tokenizer) as write:
        for seed in (0, 0, 1):
            write(["beef", "beef", "cab"], 6, 0.7, seed)
            found.append([settings["seed"] for settings in asked.settings])
    first, again, other = found
    assert first == again
    assert len({*first, *other}) == 6
    assert all(0 <= seed < 2**63 for seed in (*first, *other))


def test_vllm_takes_of_the_memory_what_the_model_in_it_leaves(llama, asked, monkeypatch):
    free = SimpleNamespace(available=6, total=24)
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(virtual_memory=lambda: free))
    generate_by_vllm(llama.name, llama.tokenizer, ["beef"])
    monkeypatch.setattr("editing.evaluation.vllm_generation.pick_device", lambda: torch.device("cuda"))
    generate_by_vllm(llama.name, llama.tokenizer, ["beef"])
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (30, 80))
    generate_by_vllm(llama.name, llama.tokenizer, ["beef"])
    shares = [settings.get("gpu_memory_utilization") for settings in asked.started]
    assert shares == [pytest.approx(0.2), None, pytest.approx(0.3)]


@pytest.fixture
def heard():
    """Interrupts are heard as in a terminal: a job in the background is born deaf to them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_an_engine_starts_is_not_lost(llama, asked, heard):
    """vLLM swallows one there."""

    def deaf(**settings):
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    asked.LLM = deaf
    with pytest.raises(KeyboardInterrupt):
        generate_by_vllm(llama.name, llama.tokenizer, ["beef"])
    assert signal.getsignal(signal.SIGINT) is heard


def test_a_model_with_a_template_goes_on_with_plain_text_where_no_chat_is_asked_for(llama, chat_model):
    arguments = [chat_model, "--prompts", *TEXTS, "--new-tokens", 6, "--json"]
    plain = [row["unedited"] for row in texts_of(run(*arguments, "--no-chat"))]
    assert plain == written(llama)
    assert [row["unedited"] for row in texts_of(run(*arguments))] != plain
