"""A study's directory, written by the same functions that the commands write with, and a reader of pages."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import torch

from editing.evaluation.outcome import Outcome, Refused, Sample
from editing.plans.plan import ModuleEdit, make_plan
from editing.study.results import Choice, Report
from editing.study.search_result import Reported, SearchResult, search_document
from editing.study.trial import Goals, Trial
from neurons.ablation.matrix import Changes, Specificity
from neurons.ablation.study import Dose, SetOutcome, Settings, Study
from neurons.ablation.study_file import study_document
from neurons.files.artifact import json_bytes
from neurons.files.json_file import document
from neurons.neuron_sets.neuron_set import neuron_set

LANGUAGES = ("ar", "en", "zh")
HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & <!-- ${7*7} "
ARABIC, CHINESE = "كان الرجل في البيت مع أولاده", "孩子们不想睡觉"
VOID = {"meta", "link", "br", "wbr", "col", "img"}


class Page(HTMLParser):
    """Elements of a page with their attributes and text, and what is not closed as it was opened."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.faults, self.elements, self.comments = [], [], [], []
        self.feed(text)
        self.close()
        self.faults += [f"{name} is left open" for name, _ in self.open]

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if len(attributes) < len(attrs):
            self.faults.append(f"{tag} has an attribute twice")
        one = {"tag": tag, "attributes": attributes, "text": "", "within": [name for name, _ in self.open]}
        self.elements.append(one)
        if tag not in VOID:
            self.open.append((tag, one))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open[-1][0] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1][0] if self.open else 'nothing'}")
            return
        self.open.pop()

    def handle_data(self, data):
        for _, one in self.open:
            one["text"] += data

    def handle_comment(self, data):
        self.comments.append(data)

    def all(self, tag, **attributes):
        return [
            one
            for one in self.elements
            if one["tag"] == tag and all(one["attributes"].get(k) == v for k, v in attributes.items())
        ]

    def table(self, caption):
        """The rows of the first table whose caption has these words: lists of cell texts."""
        at = next(
            i for i, one in enumerate(self.elements) if one["tag"] == "figcaption" and caption in one["text"]
        )
        found = []
        for one in self.elements[at + 1 :]:
            if one["tag"] == "figcaption":
                break
            if one["tag"] == "tr":
                found.append([])
            elif one["tag"] in ("td", "th"):
                found[-1].append(one)
        return found

    def texts(self, caption):
        return [[cell["text"] for cell in row] for row in self.table(caption)]


def outcome(name, share, target="ar", text=ARABIC, **changes):
    fields = {
        "name": name,
        "target_share": share,
        "source_share": 1 - share,
        "distinct": 0.9,
        "fluency_gap": 0.25,
        "nll": {"ar": 3.0, "en": 2.0, "zh": 4.0},
        "nll_rise": {"ar": 0.012, "en": 1.5, "zh": -0.034},
        "kl": {"zh": 0.021},
        "languages_found": {target: 3},
        "samples": (Sample("The children did not", text, target),),
        "details": {"settings": {"strength": 3.5}, "components": 12, "relative_change": 0.004},
        "agreement": 1.0,
        **dict.fromkeys(("sentence_share", "distinct_pairs", "longest_repeat", "answer_words"), 0.0),
    }
    return Outcome(**{**fields, **changes})


# way -> (dose, share, NLL rise of zh) of each of its doses; the keyed edit is cheapest below a share of 0.9.
DOSES = {
    "keyed edit": ((0.25, 0.1, 0.002), (0.5, 0.6, 0.03), (1.0, 0.9, 0.01)),
    "hook": ((0.25, 0.0, 0.001), (0.5, 0.3, 0.1), (1.0, 0.95, 0.4)),
    "baked $x$": ((0.25, 0.05, -0.02), (0.5, 0.6, 0.01), (1.0, 0.9, 0.2)),
    "a prompt": ((1.0, 0.7, 0.005),),
}
LASTING = ("keyed edit", "baked $x$")


def dose_curves(doses=DOSES, lasting=LASTING):
    """Way -> its outcomes; the own and the target's text become much less likely, which is no harm."""
    return {
        way: tuple(
            outcome(
                way,
                share,
                nll_rise={"ar": 7.0, "en": 9.0, "zh": rise},
                fluency_gap=dose / 10,
                details={"dose": dose, "permanent": way in lasting, "settings": {"strength": 2.0}},
            )
            for dose, share, rise in one
        )
        for way, one in doses.items()
    }


def dosed(doses=DOSES, base=0.05):
    """The JSON of ``broca evaluate --methods --doses`` with known numbers."""
    curves = dose_curves(doses)
    ways = [outcome("base", base), *(one[-1] for one in curves.values())]
    return written(Report("en", "ar", 0.96, 100, tuple(ways), notes=(), curves=curves))


def written(result):
    """The values of a result's file, as JSON has them."""
    return json.loads(json_bytes(document(result)))


def write_run(directory, name="model", edited="keyed edit", text=ARABIC, prompt="The children did not"):
    """What ``broca run`` leaves, but for the checkpoint's weights."""
    sample = Sample(prompt, "want to sleep.", "en")
    base = outcome("base", 0.0, samples=(sample,), kl={}, details={}, fluency_gap=float("nan"))
    edit, other = Sample(prompt, text, "ar"), Sample(prompt, CHINESE, "zh")
    ways = (base, outcome(edited, 0.97, samples=(edit,)), outcome("hook", 0.5, samples=(other,)))
    about = {"model": name, "fingerprint": "0123456789abcdef"}
    report = document(Report("en", "ar", 0.98, 102, ways, ("A note.",), about=about))
    (directory / "measured-ar.json").write_bytes(json_bytes(report))
    (directory / "report.json").write_bytes(json_bytes([report]))
    (directory / "report.md").write_text("# as Markdown")
    stage = {"inputs": "1", "outputs": {"measured-ar.json": "2"}}
    (directory / "run.json").write_bytes(json_bytes({"measure ar": stage}))
    tried = (
        outcome(edited, 0.9, details={"settings": {"strength": 2.0}}),
        outcome(edited, 0.97),
        Refused("Steer2Edit", {"alpha": 0.8}, "nothing changes"),
    )
    choice = Choice("en", "ar", 0.99, {edited: {"strength": 3.5}}, tried)
    (directory / "choice-ar.json").write_bytes(json_bytes(document(choice)))
    members = {"ar": [[0, 1], [1, 2]], "en": [[0, 1]], "zh": []}
    found = neuron_set(
        {k: torch.tensor(rows, dtype=torch.int64).reshape(-1, 2) for k, rows in members.items()},
        {k: torch.arange(len(rows)).double() for k, rows in members.items()},
        2,
        8,
        {
            "method": "lape",
            "model": name,
            "fingerprint": "0123456789abcdef",
            "settings": {"top_rate": 0.01, "filter_rate": 0.95, "kinds": None},
            "corpora": [{"digest": "d" * 64, "part": "estimate"}],
        },
    )
    found.save(directory / "neurons.safetensors")
    scale = torch.ones(8)
    scale[3] = 0.25
    edit = ModuleEdit(1, "mlp", (3,), column_scale=scale, notes={"change_norm": 1.5, "weight_norm": 3.0})
    metadata = {"method": "keyed", "source": "en", "target": "ar", "languages": ["en", "ar"]}
    make_plan([edit], {**metadata, "fingerprint": "0123456789abcdef", "settings": {"strength": 3.5}}).save(
        directory / "edit-ar.safetensors"
    )
    (directory / "checkpoint-ar").mkdir()
    (directory / "checkpoint-ar" / "config.json").write_text("{}")


def changes(seed):
    size = len(LANGUAGES)
    drawn = torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    change = drawn * 0.1 + torch.eye(size, dtype=torch.float64)
    return Changes(change + 3, change, change - 0.05, change + 0.05)


def ablation(name="neurons", command="broca ablate model --neurons neurons.safetensors"):
    """The JSON of an ablation study with known numbers."""
    own = changes(1)
    doses = tuple(Dose(share, (1, 2, 3), changes(int(10 * share))) for share in (0.5, 1.0))
    one = SetOutcome(
        name,
        "lape",
        (1, 2, 3),
        own,
        {"random": (changes(5), changes(6)), "matched": ()},
        doses,
        Specificity(20.0, (15.0, 25.0), 1.05, 0.05),
    )
    study = Study(
        LANGUAGES,
        (10, 10, 10),
        (100, 200, 300),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        (one,),
        Settings(doses=(0.5, 1.0)),
        {
            "model": "model",
            "fingerprint": "0123456789abcdef",
            "corpus": {"digest": "e" * 64, "part": "report"},
            "packages": {"torch": "2.0"},
            "settings": {"way": "zero", "confidence": 0.95, "dose_of_model": False},
            "command": command,
        },
    )
    return json.loads(json_bytes(study_document(study)))


def tuned(command="broca tune model --source en --target ar"):
    """A tune.json with known numbers."""
    whole = {"state": "measured", "continuations": 100, "nll_rise": {"zh": 0.02}}
    trials = [
        Trial(0, "keyed", {"strength": 2.0}, found=60, fluency_gap=0.1, kl={"zh": 0.004}, **whole),
        Trial(1, "keyed", {"strength": 4.0}, found=98, fluency_gap=0.2, kl={"zh": 0.006}, **whole),
        Trial(2, "bake", {"strength": 9.0}, found=70, fluency_gap=0.9, kl={"zh": 0.2}, **whole),
        Trial(3, "bake", {"strength": 1.0}, state="hopeless", found=1, continuations=16, why="1 of 16"),
    ]
    reported = Reported(
        ceiling=0.96,
        continuations=100,
        goals_met={"share": True, "fluency gap": True, "rise": False},
        outcomes=(outcome("base", 0.0), outcome("tuned edit", 0.94)),
    )
    search = SearchResult(
        source="en",
        target="ar",
        goals=Goals(0.95, 0.3, 0.05),
        ceiling=0.97,
        trials=tuple(trials),
        front=(1, 0),
        chosen=1,
        chosen_meets_goals=True,
        why="the least harmful of 1 that meet all goals",
        report=reported,
        finished=True,
        about={
            "identity": {"model": "0123456789abcdef", "corpus": {"choose": "f" * 64}, "seed": 0},
            "packages": {"optuna": "5.0"},
            "command": command,
            "model": "model",
        },
    )
    return json.loads(json_bytes(search_document(search)))
