"""Sources: where frames come from, live or recorded.

A source turns bytes into :class:`triage.records.Message` and keeps the pixels compressed. It
knows nothing of scores or verdicts. Its one invariant: every image message received becomes
exactly one ``Message`` of kind ``image``, whatever is wrong with it.
"""

from __future__ import annotations

from typing import Protocol

from triage.records import Message

__all__ = ["Source"]


class Source(Protocol):
    """What the pipeline reads. ``subscriber.Subscriber`` and ``files.Files`` are two of them."""

    def receive(self, timeout_ms: int) -> list[Message]:
        """Messages in arrival order, at most a few; empty when ``timeout_ms`` passed."""
        ...

    @property
    def exhausted(self) -> bool:
        """True when nothing more can come; a live source never is."""
        ...

    def close(self) -> None:
        """Release sockets or files; may be called twice."""
        ...
