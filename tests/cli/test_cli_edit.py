"""``broca edit``: every method and every operation on plans, on a tiny model."""

import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO

import models
import pytest
import torch
from safetensors.torch import save_file

from cli.main import main
from editing.methods.neutral_mean import neutral_means
from editing.plans.plan import load_plan
from editing.report.edits_section import edit_content
from editing.study.registry import edits
from neurons.models.source import load_model
from neurons.text.corpus import read_corpus


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, a parallel corpus, and the outputs of the commands before ``edit``."""
    folder = tmp_path_factory.mktemp("edit")
    models.build_checkpoint(folder / "model", "gpt2")
    models.write_corpus(folder / "text", lines=40)
    run = [
        ["direction", "--corpus", "text", "--source", "qaa", "--target", "qab", "--out", "direction"],
        [
            "direction", "--corpus", "text", "--source", "qaa", "--target", "qab", "--method",
            "language-subspace", "--out", "subspace",
        ],
        ["identify", "--corpus", "text", "--top-rate", "0.3", "--out", "neurons"],
        ["identify", "--corpus", "text", "--method", "clas", "--kinds", "specific,related", "--top-rate", "1",
         "--out", "classes"],
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, *arguments in run:
            given = [str(folder / word) if word in ("text",) else word for word in arguments]
            given[-1] = str(folder / f"{given[-1]}.safetensors")
            patch.setattr(sys, "argv", ["broca", name, str(folder / "model"), *given])
            main()
    return folder


METHODS = {
    "keyed": ["--direction", "direction", "--corpus", "text"],
    "steer2edit": ["--direction", "direction", "--neurons-rho", "0.1", "--alpha", "0.1"],
    "ablate": ["--direction", "direction", "--set", "form=norm-preserving", "--set", "from_layer=1"],
    "ablate-subspace": ["--direction", "subspace", "--strength", "0.5"],
    "leace": ["--corpus", "text"],
    "selective-steering": [
        "--corpus", "text", "--languages", "qaa,qab", "--set", "theta=60", "--set", "select=all",
    ],
    "ara": ["--corpus", "text", "--languages", "qaa,qab,qac", "--layers", "1", "--set", "texts=8"],
    "scale": ["--neurons", "neurons", "--languages", "qab", "--factor", "0"],
    "clas": ["--neurons", "classes", "--layers", "0-2", "--set", "specific_loss=0.1"],
    "austeer": ["--corpus", "text", "--languages", "qaa,qab", "--set", "channels=7"],
    "bake": [
        "--direction", "direction", "--layers", "1", "--corpus", "text", "--set", "correct_layers=1",
    ],
    "bake-bias": ["--direction", "direction", "--layers", "1"],
    "language-arithmetic": [
        "--neurons", "neurons", "--corpus", "text", "--set", "target=qab", "--set", "deactivate=qaa",
    ],
}  # fmt: skip


def arguments_of(files, words):
    kinds = {
        name: str(files / f"{name}.safetensors") for name in ("direction", "subspace", "neurons", "classes")
    }
    kinds["text"] = str(files / "text")
    out = []
    for i, word in enumerate(words):
        named = i > 0 and words[i - 1] in ("--direction", "--neurons", "--corpus", "--compose")
        out.append(kinds[word] if named else word)
    return out


@pytest.fixture(scope="module")
def plan_of(files):
    """Method -> the file of its plan, built once."""

    def make(method):
        path = files / f"edit-{method}.safetensors"
        if not path.exists():
            words = ["--method", method, *arguments_of(files, METHODS[method]), "--out", str(path)]
            with (
                pytest.MonkeyPatch.context() as patch,
                redirect_stdout(StringIO()),
                redirect_stderr(StringIO()),
            ):
                patch.setattr(sys, "argv", ["broca", "edit", str(files / "model"), *words])
                main()
        return path

    return make


def test_every_method_is_tried():
    # These are only for mixtures, and tried in tests of their own.
    assert {*METHODS, "steer-router", "keyed-experts"} == set(edits())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_plan_that_exports(broca, files, tmp_path, method):
    edit = tmp_path / "edit.safetensors"
    status, out, err = broca(
        "edit", files / "model", "--method", method, *arguments_of(files, METHODS[method]), "--out", edit
    )
    assert status == 0, err
    assert out.rstrip().endswith(str(edit))
    plan = load_plan(edit)
    loaded = load_model(str(files / "model"))
    assert plan.metadata["fingerprint"] == loaded.fingerprint and plan.metadata["method"]
    status, _, err = broca(
        "export", files / "model", "--edit", edit, "--verify", "--out", tmp_path / "out", "--json"
    )
    assert status == 0, err
    exported = load_model(str(tmp_path / "out"))
    ids = torch.tensor([[0, 5, 80, 33, 200, 7]])
    with torch.no_grad():
        difference = exported.model(ids).logits - loaded.model(ids).logits
    assert float(difference.abs().max()) > 1e-4
    assert "{'" not in broca("inspect", edit)[1]  # settings are words


@pytest.mark.parametrize("method", METHODS)
def test_inspect_shows_the_components_that_change_most(broca, files, plan_of, method):
    plan, loaded = load_plan(plan_of(method)), load_model(str(files / "model"))
    changes, scaled = (
        {},
        any(edit.column_scale is not None or edit.row_scale is not None for edit in plan.edits),
    )
    for edit in plan.edits:
        weight = loaded.anatomy.parts(edit.layer, edit.block)[0].weight.double()
        change = (edit.apply(weight) - weight).view(
            len(weight), -1, loaded.anatomy.component_width(edit.block, edit.layer)
        )
        norms = change.norm(dim=(0, 2))
        changes |= {(edit.layer, edit.block, i): float(norms[i]) for i in edit.components}
    shown = json.loads(broca("inspect", plan_of(method), "--json")[1])["strongest"]
    largest = sorted(changes.values(), reverse=True)[:10]
    exact = [changes[row["layer"], row["block"], row["component"]] for row in shown]
    if scaled:
        # An estimate, because a plan does not contain the weights.
        assert sum(exact) >= 0.9 * sum(largest)
    else:
        assert exact == pytest.approx(largest, rel=1e-5)
        assert [row["change"] for row in shown] == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_scaled_plan_says_is_what_it_does(files, plan_of, method):
    """Every note and detail agrees with the factors; add new ones to this test."""
    plan, loaded = load_plan(plan_of(method)).scaled(2), load_model(str(files / "model"))
    # Notes of the key, which does not scale, and of the weights.
    of_key = {"spread", "least_spread", "key_means", "carriers", "value_share", "start_coefficient", "eps"}
    other = {"weight_norm", "share", "constant_share", "kept", "norm", "projections"}
    for edit in plan.edits:
        weight = loaded.anatomy.parts(edit.layer, edit.block)[0].weight.double()
        width, components = loaded.anatomy.component_width(edit.block, edit.layer), list(edit.components)
        change = edit.apply(weight) - weight
        measured = {"change_norm": float(change.norm()), "weight_norm": float(weight.norm())}
        if edit.bias is not None:
            measured["bias_norm"] = float(edit.bias.double().norm())
        for name, value in edit.notes.items():
            assert name in measured or name in of_key | other
            if name in measured:
                assert value == pytest.approx(measured[name], rel=1e-5)
        keys = None if edit.right is None else edit.right.double().view(-1, width, edit.rank).flatten(1)
        parts = change.view(len(change), -1, width)[:, components]
        for name, values in edit.details.items():
            if name in ("factor", "scale"):
                expected = edit.column_scale.double().view(-1, width).mean(1)[components]
            elif name == "key":
                expected = keys[components, 0] if width == 1 else keys[components].norm(dim=1)
            elif name == "lambda":
                assert float(edit.left.norm()) == pytest.approx(2)
                expected = parts.norm(dim=(0, 2)) * values.sign()
            elif name == "c" and edit.column_scale is None:
                written = edit.left.double().T @ weight.view(len(weight), -1)
                ratio = (edit.left.double().T @ change) / written
                expected = ratio.view(edit.rank, -1, width)[0, components, 0]
            elif name == "offset":
                shift = edit.left[:, 0].double() if edit.bias is None else edit.bias.double()
                torch.testing.assert_close(weight[:, components] @ values, shift, rtol=1e-4, atol=1e-6)
                continue
            else:
                assert name in ("g", "c", "share", "carried")
                continue
            torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["keyed", "steer2edit", "ablate-subspace", "clas", "bake-bias"])
def test_a_scaled_plan_says_what_the_plan_of_that_strength_says(broca, files, plan_of, tmp_path, method):
    words = [word for word in METHODS[method] if word not in ("--strength", "0.5")]
    whole = load_plan(plan_of(method))
    strength = 2 * whole.metadata["settings"]["strength"]
    out = tmp_path / "edit.safetensors"
    status, _, err = broca(
        "edit", files / "model", "--method", method, *arguments_of(files, words), "--strength", strength,
        "--out", out,
    )  # fmt: skip
    assert status == 0, err
    expected, scaled = load_plan(out), whole.scaled(2)
    metadata = [{k: v for k, v in plan.metadata.items() if k != "modules"} for plan in (scaled, expected)]
    assert metadata[0] == metadata[1]
    for edit, other in zip(scaled.edits, expected.edits, strict=True):
        assert edit.notes.keys() == other.notes.keys() and edit.details.keys() == other.details.keys()
        for name, value in other.notes.items():
            assert edit.notes[name] == pytest.approx(value, rel=1e-5)
        for name, values in other.details.items():
            torch.testing.assert_close(edit.details[name], values, rtol=1e-5, atol=1e-9)


def test_keyed_learns_what_it_writes(broca, files, tmp_path):
    plans = {}
    for learn in ("no", "yes"):
        edit = tmp_path / f"{learn}.safetensors"
        words = [*METHODS["keyed"], "--blocks", "attn,mlp", "--strength", "2", "--set", f"learn={learn}"]
        status, _, err = broca("edit", files / "model", *arguments_of(files, words), "--out", edit)
        assert status == 0, err
        plans[learn] = load_plan(edit)
    held_out = plans["yes"].metadata["learning"]["held_out"]
    assert min(held_out) < held_out[0]
    for learned, other in zip(plans["yes"].edits, plans["no"].edits, strict=True):
        assert torch.equal(learned.right, other.right) and not torch.equal(learned.left, other.left)
    assert "learned" not in plans["no"].metadata["settings"]


def test_learning_takes_openings_of_every_source_in_turn(broca, files, tmp_path, monkeypatch):
    """Learning reads a limited number of lines, so sources must alternate."""
    folder = tmp_path / "text"
    models.write_corpus(folder, lines=12)
    shortened = (folder / "qac.txt").read_text().splitlines()[:4]
    (folder / "qac.txt").write_text("\n".join(shortened) + "\n")
    seen = []

    def recorded(loaded, plan, sources, target, **_):
        seen.append((sources, target))
        return plan

    monkeypatch.setattr("editing.methods.keyed_edit.learned_values", recorded)
    words = ["--direction", str(files / "direction.safetensors"), "--corpus", str(folder), "--strength", "2"]
    status, _, err = broca(
        "edit", files / "model", *words, "--set", "learn=yes", "--set", "sources=qaa,qac",
        "--out", tmp_path / "edit.safetensors",
    )  # fmt: skip
    assert status == 0, err
    texts = read_corpus(folder).texts
    openings = [line for pair in zip(texts["qaa"], texts["qac"], strict=False) for line in pair]
    assert seen == [([*openings, *texts["qaa"][4:]], texts["qab"])]


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_foresees_keys_where_they_are_solved_without_weights(broca, files, tmp_path, method):
    words = arguments_of(files, METHODS[method])
    shutil.copytree(files / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    status, printed, errors = broca(
        "edit", tmp_path / "model", "--method", method, *words, "--dry-run", "--json", "--out", files / "none"
    )
    assert status == 0, errors
    solves = method in ("keyed", "leace", "ara", "bake", "language-arithmetic")
    assert set(json.loads(printed)["stages"]) == {"key" if solves else "plan"}
    assert not (files / "none").exists()


def test_a_dry_run_counts_what_a_method_keeps(broca, files):
    kept = []
    for texts in (10, 20):
        words = [*arguments_of(files, METHODS["ara"])[:-1], f"texts={texts}", "--dry-run", "--json"]
        status, printed, errors = broca(
            "edit", files / "model", "--method", "ara", *words, "--out", files / "none"
        )
        assert status == 0, errors
        kept.append(json.loads(printed)["stages"]["key"]["parts"]["kept"])
    assert 2 * kept[0] < kept[1] < 4 * kept[0]


@pytest.fixture
def two(broca, files, tmp_path):
    plans = []
    for name, words in (("scale", METHODS["scale"]), ("keyed", METHODS["keyed"])):
        path = tmp_path / f"{name}.safetensors"
        assert (
            broca("edit", files / "model", "--method", name, *arguments_of(files, words), "--out", path)[0]
            == 0
        )
        plans.append(path)
    return plans


def test_plans_compose_in_one_option(broca, files, two, tmp_path):
    out = tmp_path / "both.safetensors"
    status, _, err = broca("edit", "--compose", *two, "--out", out)
    assert status == 0, err
    assert load_plan(out).metadata["settings"]["of"][0]["method"] == "scale"
    status, printed, err = broca("edit", files / "model", "--compose", *two, "--out", out, "--json")
    assert status == 0, err
    assert json.loads(printed)["relative_change"] > 0


@pytest.mark.parametrize("end", ["source", "target"])
def test_plans_with_one_end_in_common_are_shown_exported_and_drawn(broca, files, plan_of, tmp_path, end):
    first = load_plan(plan_of("steer2edit"))
    other, both, out = (tmp_path / name for name in ("other.safetensors", "both.safetensors", "out"))
    replace(first, metadata={**first.metadata, end: "qac", "languages": ["qac"]}).save(other)
    for words in (
        ["edit", "--compose", plan_of("steer2edit"), other, "--out", both],
        ["inspect", both],
        ["export", files / "model", "--edit", both, "--out", out],
        ["inspect", out],
        ["plot", both, "--out", tmp_path / "plan.svg"],
    ):
        status, printed, err = broca(*words)
        assert status == 0, err
        assert words[0] != "inspect" or "qaa, qab, qac" in printed
    assert "`qac`" in (out / "README.md").read_text()
    assert "qac" in str(edit_content(load_plan(both), "both"))


def test_a_plan_is_scaled_inverted_and_restricted(broca, files, two, tmp_path):
    half, back, cut = (tmp_path / f"{name}.safetensors" for name in ("half", "back", "cut"))
    whole = load_plan(two[1])
    assert broca("edit", "--compose", two[1], "--strength", "0.5", "--out", half)[0] == 0
    edit, other = load_plan(half).edits[0], whole.edits[0]
    torch.testing.assert_close(edit.left @ edit.right.T, 0.5 * other.left @ other.right.T)
    assert broca("edit", files / "model", "--invert", two[1], "--out", back)[0] == 0
    torch.testing.assert_close(load_plan(back).edits[0].left, -whole.edits[0].left)
    status, _, err = broca(
        "edit", files / "model", "--restrict", two[1], "--layers", "2", "--neurons",
        files / "neurons.safetensors", "--languages", "qab", "--out", cut,
    )  # fmt: skip
    assert status == 0, err
    assert [edit.layer for edit in load_plan(cut).edits] == [2]
    assert 0 < load_plan(cut).components < whole.components


def test_two_plans_are_compared_and_drawn(broca, two, tmp_path):
    status, out, err = broca("compare", *two, "--json")
    assert status == 0, err
    assert {row["layer"] for row in json.loads(out)["modules"]} == {0, 1, 2}
    assert broca("plot", two[1], "--out", tmp_path / "plan.svg")[0] == 0
    assert (tmp_path / "plan.svg").stat().st_size > 1000


def test_languages_choose_the_corpus_also_beside_a_neuron_set(broca, files, tmp_path):
    given = arguments_of(files, [*METHODS["keyed"], "--neurons", "neurons"])
    kept = []
    for extra in ([], ["--languages", "qaa,qab"]):
        out = tmp_path / "edit.safetensors"
        status, _, err = broca("edit", files / "model", *given, *extra, "--out", out)
        assert status == 0, err
        kept.append(set(load_plan(out).edits[0].notes["key_means"]))
    assert kept == [{"qaa", "qab", "qac"}, {"qaa", "qab"}]


def test_the_list_says_what_each_needs(broca):
    status, out, _ = broca("edit", "--method", "list")
    assert status == 0 and all(name in out for name in edits())
    listed = json.loads(broca("edit", "--method", "list", "--json")[1])
    assert listed["keyed"]["needs"] == ["direction", "corpus"]
    assert listed["scale"]["settings"] == {"factor": None}


def test_anothers_vector_is_baked(broca, files, tmp_path):
    vector = tmp_path / "control.safetensors"
    save_file({"direction.1": torch.randn(64)}, vector)
    status, _, err = broca(
        "edit", files / "model", "--method", "bake", "--vector", vector, "--corpus", files / "text", "--out",
        tmp_path / "edit.safetensors",
    )  # fmt: skip
    assert status == 0, err
    assert [edit.layer for edit in load_plan(tmp_path / "edit.safetensors").edits] == [1]


@pytest.mark.parametrize("site", ["block_out", "own"])
def test_the_ablation_spares_the_mean_of_a_neutral_language(broca, files, tmp_path, site):
    plans = {}
    for languages in (["qaa"], ["qaa", "qab"]):
        out = tmp_path / f"{len(languages)}.safetensors"
        status, _, err = broca(
            "edit", files / "model", "--method", "ablate", "--set", "form=biprojected", "--set", f"site={site}",
            "--direction", files / "direction.safetensors", "--corpus", files / "text", "--languages", ",".join(languages),
            "--part", "choose", "--out", out,
        )  # fmt: skip
        assert status == 0, err
        plans[len(languages)] = load_plan(out)
        neutral = plans[len(languages)].metadata["neutral"]
        assert neutral["languages"] == languages and neutral["corpus"]["part"] == "choose"
    loaded = load_model(str(files / "model"), device="cpu")
    corpus = read_corpus(files / "text", ["qaa"], "choose", min_languages=1)
    sites = ("attn_out", "mlp_out", "block_out")
    means = neutral_means(loaded, corpus, sites)
    for edit in plans[1].edits:
        mean = means[f"{edit.block}_out" if site == "own" else site][edit.layer]
        # The edit adds nothing along the mean: U^T m = 0.
        assert float((edit.left.double().T @ mean).abs().max()) < 1e-5 * float(mean.norm())
    assert any(
        not torch.equal(first.left, other.left)
        for first, other in zip(plans[1].edits, plans[2].edits, strict=True)
    )


REFUSALS = {
    "an unknown method": (["--method", "magic"], "magic"),
    "a setting of another method": (["--direction", "direction", "--corpus", "text", "--factor", "0"], "--factor"),
    "an unknown setting": (["--direction", "direction", "--corpus", "text", "--set", "rho=1"], "rho"),
    "a setting of the wrong kind": (
        ["--direction", "direction", "--corpus", "text", "--set", "jointly=perhaps"], "perhaps"),
    "a word that is none of them": (["--method", "ablate", "--direction", "direction", "--set", "form=x"], "plain"),
    "no layer for a vector": (["--method", "bake", "--direction", "direction", "--corpus", "text"], "--layers"),
    "no languages": (["--method", "scale", "--neurons", "neurons", "--factor", "0"], "--languages"),
    "no factor": (["--method", "scale", "--neurons", "neurons", "--languages", "qaa"], "--factor"),
    "no neurons": (["--method", "scale", "--languages", "qaa", "--factor", "0"], "--neurons"),
    "heads of a method": (["--direction", "direction", "--corpus", "text", "--heads", "1"], "--heads"),
    "a setting twice": (
        ["--direction", "direction", "--corpus", "text", "--eps", "1", "--set", "eps=1"], "eps"),
    "a method's option while composing": (["--compose", "direction", "--corpus", "text"], "--corpus"),
    "neutral text that nothing reads": (
        ["--method", "ablate", "--direction", "direction", "--corpus", "text"], "form=biprojected"),
    "a neutral language of no text": (
        ["--method", "ablate", "--direction", "direction", "--languages", "qaa"], "--corpus"),
    "a part of no text": (["--method", "steer2edit", "--direction", "direction", "--part", "report"], "--part"),
    "a biprojection without neutral text": (
        ["--method", "ablate", "--direction", "direction", "--set", "form=biprojected"], "--corpus"),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_strength_of_nothing_is_refused(broca, files, tmp_path, method):
    """The message names the strength."""
    out = tmp_path / "edit.safetensors"
    words = arguments_of(files, [word for word in METHODS[method] if word not in ("--strength", "0.5")])
    status, _, err = broca(
        "edit", files / "model", "--method", method, *words, "--strength", "0", "--out", out
    )
    assert status == 2 and "strength" in err and err.count("\n") == 1, err
    assert not out.exists()


@pytest.mark.parametrize("words", [["export", "MODEL", "--edit", "PLAN"], ["edit", "--compose", "PLAN"]])
def test_nothing_of_a_plan_is_no_plan(broca, files, plan_of, tmp_path, words):
    places = {"MODEL": files / "model", "PLAN": plan_of("scale")}
    words = [places.get(word, word) for word in words]
    status, _, err = broca(*words, "--strength", "0", "--out", tmp_path / "out")
    assert status == 2 and "strength of 0" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["MODEL", "--method", "steer2edit", "--direction", "FILE"], "--direction"),
        (
            ["MODEL", "--method", "scale", "--neurons", "FILE", "--languages", "qab", "--factor=0"],
            "--neurons",
        ),
        (["MODEL", "--method", "bake", "--vector", "FILE", "--corpus", "TEXT"], "--vector"),
        (["--compose", "OTHER", "FILE"], "--compose"),
        (["MODEL", "--invert", "FILE"], "--invert"),
        (["MODEL", "--restrict", "FILE", "--layers", "1"], "--restrict"),
    ],
)
def test_what_a_plan_is_made_of_is_not_overwritten(broca, files, plan_of, tmp_path, words, option):
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"mine")
    (tmp_path / "link").symlink_to(mine)
    places = {"MODEL": files / "model", "FILE": mine, "OTHER": plan_of("scale"), "TEXT": files / "text"}
    for out in (mine, tmp_path / "link"):
        status, printed, err = broca("edit", *(places.get(word, word) for word in words), "--out", out)
        assert (status, printed) == (2, "") and option in err and str(out) in err
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize(("extra", "option"), [([], "--layers"), (["--languages", "qab"], "--layers"),
                                             (["--layers", "1", "--languages", "qab"], "--languages")])  # fmt: skip
def test_a_restriction_to_nothing_is_refused(broca, files, plan_of, tmp_path, extra, option):
    out = tmp_path / "out.safetensors"
    status, _, err = broca("edit", files / "model", "--restrict", plan_of("scale"), *extra, "--out", out)
    assert status == 2 and option in err and not out.exists()


@pytest.mark.parametrize("heads", ["99", "2-1", "x"])
def test_heads_are_called_heads(broca, files, plan_of, tmp_path, heads):
    restrict = ["--restrict", plan_of("steer2edit"), "--heads", heads]
    status, _, err = broca("edit", files / "model", *restrict, "--out", tmp_path / "x")
    assert status == 2 and f"heads {heads!r}" in err and "layer" not in err


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_gets_one_sentence(broca, files, tmp_path, name):
    words, value = REFUSALS[name]
    status, _, err = broca(
        "edit", files / "model", *arguments_of(files, words), "--out", tmp_path / "edit.safetensors"
    )
    assert status == 2, err
    assert value in err and "Traceback" not in err
    assert not (tmp_path / "edit.safetensors").exists()
