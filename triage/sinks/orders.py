"""What stopped all drops of a run, in a file of its folder: it stands until it is taken back.

A process that is started anew, by a service manager or with its machine, must not drop what its
operator or its audit had told the one before not to. The file is made when a run begins, of one
block, and then written in place, so that a disk that has become full takes it all the same. What
cannot be read is taken for an order: nothing is dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["GATE_OPEN", "SHADOW", "StandingOrders", "orders_in"]

SHADOW = "shadow"
GATE_OPEN = "gate_open"

_FILE = "override.json"
_SIZE_BYTES = 4096
_CHARACTERS = 200


def orders_in(folder: Path) -> dict[str, str]:
    """What stands in the folder of a run: :data:`SHADOW`, :data:`GATE_OPEN`, and who gave it when.

    A file that cannot be read, or holds something else, is :data:`SHADOW`, with the reason.
    """
    path = folder / _FILE
    try:
        text = path.read_bytes()[: _SIZE_BYTES + 1]
    except FileNotFoundError:
        return {}
    except OSError as err:
        return _taken_for_one(path, err.strerror or type(err).__name__)
    try:
        orders = json.loads(text)
    except (ValueError, RecursionError):
        return _taken_for_one(path, "it is not JSON")
    known = isinstance(orders, dict) and orders.keys() <= {SHADOW, GATE_OPEN}
    if not known or not all(isinstance(who, str) for who in orders.values()):
        return _taken_for_one(path, f"it holds more than {SHADOW} and {GATE_OPEN}")
    return dict(orders)


def _taken_for_one(path: Path, why: str) -> dict[str, str]:
    return {SHADOW: f"{path} cannot be read ({why}), which may be an order"}


class StandingOrders:
    """The file of a folder that this process holds. Used from one thread at a time.

    Attributes:
        path: the file.
        standing: what stands in it, as :func:`orders_in` reads it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / _FILE
        self.standing = orders_in(folder)
        if not self.path.exists():
            self._make()

    def _make(self) -> None:
        """A run can do without until an order is given: a failure is said then."""
        try:
            self.write({})
        except OSError:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            self.standing = {}

    def write(self, orders: Mapping[str, str]) -> None:
        """Let these stand and no others.

        Raises:
            OSError: the disk refused them; what stands now is what can be read.
        """
        text = json.dumps({kind: who[:_CHARACTERS] for kind, who in orders.items()})
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(fd, text.encode().ljust(_SIZE_BYTES - 1) + b"\n", 0)
                os.ftruncate(fd, _SIZE_BYTES)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError:
            self.standing = orders_in(self.path.parent)
            raise
        self.standing = dict(orders)
