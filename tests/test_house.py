"""Rules of the house, read from the source itself."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package may import itself and those before it.
PACKAGES = ("neurons", "editing", "cli")
# Rooms of a package, from the ground up: a room imports from those below it.
ROOMS = {
    "neurons": (
        "files", "architectures", "models", "text", "statistics", "scorers", "recording", "neuron_sets", "ablation"
    ),
    "editing": (
        "directions", "plans", "checkpoints", "methods", "hooks", "evaluation", "study", "report", "pipeline"
    ),
}  # fmt: skip
VAGUE = {"utils", "util", "helpers", "helper", "manager", "managers", "misc", "common"}
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(tree):
    """Names of all modules that a module imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def wrong_imports(source, package):
    later = PACKAGES[PACKAGES.index(package) + 1 :]
    names = list(imported(ast.parse(source)))
    return [name for name in names if name.partition(".")[0] in (*later, "tests") or name.startswith("..")]


def pickles(source):
    """Pickle imports, and loads that may unpickle."""
    tree = ast.parse(source)
    found = [name for name in imported(tree) if name.partition(".")[0] in PICKLES]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"torch.{alias.name}" for alias in node.names if alias.name == "load"]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if call == "torch.load" and settings.get("weights_only") != "True":
            found.append(call)
        if settings.get("allow_pickle", "False") != "False":
            found.append(f"{call} with allow_pickle")
    return found


def name_of(path):
    return str(path.relative_to(ROOT))


def test_there_are_sources_to_read():
    packages = {path.relative_to(ROOT).parts[0] for path in FILES}
    assert packages == set(PACKAGES)
    assert len(FILES) > 15


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path):
    assert wrong_imports(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parts[0]) == []


def rooms_above(source, package, room):
    """Imports of a room's file from rooms above it."""
    order = ROOMS[package]
    above = order[order.index(room) + 1 :]
    parts = [name.split(".") for name in imported(ast.parse(source))]
    return [".".join(name) for name in parts if name[0] == package and len(name) > 1 and name[1] in above]


def test_the_rooms_are_those_on_disk():
    for package, rooms in ROOMS.items():
        there = {
            path.name for path in (ROOT / package).iterdir() if path.is_dir() and path.name != "__pycache__"
        }
        assert there == set(rooms)
        assert {path.name for path in (ROOT / package).glob("*.py")} <= {
            "__init__.py",
            "errors.py",
            "setting.py",
        }
        for room in rooms:
            assert ast.get_docstring(ast.parse((ROOT / package / room / "__init__.py").read_text())), room
        tests = {path.name for path in (ROOT / "tests" / package).iterdir() if path.is_dir()}
        assert tests - {"__pycache__"} == set(rooms)


IN_ROOMS = [
    path
    for path in FILES
    if len(path.relative_to(ROOT).parts) == 3 and path.relative_to(ROOT).parts[0] in ROOMS
]


@pytest.mark.parametrize("path", IN_ROOMS, ids=name_of)
def test_imports_run_from_room_to_room_one_way(path):
    package, room, _ = path.relative_to(ROOT).parts
    assert rooms_above(path.read_text(encoding="utf-8"), package, room) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from neurons.recording.record import forward", 1),
        ("def f():\n    import neurons.ablation.study", 1),
        ("from neurons.files.artifact import load_artifact\nfrom neurons.errors import BrocaError", 0),
        ("from neurons.text.batches import TokenBatch", 0),
    ],
)
def test_the_check_of_rooms_itself(source, count):
    assert len(rooms_above(source, "neurons", "text")) == count


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_unpickled(path):
    assert pickles(path.read_text(encoding="utf-8")) == []


def test_module_names_say_what_is_inside():
    parts = {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not {part for part in parts if set(part.lower().split("_")) & VAGUE}


@pytest.mark.parametrize(
    ("package", "source", "expected"),
    [
        ("neurons", "import editing.plans.plan", ["editing.plans.plan"]),
        ("neurons", "def f():\n    from cli import main", ["cli"]),
        ("neurons", "from ..cli import main", ["..cli"]),
        ("editing", "if x:\n    from cli.main import main", ["cli.main"]),
        ("editing", "import neurons.text.corpus\nimport torch\nfrom .plan import Plan", []),
        ("cli", "from editing import plan\nimport neurons", []),
        ("cli", "import tests.models", ["tests.models"]),
    ],
)
def test_the_import_check_itself(package, source, expected):
    assert wrong_imports(source, package) == expected


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import pickle", 1),
        ("def f():\n    from pickle import loads", 1),
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, map_location='cpu', weights_only=True)", 0),
        ("from torch import load", 1),
        ("numpy.load(path, allow_pickle=True)", 1),
        ("numpy.load(path)\nsafetensors.torch.load(data)", 0),
    ],
)
def test_the_pickle_check_itself(source, count):
    assert len(pickles(source)) == count


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_every_benchmark_imports_what_there_is(name):
    importlib.import_module(name)
