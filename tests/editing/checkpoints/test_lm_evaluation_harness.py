"""lm-evaluation-harness' own `hf` model, on a task file of ours, gives an export the figures that its edit means.

Its command runs in a process of its own, as a user types it: it knows a checkpoint directory and nothing of
Broca. What it should find is computed from the unedited weights with the edit done to them by hand.
"""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import models
import pytest
import torch
import transformers
import yaml

from editing.checkpoints.export import export
from editing.methods.scale import scale_plan
from neurons.models.source import open_model
from neurons.neuron_sets.neuron_set import neuron_set

FACTOR = -2.0
NEURONS = [(0, 3), (0, 40), (1, 11), (2, 7), (2, 30)]
TEXTS = ["beef cab add", "milk jim hill gill kill", "stop trust sport", "a cafe, then quot"]
CHOICES = [
    ("bead face", ["deaf", "milk jig", "stop"]),
    ("high hill", ["ikki", "opus runt", "ebb dab"]),
    ("turns un", ["pours", "him", "decaf feed"]),
    ("fade bed", ["nut root", "lim", "add"]),
    ("glim", ["cab", "tosu", "mig milk"]),
]
ANSWER = 0
LIKELIHOOD, CHOICE = "broca_likelihood", "broca_choice"


def write_tasks(directory):
    """One task of texts to read and one of multiple choice, their data beside them."""
    rows = {
        LIKELIHOOD: [{"text": text} for text in TEXTS],
        CHOICE: [{"question": q, "choices": c, "answer": ANSWER} for q, c in CHOICES],
    }
    asks = {
        LIKELIHOOD: {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}, {"metric": "word_perplexity"}],
        },
        CHOICE: {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    }
    for name, ask in asks.items():
        data = directory / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows[name])), encoding="utf-8")
        task = {"task": name, "dataset_path": "json", "test_split": "test", **ask}
        task["dataset_kwargs"] = {"data_files": {"test": str(data)}}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def measured(tasks, home, checkpoint):
    """(figures by task, log-likelihoods by task and item) that the harness writes down."""
    out = home / checkpoint.name
    out.mkdir()
    command = [Path(sys.executable).parent / "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={checkpoint},dtype=float32", "--batch_size", "2"]
    command += ["--tasks", f"{LIKELIHOOD},{CHOICE}", "--include_path", tasks]
    command += ["--output_path", out, "--log_samples"]
    environment = {**os.environ, "HF_HOME": str(out / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    figures = {
        task: {name.removesuffix(",none"): value for name, value in row.items()}
        for task, row in json.loads(results.read_text(encoding="utf-8"))["results"].items()
    }
    found = {}
    for task in (LIKELIHOOD, CHOICE):
        (samples,) = out.rglob(f"samples_{task}_*.jsonl")
        items = sorted(map(json.loads, samples.read_text(encoding="utf-8").splitlines()), key=by_number)
        found[task] = [item["filtered_resps"] for item in items]
    return figures, found


def by_number(item):
    return item["doc_id"]


def by_hand(model):
    """The same from a float64 forward pass written out, token by token."""
    tokenizer = models.tiny_tokenizer(adds_start=False)

    def log_likelihood(before, text):
        """Of the tokens after the first ``before``: the text's own tokenizer adds none of its own."""
        ids = tokenizer(text)["input_ids"] if isinstance(text, str) else text
        logp = models.naive_llama(model, ids)[0].detach().log_softmax(-1)
        return sum(float(logp[i - 1, ids[i]]) for i in range(before, len(ids)))

    read = [log_likelihood(1, [0, *tokenizer(text)["input_ids"]]) for text in TEXTS]
    chosen = [
        [log_likelihood(len(tokenizer(question)["input_ids"]), f"{question} {choice}") for choice in choices]
        for question, choices in CHOICES
    ]

    def accuracy(of):
        hits = [
            max(range(len(row)), key=[of(v, c) for v, c in zip(row, choices, strict=True)].__getitem__)
            == ANSWER
            for row, (_, choices) in zip(chosen, CHOICES, strict=True)
        ]
        return sum(hits) / len(hits)

    figures = {
        LIKELIHOOD: {
            "byte_perplexity": math.exp(-sum(read) / sum(len(text.encode()) for text in TEXTS)),
            "word_perplexity": math.exp(-sum(read) / sum(len(text.split()) for text in TEXTS)),
        },
        CHOICE: {
            "acc": accuracy(lambda value, choice: value),
            "acc_norm": accuracy(lambda value, choice: value / len(choice)),
        },
    }
    return figures, read, chosen


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """The unedited checkpoint, and its export with some neurons of every layer times FACTOR."""
    directory = tmp_path_factory.mktemp("harness")
    base = models.build_checkpoint(directory / "base")
    # One that adds a start token would be read with the harness' own beside it.
    models.tiny_tokenizer(adds_start=False).save_pretrained(base)
    source = open_model(str(base))
    rows = {"qaa": torch.tensor(NEURONS)}
    chosen = neuron_set(rows, {"qaa": torch.zeros(len(NEURONS))}, 3, 48, {"method": "lape"})
    out = directory / "steered"
    export(source, scale_plan(source, chosen, ["qaa"], FACTOR), out)
    return base, out


def test_an_export_is_measured_as_what_it_is(edited, tmp_path):
    base, steered = edited
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_tasks(tasks)
    unedited = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = {base: by_hand(unedited)}
    with torch.no_grad():
        for layer, neuron in NEURONS:
            unedited.model.layers[layer].mlp.down_proj.weight[:, neuron] *= FACTOR
    expected[steered] = by_hand(unedited)
    # Both at once: most of what takes time is the harness reading its own few thousand task files.
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(partial(measured, tasks, tmp_path), expected))
    for (given, answers), (figures, read, chosen) in zip(found, expected.values(), strict=True):
        for task, row in figures.items():
            assert {name: given[task][name] for name in row} == pytest.approx(row, rel=1e-4)
        assert [float(value) for (value,) in answers[LIKELIHOOD]] == pytest.approx(read, rel=1e-4)
        for row, choice in zip(answers[CHOICE], chosen, strict=True):
            assert [float(value) for value, _ in row] == pytest.approx(choice, rel=1e-4)
    # Else the harness could have read the wrong checkpoint and nobody would know.
    (plain, *_), (other, *_) = expected.values()
    assert abs(other[LIKELIHOOD]["byte_perplexity"] / plain[LIKELIHOOD]["byte_perplexity"] - 1) > 0.01
    assert other[CHOICE] != plain[CHOICE]
