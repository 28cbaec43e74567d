"""The CUDA kernels compile for every architecture that is served; no device is needed."""

from __future__ import annotations

from typing import Any

import pytest

from triage.backends import cuda
from triage.errors import EnvironmentLacksError

pytest.importorskip("cupy", reason="needs cupy")

ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]


@pytest.fixture(scope="module")
def nvrtc() -> Any:
    """CuPy's binding of NVRTC, which loads the library on first use."""
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except RuntimeError as err:
        pytest.skip(f"NVRTC does not load: {err}")
    return nvrtc


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile(nvrtc: Any, arch: int) -> None:
    """Machine code (an ELF image) for Turing to Blackwell, by the installed NVRTC."""
    if arch not in nvrtc.getSupportedArchs():
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    cubin = cuda.compile_kernels(f"sm_{arch}")
    assert cubin.startswith(b"\x7fELF")
    for kernel in (b"reduce_blocks_16", b"unshuffle", b"reduce_u2", b"crop_f4", b"radial_shares"):
        assert kernel in cubin


def test_an_unknown_architecture_is_explained(nvrtc: Any) -> None:
    """The error names the architecture and holds the compiler's log."""
    with pytest.raises(EnvironmentLacksError, match="sm_20"):
        cuda.compile_kernels("sm_20")


def test_unavailable_gives_a_reason_or_none() -> None:
    """None exactly where CuPy finds a device."""
    import cupy

    reason = cuda.unavailable()
    assert (reason is None) == cupy.is_available()
