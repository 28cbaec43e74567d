"""What a live run says, written beside it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from functools import partial
from typing import TextIO

from triage.sinks.aside import Aside

__all__ = ["said_beside"]

_WAITING_BYTES = 4 << 20
_LINE_BYTES = 512
"""About what a line that waits holds beside its text."""

_END_S = 2.0


class _Plain(io.TextIOBase):
    """A stream without Python's buffer; what cannot be written is left out.

    What a buffer could not write it tries again at the end of the process, and a thread that
    hangs in it hangs that end.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        try:
            self._fd = stream.fileno()
        except (OSError, ValueError):
            self._fd = -1

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return self._stream.encoding or "utf-8"

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def write(self, text: str) -> int:
        """Write text, or what of it goes."""
        with contextlib.suppress(OSError, ValueError):
            if self._fd < 0:
                return self._stream.write(text)
            left = memoryview(text.encode(self.encoding, "replace"))
            while left:
                left = left[os.write(self._fd, left) :]
        return len(text)


class _Posted(_Plain):
    """The same, written in another thread."""

    def __init__(self, stream: TextIO, aside: Aside) -> None:
        super().__init__(stream)
        self._aside = aside

    def write(self, text: str) -> int:
        """Have text written."""
        if text:
            self._aside.post(partial(super().write, text), _LINE_BYTES + len(text))
        return len(text)


@contextlib.contextmanager
def said_beside() -> Iterator[TextIO]:
    """Let no thread wait for whoever reads the log and standard error; gives a stream to standard
    error.

    A terminal that is held, or a pipe to a program that does not read, takes no more text: without
    this, the next thread with something to say would stand still. A pipe to a program that has
    ended, or a file on a full disk, would end the run.
    """
    aside = Aside("log", most_bytes=_WAITING_BYTES)
    shown: TextIO = _Posted(sys.stderr, aside)  # type: ignore[assignment]
    # The stream is replaced, not the handler: one that writes holds its lock, which the end of
    # the process takes as well.
    streams = [
        (handler, handler.setStream(shown))
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
    ]
    try:
        yield shown
    finally:
        for handler, stream in streams:
            handler.setStream(stream)
        aside.close(_END_S)
