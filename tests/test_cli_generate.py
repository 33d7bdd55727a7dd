"""``broca generate``, called as a command."""

import json
import sys
from types import SimpleNamespace

import models
import pytest
from click.testing import CliRunner

from cli.generate import command
from editing.directions.diffmean import diffmean_direction
from editing.edits.directional_ablation import directional_ablation_plan
from editing.export import export
from editing.generation import generate
from editing.live import applied
from editing.vllm_generation import generate_by_vllm
from neurons.errors import UsageError
from neurons.source import open_model

TEXTS = ["beef cab", "stop milk"]


@pytest.fixture(scope="module")
def plan(llama, corpus):
    direction = diffmean_direction(llama, corpus, "qaa", "qab")
    return directional_ablation_plan(llama, direction, strength=-3.0)


@pytest.fixture(scope="module")
def edit(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("edit") / "edit.safetensors"
    plan.save(path)
    return path


@pytest.fixture(scope="module")
def steered(llama, plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("steered") / "checkpoint"
    export(open_model(llama.name), plan, path)
    return path


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
    for name in ("p.txt", "q.jsonl"):
        found = texts_of(run(llama.name, "--prompts", tmp_path / name, "--new-tokens", 1, "--json"))
        assert [row["prompt"] for row in found] == TEXTS
    mixed = texts_of(
        run(llama.name, "--prompts", tmp_path / "p.txt", "See a file.txt", "--new-tokens", 1, "--json")
    )
    assert [row["prompt"] for row in mixed] == [*TEXTS, "See a file.txt"]


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


def test_vllm_is_asked_for_the_same_tokens(llama, steered, monkeypatch):
    """With a stand-in that writes down what it is asked."""
    asked = {}

    class LLM:
        def __init__(self, **settings):
            asked.setdefault("models", []).append(settings["model"])

        def generate(self, rows, settings, use_tqdm):
            asked["rows"], asked["settings"] = rows, settings
            ids = [llama.tokenizer(" high")["input_ids"] + [1]] * len(rows)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=one)]) for one in ids]

    stand_in = SimpleNamespace(LLM=LLM, SamplingParams=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    few = ["--prompts", *TEXTS, "--new-tokens", 6, "--engine", "vllm", "--json"]
    found = texts_of(run(llama.name, "--against", steered, "--compare", *few))
    assert found == [{"prompt": prompt, "unedited": " high", "edited": " high"} for prompt in TEXTS]
    assert asked["models"] == [str(llama.checkpoint), str(steered)]
    tokens = [[0, *models.tiny_tokenizer()(text)["input_ids"]] for text in TEXTS]
    assert asked["rows"] == [{"prompt_token_ids": ids} for ids in tokens]
    assert asked["settings"] == {"temperature": 0.0, "max_tokens": 6, "seed": 0, "stop_token_ids": [1]}
    assert generate_by_vllm(llama.name, llama.tokenizer, []) == []
