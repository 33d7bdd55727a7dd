"""Rules of the house, read from the source itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A package may import itself and those before it.
PACKAGES = ("neurons", "editing", "cli")
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


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_unpickled(path):
    assert pickles(path.read_text(encoding="utf-8")) == []


def test_module_names_say_what_is_inside():
    parts = {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not {part for part in parts if set(part.lower().split("_")) & VAGUE}


@pytest.mark.parametrize(
    ("package", "source", "expected"),
    [
        ("neurons", "import editing.plan", ["editing.plan"]),
        ("neurons", "def f():\n    from cli import main", ["cli"]),
        ("neurons", "from ..cli import main", ["..cli"]),
        ("editing", "if x:\n    from cli.main import main", ["cli.main"]),
        ("editing", "import neurons.corpus\nimport torch\nfrom .plan import Plan", []),
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
