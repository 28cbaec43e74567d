"""nvCOMP's LZ4 in the place of ours: the vendor's library behind the same backend.

Its batched interface takes the addresses of bare LZ4 blocks, so bitshuffle's blocks go in as they
lie. Since version 6 it can undo a bitshuffle of 8 KiB as well; both ways are here. Either writes
whole frames to the device's memory, from which our kernels reduce them.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triage.backends.cuda import CudaBackend
from triage.backends.staging import Piece
from triage.errors import EnvironmentLacksError
from triage.records import Frame, Recipe

__all__ = ["ByNvcomp", "Nvcomp", "installed"]

_UNSHUFFLES_SINCE = 6
_OPTIONS_SINCE = 5
_CUDA_KERNELS = 2
_LOWEST_BIT_FIRST = 2
_TYPES = {1: 1, 2: 3, 4: 5}
"""nvcompType_t of unsigned integers, by bytes."""
_UNSHUFFLED_BLOCK_BYTES = 8192


class _Options(ctypes.Structure):
    """``nvcompBatchedLZ4DecompressOpts_t``; reserved bytes are zero."""

    _fields_ = (
        ("backend", ctypes.c_int),
        ("sort_before_hw_decompress", ctypes.c_int),
        ("data_type", ctypes.c_int),
        ("bitshuffle_mode", ctypes.c_int),
        ("reserved", ctypes.c_char * 48),
    )


class Nvcomp:
    """The library's batched LZ4 decompression.

    Raises:
        EnvironmentLacksError: it does not load, or is older than version 5.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as err:
            raise EnvironmentLacksError(f"{path.name}: {err}; reinstall nvidia-libnvcomp") from err
        properties = (ctypes.c_uint32 * 2)()
        self._library.nvcompGetProperties(properties)
        self.version = properties[0] // 1000
        if self.version < _OPTIONS_SINCE:
            raise EnvironmentLacksError(
                f"nvCOMP {self.version}: expected version {_OPTIONS_SINCE} or newer"
            )

    @property
    def unshuffles(self) -> bool:
        """Whether it can undo a bitshuffle."""
        return self.version >= _UNSHUFFLES_SINCE

    def scratch_bytes(self, blocks: int, block_bytes: int, total_bytes: int) -> int:
        """Device memory that decompressing takes besides input and output."""
        size = ctypes.c_size_t()
        self._check(
            self._library.nvcompBatchedLZ4DecompressGetTempSize(
                ctypes.c_size_t(blocks),
                ctypes.c_size_t(block_bytes),
                _Options(backend=_CUDA_KERNELS),
                ctypes.byref(size),
                ctypes.c_size_t(total_bytes),
                ctypes.c_void_p(0),
            )
        )
        return int(size.value)

    def decompress(
        self, table: int, blocks: int, scratch: int, scratch_bytes: int, item: int, stream: int
    ) -> None:
        """Queue the decompression of ``blocks`` blocks.

        Args:
            table: device address of (6, blocks) uint64: addresses of input, its sizes, room for
                output, sizes that came out, addresses of output, statuses.
            scratch: device address.
            item: bytes of the elements whose bits are put together; 0: they stay as they are.
            stream: CUDA stream.
        """
        row = 8 * blocks
        options = _Options(backend=_CUDA_KERNELS)
        if item:
            options.data_type, options.bitshuffle_mode = _TYPES[item], _LOWEST_BIT_FIRST
        self._check(
            self._library.nvcompBatchedLZ4DecompressAsync(
                ctypes.c_void_p(table),
                ctypes.c_void_p(table + row),
                ctypes.c_void_p(table + 2 * row),
                ctypes.c_void_p(table + 3 * row),
                ctypes.c_size_t(blocks),
                ctypes.c_void_p(scratch),
                ctypes.c_size_t(scratch_bytes),
                ctypes.c_void_p(table + 4 * row),
                options,
                ctypes.c_void_p(table + 5 * row),
                ctypes.c_void_p(stream),
            )
        )

    def _check(self, status: int) -> None:
        if status:
            raise EnvironmentLacksError(
                f"nvCOMP {self.version}: status {status}; expected 0; leave it out of the "
                "comparison, or try another version"
            )


def installed() -> Nvcomp:
    """The library of the package nvidia-libnvcomp.

    Raises:
        EnvironmentLacksError: it is not there, or cannot be used.
    """
    try:
        spec = importlib.util.find_spec("nvidia.libnvcomp")
    except ModuleNotFoundError:
        spec = None
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        for path in sorted(Path(folder, "lib64").glob("libnvcomp.so*")):
            return Nvcomp(path)
    raise EnvironmentLacksError(
        "nvCOMP is not installed; expected the package nvidia-libnvcomp-cu13 or -cu12, as CuPy's"
    )


class ByNvcomp(CudaBackend):
    """The CUDA backend with nvCOMP's LZ4: a piece in one call, then kernels for each frame.

    Args:
        recipe: as of the backend.
        library: what decompresses.
        unshuffles: whether the library also puts the bits together, which it does for blocks of
            8 KiB.
    """

    def __init__(self, recipe: Recipe, library: Nvcomp, *, unshuffles: bool) -> None:
        super().__init__(recipe)
        self._nvcomp = library
        self._unshuffles = unshuffles
        self._scratch: dict[int, Any] = {}

    def _reduce_piece(
        self,
        piece: Piece,
        data: Any,
        jobs: Any,
        cells: Any,
        frames: Sequence[Frame],
        faults: Any,
    ) -> None:
        cp = self._cupy
        stream = int(cp.cuda.get_current_stream().ptr)
        payloads, item = piece.payloads, piece.item
        starts = np.cumsum([0, *(p.size for p in payloads)])
        planes, out = cp.empty(int(starts[-1]), np.uint8), cp.empty(int(starts[-1]), np.uint8)
        target = out if self._unshuffles else planes
        table = np.zeros((6, piece.spans), np.uint64)
        table[0] = piece.table[:, 0] + _address(data)
        table[1] = piece.table[:, 1] & 0xFFFFFFFF
        for payload, start, first in zip(payloads, starts, piece.first_span, strict=False):
            at = np.arange(0, payload.whole, payload.block_bytes)
            blocks = slice(int(first), int(first) + at.size)
            table[2, blocks] = np.minimum(payload.block_bytes, payload.whole - at)
            table[4, blocks] = _address(target) + start + at
        largest = max(p.block_bytes for p in payloads)
        need = max(1, self._nvcomp.scratch_bytes(piece.spans, largest, int(starts[-1])))
        # Kept for each stream: the piece before this one may still be using its own.
        if stream not in self._scratch or self._scratch[stream].size < need:
            self._scratch[stream] = cp.empty(need, np.uint8)
        on_device = cp.asarray(table)
        self._nvcomp.decompress(
            _address(on_device),
            piece.spans,
            _address(self._scratch[stream]),
            need,
            item if self._unshuffles else 0,
            stream,
        )
        for row, payload, start, tail in zip(
            piece.rows.tolist(), payloads, starts.tolist(), piece.tails.tolist(), strict=False
        ):
            rest = payload.size - payload.whole
            # The kernel also copies the raw tail; with nothing shuffled it does that alone.
            shuffled = 0 if self._unshuffles else payload.whole
            self._launch(
                "unshuffle",
                shuffled // (8 * item) + 1,
                planes[start : start + payload.size],
                np.int64(shuffled),
                np.int64(payload.block_bytes),
                np.int32(item),
                data[tail : tail + rest] if rest else data,
                np.int64(rest),
                out[start + payload.whole - shuffled : start + payload.size],
            )
            self._reduce(frames[row], out[start : start + payload.size], cells, row)

    @staticmethod
    def can_unshuffle(frames: Sequence[Frame]) -> bool:
        """Whether all blocks have the size that the library puts together."""
        return all(
            int.from_bytes(bytes(f.payload[8:12]), "big") == _UNSHUFFLED_BLOCK_BYTES for f in frames
        )


def _address(array: Any) -> int:
    return int(array.__cuda_array_interface__["data"][0])
