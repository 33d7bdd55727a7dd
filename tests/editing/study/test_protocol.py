"""All methods on a tiny model: made, chosen on one part of the text, reported on another."""

import json
from dataclasses import replace

import pytest
import torch
from test_evaluation import LINES

from editing.evaluation.evaluation import Evaluation
from editing.evaluation.outcome import Refused
from editing.methods.material import Material
from editing.methods.method import Method
from editing.report.run_report import methods_markdown
from editing.report.tables import details_of, methods_table, outcomes_table
from editing.study import protocol, registry
from editing.study.candidates import Candidate, candidates_of
from editing.study.comparison import choose
from editing.study.protocol import compare_methods
from editing.study.registry import compared_named
from editing.study.results import report_of
from neurons.errors import BrocaError, UsageError
from neurons.files.artifact import json_bytes
from neurons.files.json_file import document
from neurons.text.corpus import Corpus

ALL = registry.compared()
NEEDED = {
    "prompt-source", "prompt-target", "diffmean", "arithmetic-additive", "arithmetic-replacement",
    "arithmetic-difference", "clas", "austeer", "subspace-removal", "keyed", "keyed-learned", "steer2edit", "steer2edit-lape",
    "steer2edit-gradient", "ablate", "selective-steering", "ara", "bake", "scale",
}  # fmt: skip


def logits(loaded):
    with torch.no_grad():
        return loaded.model(torch.tensor([[0, 5, 80, 33, 7]])).logits


@pytest.mark.parametrize("name", ALL)
def test_every_method_steers_and_leaves_no_trace(llama, material, name):
    base = logits(llama)
    candidates, refused = candidates_of(ALL[name], material)
    if name == "steer2edit-lape" and not candidates:
        assert all("lape finds no neuron" in one.refused or "importance" in one.refused for one in refused)
        return
    assert candidates, refused
    assert len({json.dumps(candidate.settings) for candidate in candidates}) == len(candidates)
    for candidate in candidates:
        assert candidate.title == ALL[name].title
        assert (candidate.plan is not None) == ALL[name].permanent
        with candidate.steering():
            changed = not torch.equal(logits(llama), base)
        assert changed != name.startswith("prompt")
        assert torch.equal(logits(llama), base)
        if candidate.plan is not None:
            assert candidate.plan.metadata["fingerprint"] == llama.fingerprint


def test_all_that_is_to_be_compared_is_there():
    assert set(ALL) == NEEDED
    assert len({method.title for method in ALL.values()}) == len(ALL)


def test_prompts_say_it_in_both_languages(material):
    (source,), (target,) = (candidates_of(ALL[f"prompt-{end}"], material)[0] for end in ("source", "target"))
    assert source.instruction == "Respond in French."
    assert target.instruction == "Réponds en français."


def test_keyed_over_heads_too_is_a_candidate(material):
    settings = [candidate.settings for candidate in candidates_of(ALL["keyed"], material)[0]]
    assert {"strength": 2.5, "blocks": ["attn", "mlp"]} in settings
    assert {"strength": 3.5, "blocks": ["mlp"]} in settings


def test_compared_named():
    assert list(compared_named(["all"])) == list(ALL)
    assert list(compared_named(["keyed", "diffmean"])) == ["diffmean", "keyed"]
    with pytest.raises(UsageError, match="'keyd'"):
        compared_named(["keyd"])


class NEVER(Method):
    title = "never"
    permanent = False

    def prepare(self, material):
        raise BrocaError("not in this model")


@pytest.fixture(scope="module")
def compared(llama, material, parts):
    choosing, reporting = (
        Evaluation(llama, parts[part], "en", "fr", max_prompts=3, new_tokens=8)
        for part in ("choose", "report")
    )
    methods = {**compared_named(["prompt-target", "diffmean", "keyed"]), "never": NEVER}
    titles = []
    *partial_reports, report = compare_methods(methods, material, choosing, reporting, titles.append)
    assert [len(partial.outcomes) for partial in partial_reports] == [2, 3, 4]
    assert titles == [method.title for method in methods.values()]
    return report, choosing, reporting


def test_settings_are_chosen_on_one_part_and_reported_on_another(compared, material):
    report, choosing, reporting = compared
    names = [outcome.name for outcome in report.outcomes]
    assert names == ["base", "prompt, target language", "DiffMean hook", "keyed edit"]
    for name in ("DiffMean hook", "keyed edit"):
        (outcome,) = (outcome for outcome in report.outcomes if outcome.name == name)
        method = next(method for method in ALL.values() if method.title == name)
        measured = [
            (candidate, choosing.measure(candidate.title, candidate.steering, candidate.details()))
            for candidate in candidates_of(method, material)[0]
        ]
        best, _ = choose(measured, choosing.ceiling, "en")
        assert outcome.details["settings"] == best.settings
        again = reporting.measure(name, best.steering, kl=True, others=True)
        for field in ("nll", "kl", "target_share", "others", "samples"):
            assert getattr(again, field) == getattr(outcome, field), field
    tried = [outcome for outcome in report.tried if outcome.name == "DiffMean hook"]
    assert len(tried) == 4  # two layers of three, twice
    assert report.notes == ("never: not tried: not in this model",)
    assert Refused("never", {}, "not in this model") in report.tried


def test_the_estimate_is_not_measured_on(compared, material, parts, monkeypatch):
    """A method that needs no text has the same outcome with another text to estimate from."""
    report, choosing, reporting = compared
    other = Material(material.loaded, Corpus(LINES, "other", "estimate"), "en", "fr")
    (again,) = compare_methods(compared_named(["prompt-target"]), other, choosing, reporting)
    assert again.outcomes == report.outcomes[:2]
    with pytest.raises(BrocaError, match="never"):
        list(compare_methods({"never": NEVER}, other, choosing, reporting))
    assert protocol.choose is choose


def test_an_instruction_is_used_to_choose_too(llama, parts):
    instructions = []

    class Noting(Evaluation):
        def measure(self, *given, instruction=None, **options):
            instructions.append(instruction)
            return super().measure(*given, instruction=instruction, **options)

    both = [
        Noting(llama, parts[part], "en", "fr", max_prompts=1, new_tokens=2) for part in ("choose", "report")
    ]
    instructions.clear()
    list(
        compare_methods(
            compared_named(["prompt-source"]), Material(llama, parts["estimate"], "en", "fr"), *both
        )
    )
    assert instructions == [None, "Respond in French.", "Respond in French."]


def test_the_table_survives_the_file(compared):
    compared_methods, _, reporting = compared
    noted = replace(compared_methods, notes=("A note.",), about={"model": "tiny"})
    report = report_of(json.loads(json_bytes(document(noted))), "methods.json")
    assert (report.ceiling, report.continuations) == (reporting.ceiling, reporting.continuations)
    head, rows = methods_table(report)
    assert [len(row) for row in rows] == [len(head)] * 4
    keyed = next(outcome for outcome in compared_methods.outcomes if outcome.name == "keyed edit")
    assert rows[-1][0] == "keyed edit"
    assert rows[-1][head.index("KL, largest")] == f"{max(keyed.kl.values()):.3f}"
    assert rows[-1][head.index("NLL third, largest")] == f"{keyed.nll_rise['de']:+.3f}"
    small = replace(keyed, details={"relative_change": 0.004})
    for table in (methods_table, outcomes_table):
        head, (row,) = table(replace(report, outcomes=(small,)))
        assert row[head.index("||dW||/||W||")] == "0.004"
    text = methods_markdown(report)
    assert text.count("\n| ") == 5 and "A note." in text and "| keyed edit |" in text
    lines = "\n".join(details_of(report, keyed))
    assert "on de prompts" in lines and "entanglement" in lines


def test_a_candidate_without_an_instruction_has_none():
    assert Candidate("hook", {}, None, lambda: None).instruction is None
