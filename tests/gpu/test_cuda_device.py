"""What only a device can show: streams that overlap, full-size frames, many blocks at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from triage.backends import cuda, open_backend
from triage.bench.frames import PoolSpec, made_pool
from triage.records import Frame, Recipe, Views

pytestmark = pytest.mark.gpu

ARRAYS = ("maximum", "total", "count", "bin_factor", "overview", "radial", "has_geometry")


@pytest.fixture(autouse=True)
def _device() -> None:
    why_not = cuda.unavailable()
    if why_not is not None:
        pytest.skip(why_not)


def same(found: Views, wanted: Views) -> None:
    assert found.errors == wanted.errors
    for name in ARRAYS:
        assert getattr(found, name).tobytes() == getattr(wanted, name).tobytes(), name


@pytest.mark.parametrize(("size", "bits"), [("4M", 16), ("4M", 32), ("1M", 8), ("16M", 16)])
def test_full_size_frames_are_the_cpus(size: str, bits: int) -> None:
    """Several pieces in flight, every block at once: cells, views, tiles and pixels bit for bit."""
    frames = list(made_pool(PoolSpec(size=size, bits=bits, count=2)).frames) * 8
    device, host = open_backend("cuda", Recipe()), open_backend("cpu", Recipe())
    wanted = host.prepare(frames)
    for _ in range(3):
        same(device.prepare(frames), wanted)
    views = device.prepare(frames)
    found = device.close_ups(frames, views, range(len(frames)))
    expected = host.close_ups(frames, wanted, range(len(frames)))
    assert found.tiles.tobytes() == expected.tiles.tobytes()
    assert found.spots.tobytes() == expected.spots.tobytes()
    assert device.decode(frames[0]).tobytes() == host.decode(frames[0]).tobytes()


def test_two_workers_do_not_disturb_each_other() -> None:
    """Each has streams and memory of its own."""
    pools = [made_pool(PoolSpec(size="1M", level=level, count=4)) for level in ("weak", "strong")]
    host = open_backend("cpu", Recipe())
    wanted = [host.prepare(pool.frames) for pool in pools]
    devices = [open_backend("cuda", Recipe()) for _ in pools]

    def work(i: int) -> None:
        frames: tuple[Frame, ...] = pools[i].frames
        for _ in range(50):
            same(devices[i].prepare(frames), wanted[i])

    with ThreadPoolExecutor(len(pools)) as threads:
        list(threads.map(work, range(len(pools))))
