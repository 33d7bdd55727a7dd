"""What is computed from files, computed once in a process for each state that they are in.

Files are in the same state while their names, places on disk, sizes and times of change are the same.  The
system's clock of such times ticks every few milliseconds, so that a file could change twice within one tick:
what is computed from it waits until the tick in which it last changed is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

TICK = 20_000_000  # nanoseconds; Linux ticks every 1 to 10 ms

_State = tuple[tuple[str, int, int, int, int, int], ...]


class OncePerState:
    """Remembers one text for each place: the last that was computed there."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[_State, str]] = {}

    def get(self, place: Path, files: Sequence[Path], compute: Callable[[], str]) -> str:
        """What ``compute`` gives, or gave when the files were in the state that they are in now.

        Args:
            place: what the text is of.
            files: everything that it depends on; all of them are there.
            compute: reads the files.
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

    def forget(self) -> None:
        self._kept.clear()


def _state(files: Sequence[Path]) -> _State:
    found = []
    for file in files:
        status = file.stat()
        # The time of change cannot be set by hand, as that of modification can.
        times = status.st_mtime_ns, status.st_ctime_ns
        found.append((str(file), status.st_dev, status.st_ino, status.st_size, *times))
    return tuple(found)


def _wait_out_the_tick(state: _State) -> None:
    newest = max((one[-1] for one in state), default=0)
    left = newest + TICK - time.time_ns()
    if 0 < left <= TICK:
        time.sleep(left / 1e9)
