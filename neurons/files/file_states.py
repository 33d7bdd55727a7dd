"""A cache of values computed from files, valid while the files are unchanged.

Files are unchanged while their names, inodes, sizes and times of change are the same.  The clock of such times
ticks every few milliseconds, so a file could change twice within a tick: the computation waits until the tick
of the last change is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

TICK = 20_000_000  # nanoseconds; Linux ticks every 1 to 10 ms

_State = tuple[tuple[str, int, int, int, int, int], ...]


class OncePerState:
    """A cache of one text for each path."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[_State, str]] = {}

    def get(self, place: Path, files: Sequence[Path], compute: Callable[[], str]) -> str:
        """The result of ``compute``, cached while the files are unchanged.

        Args:
            place: the path that the text describes.
            files: all files that it depends on, which must exist.
        """
        place, state = place.absolute(), _state(files)
        kept = self._kept.get(place)
        if kept is not None and kept[0] == state:
            return kept[1]
        _wait_out_the_tick(state)
        state = _state(files)
        text = compute()
        if _state(files) == state:
            self._kept[place] = state, text
        return text


def _state(files: Sequence[Path]) -> _State:
    states = []
    for file in files:
        status = file.stat()
        # Unlike the modification time, ctime cannot be set by hand.
        times = status.st_mtime_ns, status.st_ctime_ns
        states.append((str(file), status.st_dev, status.st_ino, status.st_size, *times))
    return tuple(states)


def _wait_out_the_tick(state: _State) -> None:
    newest = max((file[-1] for file in state), default=0)
    left = newest + TICK - time.time_ns()
    if 0 < left <= TICK:
        time.sleep(left / 1e9)
