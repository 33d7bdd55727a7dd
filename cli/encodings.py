"""Escapes for output in encodings that lack some characters."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_HANDLER = "broca-escape"


@contextmanager
def escaping() -> Iterator[None]:
    r"""Context in which stdout and stderr write characters that they cannot encode as \uXXXX, valid in JSON.

    This includes bytes of paths that are not UTF-8, in any encoding.  A note at the end names the encoding.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    previous = [stream.errors for stream in streams]
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
            encodings = ", ".join(sorted(escaped))
            print(
                f"broca: note: the output encoding ({encodings}) lacks some characters, written as \\uXXXX: "
                "set PYTHONIOENCODING=utf-8",
                file=sys.stderr,
            )
        for stream, errors in zip(streams, previous, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=errors)
