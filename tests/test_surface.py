"""``import neurons, editing``: the names that a researcher needs, and nothing is loaded for the others."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import editing
import neurons

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("package", [neurons, editing], ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_documented(package):
    assert {*package.__all__} <= {*dir(package)}
    for name in package.__all__:
        assert getattr(package, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


def test_the_docs_have_the_signature_of_every_public_function():
    described = re.findall(
        r"^\| `(\w+)(\(.*?\))` \|", (README.parent / "docs" / "python.md").read_text(), re.M
    )
    assert len(described) > 20
    for name, parameters in described:
        # Defaults that stand for a value of the project are named in the docstring.
        function = ast.parse(f"def {name}{parameters.replace('=...', '=None')}: ...").body[0].args
        public = getattr(neurons, name, None) or getattr(editing, name)
        signature = inspect.signature(public).parameters.values()
        keyword_only = [one.name for one in signature if one.kind is one.KEYWORD_ONLY]
        assert [one.arg for one in [*function.args, *function.kwonlyargs]] == [
            one.name for one in signature
        ], name
        assert [one.arg for one in function.kwonlyargs] == keyword_only, name


def test_importing_the_packages_loads_nothing():
    program = "import neurons, editing, sys; print(sorted(m for m in sys.modules if m in ('torch', 'numpy')))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_readmes_example_runs(tmp_path, monkeypatch):
    """On a few lines: the checkpoint that it leaves loads in transformers."""
    import transformers

    (example,) = [
        part.partition("```")[0] for part in README.read_text(encoding="utf-8").split("```python\n")[1:]
    ]
    root = README.parent
    short = tmp_path / "corpus"
    short.mkdir()
    for file in (root / "artifacts" / "demo" / "corpus").glob("*.txt"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (short / file.name).write_text("".join(lines[:40]), encoding="utf-8")
    here = example.replace("artifacts/demo/corpus", str(short)).replace("artifacts/", f"{root}/artifacts/")
    monkeypatch.chdir(tmp_path)
    exec(compile(here, str(README), "exec"), {})
    assert (tmp_path / "edit.safetensors").is_file()
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "steered-from-python")
