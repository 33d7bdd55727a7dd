"""Options that several commands share: places to write to, and several values behind one name."""

import click
import pytest
from click.testing import CliRunner

from cli.options import OUT_FILE, Many


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
