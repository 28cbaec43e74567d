"""The CUDA backend without a device: its kernels compiled by g++, its CuPy replaced by numpy.

Blocks and threads become two loops and a warp has one lane, so this checks the kernels'
arithmetic, indexing, bounds and launch arguments; not races, and not the device's own arithmetic.
"""

from __future__ import annotations

import atexit
import ctypes
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from triage.backends import Backend, cuda, open_backend
from triage.records import Recipe

_PRELUDE = """
#include <cmath>
using std::fabs;
#define __global__
#define __device__
#define LANES 1
struct Index { unsigned x; };
static Index blockIdx, threadIdx, blockDim;
static void __syncwarp() {}
template <typename T> static void atomicAdd(T* p, T v) { *p += v; }
template <typename T> static void atomicMin(T* p, T v) { if (v < *p) *p = v; }
"""
_KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')


@cache
def _library() -> ctypes.CDLL:
    """``kernels.cu`` as a host library, each kernel with a function ``launch_<name>``."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source = Path(cuda.__file__).with_name("kernels.cu").read_text(encoding="utf-8")
    # The launchers come behind the macros are expanded, when every kernel has its name.
    folder = Path(tempfile.mkdtemp(prefix="host_cuda_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
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
            f'extern "C" void launch_{name}(unsigned grid_, unsigned block_, {parameters}) {{\n'
            "  blockDim.x = block_;\n"
            "  for (blockIdx.x = 0; blockIdx.x < grid_; ++blockIdx.x)\n"
            "    for (threadIdx.x = 0; threadIdx.x < block_; ++threadIdx.x)\n"
            f"      {name}({names});\n}}\n"
        )
    assert len(launchers) > 10
    plain.write_text("\n".join([_PRELUDE, source, *launchers]), encoding="utf-8")
    library = folder / "kernels.so"
    # As on the device: no fused multiply-add, no reordering.
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", library, plain], check=True)
    return ctypes.CDLL(str(library))


_SCALARS = {
    np.dtype(np.int32): ctypes.c_int32,
    np.dtype(np.int64): ctypes.c_int64,
    np.dtype(np.float32): ctypes.c_float,
}


class _Module:
    """What ``cupy.cuda.Module`` is to the backend."""

    def load(self, cubin: bytes) -> None:
        self._library = _library()

    def get_function(self, name: str) -> Any:
        launch = self._library[f"launch_{name}"]

        def call(grid: tuple[int], block: tuple[int], args: tuple[Any, ...]) -> None:
            passed: list[Any] = [ctypes.c_uint(grid[0]), ctypes.c_uint(block[0])]
            for arg in args:
                if isinstance(arg, np.ndarray):
                    assert arg.flags.c_contiguous
                    passed.append(ctypes.c_void_p(arg.ctypes.data))
                else:
                    passed.append(_SCALARS[arg.dtype](arg.item()))
            launch(*passed)

        return call


class _NeverError(Exception):
    """Stands for the device's errors."""


_GUARD_BYTES = 64
_GUARD = 0xA5
_guarded: list[np.ndarray] = []


def _empty(shape: Any, dtype: Any) -> np.ndarray:
    """Uninitialised memory, with guard bytes on both sides."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.full(size + 2 * _GUARD_BYTES, _GUARD, np.uint8)
    _guarded.append(memory)
    return memory[_GUARD_BYTES:-_GUARD_BYTES].view(dtype).reshape(shape)


def _to_host(device: Any) -> np.ndarray:
    """A copy to the host, which waits for the kernels: none of them may have overrun."""
    for memory in _guarded:
        assert (memory[:_GUARD_BYTES] == _GUARD).all(), "a kernel wrote before its buffer"
        assert (memory[-_GUARD_BYTES:] == _GUARD).all(), "a kernel wrote behind its buffer"
    _guarded.clear()
    return _fresh(device)


def _fresh(host: Any) -> np.ndarray:
    """A copy, as a transfer makes one."""
    return np.array(host, order="C")


def host_cuda_backend(recipe: Recipe) -> cuda.CudaBackend:
    """A CudaBackend whose device is this machine's memory; skips where there is no g++."""
    errors = {
        "runtime": SimpleNamespace(CUDARuntimeError=_NeverError),
        "driver": SimpleNamespace(CUDADriverError=_NeverError),
        "memory": SimpleNamespace(OutOfMemoryError=_NeverError),
    }
    fake = SimpleNamespace(
        asarray=_fresh,
        array=_fresh,
        asnumpy=_to_host,
        empty=_empty,
        zeros=np.zeros,
        cuda=SimpleNamespace(
            Device=lambda: SimpleNamespace(compute_capability="00"), Module=_Module, **errors
        ),
    )
    with (
        mock.patch.dict("sys.modules", {"cupy": fake}),
        mock.patch.object(cuda, "compile_kernels", return_value=b""),
    ):
        return cuda.CudaBackend(recipe)


def make_backend(kind: str, recipe: Recipe) -> Backend:
    """The backend of a test parameter, ``cpu``, ``cuda_host`` or ``cuda``; skips without it."""
    if kind == "cuda_host":
        return host_cuda_backend(recipe)
    if kind == "cuda":
        why_not = cuda.unavailable()
        if why_not is not None:
            pytest.skip(why_not)
    return open_backend(kind, recipe)


KINDS = ["cpu", "cuda_host", pytest.param("cuda", marks=pytest.mark.gpu)]
"""Parameters of a fixture over every backend."""
