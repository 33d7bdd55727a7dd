"""Fenced blocks in answers, and whether they are Python."""

import pytest

from editing.evaluation.code_answers import blocks, has_block, has_python

PYTHON = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    "answer, block, python",
    [
        (f"Sure:\n\n```python\n{PYTHON}```\nIt adds.", True, True),
        (f"```\n{PYTHON}```", True, True),
        (f"1. Like this:\n   ```py\n{PYTHON}   ```", True, True),
        ("1. So:\n   ```python\n   if True:\n       print(1)\n   ```", True, True),
        (f"```python\n{PYTHON}", True, True),  # cut off behind a whole statement
        ("```python\ndef add(a, b):\n    return a + (b", True, False),  # cut off inside one
        ("```python\nfonction ajouter(a, b):\n    retourne a + b\n```", True, False),
        (f"```text\nnot this one\n```\n```python\n{PYTHON}```", True, False),  # the first block counts
        (PYTHON, False, False),
        ("Use `a + b` for that.", False, False),
        ("```python\n\n```", False, False),
        ("```python\n# only a comment\n```", True, False),
        ("", False, False),
    ],
)
def test_answers(answer, block, python):
    assert has_block([answer, "no"]) == [block, False]
    assert has_python([answer, "no"]) == [python, False]


def test_each_block_by_its_content():
    assert blocks("```a\nx\n```\ntext\n```b\ny\nz\n```") == ["x\n", "y\nz\n"]


def test_code_that_python_warns_of_is_quiet(recwarn):
    assert has_python(['```\nprint("\\d" is 3)\n```']) == [True]
    assert not recwarn.list
