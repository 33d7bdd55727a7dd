"""SIGTERM: a command removes its temporary files and exits with its status."""

import subprocess
import sys

import pytest

WAITS = """
import os, signal, sys, tempfile, time, types
import click
import cli.main
{before}
@click.command()
def command():
    with tempfile.TemporaryDirectory(dir={folder!r}):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep({seconds})
        print("went on")
sys.modules["cli.wait"] = types.SimpleNamespace(command=command)
cli.main.COMMANDS["wait"] = "Wait."
sys.argv = ["broca", "wait"]
cli.main.main()
"""


def run(folder, before="", seconds=60):
    code = WAITS.format(folder=str(folder), before=before, seconds=seconds)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)


def test_leaves_nothing_and_says_so(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 143
    assert done.stderr.startswith("broca: stopped") and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("handler", ["signal.SIG_IGN", "lambda *_: None"])
def test_an_earlier_handler_is_kept(tmp_path, handler):
    done = run(tmp_path, f"signal.signal(signal.SIGTERM, {handler})", 0.1)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "went on\n"
