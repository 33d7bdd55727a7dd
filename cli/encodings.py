"""Output in an encoding that lacks characters: these are written as JSON escapes, and the reader is told."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_HANDLER = "broca-escape"


@contextmanager
def escaping() -> Iterator[None]:
    r"""What stdout and stderr cannot encode is written as \uXXXX, which ``--json`` may hold; told at the end.

    A path whose bytes are no UTF-8 is such output too, in any encoding.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    escaped: set[str] = set()

    def escape(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        escaped.add(error.encoding)
        units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)), error.end

    codecs.register_error(_HANDLER, escape)
    for stream in streams:
        stream.reconfigure(errors=_HANDLER)
    try:
        yield
    finally:
        escaped.discard("utf-8")
        if escaped and not sys.stderr.closed:
            told = ", ".join(sorted(escaped))
            print(
                f"broca: note: this output's encoding ({told}) lacks some characters, which stand as \\uXXXX: "
                "set PYTHONIOENCODING=utf-8",
                file=sys.stderr,
            )
        for stream, errors in zip(streams, before, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=errors)
