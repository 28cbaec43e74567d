"""Backends: from a compressed frame to the network's input.

A backend decodes, masks and reduces; it knows nothing of models or verdicts. Its invariant: a
payload that does not decode to exactly the declared frame is an error for that frame alone,
and integer results are the same bit for bit on every backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from triage.errors import EnvironmentLacksError
from triage.records import CloseUps, Frame, Recipe, Views

__all__ = ["Backend", "open_backend"]


class Backend(Protocol):
    """What the pipeline asks of a backend; safe to call from one thread at a time."""

    name: str
    recipe: Recipe

    def decode(self, frame: Frame) -> NDArray[Any]:
        """The pixels, (y, x), in the frame's dtype (native byte order); a fresh array.

        Raises:
            DecodeError: the payload is corrupt or does not match shape and dtype.
            UnsupportedEncoding: the encoding or pixel type is not one this backend reads.
        """
        ...

    def prepare(self, frames: Sequence[Frame]) -> Views:
        """Overview and radial views; an unusable frame has its error in ``Views.errors``."""
        ...

    def close_ups(self, frames: Sequence[Frame], views: Views, rows: Sequence[int]) -> CloseUps:
        """The frames at ``rows`` at native resolution, each depending on the frame alone.

        Raises:
            DecodeError: a payload is corrupt where :meth:`prepare` had no reason to look.
        """
        ...


def open_backend(
    kind: str = "auto", recipe: Recipe | None = None, *, recycle: bool = False
) -> Backend:
    """The backend called ``kind``: ``cpu``, ``cuda`` or ``auto`` (cuda where a device is).

    Args:
        recycle: views need to last only until the next call of ``prepare``; fresh memory for
            them costs as much as reducing a small frame.

    Raises:
        EnvironmentLacksError: ``cuda`` was asked for and cannot run here; the message says why.
    """
    recipe = recipe or Recipe()
    if kind in ("cuda", "auto"):
        from triage.backends import cuda

        why_not = cuda.unavailable()
        if why_not is None:
            return cuda.CudaBackend(recipe)
        if kind == "cuda":
            raise EnvironmentLacksError(
                f"backend 'cuda': {why_not}; use backend 'cpu' or install the extra 'gpu'"
            )
    elif kind != "cpu":
        raise EnvironmentLacksError(f"backend {kind!r}: expected 'auto', 'cpu' or 'cuda'")
    from triage.backends.cpu import CpuBackend

    return CpuBackend(recipe, recycle=recycle)
