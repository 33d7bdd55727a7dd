"""Progress bars: the work that commands announce is the work that they report, and a terminal shows the time left."""

import io

import models
import pytest
from rich.console import Console

import cli.screen
from cli.screen import Screen


@pytest.fixture
def bars(monkeypatch):
    """[announced, done] of every bar without a total of its own."""
    made = []

    class Counted(cli.screen._Advance):
        def __init__(self, bar, task, grows):
            super().__init__(bar, task, grows)
            self.counts = [0, 0]
            if grows:
                made.append(self.counts)

        def __call__(self, count):
            super().__call__(count)
            self.counts[1] += count

        def expect(self, count):
            super().expect(count)
            self.counts[0] += count

        def begin_stage(self, title, total, unit):
            super().begin_stage(title, total, unit)
            self.counts = [total, 0]
            made.append(self.counts)

    monkeypatch.setattr(cli.screen, "_Advance", Counted)
    return made


def test_commands_announce_what_they_read(broca, bars, checkpoint_of, tmp_path):
    model, text = checkpoint_of(), models.write_corpus(tmp_path / "text", lines=30)
    direction, prompts = tmp_path / "direction.safetensors", tmp_path / "prompts"
    prompts.mkdir()
    for language in ("qaa", "qab"):
        (prompts / f"{language}.jsonl").write_text('{"prompt": "a b", "answer": "c"}\n' * 3)
    pair = ("--source", "qaa", "--target", "qab")
    for words in (
        ("record", model, "--corpus", text, "--for", "lape"),
        ("identify", model, "--corpus", text, "--top-rate", 0.1),
        (
            "identify",
            model,
            "--prompts",
            prompts,
            "--control",
            prompts,
            "--method",
            "culnig",
            "--top-rate",
            0.1,
        ),
        ("direction", model, "--corpus", text, *pair),
        ("edit", model, "--direction", direction, "--corpus", text),
        ("edit", model, "--method", "ara", "--languages", "qaa,qab", "--corpus", text),
        ("sae", model, "--corpus", text, "--layers", "1", "--features", 8, "--epochs", 1, "--states", 200),
    ):
        before = len(bars)
        out = direction if words[0] == "direction" else tmp_path / f"{len(bars)}.safetensors"
        status, _, err = broca(*words, "--out", out)
        assert status == 0, err
        assert len(bars) > before and all(announced == done > 0 for announced, done in bars[before:]), words


@pytest.mark.parametrize("total", [None, 8])
def test_a_terminal_shows_the_time_left(total):
    screen, shown = Screen(), io.StringIO()
    screen._err = Console(file=shown, force_terminal=True, width=120)
    with screen.progress("Reading [1:x:2]", total, "tokens") as advance:
        advance.expect(8)
        advance(4)
        advance(2)
    assert "6/8" in shown.getvalue() and "0:00:0" in shown.getvalue() and "[1:x:2]" in shown.getvalue()


def test_text_is_printed_as_it_is(capsys):
    screen = Screen()
    screen.say("s[1:x:2]")
    screen.stage("a:v:2", "runs")
    screen.result("runs/a:v:2/n.safetensors")
    printed, errors = capsys.readouterr()
    assert printed.splitlines() == ["s[1:x:2]", "runs/a:v:2/n.safetensors"]
    assert errors == "a:v:2: runs\n"


@pytest.mark.parametrize(("rank", "shows"), [("0", True), ("1", False)])
def test_one_process_of_a_launcher_shows_bars(monkeypatch, rank, shows):
    monkeypatch.setenv("RANK", rank)
    screen, shown = Screen(), io.StringIO()
    screen._err = Console(file=shown, force_terminal=True, width=120)
    with screen.progress("Reading", 8, "tokens") as advance:
        advance(8)
    assert ("8/8" in shown.getvalue()) == shows
