"""The page in a browser: nothing on its console, and no wider than a phone."""

import re
import shutil
import subprocess

import pytest
import studies

from editing.report.findings import read_findings
from editing.report.study import study_page
from neurons.files.artifact import json_bytes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
MEASURE = """<script>
const wide = [...document.querySelectorAll("body *")].filter(one => !one.closest(".scroll, .picture"))
  .filter(one => one.getBoundingClientRect().right > innerWidth + 1).map(one => one.tagName + one.className);
document.title = JSON.stringify([innerWidth, document.documentElement.scrollWidth, wide.length]);
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    directory = tmp_path_factory.mktemp("browser") / "study"
    directory.mkdir()
    long = "x" * 300
    studies.write_run(directory, name=long, text=f"{long} {studies.HOSTILE}", prompt=long)
    (directory / "ablation.json").write_bytes(json_bytes(studies.ablation(command=f"broca ablate {long}")))
    (directory / "tune.json").write_bytes(json_bytes(studies.tuned()))
    doses = {**studies.DOSES, long: studies.DOSES["hook"]}
    (directory / "methods.json").write_bytes(json_bytes(studies.dosed(doses)))
    return study_page(read_findings(directory)).decode()


def browse(directory, text, *options):
    """(what the browser prints, its console's lines) of a page."""
    path = directory / "page.html"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", f"--user-data-dir={directory / 'profile'}"),
            *options,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_nothing_on_the_console(page, tmp_path):
    shown, console = browse(tmp_path, page, "--dump-dom")
    assert console == [] and "<h1>Study: study</h1>" in shown


def test_a_console_message_would_be_seen(page, tmp_path):
    broken = page.replace("</main>", "<script>console.error('heard')</script></main>")
    assert "heard" in "".join(browse(tmp_path, broken, "--dump-dom")[1])


def test_it_is_no_wider_than_a_phone(page, tmp_path):
    shown, _ = browse(
        tmp_path, page.replace("</main>", f"</main>{MEASURE}"), "--dump-dom", "--window-size=390,800"
    )
    inner, scrolled, wide = map(int, re.search(r"<title>\[(\d+),(\d+),(\d+)\]", shown).groups())
    assert inner <= 500 and scrolled <= inner and wide == 0


def test_it_is_printed(page, tmp_path):
    browse(tmp_path, page, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
