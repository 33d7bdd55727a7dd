"""``broca run``: all stages, skipped when unchanged, resumed when interrupted, the same bytes again."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from editing.evaluation.evaluation import Evaluation
from editing.methods.keyed import STRENGTH
from editing.methods.learned_values import LEARNED_AT
from editing.pipeline.recipe import Recipe, read_recipe
from editing.pipeline.run import _Run, run
from editing.pipeline.stages import KEPT, RUNS, Stages
from editing.plans.applied import applied
from editing.plans.plan import load_plan
from neurons.errors import BrocaError, UsageError
from neurons.files import digest as digests
from neurons.files.file_states import OncePerState
from neurons.models import fingerprint
from neurons.models.source import load_model
from neurons.text.corpus import read_corpus


class Quiet:
    """A screen that records which stages ran."""

    def __init__(self):
        self.ran, self.skipped, self.states, self.warned = [], [], {}, []

    def stage(self, name, state):
        (self.ran if state == RUNS else self.skipped).append(name)
        self.states[name] = state

    def progress(self, title, total, unit):
        return nullcontext(lambda count: None)

    def copying(self, title):
        return nullcontext(lambda done, total: None)

    def warn(self, text):
        self.warned.append(text)


def ran(recipe):
    """Run a recipe: its screen."""
    screen = Quiet()
    run(recipe, screen)
    return screen


@pytest.fixture(scope="module")
def recipe(checkpoint_of, known_text, tmp_path_factory):
    model = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(checkpoint_of("llama", True, "bfloat16"), model)
    (model / "pytorch_model.bin").write_bytes(b"old")
    return Recipe(
        model=str(model),
        corpus=known_text,
        source="en",
        targets=("fr", "de"),
        out=tmp_path_factory.mktemp("run") / "out",
        top_rate=0.1,
        samples=1,
    )


STAGES = ["identify"]
for language in ("fr", "de"):
    STAGES += [f"{what} to {language}" for what in ("direction", "edit", "export")] + [f"measure {language}"]
STAGES += ["report"]


def contents(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(recipe):
    """The recipe run once: (its stages, its files)."""
    return ran(recipe), contents(recipe.out)


def test_runs_every_stage_and_leaves_every_file(finished, recipe):
    screen, files = finished
    assert screen.ran == STAGES
    assert [Path(text.split()[0]).name for text in screen.warned] == 2 * ["pytorch_model.bin"]
    for name in ("neurons.safetensors", "report.json", "report.md", "report.png", "report.svg"):
        assert name in files
    for target in ("fr", "de"):
        assert f"checkpoint-{target}/model.safetensors" in files
        assert files[f"checkpoint-{target}/broca/edit.safetensors"] == files[f"edit-{target}.safetensors"]
        measured = json.loads(files[f"measured-{target}.json"])
        names = [outcome["name"] for outcome in measured["outcomes"]]
        assert names[0] == "base" and names[-1] == "keyed edit" and "DiffMean hook" in names


def test_the_keyed_row_is_that_of_the_exported_checkpoint(finished, recipe):
    measured = json.loads((recipe.out / "measured-fr.json").read_text())["outcomes"][-1]
    loaded = load_model(recipe.model, "cpu")
    evaluation = Evaluation(loaded, read_corpus(recipe.corpus, part="report"), "en", "fr", samples=1)
    plan = load_plan(recipe.out / "edit-fr.safetensors")
    again = evaluation.measure("keyed edit", partial(applied, loaded, plan), kl=True)
    for name in ("nll", "kl", "fluency_gap", "languages_found"):
        assert measured[name] == getattr(again, name), name


def test_a_second_run_skips_everything(finished, recipe):
    screen = ran(recipe)
    assert screen.ran == []
    assert screen.skipped == STAGES
    assert contents(recipe.out) == finished[1]


def test_a_run_reads_each_file_for_its_digest_once(finished, recipe, monkeypatch):
    read = []
    digest, name = digests._digest_of_file, fingerprint._fingerprint
    monkeypatch.setattr(digests, "_digest_of_file", lambda path: read.append(path) or digest(path))
    monkeypatch.setattr(fingerprint, "_fingerprint", lambda path, plan: read.append(path) or name(path, plan))
    monkeypatch.setattr(digests, "DIGESTS", OncePerState())
    monkeypatch.setattr(fingerprint, "FINGERPRINTS", OncePerState())
    for target in recipe.targets:
        (recipe.out / f"measured-{target}.json").unlink()
    screen = ran(recipe)
    assert screen.ran == [f"measure {target}" for target in recipe.targets]
    checkpoints = [recipe.out / f"checkpoint-{target}" for target in recipe.targets]
    assert {Path(recipe.model), *checkpoints, checkpoints[0] / "model.safetensors"} <= set(read)
    # What the stage has written anew is another file.
    rewritten = {recipe.out / f"measured-{target}.json" for target in recipe.targets}
    assert sorted(set(read) - rewritten) == sorted(path for path in read if path not in rewritten)
    assert contents(recipe.out) == finished[1]


def test_a_missing_file_is_made_again(finished, recipe):
    (recipe.out / "direction-de.safetensors").unlink()
    screen = ran(recipe)
    # The direction comes out with the same bytes, so what was made from it still holds.
    assert screen.ran == ["direction to de"]
    assert contents(recipe.out) == finished[1]


def test_a_file_that_was_replaced_is_kept_and_used(finished, recipe, tmp_path):
    """A researcher may put a plan of their own in the place of the one that was made."""
    edited = recipe.with_options(out=tmp_path / "edited")
    shutil.copytree(recipe.out, edited.out)
    plan = load_plan(edited.out / "edit-fr.safetensors").scaled(0.5)
    plan.save(edited.out / "edit-fr.safetensors")
    (edited.out / "measured-de.json").unlink()
    screen = ran(edited)
    assert screen.ran == ["export to fr", "measure fr", "measure de", "report"]
    assert screen.states["edit to fr"] == KEPT.format("edit-fr.safetensors")
    notes = [json.loads((edited.out / f"measured-{k}.json").read_text())["notes"] for k in ("fr", "de")]
    noted = [any("edit-fr.safetensors" in note for note in of_target) for of_target in notes]
    assert noted == [True, False]
    files = contents(edited.out)
    assert files["edit-fr.safetensors"] == plan.to_bytes()
    assert files["checkpoint-fr/broca/edit.safetensors"] == plan.to_bytes()
    assert files["checkpoint-fr/model.safetensors"] != finished[1]["checkpoint-fr/model.safetensors"]
    with pytest.raises(BrocaError, match="changed by hand"):
        run(edited.with_options(strengths=(0.9,)), Quiet())
    assert contents(edited.out) == files


@pytest.mark.parametrize("finished", [True, False])
def test_a_stage_that_was_killed_after_it_wrote_runs_again(tmp_path, finished):
    out, file = tmp_path / "out", tmp_path / "out" / "file"
    out.mkdir()

    def stage(number, action):
        Stages(out, lambda name, state: None).run("stage", {"number": number}, ["file"], action)

    def killed():
        file.write_text("two")
        raise KeyboardInterrupt

    if finished:
        stage(1, lambda: file.write_text("one"))
    with pytest.raises(KeyboardInterrupt):
        stage(2, killed)
    stage(2, lambda: file.write_text("again"))
    assert file.read_text() == "again"


def test_a_second_run_in_a_directory_is_refused(recipe, tmp_path):
    again = recipe.with_options(out=tmp_path / "out")

    class Crowded(Quiet):
        def stage(self, name, state):
            with pytest.raises(BrocaError, match="out: another run is writing this directory"):
                run(again, Quiet())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(again, Crowded())


def test_the_model_may_lie_elsewhere(finished, recipe, tmp_path):
    copy = tmp_path / "elsewhere" / Path(recipe.model).name
    shutil.copytree(recipe.model, copy)
    again = recipe.with_options(model=str(copy), out=tmp_path / "out")
    run(again, Quiet())
    assert contents(again.out) == finished[1]


def test_interrupted_it_goes_on_and_ends_with_the_same_bytes(finished, recipe, tmp_path, monkeypatch):
    again = recipe.with_options(out=tmp_path / "again")
    with monkeypatch.context() as patched:

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        patched.setattr("editing.pipeline.run.export", interrupted)
        first = Quiet()
        with pytest.raises(KeyboardInterrupt):
            run(again, first)
    assert first.ran[-1] == "export to fr"
    assert not (again.out / "checkpoint-fr").exists()
    second = ran(again)
    assert second.skipped == STAGES[:3]
    assert second.ran == STAGES[3:]
    assert contents(again.out) == finished[1]


def test_another_setting_runs_what_depends_on_it(finished, recipe, tmp_path):
    other = recipe.with_options(strengths=(0.5,), out=tmp_path / "other")
    shutil.copytree(recipe.out, other.out)
    screen = ran(other)
    assert "identify" in screen.skipped and "direction to fr" in screen.skipped
    assert "edit to fr" in screen.ran and "export to fr" in screen.ran


@pytest.mark.parametrize(
    ("changed", "first"), [("files", "identify"), ("device", "identify"), ("packages", "edit to fr")]
)
def test_what_decides_the_results_runs_again(finished, recipe, tmp_path, monkeypatch, changed, first):
    model = tmp_path / Path(recipe.model).name
    shutil.copytree(recipe.model, model)
    again = recipe.with_options(model=str(model), out=tmp_path / "out")
    shutil.copytree(recipe.out, again.out)
    if changed == "files":
        (model / "chat_template.jinja").write_text("{{ messages }}")
    elif changed == "device":
        monkeypatch.setattr("editing.pipeline.run.pick_device", lambda name: torch.device("cuda"))
    else:
        monkeypatch.setattr("editing.pipeline.run.measured_by", lambda: {"py3langid": "another"})

    class Stopping(Quiet):
        def stage(self, name, state):
            super().stage(name, state)
            if state == RUNS:
                raise KeyboardInterrupt

    screen = Stopping()
    with pytest.raises(KeyboardInterrupt):
        run(again, screen)
    assert screen.ran == [first]


def test_a_directory_of_the_users_is_refused(recipe, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("...")
    with pytest.raises(BrocaError, match="choose another"):
        run(recipe.with_options(out=tmp_path / "letters"), Quiet())
    assert sorted(path.name for path in (tmp_path / "letters").iterdir()) == ["dear.txt"]


def written(tmp_path, content):
    (tmp_path / "recipe.toml").write_text(content)
    return tmp_path / "recipe.toml"


def test_read_recipe(tmp_path):
    (tmp_path / "model").mkdir()
    recipe = read_recipe(
        written(tmp_path, 'model = "model"\ncorpus = "text"\nsource = "en"\ntargets = ["fr"]\nseed = 3\n')
    )
    assert recipe.model == str(tmp_path / "model")
    assert recipe.corpus == tmp_path / "text"
    assert (recipe.targets, recipe.seed, recipe.method) == (("fr",), 3, "gradient-contrast")


def test_a_hub_id_stays_a_hub_id(tmp_path):
    content = 'model = "meta-llama/Llama-3.2-1B"\ncorpus = "text"\nsource = "en"\ntargets = ["fr"]\n'
    assert read_recipe(written(tmp_path, content)).model == "meta-llama/Llama-3.2-1B"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("speed = 3", "speed"),
        ("seed = 'x'", "seed"),
        ("seed = 1.5", "seed"),
        ("top_rate = nan", "top_rate"),
        ("top_rate = inf", "top_rate"),
        ("top_rate = true", "top_rate"),
        ("strengths = [2.0, nan]", "strengths"),
        ("strengths = [-inf]", "strengths"),
        ("strengths = [0]", "strengths"),
        ("strengths = ['2']", "strengths"),
        ("prompts = inf", "prompts"),
        ("samples = 0", "samples"),
        ("targets = 'fr'", "targets"),
        ("key_neurons = 'some'", "key_neurons"),
        ("values = 'guessed'", "guessed"),
        ("method = 'culnig'", "'culnig'"),
        ("method = 'random-matched'", "'random-matched'"),
        ("dtype = 'bf16'", "'bf16'"),
        ("targets = ['en']", "'en'"),
        ("targets = []", "targets"),
        ("strengths = [2, 2.0]", "strengths"),
        ("not toml", "TOML"),
    ],
)
def test_recipes_that_are_refused(tmp_path, line, named):
    base = {"model": "'m'", "corpus": "'c'", "source": "'en'", "targets": "['fr']"}
    lines = [f"{k} = {v}" for k, v in base.items() if not line.startswith(k)]
    with pytest.raises(UsageError, match=named):
        read_recipe(written(tmp_path, "\n".join([*lines, line]) + "\n"))


@pytest.mark.parametrize(
    ("family", "values", "blocks"),
    [("mixtral", "means", "attn"), ("mixtral", "learned", "attn"), ("llama", "means", "mlp"), ("llama", "learned", "attn mlp")],
)  # fmt: skip
def test_the_keyed_edit_takes_what_every_token_reaches(
    recipe, checkpoint_of, tmp_path, family, values, blocks
):
    chosen = replace(recipe, model=str(checkpoint_of(family)), values=values, out=tmp_path / "out")
    assert _Run(chosen, Quiet(), {}).blocks == tuple(blocks.split())


def test_strengths_suit_the_values():
    recipe = Recipe("m", Path("c"), "en", ("fr",))
    assert recipe.keyed_strengths == (STRENGTH,)
    assert recipe.with_options(values="learned").keyed_strengths == (LEARNED_AT,)
    assert recipe.with_options(values="learned", strengths=(1.0, 3.0)).keyed_strengths == (1.0, 3.0)


def test_a_recipe_without_a_source_is_refused(tmp_path):
    with pytest.raises(UsageError, match="source is missing"):
        read_recipe(written(tmp_path, 'model = "m"\ncorpus = "c"\ntargets = ["fr"]\n'))


@pytest.mark.parametrize(
    "option", [{"method": "lapes"}, {"method": "head-shapley"}, {"top_rate": 5.0}, {"device": "nonsense"}]
)
def test_what_a_late_stage_would_refuse_is_refused_before_the_first(recipe, tmp_path, option):
    screen = Quiet()
    with pytest.raises(UsageError, match=next(iter(option))):
        run(recipe.with_options(out=tmp_path / "out", **option), screen)
    assert screen.states == {} and not (tmp_path / "out").exists()
