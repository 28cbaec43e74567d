"""What a fuzzed way in is; see fuzz_targets.py."""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["Target", "need"]


class Target:
    """One way in. Modules of the product are imported when a target is made, not before.

    Attributes:
        modules: of the product, whose coverage leads the search.
        seeds: sound inputs.
    """

    modules: tuple[str, ...] = ()
    seeds: Sequence[bytes] = ()

    def changed(self, data: bytes, rng: random.Random) -> bytes:
        """An input that differs a little."""
        raise NotImplementedError

    def check(self, data: bytes) -> None:
        """Raise where an input breaks a promise."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove what was written."""


def need(holds: object, why: str) -> None:
    """Raise unless a promise holds."""
    if not holds:
        raise AssertionError(why)
