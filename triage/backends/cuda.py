"""The CUDA backend: CuPy launches the kernels of ``kernels.cu``; the only module to import cupy.

The bytes cross to the device compressed. The host walks the block lengths, which lie one behind
the other, and chooses the places of tiles; all else is kernels. Bitshuffle-zstd is decoded on the
host. Of CuPy only memory and launches are used, never its array kernels, so that nothing but
``kernels.cu`` is compiled at run time and no CUDA headers are needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage.backends.payload import Payload, fault, open_payload
from triage.backends.recipe import (
    SPOT_EXCESS,
    SeriesMaps,
    bin_factor,
    check_recipe,
    limits,
    tile_corners,
)
from triage.errors import DeviceError, EnvironmentLacksError, TriageError
from triage.records import EXPECTED_MAXIMUM, Frame, Recipe, Views

__all__ = ["CudaBackend", "compile_kernels", "unavailable"]

_SOURCE = Path(__file__).with_name("kernels.cu")
_THREADS = 256
_WARP = 32
_KEPT_ON_DEVICE = 8
_NO_FAULT = np.uint64(2**64 - 1)


def unavailable() -> str | None:
    """Why no device can be used, or None when one can."""
    try:
        import cupy
    except ImportError:
        return "cupy is not installed"
    if not cupy.is_available():
        return "cupy finds no CUDA device"
    return None


def compile_kernels(arch: str) -> bytes:
    """The kernels as machine code for ``arch``, such as ``sm_90``; needs no device.

    Raises:
        EnvironmentLacksError: NVRTC is missing, or refuses the architecture or the source; the
            message holds its log.
    """
    try:
        from cupy.cuda import nvrtc
    except ImportError as err:
        raise EnvironmentLacksError(
            f"CUDA kernels: {err}; expected cupy with NVRTC; install the extra 'gpu'"
        ) from err
    # No fused multiply-add: float results agree with the CPU's bit for bit.
    options = (f"--gpu-architecture={arch}", "--fmad=false", "--std=c++17")
    try:
        program = nvrtc.createProgram(_SOURCE.read_text(encoding="utf-8"), _SOURCE.name, (), ())
    except RuntimeError as err:
        # CuPy loads the library on first use and says where it looked.
        raise EnvironmentLacksError(
            f"CUDA kernels: NVRTC does not load: {err}; install the extra 'gpu'"
        ) from err
    try:
        nvrtc.compileProgram(program, options)
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as err:
        raise EnvironmentLacksError(
            f"CUDA kernels for {arch}: {err}; expected an architecture that NVRTC "
            f"{nvrtc.getVersion()} knows\n{nvrtc.getProgramLog(program)}"
        ) from err
    finally:
        nvrtc.destroyProgram(program)


class CudaBackend:
    """Decodes and reduces on the current CUDA device; see :class:`triage.backends.Backend`.

    Raises:
        ConfigError: the recipe has a bin factor of unknown noise.
        EnvironmentLacksError: the kernels do not compile for this device.
        DeviceError: from any method, the device failed; nothing of that call is to be used.
    """

    name = "cuda"

    def __init__(self, recipe: Recipe) -> None:
        check_recipe(recipe)
        import cupy

        self.recipe = recipe
        self._cupy = cupy
        self._lost = (
            cupy.cuda.runtime.CUDARuntimeError,
            cupy.cuda.driver.CUDADriverError,
            cupy.cuda.memory.OutOfMemoryError,
        )
        self._maps = SeriesMaps(recipe)
        self._sent: OrderedDict[int, tuple[NDArray[Any], Any]] = OrderedDict()
        with self._guarded("loading the kernels"):
            arch = f"sm_{cupy.cuda.Device().compute_capability}"
            self._module = cupy.cuda.Module()
            self._module.load(compile_kernels(arch))

    def decode(self, frame: Frame) -> NDArray[Any]:
        """The pixels, (y, x), in the frame's dtype and native byte order; a fresh array."""
        payload = open_payload(frame)
        with self._guarded("decoding"):
            faults = self._no_faults(1)
            data = self._cupy.asnumpy(self._decode_to_device(frame, payload, faults))
            code = int(self._cupy.asnumpy(faults)[0])
        if code != _NO_FAULT:
            raise fault(code % 8, frame)
        native = frame.dtype.newbyteorder("=")
        return np.asarray(data, np.uint8).view(native).reshape(frame.shape)

    def prepare(self, frames: Sequence[Frame]) -> Views:
        """Overview and radial views of each frame; everything is queued before the first wait."""
        with self._guarded("preparing"):
            return self._prepare(frames)

    def tiles(
        self, frames: Sequence[Frame], views: Views, rows: Sequence[int]
    ) -> NDArray[np.float32]:
        """Native crops at the strongest separate cells of each frame in ``rows``.

        A row that has an error in ``views`` gives zeros.
        """
        with self._guarded("cropping tiles"):
            return self._tiles(frames, views, rows)

    def _prepare(self, frames: Sequence[Frame]) -> Views:
        cp, r, n = self._cupy, self.recipe, len(frames)
        on_device = {
            "maximum": cp.zeros((n, r.grid, r.grid), np.uint32),
            "total": cp.zeros((n, r.grid, r.grid), np.uint64),
            "count": cp.zeros((n, r.grid, r.grid), np.uint16),
            "overview": cp.zeros((n, 3, r.grid, r.grid), np.float32),
            "radial": cp.zeros((n, 3, r.sectors, r.radial_bins), np.float32),
        }
        faults = self._no_faults(n)
        factors = np.zeros(n, np.int32)
        has_geometry = np.zeros(n, np.bool_)
        errors: list[TriageError | None] = [None] * n
        for i, frame in enumerate(frames):
            try:
                payload = open_payload(frame)
                k = bin_factor(r, frame)
                invalid = self._maps.invalid(frame)
                pixels = self._decode_to_device(frame, payload, faults[i : i + 1])
            except TriageError as err:
                errors[i] = err
                continue
            factors[i] = k
            has_geometry[i] = frame.series.geometry is not None
            row = {name: array[i] for name, array in on_device.items()}
            self._reduce(frame, pixels, invalid, k, row)
        host = {name: cp.asnumpy(array) for name, array in on_device.items()}
        for i, code in enumerate(cp.asnumpy(faults).tolist()):
            if code != _NO_FAULT:
                errors[i] = fault(code % 8, frames[i])
                factors[i] = 0
                has_geometry[i] = False
                for array in host.values():
                    array[i] = 0
        return Views(bin_factor=factors, has_geometry=has_geometry, errors=tuple(errors), **host)

    def _reduce(
        self,
        frame: Frame,
        pixels: Any,
        invalid: NDArray[np.uint8],
        k: int,
        row: dict[str, Any],
    ) -> None:
        """Queue the kernels that fill one row of the views."""
        grid = self.recipe.grid
        ny, nx = frame.shape
        cells = grid * grid
        self._launch(
            f"reduce_{frame.dtype.str[1:]}",
            -(-ny // k) * -(-nx // k),
            pixels,
            np.int32(ny),
            np.int32(nx),
            self._send(invalid),
            np.int32(invalid.size > 0),
            np.int32(k),
            np.int32(grid),
            *_bounds(frame),
            row["maximum"],
            row["total"],
            row["count"],
        )
        integers = (row["maximum"], row["total"], row["count"])
        numbers = (np.int32(cells), np.int32(k), EXPECTED_MAXIMUM[k])
        self._launch("overview", cells, *integers, *numbers, row["overview"])
        geometry = frame.series.geometry
        if geometry is None:
            return
        bins = self._send(self._maps.radial_bins(frame.shape, k, geometry))
        size = self.recipe.sectors * self.recipe.radial_bins
        sums = self._cupy.zeros(5 * size, np.uint64)
        self._launch(
            "radial_sums", cells, *integers, bins, *numbers, SPOT_EXCESS, np.int32(size), sums
        )
        self._launch("radial_shares", size, sums, np.int32(size), row["radial"])

    def _tiles(
        self, frames: Sequence[Frame], views: Views, rows: Sequence[int]
    ) -> NDArray[np.float32]:
        cp, r = self._cupy, self.recipe
        out = cp.zeros((len(rows), r.tiles, 2, r.tile_px, r.tile_px), np.float32)
        faults = self._no_faults(len(rows))
        for number, row in enumerate(rows):
            if views.errors[row] is not None:
                continue
            frame = frames[row]
            corners = tile_corners(views, row, frame.shape, r)
            if not len(corners):
                continue
            invalid = self._maps.invalid(frame)
            pixels = self._decode_to_device(frame, open_payload(frame), faults[number : number + 1])
            self._launch(
                f"crop_{frame.dtype.str[1:]}",
                len(corners) * r.tile_px * r.tile_px,
                pixels,
                np.int32(frame.shape[0]),
                np.int32(frame.shape[1]),
                self._send(invalid),
                np.int32(invalid.size > 0),
                cp.asarray(corners),
                np.int32(len(corners)),
                np.int32(r.tile_px),
                *_bounds(frame),
                out[number],
            )
        for row, code in zip(rows, cp.asnumpy(faults).tolist(), strict=True):
            if code != _NO_FAULT:
                raise fault(code % 8, frames[row])
        return np.asarray(cp.asnumpy(out), np.float32)

    def _decode_to_device(self, frame: Frame, payload: Payload, faults: Any) -> Any:
        """Queue the decoding into a device array of bytes in native order; faults come later.

        Raises:
            DecodeError: what the host can see is wrong already.
        """
        cp, item = self._cupy, frame.dtype.itemsize
        if frame.encoding == "raw":
            # Copied even by a device that shares the host's memory: the bytes may be swapped below.
            out = cp.array(payload.data)
        elif frame.encoding == "bszstd":
            return cp.asarray(_decode_zstd(frame, payload))
        else:
            out = self._decode_lz4(frame, payload, faults)
        if not frame.dtype.isnative:
            pixels = payload.size // item
            self._launch("swap_bytes", pixels, out, np.int64(pixels), np.int32(item))
        return out

    def _decode_lz4(self, frame: Frame, payload: Payload, faults: Any) -> Any:
        from triage.backends import lz4

        cp, item = self._cupy, frame.dtype.itemsize
        tail = payload.size - payload.whole
        if frame.encoding == "lz4" and not frame.framed:
            starts = np.zeros(1, np.int64)
            lengths = np.full(1, payload.data.size, np.int32)
        else:
            blocks = -(-payload.whole // payload.block_bytes)
            if 4 * blocks > payload.data.size:
                raise fault(1, frame)
            starts, lengths = np.empty(blocks, np.int64), np.empty(blocks, np.int32)
            code = lz4.block_spans(payload.data, payload.at, tail, starts, lengths)
            if code:
                raise fault(code, frame)
        shuffled = frame.encoding == "bslz4"
        data = cp.asarray(payload.data)
        out = cp.empty(payload.size, np.uint8)
        planes = cp.empty(payload.whole, np.uint8) if shuffled else out
        block_bytes, whole = np.int64(payload.block_bytes), np.int64(payload.whole)
        if starts.size:
            self._launch(
                "decode_blocks",
                starts.size * _WARP,
                data,
                cp.asarray(starts),
                cp.asarray(lengths),
                np.int64(starts.size),
                block_bytes,
                whole,
                np.int32(frame.encoding == "lz4" and frame.framed),
                planes,
                faults,
            )
        if shuffled:
            self._launch(
                "unshuffle",
                payload.whole // (8 * item) + 1,
                planes,
                whole,
                block_bytes,
                np.int32(item),
                data[data.size - tail :],
                np.int64(tail),
                out,
            )
        return out

    def _send(self, host: NDArray[Any]) -> Any:
        """A device copy of a host array that is met again and again and never changes."""
        found = self._sent.get(id(host))
        if found is None or found[0] is not host:
            # An array without elements has no address; kernels do not read from this one.
            found = (host, self._cupy.asarray(host if host.size else np.zeros(1, host.dtype)))
            self._sent[id(host)] = found
            while len(self._sent) > _KEPT_ON_DEVICE:
                self._sent.popitem(last=False)
        return found[1]

    def _no_faults(self, n: int) -> Any:
        return self._cupy.asarray(np.full(n, _NO_FAULT, np.uint64))

    def _launch(self, kernel: str, threads: int, *args: Any) -> None:
        blocks = -(-threads // _THREADS)
        self._module.get_function(kernel)((blocks,), (_THREADS,), args)

    @contextmanager
    def _guarded(self, doing: str) -> Iterator[None]:
        """Turn the device's failures into DeviceError."""
        try:
            yield
        except self._lost as err:
            raise DeviceError(
                f"CUDA device, {doing}: {err}; expected a working device with free memory; "
                "frames go on unscored until the process is started again"
            ) from err


def _bounds(frame: Frame) -> tuple[np.int64, np.int64, np.int32]:
    bounds = limits(frame.dtype, frame.series)
    return (
        np.int64(bounds.high),
        np.int64(bounds.error),
        np.int32(bounds.negative_is_invalid),
    )


def _decode_zstd(frame: Frame, payload: Payload) -> NDArray[np.uint8]:
    from triage.backends.cpu import decode_on_host

    out = np.empty(payload.size, np.uint8)
    decode_on_host(frame, payload, np.empty(0, np.uint8), out)
    return out
