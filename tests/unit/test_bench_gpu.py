"""The benchmark of a device, on kernels built for the host: its figures mean nothing here."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import reference
from host_cuda import host_cupy
from typer.testing import CliRunner

from triage.backends import cuda
from triage.bench import Options, gpu, measure, run_bench
from triage.bench.nvcomp import ByNvcomp, installed
from triage.errors import DeviceError, EnvironmentLacksError

LABEL = "0_1m_u16"


class SlowNvcomp:
    """Does with the same addresses what nvCOMP is asked to do."""

    unshuffles = True

    def scratch_bytes(self, blocks: int, block_bytes: int, total_bytes: int) -> int:
        return 0

    def decompress(
        self, table: int, blocks: int, scratch: int, scratch_bytes: int, item: int, stream: int
    ) -> None:
        rows = np.ctypeslib.as_array((ctypes.c_uint64 * (6 * blocks)).from_address(table))
        for source, size, room, _, target, _ in rows.reshape(6, blocks).T.tolist():
            block = reference.lz4_block(ctypes.string_at(source, size))
            assert len(block) == room
            if item:
                block = reference.unshuffled(block, item)
            ctypes.memmove(target, block, room)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two frames and one round of everything, on a device that is this machine."""
    monkeypatch.setattr(measure, "_LEAST_ROUNDS", 1)
    monkeypatch.setattr(gpu, "_OTHER_BATCHES", (1, 2))
    monkeypatch.setattr(gpu, "_COUNT", 2)
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(gpu, "installed", SlowNvcomp)


@pytest.mark.usefixtures("short")
def test_every_design_is_measured() -> None:
    """Rates of all designs, batches and workers, latency and ratios: positive numbers."""
    with host_cupy():
        record = run_bench("gpu", Options(seconds=0.0, sizes=("0.1M",)), "triage bench gpu")
    designs = ("fused", "apart", "cpu", "nvcomp", "nvcomp_bits")
    wanted = {f"reduced_{LABEL}_{name}_per_s" for name in designs}
    for batch in (1, 2):
        wanted.add(f"kernel_{LABEL}_batch{batch}_us")
        for workers in (1, 2):
            wanted.add(f"reduced_{LABEL}_batch{batch}_workers{workers}_per_s")
            wanted.add(f"decided_{LABEL}_batch{batch}_workers{workers}_per_s")
    wanted |= {f"latency_{LABEL}_2000hz_p{share}_ms" for share in (50, 99)}
    wanted |= {f"decode_{LABEL}_over_cpu", f"reduce_{LABEL}_over_cpu"}
    wanted |= {"floor_copy_gb_per_s", "floor_bus_gb_per_s"}
    assert set(record.figures) == wanted
    assert all(math.isfinite(value) and value > 0 for value in record.figures.values())
    assert record.input["0.1M u16 typ"]["frames"] == 2
    assert record.input["device"]["name"] == "none"


@pytest.mark.usefixtures("short")
def test_a_design_with_other_numbers_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named as absent; with the fused design nothing is measured at all."""

    class Wrong(SlowNvcomp):
        unshuffles = False

        def decompress(self, *args: int) -> None:
            """Leaves everything as it was."""

    monkeypatch.setattr(gpu, "installed", Wrong)
    monkeypatch.setattr(gpu, "_compare", lambda *_: None)
    for name in ("_batches", "_decoding", "_decisions"):
        monkeypatch.setattr(gpu, name, lambda *_: None)
    options = Options(seconds=0.0, sizes=("0.1M",))
    with host_cupy():
        assert "maximum" in gpu.run(options).absent["nvcomp, 0.1M u16 typ"]
        monkeypatch.setattr(gpu, "_differing", lambda *_: ["total"])
        with pytest.raises(DeviceError, match="total"):
            gpu.run(options)


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 4 of the command line: the environment lacks something."""
    monkeypatch.setattr(cuda, "unavailable", lambda: "no device today")
    with pytest.raises(EnvironmentLacksError, match="no device today"):
        gpu.run(Options())


def test_late_frames_are_late() -> None:
    """Frames arrive by the clock and not when the last ones are done."""
    now = [0.0]

    def clock() -> float:
        return now[0]

    batches: list[int] = []

    def decide(frames: list[int]) -> None:
        batches.append(len(frames))
        now[0] += 0.05

    # Ten a second, 50 ms a batch: the first alone; then time stands still until it is done.
    def slow(frames: list[int]) -> None:
        decide(frames)
        now[0] += 0.25

    latencies = gpu._latencies(slow, [0], 10.0, 1.0, clock)
    assert batches == [1, 3, 3, 3]
    assert latencies == pytest.approx([0.3, 0.5, 0.4, 0.3, 0.5, 0.4, 0.3, 0.5, 0.4, 0.3])


def test_blocks_that_nvcomp_puts_together() -> None:
    """Those of 8 KiB, as the payload says."""
    from triage.bench.frames import PoolSpec, made_pool

    frames = made_pool(PoolSpec(size="0.1M", count=2)).frames
    assert ByNvcomp.can_unshuffle(frames)


def test_nvcomp_is_there_or_named() -> None:
    """The library, or an error that names the package."""
    try:
        library = installed()
    except EnvironmentLacksError as err:
        library, why = None, str(err)
    assert "nvidia-libnvcomp" in why if library is None else library.version >= 5


def test_the_command_exits_with_4_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``triage doctor`` would say it."""
    from triage.cli import app

    monkeypatch.setattr(cuda, "unavailable", lambda: "no device today")
    result = CliRunner().invoke(app, ["bench", "gpu"])
    assert isinstance(result.exception, EnvironmentLacksError)
