"""Classifiers: keywords against a plain loop, a model against its logits, a function, and what is refused."""

import json
import random
import re

import models
import pytest
import torch
from transformers import LlamaForSequenceClassification

from editing.evaluation.answer_language import answer_language
from editing.evaluation.classifier import LANGUAGE_IDENTIFICATION, load_classifier
from editing.evaluation.language_id import identify_language
from neurons.errors import UsageError

WORDS = {
    "python": {"keywords": ["def", "self", "=>"], "patterns": [r"^ *import \w+"]},
    "javascript": {"keywords": ["function", "const", "=>"]},
    "formal": {"patterns": ["(?i)dear (sir|madam)", "x+"]},
}
TOML = """
[python]
keywords = ["def", "self", "=>"]
patterns = ['^ *import \\w+']
[javascript]
keywords = ["function", "const", "=>"]
[formal]
patterns = ["(?i)dear (sir|madam)", "x+"]
"""


@pytest.fixture
def keywords(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps(WORDS))
    return path


def occurrences(keyword, text):
    """Places of a keyword that no letter continues, counted from the left without overlap."""
    count = at = 0
    word = re.compile(r"\w")
    while at <= len(text) - len(keyword):
        end = at + len(keyword)
        joined = (at > 0 and word.match(text[at - 1]) and word.match(text[at])) or (
            end < len(text) and word.match(text[end]) and word.match(text[end - 1])
        )
        if text[at:end].lower() == keyword.lower() and not joined:
            count += 1
            at = end
        else:
            at += 1
    return count


def naive(text):
    counts = {}
    for label, words in WORDS.items():
        counts[label] = sum(occurrences(keyword, text) for keyword in words.get("keywords", ()))
        for pattern in words.get("patterns", ()):
            counts[label] += len(list(re.finditer(pattern, text, re.MULTILINE)))
    best = max(counts.values())
    return [*counts][[*counts.values()].index(best)] if list(counts.values()).count(best) == 1 else "other"


def test_keywords_equal_a_plain_loop(keywords, tmp_path):
    chooser = random.Random(0)
    parts = ["def", "DEF", "self.x", "undefined", "import os", "\n", " ", "=>", "a=>b", "const", "function(", "xx",
             "Dear Sir", "constant", "\nimport re", "(self)", ".", "Dear madam"]  # fmt: skip
    texts = ["".join(chooser.choices(parts, k=chooser.randrange(1, 9))) for _ in range(400)]
    texts = [text for text in texts if text.strip()]
    classifier = load_classifier(keywords)
    expected = [naive(text) for text in texts]
    assert set(expected) == {*WORDS, "other"}
    assert classifier.classify(texts, tuple(WORDS)) == expected
    other = tmp_path / "words.toml"
    other.write_text(TOML)
    again = load_classifier(str(other))
    assert again.classify(texts, tuple(WORDS)) == expected
    assert classifier.name == str(keywords) and len({classifier.digest, again.digest}) == 2


def test_a_label_that_is_not_in_question_is_other_and_a_blank_text_empty(keywords):
    classifier = load_classifier(keywords)
    assert classifier.classify(["def", " \n", "const"], ["python"]) == ["python", "empty", "other"]
    assert classifier.sentence_share("the def of it all.\nthe const of it all.", "python", ["python"]) == 0.5


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"formal": {"keywords": []}}, "'formal' has no keywords"),
        ({"formal": {}}, "'formal' has no keywords"),
        ({"formal": {"keywords": ["a", ""]}}, "'formal' has an empty keyword"),
        ({"formal": {"patterns": ["("]}}, r"'\('"),
        ({"formal": {"words": ["a"]}}, "formal.words"),
        ({"formal": ["a"]}, "formal"),
        ([], "the file"),
        ({}, "no label"),
    ],
)
def test_refuses_a_file_by_its_label(tmp_path, content, fault):
    path = tmp_path / "words.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=fault):
        load_classifier(path)


def test_refuses_what_is_no_file(tmp_path):
    for name in ("none.toml", "none.json"):
        with pytest.raises(UsageError, match=name):
            load_classifier(tmp_path / name)
    (tmp_path / "bad.toml").write_text("[")
    with pytest.raises(UsageError, match="not TOML"):
        load_classifier(tmp_path / "bad.toml")


def test_a_function():
    def shout(texts):
        return ["loud" if text.isupper() else "quiet" for text in texts]

    classifier = load_classifier(shout, labels=["loud", "quiet"])
    assert classifier.classify(["A", "", "b"], ["loud"]) == ["loud", "empty", "other"]
    assert classifier.name.endswith("shout") and len(classifier.digest) == 64
    assert load_classifier(classifier) is classifier
    with pytest.raises(UsageError, match=r"rude, only loud, quiet"):
        classifier.require(["loud", "rude"])
    load_classifier(shout).require(["anything"])
    with pytest.raises(UsageError, match="2 strings for 2 texts"):
        load_classifier(lambda texts: ["loud"]).classify(["a", "b"], ["loud"])


def test_without_one_it_is_language_identification():
    texts = ["The children were playing in the garden.", "Les enfants jouaient dans le jardin.", "12"]
    languages = ("en", "fr")
    classifier = load_classifier()
    assert classifier is LANGUAGE_IDENTIFICATION
    assert classifier.classify(texts, languages) == [identify_language(text, languages) for text in texts]
    classifier.require(("en", "fr", "zh", "ko", "yue"))
    with pytest.raises(UsageError, match=r"ceb, xx.*--classifier"):
        classifier.require(("en", "ceb", "xx"))


def test_answers_are_read_with_their_code(keywords):
    answers = ["```python\ndef f(self):\n```", "const a = 1"]
    figures = answer_language(answers, "python", ("python",), "en", load_classifier(keywords))
    assert (figures.whole, figures.begins) == (0.5, None)


# --- models --------------------------------------------------------------------------------------


def classifying(directory, **changes):
    torch.manual_seed(0)
    config = models.tiny_model("llama", tied=False).config
    config.id2label = {0: "formal", 1: "slang", 2: "pirate"}
    config.label2id = {label: i for i, label in config.id2label.items()}
    config.pad_token_id = 0
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(directory)
    models.tiny_tokenizer().save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return model


def test_a_model_gives_the_label_of_its_largest_logit(tmp_path):
    model = classifying(tmp_path)
    tokenizer = models.tiny_tokenizer()
    texts = [text for language in models.LANGUAGES for text in models.sentences(language, 8)]
    expected = []
    for text in texts:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        expected.append(model.config.id2label[int(logits.argmax())])
    classifier = load_classifier(str(tmp_path), device="cpu")
    assert len(set(expected)) > 1
    assert classifier.classify(texts, ("formal", "slang", "pirate")) == expected
    assert classifier.labels == {"formal", "slang", "pirate"} and len(classifier.digest) == 64
    # Longer than the context of 128 tokens.
    assert classifier.classify([" ".join(texts)], ("formal", "slang", "pirate"))[0] != "other"


def test_refuses_a_model_without_labels_and_one_of_text(tmp_path, checkpoint_of):
    classifying(tmp_path, id2label={"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"})
    with pytest.raises(UsageError, match="names no labels"):
        load_classifier(str(tmp_path))
    with pytest.raises(UsageError, match="LlamaForCausalLM"):
        load_classifier(str(checkpoint_of()))
    with pytest.raises(UsageError, match="no-such"):
        load_classifier("./no-such")
