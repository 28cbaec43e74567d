"""The log of a live run: a reader that does not read holds up nobody."""

from __future__ import annotations

import logging
import os
import sys
import threading

import pytest

from triage.cli.logs import said_beside


def test_whoever_logs_does_not_wait_for_a_held_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty thousand lines, more than pipe and memory may hold, return at once; the first of
    them are written when the reader goes on, in order, and afterwards the log is as before, held
    or not."""
    out, into = os.pipe()
    with os.fdopen(into, "w") as stderr, os.fdopen(out) as reader:
        monkeypatch.setattr(sys, "stderr", stderr)
        root, handler = logging.getLogger(), logging.StreamHandler(stderr)
        before = list(root.handlers)
        root.addHandler(handler)
        try:
            with said_beside():
                for i in range(20_000):
                    logging.getLogger("triage.test").warning("line %06d of a log that is long", i)
                assert [reader.readline() for _ in range(3)] == [
                    f"line {i:06d} of a log that is long\n" for i in range(3)
                ]
            # The thread that writes is held; this would wait for it.
            handler.setStream(sys.stdout)
            assert root.handlers == [*before, handler]
        finally:
            root.removeHandler(handler)
            # Without a reader nothing is held. The thread must be gone before the pipe is: it
            # would write on into whatever has the pipe's number next.
            reader.close()
            for thread in threading.enumerate():
                if thread.name == "log":
                    thread.join(60)
                    assert not thread.is_alive()
