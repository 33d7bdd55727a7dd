"""Exceptions of Broca."""


class BrocaError(Exception):
    """Something failed; the message names the fault, the place and the fix.  Exit status 1."""


class UsageError(BrocaError):
    """Invalid arguments or options.  Exit status 2."""


class NotFiniteError(BrocaError):
    """A computed value, named in the message, is NaN or infinite (``neurons.models.not_finite`` says why)."""


class ExplainedNotFiniteError(NotFiniteError):
    """The same, with the cause and the remedy in the message."""


class NothingToChangeError(BrocaError):
    """A method's thresholds leave no component to edit."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
