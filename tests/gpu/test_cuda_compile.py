"""The CUDA kernels compile for every architecture that is served; no device is needed."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from triage.backends import cuda
from triage.errors import EnvironmentLacksError

pytest.importorskip("cupy", reason="needs cupy")

ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]
REDUCING = ("reduce_blocks_8", "reduce_blocks_16", "reduce_blocks_32")
REGISTERS_OF_A_PROCESSOR = 65536
BLOCK_BYTES = 8192
# Compute capability: shared memory of a processor and of one thread block, and thread blocks that
# a processor holds (CUDA C++ programming guide, technical specifications), KiB.
LIMITS = {
    75: (64, 64, 16),
    80: (164, 163, 32),
    86: (100, 99, 16),
    89: (100, 99, 24),
    90: (228, 227, 32),
    100: (228, 227, 32),
    120: (100, 99, 24),
}
RESERVED_KIB = 1  # of each thread block, from 8.0 on
REGISTERS, FRAME = 0x2F, 0x11  # attributes of a cubin's section .nv.info


@pytest.fixture(scope="module")
def nvrtc() -> Any:
    """CuPy's binding of NVRTC, which loads the library on first use."""
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except RuntimeError as err:
        pytest.skip(f"NVRTC does not load: {err}")
    return nvrtc


def resources(cubin: bytes) -> dict[str, dict[int, int]]:
    """Attributes of each kernel in a cubin (ELF64): registers of a thread, bytes of its stack."""
    (at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<2I4Q2I2Q", cubin, at + size * i) for i in range(count)]

    def text(section: int, offset: int) -> str:
        begin = sections[section][4] + offset
        return cubin[begin : cubin.index(b"\0", begin)].decode()

    named = {text(names_at, section[0]): section for section in sections}
    symbols = named[".symtab"]
    found: dict[str, dict[int, int]] = {}
    info = named[".nv.info"]
    at, end = info[4], info[4] + info[5]
    while at < end:
        form, attribute, value = struct.unpack_from("<2BH", cubin, at)
        at += 4
        if form == 4:  # the value is the length of what follows
            if attribute in (REGISTERS, FRAME):
                symbol, number = struct.unpack_from("<2I", cubin, at)
                (name,) = struct.unpack_from("<I", cubin, symbols[4] + 24 * symbol)
                found.setdefault(text(symbols[6], name), {})[attribute] = number
            at += value
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shared_memory_alone_bounds_the_blocks_at_a_time(nvrtc: Any, arch: int) -> None:
    """As many thread blocks as hold 8 KiB of planes each also find registers; none are spilled."""
    if arch not in nvrtc.getSupportedArchs():
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    found = resources(cuda.compile_kernels(f"sm_{arch}"))
    processor, largest, most = LIMITS[arch]
    pixels = BLOCK_BYTES // 2
    needed = 4 * (16 * pixels // 32 + 2)
    assert needed <= largest << 10
    reserved = RESERVED_KIB if arch >= 80 else 0
    at_a_time = min(most, (processor << 10) // (needed + (reserved << 10)))
    assert at_a_time >= 7
    for kernel in REDUCING:
        assert found[kernel][FRAME] == 0
        # Registers are given out to warps in steps of eight a thread.
        registers = 32 * (-(-found[kernel][REGISTERS] // 8) * 8)
        assert at_a_time * registers <= REGISTERS_OF_A_PROCESSOR


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile(nvrtc: Any, arch: int) -> None:
    """Machine code (an ELF image) for Turing to Blackwell, by the installed NVRTC."""
    if arch not in nvrtc.getSupportedArchs():
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    cubin = cuda.compile_kernels(f"sm_{arch}")
    assert cubin.startswith(b"\x7fELF")
    for kernel in (
        b"reduce_blocks_16",
        b"tile_corners",
        b"unshuffle",
        b"reduce_u2",
        b"crop_f4",
        b"radial_clipped",
        b"radial_shares",
    ):
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
