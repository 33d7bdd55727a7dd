"""``broca chat --web`` in a real browser: the answers of transformers, and nothing from another machine."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import pytest
from test_cli_chat import stock_answers, with_context

from cli.chat_page import chat_page
from editing.evaluation.talk import Talk

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PATIENCE = 60_000  # milliseconds


def test_without_gradio_the_extra_is_named(broca, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, _, errors = broca("chat", "model", "--web")
    assert status == 2 and "broca[web]" in errors and len(errors.splitlines()) == 1


def test_an_error_takes_back_the_message(chatting, monkeypatch):
    class PageError(Exception):
        def __init__(self, text, print_exception):
            super().__init__(text)

    template = (
        "{{ raise_exception('no system message') if messages[0].role == 'system' }}{{ messages[-1].content }}"
    )
    monkeypatch.setattr(chatting.tokenizer, "chat_template", template)
    gradio = MagicMock(Error=PageError)
    chat_page(gradio, {"model": partial(Talk, chatting)}, None)
    respond = gradio.Textbox.return_value.submit.call_args.args[0]
    before = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    shown = []
    with pytest.raises(PageError, match="no system message"):
        shown.extend(respond("a cab", "be bad", before))
    assert shown[-1:] == [("a cab", before, *before)]


@pytest.fixture
def twins(chat_model):
    model = with_context(chat_model, 512)
    return model, shutil.copytree(model, model.parent / "twin")


@pytest.fixture
def address(twins):
    """Of the page of two models, on a port of its own."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'broca[web]'")
    model, twin = twins
    options = ["--beside", twin, "--web", "--new-tokens", "8", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "cli.main", "chat", model, *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "NO_PROXY": "*", "no_proxy": "*"},
    )
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait(30)


@pytest.fixture
def page(address, tmp_path):
    """The page, with the requests and the console's errors of the browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=CHROMIUM,
            args=OPTIONS,
            viewport={"width": 1100, "height": 800},
        )
        page = browser.pages[0]
        page.set_default_timeout(PATIENCE)
        page.requested, page.heard = [], []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("console", lambda line: page.heard.append(line.text) if line.type == "error" else None)
        page.goto(address)
        yield page
        browser.close()


def say(page, text):
    box = page.get_by_test_id("textbox").last
    box.fill(text)
    box.press("Enter")


def test_a_conversation_with_two_models(page, address, twins):
    from playwright.sync_api import expect

    def answered(expected):
        """Both columns show the answers; control characters of a tiny model are no text of an element."""
        found = page.get_by_test_id("bot")
        expect(found).to_have_count(2 * len(expected), timeout=PATIENCE)
        expect(page.get_by_test_id("textbox").last).to_have_value("")
        page.wait_for_function(
            "texts => texts.every((text, i) => document.querySelectorAll('[data-testid=bot]')[i].innerText.trim() == text)",
            arg=[answer.strip() for _ in twins for answer in expected],
        )

    model, twin = twins
    turns = ["what\n    is\na cab?", "and a bad cab?"]
    stock = stock_answers(model, turns, 8)
    for count, turn in enumerate(turns, start=1):
        say(page, turn)
        answered(stock[:count])
    assert page.get_by_test_id("user").first.inner_text().strip() == turns[0]
    for name in (model, twin):
        assert page.get_by_text(str(name), exact=True).count()
    page.get_by_role("button", name="Clear", exact=True).last.click()
    expect(page.get_by_test_id("bot")).to_have_count(0, timeout=PATIENCE)
    page.get_by_test_id("textbox").first.fill("be bad")
    say(page, turns[0])
    (answer,) = stock_answers(model, turns[:1], 8, [{"role": "system", "content": "be bad"}])
    assert answer != stock[0]
    answered([answer])
    requested = [urlsplit(url) for url in page.requested]
    assert {url.hostname for url in requested if url.scheme.startswith("http")} == {"127.0.0.1"}
    assert urlsplit(address).hostname == "127.0.0.1" and page.heard == []
