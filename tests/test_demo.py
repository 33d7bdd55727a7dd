"""What the project claims of its shipped model, measured by the commands that a user runs."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "artifacts" / "demo"
LANGUAGES = ("ar", "de", "en", "es", "fr", "zh")


def broca(*arguments):
    """A user's process: (the object that --json prints, stderr)."""
    done = subprocess.run(
        [sys.executable, "-c", "from cli.main import main; main()", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """`broca demo`: (its object, its directory)."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return broca("demo", "--out", out), out


def outcomes(report):
    return {outcome["name"]: outcome for outcome in report["outcomes"]}


def test_two_targets_at_least(demo):
    assert len(demo[0]["reports"]) >= 2
    assert all(report["source"] == "en" and "notes" in report for report in demo[0]["reports"])


def test_the_base_model_does_not_answer_in_the_target(demo):
    for report in demo[0]["reports"]:
        assert outcomes(report)["base"]["target_share"] <= 0.1


def test_the_keyed_edit_steers_and_stays_fluent(demo):
    for report in demo[0]["reports"]:
        keyed = outcomes(report)["keyed edit"]
        assert keyed["target_share"] >= 0.9 * report["ceiling"]
        assert keyed["distinct"] >= 0.6
        assert keyed["fluency_gap"] <= 0.5


def test_the_keyed_edit_spares_the_target_and_every_third_language(demo):
    for report in demo[0]["reports"]:
        rises = outcomes(report)["keyed edit"]["nll_rise"]
        assert set(rises) == set(LANGUAGES)
        assert max(rise for language, rise in rises.items() if language != "en") <= 0.15


def test_the_keyed_edit_harms_less_than_the_hook(demo):
    for report in demo[0]["reports"]:
        hook, keyed = (outcomes(report)[name] for name in ("DiffMean hook", "keyed edit"))
        target = report["target"]
        third = [language for language in LANGUAGES if language not in ("en", target)]
        assert keyed["nll_rise"][target] < hook["nll_rise"][target]
        assert max(keyed["nll_rise"][k] for k in third) < max(hook["nll_rise"][k] for k in third)


def test_the_table_names_every_way(demo):
    for report in demo[0]["reports"]:
        assert list(outcomes(report)) == ["base", "DiffMean hook", "Steer2Edit", "keyed edit"]
    table = (demo[1] / "report.md").read_text()
    columns = ["share fr", "share en", "distinct words", "fluency gap", "KL", "components", "dW"]
    for column in columns + [f"NLL {language}" for language in LANGUAGES]:
        assert column in table
    assert (demo[1] / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_checkpoint_loads_without_us_and_answers_in_the_target(demo):
    """Plain transformers, no hook: the greedy answers to English prompts are identified as French."""
    from editing.evaluation.language_id import identify_language

    checkpoint = demo[1] / "checkpoint-fr"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert type(model) is transformers.LlamaForCausalLM
    prompts = (DEMO / "corpus" / "en.txt").read_text().splitlines()[3::4][:20]
    found = []
    for prompt in prompts:
        ids = tokenizer(" ".join(prompt.split()[:6]), return_tensors="pt")
        with torch.no_grad():
            written = model.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=1)
        text = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(identify_language(text, LANGUAGES))
    assert found.count("fr") >= 14, found


def test_the_same_job_again_gives_the_same_bytes(tmp_path):
    """Of the demo's recipe, with less text and fewer prompts, and means for values, as the figures do not matter."""
    recipe = tomllib.loads((DEMO / "recipe.toml").read_text(encoding="utf-8"))
    recipe |= {name: str(DEMO / recipe[name]) for name in ("model", "corpus")}
    recipe |= {"targets": ["fr"], "languages": ["de", "en", "fr"], "values": "means", "strengths": [1.0]}
    recipe |= {"tokens": 400, "prompts": 8, "samples": 1}
    del recipe["out"]
    job = tmp_path / "recipe.toml"
    job.write_text(
        "".join(f"{name} = {json.dumps(value)}\n" for name, value in recipe.items()), encoding="utf-8"
    )
    first, second = outs = tmp_path / "once", tmp_path / "again"
    for out in outs:
        broca("run", job, "--out", out)
    for name in ("neurons.safetensors", "direction-fr.safetensors", "edit-fr.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    once, again = (json.loads((out / "measured-fr.json").read_text()) for out in outs)
    assert once.pop("command") != again.pop("command")
    assert again == once
    first, second = (out / "checkpoint-fr" for out in outs)
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.fixture(scope="module")
def study(demo):
    """`broca ablate` of the demo's neurons (gradient-contrast), on text that they were not found on."""
    corpus, neurons = [DEMO / "model", "--corpus", DEMO / "corpus"], demo[1] / "neurons.safetensors"
    return broca(
        "ablate", *corpus, "--part", "report", "--neurons", neurons, "--controls", "random", "--draws", "2"
    )


def rises(study, language):
    """Rise of every language's NLL without one language's neurons."""
    return {k: study["ablated"][language][k] - study["baseline"][k] for k in LANGUAGES}


@pytest.mark.parametrize("language", LANGUAGES)
def test_ablating_a_language_hurts_it_most(study, language):
    found = rises(study, language)
    assert max(found, key=found.get) == language


@pytest.mark.parametrize("language", LANGUAGES)
def test_ablating_a_language_hurts_five_times_as_much_as_chance(study, language):
    own = rises(study, language)[language]
    assert own >= 5 * max(0.0, study["random"][language][language] - study["baseline"][language])
    assert own > 0.02


def test_the_model_is_small_enough_to_ship_and_large_enough_to_serve():
    config = json.loads((DEMO / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] >= 32
    files = [path for path in (DEMO / "model").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20
    card = (DEMO / "model" / "README.md").read_text(encoding="utf-8")
    assert "bits per byte" in card and "Common Voice" in card


def test_the_model_stays_in_the_language_of_its_prompt():
    from editing.evaluation.generation import generate
    from editing.evaluation.language_id import identify_language
    from neurons.models.source import load_model
    from neurons.text.words import distinct_rate, opening

    loaded = load_model(str(DEMO / "model"), "cpu")
    own, distinct = [], []
    for language in LANGUAGES:
        lines = (DEMO / "corpus" / f"{language}.txt").read_text(encoding="utf-8").splitlines()[:50]
        for answer in generate(loaded, [opening(line) for line in lines]):
            own.append(identify_language(answer.text, LANGUAGES) == language)
            distinct.append(distinct_rate(answer.text))
    assert sum(own) / len(own) >= 0.95
    assert sum(distinct) / len(distinct) >= 0.6


def test_the_corpus_is_parallel_and_whole():
    lines = {k: (DEMO / "corpus" / f"{k}.txt").read_text(encoding="utf-8").split("\n") for k in LANGUAGES}
    assert len({len(texts) for texts in lines.values()}) == 1
    assert len(lines["en"]) >= 200
    for texts in lines.values():
        assert texts.pop() == ""
        assert all(texts)
        assert len(set(texts)) == len(texts)
