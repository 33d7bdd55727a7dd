"""The two ways in which Broca says no."""


class BrocaError(Exception):
    """Something failed; the message says what, where and the mend.  Exit status 1."""


class UsageError(BrocaError):
    """What was asked for cannot be done as asked.  Exit status 2."""
