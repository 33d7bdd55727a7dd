"""Copy files in the background while their changed parts are written.

By a copy-on-write clone if the file system supports it; else the kernel copies all bytes that the caller does not
write.  Never by a hard link, through which writes would reach the source.
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
# On some systems sendfile supports only sockets.
_CANNOT_SEND = (errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.EOPNOTSUPP)


class Copies:
    """Background copies.

    Args:
        advance: called with the number of copied bytes, from another thread.
    """

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._copying = ThreadPoolExecutor(max_workers=1)
        self._writing = ThreadPoolExecutor(max_workers=1)
        self._copies: dict[Path, Future[None]] = {}
        self._written: list[Future[None]] = []
        self._stopped = threading.Event()

    def begin(self, source: Path, target: Path, left_out: Sequence[tuple[int, int]] = ()) -> None:
        """Create the target in its full length and start to copy.

        Args:
            source: a file.
            target: must not exist.
            left_out: (begin, end) of bytes that the caller writes, ascending.
        """
        with source.open("rb") as reader, target.open("xb") as writer:
            size = os.fstat(reader.fileno()).st_size
            try:
                # Blocks are shared until a write to the copy.
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
        """Mark the caller's part of a file as written; the file is synced once the rest is copied."""
        self.check()
        self._written.append(self._writing.submit(self._to_disk, target))

    def check(self) -> None:
        """Raise the error of a failed copy."""
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
                        raise OSError(f"{source} became shorter during the copy")
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
    """Context of background copies, which are complete and synced at its end; an error in it stops them.

    Raises:
        OSError: a copy failed.
    """
    under_way = Copies(advance)
    try:
        yield under_way
    except BaseException:
        under_way._end(stopped=True)
        raise
    under_way._end(stopped=False)


def _send(reader: int, writer: int, begin: int, count: int) -> int:
    """Copy bytes to the writer's position and return their number."""
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
