"""The CUDA backend: CuPy launches the kernels of ``kernels.cu``; the only module to import cupy.

The bytes cross to the device compressed, several frames at a time, from pinned memory; while one
piece of a batch is copied, the piece before it is reduced. The host finds the blocks of a payload,
which lie one behind the other; all else is kernels, and nothing waits for them before someone
reads a result. Bitshuffle-zstd is decoded on the host. Of CuPy only memory, streams and launches
are used, never its array kernels, so that nothing but ``kernels.cu`` is compiled at run time and
no CUDA headers are needed.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage.backends.payload import Payload, fault, open_payload
from triage.backends.recipe import (
    CLIP_SIGMA,
    SPOT_EXCESS,
    SeriesMaps,
    bin_factor,
    check_recipe,
    limits,
    tile_corners,
)
from triage.backends.staging import SPAN_BYTES, Piece, pieces, shared_bytes, spans_of
from triage.errors import DeviceError, EnvironmentLacksError, TriageError
from triage.records import EXPECTED_MAXIMUM, CloseUps, Frame, OnDevice, Recipe, Views

__all__ = ["CudaBackend", "compile_kernels", "unavailable"]

_SOURCE = Path(__file__).with_name("kernels.cu")
_THREADS = 256
_WARP = 32
_WORD_BYTES = 4
_KEPT_ON_DEVICE = 8
_NO_FAULT = np.uint64(2**64 - 1)
_SLOTS = 3
"""Pieces of a batch on their way at a time: one is filled, one copied, one reduced."""
_PIECE_BYTES = 8 << 20
"""Compressed bytes that are copied at a time: long enough for the bus, short enough to overlap."""
_COPY_THREADS = min(4, os.cpu_count() or 1)
_PIXEL_BYTES = (1, 2, 4)

_JOB = np.dtype(
    [
        ("valid", "u8"), ("bins", "u8"), ("high", "i8"), ("error", "i8"), ("tail", "i8"),
        ("first_span", "i4"), ("whole", "i4"), ("block_bytes", "i4"), ("item", "i4"),
        ("is_signed", "i4"), ("swapped", "i4"), ("negative_is_invalid", "i4"),
        ("ny", "i4"), ("nx", "i4"), ("k", "i4"), ("expected", "f4"),
    ],
    align=True,
)  # fmt: skip
"""``struct Job`` of ``kernels.cu``."""


def unavailable() -> str | None:
    """Why no device can be used, or None when one can."""
    try:
        import cupy
    except ImportError:
        return "cupy is not installed"
    if not cupy.is_available():
        return "cupy finds no CUDA device"
    return None


@cache
def compile_kernels(arch: str) -> bytes:
    """The kernels as machine code for ``arch``, such as ``sm_90``; needs no device.

    It takes seconds, so a process does it once.

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


class _Slot:
    """A pinned buffer, its copy on the device, and the stream on which it is sent and used."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._copied: Any = None
        self._pinned = np.empty(0, np.uint8)
        self._device: Any = None

    def host(self, size_bytes: int) -> NDArray[np.uint8]:
        """The pinned buffer, when the device has copied what was in it."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._pinned.size < size_bytes:
            memory = self._cupy.cuda.alloc_pinned_memory(size_bytes)
            self._pinned = np.frombuffer(memory, np.uint8, size_bytes)
            with self.stream:
                self._device = self._cupy.empty(size_bytes, np.uint8)
        return self._pinned[:size_bytes]

    def send(self, size_bytes: int) -> Any:
        """Queue the copy; the device's buffer."""
        self._device[:size_bytes].set(self._pinned[:size_bytes], stream=self.stream)
        self._copied = self.stream.record()
        return self._device


class _Cells:
    """The integers of N frames, (N, grid, grid) as in Views, on the device."""

    def __init__(self, cupy: Any, n: int, grid: int) -> None:
        shape, size = (n, grid, grid), n * grid * grid
        self.maximum = cupy.zeros(shape, np.uint32)
        self.total = cupy.zeros(shape, np.uint64)
        # The kernel adds to words that hold two counts, so the last one needs a partner.
        self.count = cupy.zeros(size + 1, np.uint16)[:size].reshape(shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Batch:
    """What is queued for some frames, in device arrays, and what the host knows already.

    Attributes:
        errors: found by the host; those of the kernels are in ``status``.
        jobs: (N,) of ``_JOB``; zeros for a frame that was not opened.
        jobs_on_device: the same; what they point to is there no more.
        status: (2, N) uint64, on the device: faults of the kernels, and valid pixels.
        cells: on the device, whatever the errors.
    """

    frames: tuple[Frame, ...]
    errors: tuple[TriageError | None, ...]
    jobs: NDArray[Any]
    jobs_on_device: Any
    status: Any
    cells: _Cells
    on_device: OnDevice


class _DeviceViews(Views):
    """Views that stay on the device; what is read of them crosses to the host when it is.

    Reading waits for the kernels, and a device that fails shows then.
    """

    _read: Callable[[Any], NDArray[Any]]
    batch: _Batch

    def __init__(self, *, read: Callable[[Any], NDArray[Any]], batch: _Batch) -> None:
        # Not the generated one: the fields of Views are properties here.
        object.__setattr__(self, "_read", read)
        object.__setattr__(self, "batch", batch)
        object.__setattr__(self, "on_device", batch.on_device)

    @cached_property
    def _status(self) -> NDArray[np.uint64]:
        return self._read(self.batch.status)

    @cached_property
    def errors(self) -> tuple[TriageError | None, ...]:
        codes = self._status[0].tolist()
        return tuple(
            fault(code % 8, frame) if error is None and code != _NO_FAULT else error
            for code, frame, error in zip(codes, self.batch.frames, self.batch.errors, strict=True)
        )

    @cached_property
    def valid_px(self) -> NDArray[np.int64]:
        return self._usable(self._status[1].astype(np.int64))

    def _usable(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows of frames that have an error set to zero."""
        rows[[error is not None for error in self.errors]] = 0
        return rows

    @cached_property
    def bin_factor(self) -> NDArray[np.int32]:
        return self._usable(self.batch.jobs["k"].copy())

    @cached_property
    def has_geometry(self) -> NDArray[np.bool_]:
        return self._usable(self.batch.jobs["bins"] != 0)

    @cached_property
    def maximum(self) -> NDArray[np.uint32]:
        return self._usable(self._read(self.batch.cells.maximum))

    @cached_property
    def total(self) -> NDArray[np.uint64]:
        return self._usable(self._read(self.batch.cells.total))

    @cached_property
    def count(self) -> NDArray[np.uint16]:
        return self._usable(self._read(self.batch.cells.count))

    @cached_property
    def overview(self) -> NDArray[np.float32]:
        return self._usable(self._read(self.batch.on_device.overview))

    @cached_property
    def radial(self) -> NDArray[np.float32]:
        return self._usable(self._read(self.batch.on_device.radial))


class CudaBackend:
    """Decodes and reduces on the current CUDA device; see :class:`triage.backends.Backend`.

    Raises:
        ConfigError: the recipe has a bin factor of unknown noise.
        EnvironmentLacksError: the kernels do not compile for this device.
        DeviceError: from any method, and from reading views, the device failed; nothing of that
            batch is to be used.
    """

    name = "cuda"

    def __init__(self, recipe: Recipe) -> None:
        check_recipe(recipe)
        import cupy

        from triage.backends.cpu import CpuBackend

        self.recipe = recipe
        self._cupy = cupy
        self._lost = (
            cupy.cuda.runtime.CUDARuntimeError,
            cupy.cuda.driver.CUDADriverError,
            cupy.cuda.memory.OutOfMemoryError,
        )
        self._maps = SeriesMaps(recipe)
        self._host = CpuBackend(recipe, recycle=True)
        self._sent: OrderedDict[tuple[int, str], tuple[NDArray[Any], Any]] = OrderedDict()
        self._pool = ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="to-device")
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._slots = [_Slot(cupy) for _ in range(_SLOTS)]
        with self._guarded("loading the kernels"):
            device = cupy.cuda.Device()
            self._module = cupy.cuda.Module()
            self._module.load(compile_kernels(f"sm_{device.compute_capability}"))
            self._shared_bytes = int(device.attributes["MaxSharedMemoryPerBlockOptin"])
            driver = cupy.cuda.driver
            for item in _PIXEL_BYTES:
                kernel = self._module.get_function(f"reduce_blocks_{8 * item}").ptr
                for attribute, value in (
                    (driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self._shared_bytes),
                    # In per cent: shared memory bounds how many blocks are decoded at a time.
                    (driver.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
                ):
                    driver.funcSetAttribute(kernel, attribute, value)

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
        """Overview and radial views of each frame; they stay on the device until they are read.

        Everything is queued when this returns, and the payloads are no longer needed.
        """
        with self._guarded("preparing"):
            return _DeviceViews(read=self._read, batch=self._prepare(frames))

    def close_ups(self, frames: Sequence[Frame], views: Views, rows: Sequence[int]) -> CloseUps:
        """Native crops at the strongest separate cells of each frame in ``rows``, and its spots.

        A row that has an error in ``views`` gives zeros. Spots are found on the host, by the same
        function as the CPU backend's: to look around a thousand places one after the other is
        no work for a device. For that the few frames that are asked for are decoded once more.
        """
        with self._guarded("cropping tiles"):
            tiles = self._tiles(frames, views, rows)
        wanted = [frames[row] for row in rows]
        on_host = self._host.close_ups(wanted, self._host.prepare(wanted), range(len(wanted)))
        return replace(on_host, tiles=tiles)

    def _read(self, array: Any) -> NDArray[Any]:
        """A copy on the host, when everything queued so far is done."""
        with self._guarded("reading results"):
            return np.asarray(self._cupy.asnumpy(array))

    def _prepare(self, frames: Sequence[Frame]) -> _Batch:
        cp, r, n = self._cupy, self.recipe, len(frames)
        cells = _Cells(cp, n, r.grid)
        status = cp.asarray(np.stack([np.full(n, _NO_FAULT), np.zeros(n, np.uint64)]))
        faults, valid_px = status[0], status[1]
        jobs = np.zeros(n, _JOB)
        payloads: dict[int, Payload] = {}
        errors: list[TriageError | None] = [None] * n
        # Addresses in jobs do not keep what they point to; this does until all is queued.
        held: list[Any] = []
        for i, frame in enumerate(frames):
            try:
                payloads[i] = self._open(frame, jobs, i, held)
            except TriageError as err:
                errors[i] = err
        fused = [i for i, payload in payloads.items() if self._is_fused(frames[i], payload)]
        sendings = [
            piece
            for item in _PIXEL_BYTES
            for piece in pieces(
                [i for i in fused if frames[i].dtype.itemsize == item], payloads, item, _PIECE_BYTES
            )
        ]
        for piece in sendings:
            jobs["first_span"][piece.rows] = piece.first_span
            jobs["tail"][piece.rows] = piece.tails
        on_device = cp.asarray(jobs.view(np.uint8))
        cleared = self._stream.record()
        for number, piece in enumerate(sendings):
            slot = self._slots[number % _SLOTS]
            codes = piece.fill(slot.host(piece.size_bytes), self._pool)
            for row, code in zip(piece.rows.tolist(), codes, strict=True):
                if code:
                    errors[row] = fault(code, frames[row])
            data = slot.send(piece.size_bytes)
            with slot.stream:
                slot.stream.wait_event(cleared)
                self._reduce_piece(piece, data, on_device, cells, frames, faults)
                self._stream.wait_event(slot.stream.record())
        for i in payloads.keys() - set(fused):
            try:
                pixels = self._decode_to_device(frames[i], payloads[i], faults[i : i + 1])
            except TriageError as err:
                errors[i] = err
                continue
            self._reduce(frames[i], pixels, cells, i)
        overview, radial = self._floats(jobs, on_device, cells, valid_px)
        return _Batch(
            frames=tuple(frames),
            errors=tuple(errors),
            jobs=jobs,
            jobs_on_device=on_device,
            status=status,
            cells=cells,
            on_device=OnDevice(
                stream=int(self._stream.ptr),
                overview=overview,
                radial=radial,
                bin_factor=cp.asarray(np.where(jobs["k"], jobs["k"], 2).astype(np.float32)),
            ),
        )

    def _floats(
        self, jobs: NDArray[Any], on_device: Any, cells: _Cells, valid_px: Any
    ) -> tuple[Any, Any]:
        """Queue what follows from the cells: overview, radial view and number of valid pixels."""
        cp, r, n = self._cupy, self.recipe, len(jobs)
        bins, area = r.sectors * r.radial_bins, r.grid * r.grid
        overview = cp.zeros((n, 3, r.grid, r.grid), np.float32)
        radial = cp.zeros((n, 5, r.sectors, r.radial_bins), np.float32)
        if not n:
            return overview, radial
        self._launch_warps("count_valid", n * r.grid, np.int32(r.grid), cells.count, valid_px)
        integers = (np.int32(n), np.int32(area), cells.maximum, cells.total, cells.count)
        self._launch("overview", n * area, on_device, *integers, overview)
        if jobs["bins"].any():
            sums = cp.zeros((n, 6, bins), np.uint64)
            width = np.int32(bins)
            self._launch("radial_sums", n * area, on_device, *integers, SPOT_EXCESS, width, sums)
            bounds = (SPOT_EXCESS, np.float64(CLIP_SIGMA), width)
            self._launch("radial_clipped", n * area, on_device, *integers, *bounds, sums)
            self._launch("radial_shares", n * bins, sums, np.int32(n), np.int32(bins), radial)
        return overview, radial

    def _reduce_piece(
        self,
        piece: Piece,
        data: Any,
        jobs: Any,
        cells: _Cells,
        frames: Sequence[Frame],
        faults: Any,
    ) -> None:
        """Queue what fills the cells of a piece's frames, on the current stream."""
        self._launch_warps(
            f"reduce_blocks_{8 * piece.item}",
            piece.spans,
            data,
            data,
            jobs,
            np.int32(self.recipe.grid),
            cells.maximum,
            cells.total,
            cells.count,
            faults,
            shared_bytes=piece.shared_bytes,
        )

    def _open(self, frame: Frame, jobs: NDArray[Any], row: int, held: list[Any]) -> Payload:
        """See what the payload says of itself, and fill the frame's job."""
        payload = open_payload(frame)
        k = bin_factor(self.recipe, frame)
        invalid = self._maps.invalid(frame)
        if frame.encoding == "bslz4" and _blocks(payload) * 4 > payload.data.size:
            raise fault(1, frame)
        valid = bins = 0
        if invalid.size:
            held.append(self._send(invalid, "valid", _valid_bits))
            valid = _address(held[-1]) + _WORD_BYTES
        geometry = frame.series.geometry
        if geometry is not None:
            held.append(self._send(self._maps.radial_bins(frame.shape, k, geometry)[0], "bins"))
            bins = _address(held[-1])
        bounds, dtype = limits(frame.dtype, frame.series), frame.dtype
        jobs[row] = (
            *(valid, bins, bounds.high, bounds.error),
            *(0, 0),  # tail and first_span: where the bytes go to is not known yet
            *(payload.whole, payload.block_bytes, dtype.itemsize),
            *(dtype.kind == "i", not dtype.isnative, bounds.negative_is_invalid),
            *(*frame.shape, k, EXPECTED_MAXIMUM[k]),
        )
        return payload

    def _is_fused(self, frame: Frame, payload: Payload) -> bool:
        """Whether the frame is reduced where its blocks are decoded."""
        return (
            frame.encoding == "bslz4"
            and frame.dtype.kind != "f"
            and shared_bytes(payload, frame.dtype.itemsize) <= self._shared_bytes
        )

    def _reduce(self, frame: Frame, pixels: Any, cells: _Cells, row: int) -> None:
        """Queue the reduction of decoded pixels to one row of the cells."""
        ny, nx = frame.shape
        k = bin_factor(self.recipe, frame)
        invalid = self._maps.invalid(frame)
        self._launch(
            f"reduce_{frame.dtype.str[1:]}",
            -(-ny // k) * -(-nx // k),
            pixels,
            np.int32(ny),
            np.int32(nx),
            self._send(invalid, "invalid"),
            np.int32(invalid.size > 0),
            np.int32(k),
            np.int32(self.recipe.grid),
            *_bounds(frame),
            cells.maximum[row],
            cells.total[row],
            cells.count[row],
        )

    def _tiles(
        self, frames: Sequence[Frame], views: Views, rows: Sequence[int]
    ) -> NDArray[np.float32]:
        cp, r, n = self._cupy, self.recipe, len(rows)
        out = cp.zeros((n, r.tiles, 2, r.tile_px, r.tile_px), np.float32)
        usable = [number for number, row in enumerate(rows) if views.errors[row] is None]
        if not usable or r.tiles == 0:
            return np.asarray(cp.asnumpy(out), np.float32)
        faults = self._no_faults(n)
        corners = self._corners(frames, views, rows)
        payloads = {number: open_payload(frames[rows[number]]) for number in usable}
        # What the streams below still read must outlive its place among what is kept.
        held = [
            self._send(self._maps.invalid(frames[rows[number]]), "invalid") for number in usable
        ]
        queued = self._stream.record()
        shuffled = [number for number in usable if frames[rows[number]].encoding == "bslz4"]
        for turn, piece in enumerate(pieces(shuffled, payloads, 1, _PIECE_BYTES)):
            slot = self._slots[turn % _SLOTS]
            codes = piece.fill(slot.host(piece.size_bytes), self._pool)
            data = slot.send(piece.size_bytes)
            with slot.stream:
                slot.stream.wait_event(queued)
                for i, number in enumerate(piece.rows.tolist()):
                    frame, payload = frames[rows[number]], payloads[number]
                    if codes[i]:
                        raise fault(codes[i], frame)
                    first, tail = SPAN_BYTES * piece.first_span[i], int(piece.tails[i])
                    pixels = self._decode_blocks(
                        frame,
                        payload,
                        data,
                        data[first:],
                        data[tail : tail + payload.size - payload.whole],
                        faults[number : number + 1],
                    )
                    self._crop(frame, pixels, corners[number], out[number])
                self._stream.wait_event(slot.stream.record())
        for number in set(usable) - set(shuffled):
            frame = frames[rows[number]]
            pixels = self._decode_to_device(frame, payloads[number], faults[number : number + 1])
            self._crop(frame, pixels, corners[number], out[number])
        for row, code in zip(rows, cp.asnumpy(faults).tolist(), strict=True):
            if code != _NO_FAULT:
                raise fault(code % 8, frames[row])
        del held
        return np.asarray(cp.asnumpy(out), np.float32)

    def _corners(self, frames: Sequence[Frame], views: Views, rows: Sequence[int]) -> Any:
        """(rows, tiles, 2) int32 on the device; -1 where a frame has fewer tiles."""
        cp, r, n = self._cupy, self.recipe, len(rows)
        if not isinstance(views, _DeviceViews):
            corners = np.full((n, r.tiles, 2), -1, np.int32)
            for number, row in enumerate(rows):
                if views.errors[row] is None:
                    found = tile_corners(views, row, frames[row].shape, r)
                    corners[number, : len(found)] = found
            return cp.asarray(corners)
        batch, area = views.batch, r.grid * r.grid
        # Frames with an error have no bin factor to divide by: the first frame stands for them.
        fine = [row if views.errors[row] is None else -1 for row in rows]
        stand_in = max(fine)
        chosen = cp.asarray(np.array([stand_in if row < 0 else row for row in fine], np.int32))
        left, tops = cp.empty((n, area), np.float32), cp.empty((n, r.grid), np.float32)
        largest, corners = cp.empty((n, r.grid), np.int32), cp.empty((n, r.tiles, 2), np.int32)
        cells = batch.cells
        self._launch(
            "cell_excess",
            n * area,
            batch.jobs_on_device,
            chosen,
            np.int32(n),
            np.int32(area),
            cells.maximum,
            cells.total,
            cells.count,
            left,
        )
        self._launch_warps("largest_of_rows", n * r.grid, np.int32(r.grid), left, largest)
        self._launch_warps(
            "tile_corners",
            n,
            batch.jobs_on_device,
            chosen,
            np.int32(r.grid),
            np.int32(r.tiles),
            np.int32(r.tile_px),
            left,
            largest,
            tops,
            corners,
        )
        return corners

    def _crop(self, frame: Frame, pixels: Any, corners: Any, out: Any) -> None:
        """Queue the tiles of one frame, on the current stream."""
        r, invalid = self.recipe, self._maps.invalid(frame)
        self._launch(
            f"crop_{frame.dtype.str[1:]}",
            r.tiles * r.tile_px * r.tile_px,
            pixels,
            np.int32(frame.shape[0]),
            np.int32(frame.shape[1]),
            self._send(invalid, "invalid"),
            np.int32(invalid.size > 0),
            corners,
            np.int32(r.tiles),
            np.int32(r.tile_px),
            *_bounds(frame),
            out,
        )

    def _decode_to_device(self, frame: Frame, payload: Payload, faults: Any) -> Any:
        """Queue the decoding into a device array of bytes in native order; faults come later.

        Raises:
            DecodeError: what the host can see is wrong already.
        """
        cp = self._cupy
        if frame.encoding == "raw":
            # Copied even by a device that shares the host's memory: the bytes may be swapped below.
            return self._native(frame, cp.array(payload.data))
        if frame.encoding == "bszstd":
            return cp.asarray(_decode_zstd(frame, payload))
        if frame.encoding == "lz4" and not frame.framed:
            spans = np.array([[0, payload.data.size]], np.int64)
        else:
            if _blocks(payload) * 4 > payload.data.size:
                raise fault(1, frame)
            spans, code = spans_of(payload)
            if code:
                raise fault(code, frame)
        data = cp.asarray(payload.data)
        # An array without elements has no address; kernels do not read from this one.
        table = cp.asarray(spans if len(spans) else np.zeros((1, 2), np.int64))
        tail = payload.data.size - (payload.size - payload.whole)
        return self._decode_blocks(frame, payload, data, table, data[tail:], faults)

    def _decode_blocks(
        self, frame: Frame, payload: Payload, data: Any, spans: Any, tail: Any, faults: Any
    ) -> Any:
        """Queue the decoding of LZ4 blocks that lie on the device, on the current stream."""
        cp, item = self._cupy, frame.dtype.itemsize
        shuffled = frame.encoding == "bslz4"
        out = cp.empty(payload.size, np.uint8)
        planes = cp.empty(payload.whole, np.uint8) if shuffled else out
        block_bytes, whole = np.int64(payload.block_bytes), np.int64(payload.whole)
        if payload.whole:
            self._launch_warps(
                "decode_blocks",
                _blocks(payload),
                data,
                spans,
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
                tail,
                np.int64(payload.size - payload.whole),
                out,
            )
        return self._native(frame, out)

    def _native(self, frame: Frame, data: Any) -> Any:
        """The same bytes; queues their swapping where the frame's order is not the machine's."""
        if not frame.dtype.isnative:
            item = frame.dtype.itemsize
            pixels = data.size // item
            self._launch("swap_bytes", pixels, data, np.int64(pixels), np.int32(item))
        return data

    def _send(
        self,
        host: NDArray[Any],
        use: str,
        changed: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray,
    ) -> Any:
        """A device copy of a host array that is met again and again and never changes."""
        key = (id(host), use)
        found = self._sent.get(key)
        if found is None or found[0] is not host:
            # An array without elements has no address; kernels do not read from this one.
            sent = changed(host) if host.size else np.zeros(1, host.dtype)
            with self._stream:
                found = self._sent[key] = (host, self._cupy.asarray(sent))
            # Once a series; other streams then need not wait for it.
            self._stream.synchronize()
            while len(self._sent) > _KEPT_ON_DEVICE:
                self._sent.popitem(last=False)
        return found[1]

    def _no_faults(self, n: int) -> Any:
        return self._cupy.asarray(np.full(n, _NO_FAULT, np.uint64))

    def _launch(self, kernel: str, threads: int, *args: Any) -> None:
        blocks = -(-threads // _THREADS)
        self._module.get_function(kernel)((blocks,), (_THREADS,), args)

    def _launch_warps(self, kernel: str, warps: int, *args: Any, shared_bytes: int = 0) -> None:
        self._module.get_function(kernel)((warps,), (_WARP,), args, shared_mem=shared_bytes)

    @contextmanager
    def _guarded(self, doing: str) -> Iterator[None]:
        """On the backend's stream, and with the device's failures turned into DeviceError."""
        try:
            with self._stream:
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


def _blocks(payload: Payload) -> int:
    return -(-payload.whole // payload.block_bytes)


def _valid_bits(invalid: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A bit per pixel, in words, 1 where it may count; a word to spare at both ends."""
    bits = np.packbits(invalid.ravel() == 0, bitorder="little")
    return np.pad(bits, (_WORD_BYTES, 2 * _WORD_BYTES - bits.size % _WORD_BYTES))


def _address(array: Any) -> int:
    return int(array.__cuda_array_interface__["data"][0])


def _decode_zstd(frame: Frame, payload: Payload) -> NDArray[np.uint8]:
    from triage.backends.cpu import decode_on_host

    out = np.empty(payload.size, np.uint8)
    decode_on_host(frame, payload, np.empty(0, np.uint8), out)
    return out
