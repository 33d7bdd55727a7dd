"""The session in docs/adding-an-architecture.md runs and prints what the page says."""

import doctest
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from neurons.architectures import layouts
from neurons.architectures.layouts import LAYOUTS

PAGE = Path(__file__).parents[3] / "docs" / "adding-an-architecture.md"


@pytest.fixture(autouse=True)
def _forget_the_page(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = dict(LAYOUTS)
    yield
    LAYOUTS.clear()
    LAYOUTS.update(before)
    for registered in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        registered._extra_content.clear()


def test_the_session_prints_what_the_page_says():
    found = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 20
    assert found.failed == 0


def test_the_page_shows_the_row_of_the_table():
    row = PAGE.read_text(encoding="utf-8").split('```python\n"modernbert-decoder": ')[1].split(",\n```")[0]
    assert eval(row, vars(layouts)) == LAYOUTS["modernbert-decoder"]
