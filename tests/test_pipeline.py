"""``broca run``: all stages, skipped when unchanged, resumed when interrupted, the same bytes again."""

import json

import models
import pytest

from editing.pipeline import run
from editing.recipe import Recipe, read_recipe
from neurons.errors import BrocaError, UsageError


class Quiet:
    """Notes which stages ran."""

    def __init__(self):
        self.ran, self.skipped = [], []

    def stage(self, name, skipped):
        (self.skipped if skipped else self.ran).append(name)

    def progress(self, title, total, unit):
        from contextlib import nullcontext

        return nullcontext(lambda count: None)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    written = models.write_corpus(tmp_path_factory.mktemp("text"), lines=40)
    for invented, known in zip(models.LANGUAGES, ("en", "de", "fr"), strict=True):
        (written / f"{invented}.txt").rename(written / f"{known}.txt")
    return written


@pytest.fixture(scope="module")
def recipe(checkpoint_of, text, tmp_path_factory):
    return Recipe(
        model=str(checkpoint_of("llama", True, "bfloat16")),
        corpus=text,
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
    screen = Quiet()
    run(recipe, screen)
    return screen, contents(recipe.out)


def test_runs_every_stage_and_leaves_every_file(finished, recipe):
    screen, files = finished
    assert screen.ran == STAGES
    for name in ("neurons.safetensors", "report.json", "report.md", "report.png", "report.svg"):
        assert name in files
    for target in ("fr", "de"):
        assert f"checkpoint-{target}/model.safetensors" in files
        assert files[f"checkpoint-{target}/broca/edit.safetensors"] == files[f"edit-{target}.safetensors"]
        measured = json.loads(files[f"measured-{target}.json"])
        names = [outcome["name"] for outcome in measured["outcomes"]]
        assert names[0] == "base" and names[-1] == "keyed edit" and "DiffMean hook" in names


def test_the_keyed_row_is_that_of_the_exported_checkpoint(finished, recipe):
    from functools import partial

    from editing.evaluation import Evaluation
    from editing.live import applied
    from editing.plan import load_plan
    from neurons.corpus import read_corpus
    from neurons.source import load_model

    measured = json.loads((recipe.out / "measured-fr.json").read_text())["outcomes"][-1]
    loaded = load_model(recipe.model, "cpu")
    evaluation = Evaluation(loaded, read_corpus(recipe.corpus, part="report"), "en", "fr", samples=1)
    plan = load_plan(recipe.out / "edit-fr.safetensors")
    again = evaluation.measure("keyed edit", partial(applied, loaded, plan), kl=True)
    for name in ("nll", "kl", "fluency_gap", "languages_found"):
        assert measured[name] == getattr(again, name), name


def test_a_second_run_skips_everything(finished, recipe):
    screen = Quiet()
    run(recipe, screen)
    assert screen.ran == []
    assert screen.skipped == STAGES
    assert contents(recipe.out) == finished[1]


def test_a_missing_or_changed_file_is_made_again(finished, recipe):
    (recipe.out / "direction-de.safetensors").unlink()
    (recipe.out / "report.md").write_text("something else")
    screen = Quiet()
    run(recipe, screen)
    # The direction comes out with the same bytes, so what was made from it still holds.
    assert screen.ran == ["direction to de", "report"]
    assert contents(recipe.out) == finished[1]


def test_interrupted_it_goes_on_and_ends_with_the_same_bytes(finished, recipe, tmp_path, monkeypatch):
    again = recipe.with_options(out=tmp_path / "again")
    with monkeypatch.context() as patched:

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        patched.setattr("editing.pipeline.export", interrupted)
        first = Quiet()
        with pytest.raises(KeyboardInterrupt):
            run(again, first)
    assert first.ran[-1] == "export to fr"
    assert not (again.out / "checkpoint-fr").exists()
    second = Quiet()
    run(again, second)
    assert second.skipped == STAGES[:3]
    assert second.ran == STAGES[3:]
    assert contents(again.out) == finished[1]


def test_another_setting_runs_what_depends_on_it(finished, recipe):
    screen = Quiet()
    run(recipe.with_options(strengths=(0.5,)), screen)
    assert "identify" in screen.skipped and "direction to fr" in screen.skipped
    assert "edit to fr" in screen.ran and "export to fr" in screen.ran


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
    found = read_recipe(
        written(tmp_path, 'model = "model"\ncorpus = "text"\nsource = "en"\ntargets = ["fr"]\nseed = 3\n')
    )
    assert found.model == str(tmp_path / "model")
    assert found.corpus == tmp_path / "text"
    assert (found.targets, found.seed, found.method) == (("fr",), 3, "gradient-contrast")


def test_a_hub_id_stays_a_hub_id(tmp_path):
    content = 'model = "meta-llama/Llama-3.2-1B"\ncorpus = "text"\nsource = "en"\ntargets = ["fr"]\n'
    assert read_recipe(written(tmp_path, content)).model == "meta-llama/Llama-3.2-1B"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("speed = 3", "speed"),
        ("seed = 'x'", "seed"),
        ("samples = 0", "samples"),
        ("targets = 'fr'", "targets"),
        ("key_neurons = 'some'", "key_neurons"),
        ("targets = ['en']", "'en'"),
        ("targets = []", "targets"),
        ("not toml", "TOML"),
    ],
)
def test_recipes_that_are_refused(tmp_path, line, named):
    base = {"model": "'m'", "corpus": "'c'", "source": "'en'", "targets": "['fr']"}
    lines = [f"{k} = {v}" for k, v in base.items() if not line.startswith(k)]
    with pytest.raises(UsageError, match=named):
        read_recipe(written(tmp_path, "\n".join([*lines, line]) + "\n"))


def test_a_recipe_without_a_source_is_refused(tmp_path):
    with pytest.raises(UsageError, match="source is missing"):
        read_recipe(written(tmp_path, 'model = "m"\ncorpus = "c"\ntargets = ["fr"]\n'))
