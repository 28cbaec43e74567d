"""The CUDA kernels compile for every architecture that is served; no device is needed."""

from __future__ import annotations

import pytest

from triage.backends import cuda
from triage.errors import EnvironmentLacksError

pytest.importorskip("cupy", reason="needs cupy")
nvrtc = pytest.importorskip("cupy.cuda.nvrtc", reason="needs cupy with NVRTC")


@pytest.fixture(scope="module")
def known() -> frozenset[int]:
    try:
        return frozenset(nvrtc.getSupportedArchs())
    except RuntimeError as err:
        pytest.skip(f"NVRTC does not load: {err}")


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120])
def test_kernels_compile(known: frozenset[int], arch: int) -> None:
    """Machine code (an ELF image) for Turing to Blackwell, by the installed NVRTC."""
    if arch not in known:
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    cubin = cuda.compile_kernels(f"sm_{arch}")
    assert cubin.startswith(b"\x7fELF")
    for kernel in (b"decode_blocks", b"unshuffle", b"reduce_u2", b"crop_f4", b"radial_shares"):
        assert kernel in cubin


def test_an_unknown_architecture_is_explained(known: frozenset[int]) -> None:
    """The error names the architecture and holds the compiler's log."""
    with pytest.raises(EnvironmentLacksError, match="sm_20"):
        cuda.compile_kernels("sm_20")


def test_unavailable_gives_a_reason_or_none() -> None:
    """None exactly where CuPy finds a device."""
    import cupy

    reason = cuda.unavailable()
    assert (reason is None) == cupy.is_available()
