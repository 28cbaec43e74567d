"""From a bitshuffled LZ4 payload to the integers of the cells, without building the frame.

A block of bitshuffled pixels is a stack of bit planes, and it is reduced as one: planes, masked,
are put behind those of the block before; when the rows of a band of cells are complete, the ones
of each plane are counted for the sum, and the planes searched from the highest down for the
maximum. The cost follows the planes in use, which are few where counts are low, and the only
memory of a frame's size that is touched is the payload.

``_reduce.c`` does so where it could be built; ``planes.py`` gives the same integers and faults
everywhere. The slow way, decoding and then reducing, is in ``cpu.py``; it serves other
encodings and pixel types.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from triage.backends.payload import Payload
from triage.backends.recipe import Limits
from triage.errors import EnvironmentLacksError
from triage.records import Frame

__all__ = ["KERNELS", "LARGEST_BLOCK_BYTES", "Reducer", "is_fusible"]

KERNELS = ("auto", "c", "numba")

LARGEST_BLOCK_BYTES = 1 << 18
"""Larger blocks do not stay in the cache, and are decoded and reduced one after the other."""


def is_fusible(frame: Frame, payload: Payload, bounds: Limits) -> bool:
    """Whether a frame can be reduced from its planes."""
    if frame.encoding != "bslz4" or frame.dtype.kind not in "iu":
        return False
    return payload.block_bytes <= LARGEST_BLOCK_BYTES and bounds.high >= np.iinfo(frame.dtype).min


class Reducer:
    """Reduces frames, one at a time, in a workspace that is used again.

    Args:
        kernels: ``c``, ``numba``, or ``auto`` for C where it was built and this processor has
            vectors that it knows: as plain C it is slower than numba.

    Raises:
        EnvironmentLacksError: ``c`` was asked for and was not built, or another name came.
    """

    def __init__(self, kernels: str = "auto") -> None:
        found = None if kernels == "numba" else _compiled()
        if kernels == "auto" and found is not None and found.PROCESSOR == "plain":
            found = None
        if found is None and kernels not in ("auto", "numba"):
            raise EnvironmentLacksError(
                f"kernels {kernels!r}: expected one of {', '.join(KERNELS)}, and for 'c' a "
                "compiler when braggtriage was installed; use 'auto'"
            )
        self._module = found or importlib.import_module("triage.backends.planes")
        self._workspace = np.empty(0, np.uint8)

    @property
    def kernels(self) -> str:
        """What runs: ``numba``, or the processor that the C was made for."""
        return str(self._module.PROCESSOR)

    def reduce(
        self,
        frame: Frame,
        payload: Payload,
        k: int,
        bounds: Limits,
        valid: NDArray[np.uint8] | None,
        valid_count: NDArray[np.uint16],
        maximum: NDArray[np.uint32],
        total: NDArray[np.uint64],
        count: NDArray[np.uint16],
    ) -> int:
        """Reduce a frame that :func:`is_fusible`; 0, or a key of ``payload.FAULTS``.

        Args:
            k: pixels per cell side.
            valid: a bit for each pixel, the first in the lowest bit of a byte, 1 where the mask
                lets it through, and 64 bytes more; None where there is no mask.
            valid_count: (ceil(y / k), cells), contiguous: the pixels of each cell that the mask
                lets through.
            maximum, total, count: the same shape, contiguous; written whole.
        """
        ny, nx = frame.shape
        bits = 8 * frame.dtype.itemsize
        needed = self._module.workspace_bytes(bits, nx, k, payload.block_bytes)
        if self._workspace.size < needed:
            self._workspace = np.empty(needed, np.uint8)
        code: int = self._module.reduce(
            payload.data,
            payload.at,
            bits,
            frame.dtype.kind == "i",
            frame.dtype.newbyteorder("<") != frame.dtype,
            ny,
            nx,
            payload.block_bytes,
            k,
            min(bounds.high, int(np.iinfo(frame.dtype).max)),
            bounds.error,
            bounds.negative_is_invalid,
            valid,
            valid_count,
            self._workspace,
            maximum,
            total,
            count,
        )
        return code


def _compiled() -> ModuleType | None:
    try:
        return importlib.import_module("triage.backends._reduce")
    except ImportError:
        return None
