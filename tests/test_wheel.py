"""``broca demo`` works from an installed wheel: the demo's files travel in it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    where = tmp_path_factory.mktemp("wheel")
    build = ["pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(where), str(ROOT)]
    subprocess.run([sys.executable, "-m", *build], check=True, capture_output=True)
    (wheel,) = where.glob("broca-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(where / "site")
    return where / "site"


def test_the_wheel_holds_packages_and_demo(unpacked):
    for name in ("neurons", "editing", "cli"):
        source = {path.relative_to(ROOT) for path in (ROOT / name).rglob("*.py")}
        assert source <= {path.relative_to(unpacked) for path in unpacked.rglob("*.py")}
    templates = {path.relative_to(ROOT) for path in (ROOT / "editing" / "report" / "templates").iterdir()}
    assert templates and all((unpacked / path).is_file() for path in templates)
    for path in ("recipe.toml", "model/model.safetensors", "model/README.md", "corpus/en.txt"):
        shipped = unpacked / "cli" / "shipped" / path
        assert shipped.read_bytes() == (ROOT / "artifacts" / "demo" / path).read_bytes()
    for folder in ("questions", "choices", "code_requests"):
        files = {path.name for path in (ROOT / "artifacts" / folder).iterdir()}
        assert files == {path.name for path in (unpacked / "cli" / folder).iterdir()}


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("DEMO", "shipped"),
        ("QUESTIONS", "questions"),
        ("CHOICES", "choices"),
    ],
)
def test_commands_find_their_files_there(unpacked, tmp_path, name, folder):
    done = subprocess.run(
        [sys.executable, "-c", f"from cli.shipped import {name}, shipped; print(shipped({name}))"],
        env={"PYTHONPATH": str(unpacked)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(unpacked / "cli" / folder), done.stderr
