"""Shared options: input and output paths, and options with several values."""

import os

import click
import pytest
from click.testing import CliRunner

from cli.options import IN_DIRECTORY, IN_FILE, IN_PATH, OUT_DIRECTORY, OUT_FILE, Fractions, MultiValueCommand


@click.command(cls=MultiValueCommand)
@click.argument("model", required=False)
@click.option("--files", multiple=True)
@click.option("--out", type=OUT_FILE)
@click.option("--flag", is_flag=True)
def echo(model, files, out, flag):
    click.echo(f"{model} {','.join(files)} {out} {flag}")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--files", "a", "b", "--flag"], "None a,b None True"),
        (["m", "--files", "a", "--files", "b", "c"], "m a,b,c None False"),
        (["m", "--flag", "--files", "a"], "m a None True"),
        (["--files", "a", "--", "m"], "m a None False"),
        (["--files", "--flag", "b", "--flag"], "None --flag,b None True"),
        (["--files", "--files", "b"], "None --files,b None False"),
        (["--files", "--", "b"], "None --,b None False"),
    ],
)
def test_an_option_accepts_several_values(arguments, expected):
    assert CliRunner().invoke(echo, arguments).output.strip() == expected


def test_invalid_input_paths(tmp_path):
    (tmp_path / "file").write_text("")
    for kind, valid in (
        (IN_FILE, [tmp_path / "file"]),
        (IN_DIRECTORY, [tmp_path]),
        (IN_PATH, [tmp_path / "file", tmp_path]),
    ):
        for path in (tmp_path / "file", tmp_path, tmp_path / "none", tmp_path / ("n" * 5000)):
            fault = kind.fault(path)
            assert fault is None if path in valid else fault is not None and str(path) in fault


def test_a_directory_to_write_may_be_there(tmp_path):
    (tmp_path / "file").write_text("")
    assert OUT_DIRECTORY.convert(tmp_path, None, None) == tmp_path
    assert OUT_DIRECTORY.convert(tmp_path / "new", None, None) == tmp_path / "new"
    with pytest.raises(click.BadParameter, match="cannot be written"):
        OUT_FILE.convert(tmp_path / ("n" * 5000), None, None)
    with pytest.raises(click.BadParameter, match="file"):
        OUT_DIRECTORY.convert(tmp_path / "file", None, None)
    os.mkfifo(tmp_path / "pipe")
    for kind in (OUT_FILE, OUT_DIRECTORY):
        with pytest.raises(click.BadParameter, match="device or a pipe"):
            kind.convert(tmp_path / "pipe", None, None)


def test_fractions_are_in_ascending_order_and_each_once():
    assert Fractions().convert("40%, 5%,0.1,1%,10%,100%", None, None) == (0.01, 0.05, 0.1, 0.4, 1.0)
