"""The log of a live run, written beside it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from functools import partial

from triage.sinks.aside import Aside

__all__ = ["log_beside"]

_RECORD_BYTES = 1024
"""About what a line of the log holds in memory."""

_WAITING_BYTES = 4 << 20
_END_S = 2.0


class _Beside(logging.Handler):
    """Hands records to other handlers in a thread of its own; what does not fit is left out."""

    def __init__(self, handlers: Sequence[logging.Handler], aside: Aside) -> None:
        super().__init__()
        self._others = handlers
        self._aside = aside

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on."""
        for handler in self._others:
            if record.levelno >= handler.level:
                self._aside.post(partial(handler.handle, record), _RECORD_BYTES)


@contextlib.contextmanager
def log_beside() -> Iterator[None]:
    """Let no thread wait for whoever reads the log.

    A terminal that is held, or a pipe to a program that does not read, takes no more text: without
    this, the next thread with something to say would stand still.
    """
    root = logging.getLogger()
    handlers = list(root.handlers)
    aside = Aside("log", most_bytes=_WAITING_BYTES)
    beside = _Beside(handlers, aside)
    for handler in handlers:
        root.removeHandler(handler)
    root.addHandler(beside)
    try:
        yield
    finally:
        root.removeHandler(beside)
        for handler in handlers:
            root.addHandler(handler)
        aside.close(_END_S)
