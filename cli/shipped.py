"""Directories that Broca ships: the demo, questions, multiple-choice items and requests for code."""

from __future__ import annotations

from pathlib import Path

DEMO, QUESTIONS, CHOICES, CODE_REQUESTS = "demo", "questions", "choices", "code_requests"
_IN_WHEEL = {DEMO: "shipped"}  # names there, if others: cli/demo.py is a command


def shipped(name: str) -> Path:
    """A shipped directory: beside this file in an installed wheel, under artifacts/ in a checkout.

    Raises:
        BrocaError: it is in neither place.
    """
    from neurons.errors import BrocaError

    package = Path(__file__).resolve().parent
    for directory in (package / _IN_WHEEL.get(name, name), package.parent / "artifacts" / name):
        if directory.is_dir():
            return directory
    raise BrocaError(f"the {name} are missing from this installation: install broca again")
