"""Whether answers to requests for code contain code: a fenced block, and Python that parses."""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Sequence

import regex

# The rest of the line after the fence names the language.  An answer that is cut off has no closing fence.
_BLOCK = regex.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", regex.DOTALL | regex.MULTILINE)


def blocks(answer: str) -> list[str]:
    """The content of each fenced block; the last one may lack its closing fence."""
    return [str(content) for content in _BLOCK.findall(answer) if content.strip()]


def parses(code: str) -> bool:
    """Whether a text is Python: it parses, and contains a statement."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as an invalid escape sequence
        try:
            # A block in a list is indented.
            return bool(ast.parse(textwrap.dedent(code)).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False


def has_block(answers: Sequence[str]) -> list[bool]:
    """Whether each answer has a fenced block."""
    return [bool(blocks(answer)) for answer in answers]


def has_python(answers: Sequence[str]) -> list[bool]:
    """Whether the first fenced block of each answer parses as Python."""
    return [any(map(parses, blocks(answer)[:1])) for answer in answers]
