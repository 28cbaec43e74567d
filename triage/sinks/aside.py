"""What may block, done in a thread beside one that must not wait for it.

A disk that is slow costs the caller nothing; one that hangs costs it what it is willing to wait.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Aside"]

log = logging.getLogger(__name__)


class _Task:
    """Something to be done, and its answer where one is waited for."""

    __slots__ = ("action", "answer", "done", "failed", "regret", "size_bytes")

    def __init__(
        self,
        action: Callable[[], Any],
        size_bytes: int = 0,
        regret: Callable[[Any], object] | None = None,
    ) -> None:
        self.action = action
        self.size_bytes = size_bytes
        self.regret = regret
        self.done = False
        self.answer: Any = None
        self.failed = False


class Aside:
    """Does tasks one after the other, in the order given. One thread may ask, any may post.

    Args:
        name: of the thread.
        most_bytes: what waiting tasks may hold.
    """

    def __init__(self, name: str, *, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._changed = threading.Condition()
        self._waiting: deque[_Task] = deque()
        self._waiting_bytes = 0
        self._current: _Task | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def post(self, action: Callable[[], object], size_bytes: int) -> bool:
        """Have something done that must not raise; False when too much waits already."""
        with self._changed:
            if self._closing or (
                self._waiting and self._waiting_bytes + size_bytes > self._most_bytes
            ):
                return False
            self._waiting.append(_Task(action, size_bytes))
            self._waiting_bytes += size_bytes
            self._changed.notify_all()
        return True

    def ask(
        self, action: Callable[[], Any], timeout_s: float, regret: Callable[[Any], object]
    ) -> tuple[bool, Any]:
        """Have something done and wait for its answer: (True, answer), or (False, None).

        False where it fails, and at once while an earlier task is not done: what holds that one
        would hold this one too.

        Args:
            regret: called with an answer that came after the wait was over, in the thread of the
                tasks and before any later one.
        """
        task = _Task(action, regret=regret)
        with self._changed:
            if self._closing or self._current is not None or self._waiting:
                return False, None
            self._waiting.append(task)
            self._changed.notify_all()
            self._changed.wait_for(lambda: task.done, timeout_s)
            if not task.done:
                # From now on the answer is one that nobody waits for.
                task.done = True
                return False, None
        return not task.failed, task.answer

    def close(self, timeout_s: float) -> bool:
        """Take no more, and wait for what was given; False when that is not done in time."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                task = self._current = self._waiting.popleft()
                self._waiting_bytes -= task.size_bytes
            try:
                task.answer = task.action()
            except Exception:  # the thread must live on; who asked gets no answer
                log.exception("%s failed", self._thread.name)
                task.failed = True
            with self._changed:
                too_late, task.done = task.done, True
                if not too_late:
                    self._current = None
                    self._changed.notify_all()
            if too_late:
                if task.regret is not None and not task.failed:
                    task.regret(task.answer)
                with self._changed:
                    self._current = None
                    self._changed.notify_all()
