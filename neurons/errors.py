"""The two ways in which Broca says no."""


class BrocaError(Exception):
    """Something failed; the message says what, where and the mend.  Exit status 1."""


class UsageError(BrocaError):
    """What was asked for cannot be done as asked.  Exit status 2."""


class NotFiniteError(BrocaError):
    """What was computed is NaN or infinite; the message says what it is (``neurons.models.not_finite`` says why)."""


class NothingToChangeError(BrocaError):
    """A method's thresholds leave no component to edit."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough for a sentence of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
