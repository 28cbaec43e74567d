"""The CUDA backend without a device: its kernels compiled by g++, its CuPy replaced by numpy.

Thread blocks run one after the other. A kernel launched in blocks of one warp runs its 32 lanes
as fibers that change at every warp barrier, in an order that alternates, so this checks what the
lanes share, and that all of them come to the same barriers; the threads of other kernels are a
loop. What is checked is arithmetic, indexing, bounds and launch arguments; not the device's own
arithmetic, nor races between warps.
"""

from __future__ import annotations

import atexit
import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from triage.backends import Backend, cuda, open_backend
from triage.backends.cpu import CpuBackend
from triage.errors import EnvironmentLacksError
from triage.records import Recipe

PRELUDE = Path(__file__).with_name("host_cuda.h")
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(([^)]*)\)')
_FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing"]
"""As on the device: no fused multiply-add, no reordering."""


def build(folder: Path, *more: str, appended: str = "") -> Path:
    """``kernels.cu`` for the host, each kernel with a function ``launch_<name>``.

    Args:
        more: options of the compiler, ``-shared`` among them for a library.
        appended: C++ that follows the kernels.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source = Path(cuda.__file__).with_name("kernels.cu").read_text(encoding="utf-8")
    # The launchers come behind the macros are expanded, when every kernel has its name.
    plain = folder / "kernels.cpp"
    plain.write_text(source, encoding="utf-8")
    keep = ["-D__global__=__global__", "-E", "-P", "-x", "c++"]
    expanded = subprocess.run(
        [compiler, *keep, plain], check=True, capture_output=True, text=True
    ).stdout
    launchers = []
    for name, parameters in _KERNEL.findall(expanded):
        names = ", ".join(re.split(r"[\s*]+", p.strip())[-1] for p in parameters.split(","))
        launchers.append(
            f'extern "C" void launch_{name}(unsigned grid_, unsigned block_, unsigned shared_, '
            f"{parameters}) {{\n"
            f"  host_launch(grid_, block_, shared_, [=] {{ {name}({names}); }});\n}}\n"
        )
    assert len(launchers) > 10
    parts = [PRELUDE.read_text(encoding="utf-8"), source, *launchers, appended]
    plain.write_text("\n".join(parts), encoding="utf-8")
    made = folder / "kernels"
    subprocess.run([compiler, *_FLAGS, *more, "-o", made, plain], check=True)
    return made


@cache
def _library() -> ctypes.PyDLL:
    folder = Path(tempfile.mkdtemp(prefix="host_cuda_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # With the interpreter held: thread and block indices are globals.
    return ctypes.PyDLL(str(build(folder, "-O2", "-shared", "-fPIC")))


_SCALARS = {
    np.dtype(np.int32): ctypes.c_int32,
    np.dtype(np.int64): ctypes.c_int64,
    np.dtype(np.float32): ctypes.c_float,
    np.dtype(np.float64): ctypes.c_double,
}


class _Function:
    """What ``cupy.cuda.Function`` is to the backend."""

    ptr = 0

    def __init__(self, launch: Any) -> None:
        self._launch = launch
        self._launch.restype = None

    def __call__(
        self, grid: tuple[int], block: tuple[int], args: tuple[Any, ...], shared_mem: int = 0
    ) -> None:
        passed: list[Any] = [ctypes.c_uint(n) for n in (grid[0], block[0], shared_mem)]
        for arg in args:
            if isinstance(arg, np.ndarray):
                assert arg.flags.c_contiguous
                passed.append(ctypes.c_void_p(arg.ctypes.data))
            else:
                passed.append(_SCALARS[arg.dtype](arg.item()))
        self._launch(*passed)


class _Module:
    """What ``cupy.cuda.Module`` is to the backend."""

    def load(self, cubin: bytes) -> None:
        self._library = _library()

    def get_function(self, name: str) -> _Function:
        return _Function(self._library[f"launch_{name}"])


class _Stream:
    """What ``cupy.cuda.Stream`` and its events are to the backend: all is done at once."""

    ptr = 0

    def __init__(self, non_blocking: bool = True) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record(self) -> _Stream:
        return self

    def wait_event(self, event: _Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _NeverError(Exception):
    """Stands for the device's errors."""


class _Array(np.ndarray):
    """A numpy array with what the backend asks of CuPy's."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.__array_interface__

    def set(self, host: np.ndarray, stream: _Stream) -> None:
        self[...] = host


_GUARD_BYTES = 64
_GUARD = 0xA5
_guarded: list[np.ndarray] = []


def _empty(shape: Any, dtype: Any) -> np.ndarray:
    """Uninitialised memory, with guard bytes on both sides."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.full(size + 2 * _GUARD_BYTES, _GUARD, np.uint8)
    _guarded.append(memory)
    return memory[_GUARD_BYTES:-_GUARD_BYTES].view(dtype).reshape(shape).view(_Array)


def _zeros(shape: Any, dtype: Any) -> np.ndarray:
    memory = _empty(shape, dtype)
    memory[...] = 0
    return memory


def _to_host(device: Any) -> np.ndarray:
    """A copy to the host, which waits for the kernels: none of them may have overrun."""
    for memory in _guarded:
        assert (memory[:_GUARD_BYTES] == _GUARD).all(), "a kernel wrote before its buffer"
        assert (memory[-_GUARD_BYTES:] == _GUARD).all(), "a kernel wrote behind its buffer"
    _guarded.clear()
    return np.array(device, order="C", subok=False)


def _fresh(host: Any) -> np.ndarray:
    """A copy, as a transfer makes one."""
    return np.array(host, order="C").view(_Array)


@contextmanager
def host_cupy() -> Iterator[None]:
    """CuPy replaced: a CudaBackend that is made here works on this machine's memory."""
    device = SimpleNamespace(
        id=0, compute_capability="00", attributes={"MaxSharedMemoryPerBlockOptin": 99 << 10}
    )
    properties = {"name": b"none", "totalGlobalMem": 0, "multiProcessorCount": 0}
    fake = SimpleNamespace(
        asarray=_fresh,
        array=_fresh,
        asnumpy=_to_host,
        empty=_empty,
        zeros=_zeros,
        cuda=SimpleNamespace(
            Device=lambda: device,
            Module=_Module,
            Stream=_Stream,
            alloc_pinned_memory=bytearray,
            get_current_stream=_Stream,
            get_elapsed_time=lambda began, ended: 0.001,
            runtime=SimpleNamespace(
                CUDARuntimeError=_NeverError,
                getDeviceProperties=lambda number: properties,
                driverGetVersion=lambda: 0,
            ),
            driver=SimpleNamespace(
                CUDADriverError=_NeverError,
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
                CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT=9,
                funcSetAttribute=lambda function, attribute, value: None,
            ),
            memory=SimpleNamespace(OutOfMemoryError=_NeverError),
        ),
    )
    # This one module alone: what else is imported meanwhile stays imported.
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = fake
    try:
        with mock.patch.object(cuda, "compile_kernels", return_value=b""):
            yield
    finally:
        del sys.modules["cupy"]
        if before is not None:
            sys.modules["cupy"] = before


def host_cuda_backend(recipe: Recipe) -> cuda.CudaBackend:
    """A CudaBackend whose device is this machine's memory; skips where there is no g++."""
    with host_cupy():
        return cuda.CudaBackend(recipe)


def make_backend(kind: str, recipe: Recipe) -> Backend:
    """The backend of a test parameter, a member of ``KINDS``; skips without it."""
    if kind.startswith("cpu_"):
        try:
            return CpuBackend(recipe, kernels=kind.removeprefix("cpu_"))
        except EnvironmentLacksError as err:
            pytest.skip(str(err))
    if kind == "cuda_host":
        return host_cuda_backend(recipe)
    if kind == "cuda":
        why_not = cuda.unavailable()
        if why_not is not None:
            pytest.skip(why_not)
    return open_backend(kind, recipe)


KINDS = ["cpu_c", "cpu_numba", "cuda_host", pytest.param("cuda", marks=pytest.mark.gpu)]
"""Parameters of a fixture over every backend."""
