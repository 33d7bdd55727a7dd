"""Files copied in the background while their changed parts are written: bytes alone, no tensors.

A copy-on-write clone where the file system has them; else the kernel copies all bytes but those that somebody
else is about to write.  Never a hard link, through which a write would reach the source.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

_FICLONE = 0x40049409
_AT_ONCE = 16 * 2**20
# Some systems send to sockets only.
_CANNOT_SEND = (errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.EOPNOTSUPP)


class Copies:
    """Copies under way.

    Args:
        advance: called with the number of bytes that were copied, from another thread.
    """

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._copying = ThreadPoolExecutor(max_workers=1)
        self._writing = ThreadPoolExecutor(max_workers=1)
        self._copies: dict[Path, Future[None]] = {}
        self._written: list[Future[None]] = []
        self._stopped = threading.Event()

    def begin(self, source: Path, target: Path, left_out: Sequence[tuple[int, int]] = ()) -> None:
        """Make the target, in its full length, and begin to fill it.

        Args:
            source: a file.
            target: which must not exist.
            left_out: (begin, end) of bytes that the caller writes, ascending.
        """
        with source.open("rb") as reader, target.open("xb") as writer:
            size = os.fstat(reader.fileno()).st_size
            try:
                # Shared until a write, which then stays in the copy.
                fcntl.ioctl(writer, _FICLONE, reader.fileno())
                gaps = []
                self._advance(size)
            except OSError:
                writer.truncate(size)
                begins = [0, *(end for _, end in left_out)]
                gaps = list(zip(begins, [*(begin for begin, _ in left_out), size], strict=True))
                self._advance(sum(end - begin for begin, end in left_out))
        self._copies[target] = self._copying.submit(self._fill, source, target, gaps)

    def written(self, target: Path) -> None:
        """The caller has written its part of a file, which goes to the disk once the rest is copied."""
        self.check()
        self._written.append(self._writing.submit(self._to_disk, target))

    def check(self) -> None:
        """Raise what a copy has failed with."""
        for copy in [*self._copies.values(), *self._written]:
            if copy.done():
                copy.result()

    def _fill(self, source: Path, target: Path, gaps: Sequence[tuple[int, int]]) -> None:
        with source.open("rb") as reader, target.open("r+b") as writer:
            for begin, end in gaps:
                os.lseek(writer.fileno(), begin, os.SEEK_SET)
                while begin < end and not self._stopped.is_set():
                    sent = _send(reader.fileno(), writer.fileno(), begin, min(_AT_ONCE, end - begin))
                    if sent == 0:
                        raise OSError(f"{source} became shorter while it was copied")
                    begin += sent
                    self._advance(sent)

    def _to_disk(self, target: Path) -> None:
        self._copies[target].result()
        if not self._stopped.is_set():
            with target.open("rb") as stream:
                os.fsync(stream.fileno())

    def _end(self, stopped: bool) -> None:
        if stopped:
            self._stopped.set()
        for pool in (self._copying, self._writing):
            pool.shutdown(wait=True, cancel_futures=stopped)
        if not stopped:
            self.check()


@contextmanager
def copies(advance: Callable[[int], None]) -> Iterator[Copies]:
    """Copies that are finished, and on the disk, when the block ends; stopped where it fails.

    Raises:
        OSError: what a copy has failed with.
    """
    under_way = Copies(advance)
    try:
        yield under_way
    except BaseException:
        under_way._end(stopped=True)
        raise
    under_way._end(stopped=False)


def _send(reader: int, writer: int, begin: int, count: int) -> int:
    """Copy bytes to where the writer stands; how many were."""
    try:
        return os.sendfile(writer, reader, begin, count)
    except OSError as error:
        if error.errno not in _CANNOT_SEND:
            raise
    content = os.pread(reader, count, begin)
    written = 0
    while written < len(content):
        written += os.write(writer, content[written:])
    return written
