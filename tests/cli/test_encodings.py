"""Output in an encoding that lacks characters."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.encodings import escaping

ROOT = Path(__file__).parents[2]


def written(monkeypatch, text, encoding):
    """(stdout's bytes, stderr) of a program that prints the text."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="") for _ in range(2)]
    monkeypatch.setattr("sys.stdout", streams[0])
    monkeypatch.setattr("sys.stderr", streams[1])
    with escaping():
        print(text, end="")
    assert [stream.errors for stream in streams] == ["strict"] * 2
    for stream in streams:
        stream.flush()
    return streams[0].buffer.getvalue(), streams[1].buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("text", ["né", "Привет, мир", "你好 😀", "│", "\udcff in a path"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_cannot_be_encoded_is_escaped_so_that_json_stays_json(monkeypatch, text, encoding):
    document = json.dumps({"text": text}, ensure_ascii=False)
    out, err = written(monkeypatch, document, encoding)
    assert json.loads(out.decode(encoding)) == {"text": text}
    try:
        document.encode(encoding)
        assert (out.decode(encoding), err) == (document, "")
    except UnicodeEncodeError:
        assert ("PYTHONIOENCODING=utf-8" in err) == (encoding != "utf-8")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_table_of_text_is_written_to_an_ascii_stream(tmp_path, checkpoint_of, as_json):
    for language, text in {"ru": "Привет, мир", "zh": "你好"}.items():
        (tmp_path / f"{language}.txt").write_text(f"{text}\n" * 4 + f"{language}\n", encoding="utf-8")
    command = ["neuron", str(checkpoint_of()), "0", "0", "--corpus", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *command, *["--json"] * as_json],
        cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\\u041f" in done.stdout and b"PYTHONIOENCODING" in done.stderr
    if as_json:
        assert any(
            "Прив" in snippet["before"] + snippet["token"] + snippet["after"]
            for snippet in json.loads(done.stdout)["snippets"]
        )
