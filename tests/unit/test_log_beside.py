"""The log of a live run: a reader that does not read holds up nobody."""

from __future__ import annotations

import logging
import threading

from triage.cli.logs import said_beside


class Held(logging.Handler):
    """Takes a line once it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.let_go.wait(30)
        self.lines.append(record.getMessage())


def test_whoever_logs_does_not_wait_for_a_held_terminal() -> None:
    """Ten thousand lines return at once; the first of them are written when it goes on, in
    order, and afterwards the log is as before."""
    root, held = logging.getLogger(), Held()
    before = list(root.handlers)
    root.addHandler(held)
    try:
        with said_beside():
            for i in range(10_000):
                logging.getLogger("triage.test").warning("line %d", i)
            assert held.lines == []
            held.let_go.set()
        assert root.handlers == [*before, held]
    finally:
        root.removeHandler(held)
    assert held.lines[:3] == ["line 0", "line 1", "line 2"]
    assert len(held.lines) < 10_000
