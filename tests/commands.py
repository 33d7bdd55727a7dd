"""Commands in the process of the tests, and what they say."""

from click.testing import CliRunner


def run(command, *arguments):
    """The result of a click command that succeeds; raises what it raises."""
    result = CliRunner().invoke(command, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def one_sentence(err):
    """The error of a command, beside warnings."""
    lines = [line for line in err.strip().splitlines() if not line.startswith("broca: warning")]
    assert len(lines) == 1 and lines[0].startswith("broca: "), err
    return lines[0]
