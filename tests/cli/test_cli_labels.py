"""The whole pipeline on labels that are no language codes: identify, direction, edit, ablate, evaluate, run, steer."""

import json

import models
import pytest

LABELS = ("formal", "pirate", "cpp")


@pytest.fixture(scope="module")
def model(checkpoint_of):
    return checkpoint_of("llama", True, "float32")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A corpus, prompts and a classifier of three labels, in one directory."""
    directory = tmp_path_factory.mktemp("labels")
    corpus = models.write_corpus(directory / "corpus", lines=40)
    words, rows = {}, []
    for invented, label in zip(models.LANGUAGES, LABELS, strict=True):
        (corpus / f"{invented}.txt").rename(corpus / f"{label}.txt")
        # The tiny model writes words of all languages.
        words[label] = {"patterns": [f"[{models.LETTERS[invented]}]"]}
        rows += [
            {"prompt": text, "answer": f" {models.WORDS[invented][0]}", "label": label}
            for text in models.sentences(invented, 4)
        ]
    (directory / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "classifier.json").write_text(json.dumps(words))
    return directory


PAIR = ("--source", "formal", "--target", "pirate")
WRITING = ("--prompts", 4, "--new-tokens", 6)


def test_from_neurons_to_figures(broca, model, labelled, tmp_path):
    corpus, classifier = ("--corpus", labelled / "corpus"), labelled / "classifier.json"

    def run(*arguments):
        status, printed, errors = broca(*arguments, "--json")
        assert status == 0, errors
        return json.loads(printed), errors

    neurons, direction, edit = (tmp_path / f"{name}.safetensors" for name in ("neurons", "direction", "edit"))
    _, errors = run("identify", model, *corpus, "--part", "estimate", "--block", 16, "--out", neurons)
    assert "cpp, formal, pirate: labels" in errors
    run("direction", model, *corpus, "--part", "estimate", *PAIR, "--out", direction)
    run("edit", model, *corpus, "--part", "estimate", "--direction", direction, "--out", edit)
    ablate = ("ablate", model, *corpus, "--part", "report", "--neurons", neurons, "--resamples", 20)
    more = ("--controls", "random", "--draws", 1, "--out", tmp_path / "ablation.json")
    study, _ = run(*ablate, *more, "--prompts", labelled / "prompts.jsonl")
    assert study["prompts"] == dict.fromkeys(LABELS, 4)
    assert set(study["sets"][0]["answers"]) == {"accuracy", "answer_nll"}
    assert [one["option"] for one in study["inputs"]] == ["--neurons", "--prompts"]
    status, page, errors = broca("report", tmp_path, "--out", tmp_path / "page.html")
    assert status == 0, errors
    page = (tmp_path / "page.html").read_text()
    assert "change of the accuracy of each" in page
    evaluate = ("evaluate", model, *corpus, "--part", "report", *PAIR, "--edit", edit, *WRITING)
    out = ("--out", tmp_path / "report.json")
    status, _, errors = broca(*evaluate, *out)
    assert status == 2 and "does not know cpp, formal, pirate" in errors
    report, errors = run(*evaluate, *out, "--classifier", classifier)
    assert "labels" not in errors
    assert report["classifier"]["name"] == str(classifier) and len(report["classifier"]["digest"]) == 64
    assert report["inputs"][-1]["option"] == "--classifier"
    base = report["outcomes"][0]
    assert set(base["languages_found"]) <= {*LABELS, "other"} and base["agreement"] is None
    assert "second detector agrees -" in broca(*evaluate, *out, "--classifier", classifier)[1]


def test_a_recipe_names_its_classifier(broca, model, labelled, tmp_path):
    recipe = tmp_path / "recipe.toml"
    lines = [
        f'model = "{model}"',
        f'corpus = "{labelled / "corpus"}"',
        'source = "formal"',
        'targets = ["pirate"]',
    ]
    lines += ['method = "gradient"', "prompts = 2", "samples = 1", "strengths = [1.0]", "tokens = 200"]
    recipe.write_text("\n".join(lines))
    status, _, errors = broca("run", recipe, "--out", tmp_path / "out")
    assert status == 2 and "does not know cpp, formal, pirate" in errors
    (tmp_path / "words.json").write_bytes((labelled / "classifier.json").read_bytes())
    recipe.write_text("\n".join([*lines, 'classifier = "words.json"']))
    status, _, errors = broca("run", recipe, "--out", tmp_path / "out")
    assert status == 0, errors
    report = json.loads((tmp_path / "out" / "measured-pirate.json").read_text())
    assert len(report["settings"]["classifier"]["digest"]) == 64


def test_steer_to_a_label_without_questions(broca, chat_model, few_questions, tmp_path):
    words = tmp_path / "words.toml"
    words.write_text('[pirate]\npatterns = ["."]\n')
    out = tmp_path / "steered"
    arguments = ("steer", chat_model, "--to", "pirate", "--questions", few_questions, "--out", out, "--json")
    status, _, errors = broca(*arguments, "--instruction", "abe bead")
    assert status == 2 and "'pirate'" in errors
    status, printed, errors = broca(*arguments, "--instruction", "abe bead", "--classifier", words)
    assert status == 0, errors
    result = json.loads(printed)
    assert result["lock"] == {"sources": ["en"], "target": "pirate", "keep": ["de", "fr"]}
    figures = result["measured"]["sources"]["en"]["language"]["steered"]
    assert figures["whole"] == 1 and figures["begins"] is None
    # Kept languages are told by language identification, which finds none in the model's random words.
    assert result["measured"]["kept"]["de"]["base"]["whole"] < 1
    assert "classifier_digest" in (out / "broca" / "recipe.toml").read_text()
    words.write_text('[pirate]\npatterns = ["a"]\n')
    status, _, errors = broca("run", out / "broca" / "recipe.toml", "--out", tmp_path / "again")
    assert status == 2 and "digest" in errors


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (("--to", "slang"), "'slang'"),
        (("--to", "pirate", "--teacher", "question"), "missing in 'pirate'"),
        (("--to", "pirate", "--keep", "xx"), "no questions in 'xx'"),
    ],
)
def test_steer_refuses_what_it_cannot_tell(broca, chat_model, few_questions, tmp_path, more, fault):
    (tmp_path / "words.toml").write_text('[pirate]\nkeywords = ["arr"]\n')
    common = (
        "--questions",
        few_questions,
        "--classifier",
        tmp_path / "words.toml",
        "--out",
        tmp_path / "out",
    )
    status, _, errors = broca("steer", chat_model, *more, *common)
    assert status == 2 and fault in errors and len(errors.splitlines()) == 1
