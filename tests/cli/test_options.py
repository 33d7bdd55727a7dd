"""Options that several commands share: places to write to, and several values behind one name."""

import click
import pytest
from click.testing import CliRunner

from cli.options import IN_DIRECTORY, IN_FILE, IN_PATH, OUT_DIRECTORY, OUT_FILE, Many, Shares


@click.command(cls=Many)
@click.argument("model", required=False)
@click.option("--files", multiple=True)
@click.option("--out", type=OUT_FILE)
@click.option("--flag", is_flag=True)
def echo(model, files, out, flag):
    click.echo(f"{model} {','.join(files)} {out} {flag}")


@pytest.mark.parametrize(
    ("arguments", "said"),
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
def test_one_name_takes_several_values(arguments, said):
    assert CliRunner().invoke(echo, arguments).output.strip() == said


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    for out, said in ((tmp_path, "is a directory"), (tmp_path / "file" / "x", "is a file, so")):
        result = CliRunner().invoke(echo, ["--out", str(out)])
        assert result.exit_code == 2 and said in result.output
    assert CliRunner().invoke(echo, ["--out", str(tmp_path / "new" / "x")]).exit_code == 0
    assert not (tmp_path / "new").exists()


def test_what_is_wrong_with_a_path(tmp_path):
    (tmp_path / "file").write_text("")
    for kind, file, folder, none in (
        (IN_FILE, None, "is a directory: name a file", "no such file"),
        (IN_DIRECTORY, "is a file: name a directory", None, "no such directory"),
        (IN_PATH, None, None, "no such file or directory"),
    ):
        for path, said in ((tmp_path / "file", file), (tmp_path, folder), (tmp_path / "none", none)):
            fault = kind.fault(path)
            assert (
                fault is None if said is None else fault is not None and said in fault and str(path) in fault
            )
    assert "cannot be read" in IN_FILE.fault(tmp_path / ("n" * 5000)) or "no such" in IN_FILE.fault(
        tmp_path / ("n" * 5000)
    )


def test_a_directory_to_write_may_be_there(tmp_path):
    (tmp_path / "file").write_text("")
    assert OUT_DIRECTORY.convert(tmp_path, None, None) == tmp_path
    assert OUT_DIRECTORY.convert(tmp_path / "new", None, None) == tmp_path / "new"
    with pytest.raises(click.BadParameter, match="is a file: name a directory"):
        OUT_DIRECTORY.convert(tmp_path / "file", None, None)


def test_shares_are_in_ascending_order_and_each_once():
    assert Shares().convert("40%, 5%,0.1,1%,10%,100%", None, None) == (0.01, 0.05, 0.1, 0.4, 1.0)
