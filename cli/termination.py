"""SIGTERM as an exception, so that a command removes its temporary files."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any


class Terminated(SystemExit):
    """SIGTERM was received; not a KeyboardInterrupt, which some libraries swallow."""


@contextmanager
def terminable() -> Iterator[None]:
    """Context in which SIGTERM raises Terminated.

    It has no effect if the signal is ignored or already handled, and outside the main thread, where Python does
    not allow handlers.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or current_thread() is not main_thread():
        yield
        return

    def terminated(*_: Any) -> None:
        # A second SIGTERM ends the process immediately.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated(128 + signal.SIGTERM)  # the convention of shells

    signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
