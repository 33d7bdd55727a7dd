"""SIGTERM ends a command as an exception does, so that what it made for the time being is put away."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any

STATUS = 128 + signal.SIGTERM  # as shells have it


class Terminated(SystemExit):
    """No KeyboardInterrupt, which some libraries drop."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated inside the block.

    Nothing changes where the signal is ignored or somebody handles it already, and outside the main thread,
    where no handler may be set.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or current_thread() is not main_thread():
        yield
        return

    def terminated(*_: Any) -> None:
        # A second one ends the process at once.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated(STATUS)

    signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
