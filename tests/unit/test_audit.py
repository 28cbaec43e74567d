"""The audit: its finder against a slow twin, its gate against binomial bounds, its thread."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from triage.audit import Audit, Watch
from triage.audit.finder import Spots, crystal_spots, find_spots
from triage.binomial import _cdf, lower_bound
from triage.errors import DecodeError
from triage.records import AuditReport, Frame, Geometry, Series


def noise(seed: int, level: float = 3.0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).poisson(level, (200, 240)).astype(np.int64)


def with_spots(image: NDArray[np.int64], n: int, photons: float, sigma_px: float) -> list[Any]:
    """Add Gaussian spots on a grid, far from each other and from the edge; their places."""
    rng = np.random.default_rng(9)
    yy, xx = np.mgrid[: image.shape[0], : image.shape[1]]
    places = [(24 + 30 * (i // 7), 24 + 30 * (i % 7)) for i in range(n)]
    for y, x in places:
        shape = np.exp(-0.5 * ((yy - y) ** 2 + (xx - x) ** 2) / sigma_px**2)
        image += rng.poisson(photons * shape / shape.sum())
    return places


@pytest.mark.parametrize(
    ("level", "photons", "sigma_px"),
    [(0.02, 60, 0.5), (0.02, 60, 1.5), (3, 120, 0.6), (3, 250, 1.5), (80, 700, 0.7)],
)
def test_spots_well_over_five_sigma_are_found_where_they_are(
    level: float, photons: float, sigma_px: float
) -> None:
    """I / sqrt(I + B n) is 6 or more for each of them, from sparse frames to bright ones."""
    image = noise(1, level)
    places = with_spots(image, 21, photons, sigma_px)
    found = find_spots(image, np.ones(image.shape, np.bool_))
    for y, x in places:
        distance = np.hypot(found.y_px - y - 0.5, found.x_px - x - 0.5)
        assert (distance < 2.5).sum() == 1, (y, x)
    assert len(found) <= len(places) + 1


def test_a_frame_leaves_nothing_behind_for_the_next_one() -> None:
    """The arrays that are held from frame to frame: same spots as in a thread that is new."""
    image, valid = noise(1), np.ones((200, 240), np.bool_)
    with_spots(image, 21, 250, 1.0)
    masked = valid.copy()
    masked[:70, 30:] = False
    alone: list[Spots] = []
    thread = threading.Thread(target=lambda: alone.append(find_spots(image, masked)))
    thread.start()
    thread.join()
    for before in (image * 7, noise(2), np.zeros((30, 400), np.int64)):
        find_spots(before, np.ones(before.shape, np.bool_))
        found = find_spots(image, masked)
        for name in ("x_px", "y_px", "reach_px", "photons", "sigma"):
            assert np.array_equal(getattr(found, name), getattr(alone[0], name))
    assert len(alone[0]) >= 9


def test_pure_noise_has_no_spots() -> None:
    """Forty frames of five levels: chance and the trials of a whole frame give next to none."""
    valid = np.ones((200, 240), np.bool_)
    counts = [len(find_spots(noise(s, 0.01 * 10 ** (s % 5)), valid)) for s in range(40)]
    assert sum(counts) <= 2


def test_hot_pixels_edges_streaks_and_rings_are_no_spots() -> None:
    """What stands out, but not as a spot does."""
    valid = np.ones((200, 240), np.bool_)
    hot = noise(2)
    hot[20::20, 20::20] += 4000
    assert len(find_spots(hot, valid)) == 0
    edge = noise(3, 20.0)
    edge[:, 100:] = np.random.default_rng(4).poisson(1.0, edge[:, 100:].shape)
    assert len(find_spots(edge, valid)) == 0
    streak = noise(4)
    streak[100, 30:200] += np.random.default_rng(5).poisson(30.0, 170)
    assert len(find_spots(streak, valid)) <= 2  # its ends may pass
    yy, xx = np.mgrid[:200, :240]
    ring = noise(5)
    on_ring = np.abs(np.hypot(yy - 100, xx - 120) - 70) < 2
    ring[on_ring] += np.random.default_rng(6).poisson(9.0, int(on_ring.sum()))
    assert len(find_spots(ring, valid)) <= 2


def test_masked_pixels_count_for_nothing() -> None:
    """Whatever they hold."""
    image = noise(6)
    valid = np.ones(image.shape, np.bool_)
    places = with_spots(image, 3, 300, 0.7)
    for y, x in places:
        valid[y - 4 : y + 5, x - 4 : x + 5] = False
    assert len(find_spots(image, valid)) == 0
    changed = image.copy()
    changed[~valid] = 10**6
    valid[100:110] = False
    changed[100:110] = -5
    assert len(find_spots(changed, valid)) == 0


def test_a_gain_of_several_counts_per_photon_is_seen() -> None:
    """A CCD's noise is no spot, and its photons are counted as photons."""
    image = 4 * noise(7, 30.0) + np.rint(np.random.default_rng(8).normal(0, 2, (200, 240)))
    valid = np.ones(image.shape, np.bool_)
    assert len(find_spots(image, valid)) <= 1
    spots = np.zeros((200, 240), np.int64)
    with_spots(spots, 21, 500, 0.9)
    found = find_spots(image + 4 * spots, valid)
    assert 19 <= len(found) <= 23
    # A square of 3 pixels holds erf(1.5 / (0.9 sqrt 2))^2 = 82 % of such a spot.
    assert np.median(found.photons) == pytest.approx(409, rel=0.15)


def test_the_signal_to_noise_is_that_of_a_plain_sum() -> None:
    """For each spot: its square, the ring around it, one pixel at a time."""
    image = noise(11, 2.0)
    valid = np.random.default_rng(12).random(image.shape) > 0.03
    with_spots(image, 21, 200, 0.8)
    found = find_spots(image, valid)
    assert len(found) > 15
    for i in range(len(found)):
        y, x, reach = (int(v[i]) for v in (found.square_y, found.square_x, found.reach_px))
        inner = n = around = ring_n = 0
        for py in range(max(0, y - 2 * reach - 3), min(200, y + 2 * reach + 4)):
            for px in range(max(0, x - 2 * reach - 3), min(240, x + 2 * reach + 4)):
                far = max(abs(py - y), abs(px - x))
                if valid[py, px] and far <= reach:
                    inner, n = inner + int(image[py, px]), n + 1
                elif valid[py, px] and far > reach + 1:
                    around, ring_n = around + int(image[py, px]), ring_n + 1
        net = inner - around / ring_n * n
        assert found.photons[i] == pytest.approx(net)
        assert found.sigma[i] == pytest.approx(
            net / math.sqrt(inner + around / ring_n * n * n / ring_n)
        )


GEOMETRY = Geometry(
    beam_center_x_px=500.0,
    beam_center_y_px=500.0,
    pixel_size_x_m=1e-4,
    pixel_size_y_m=1e-4,
    detector_distance_m=0.1,
    incident_wavelength_angstrom=1.0,
)


def at(*places: tuple[float, float]) -> Spots:
    """Spots at (x, y)."""
    n = len(places)
    x, y = np.array(places, np.float64).reshape(n, 2).T
    ones, whole = np.ones(n), np.ones(n, np.int64)
    return Spots(
        x_px=x,
        y_px=y,
        square_x=x.astype(np.int64),
        square_y=y.astype(np.int64),
        reach_px=whole,
        photons=ones,
        sigma=9 * ones,
    )


def test_spots_of_ice_and_at_the_smallest_angles_are_no_crystal() -> None:
    """By hand: sin(theta) = 1 / 7.8, tan(2 theta) = 0.263 for 3.90 angstrom; 3.0 is free of ice."""

    def radius(d: float) -> float:
        return 1000 * math.tan(2 * math.asin(1 / (2 * d)))

    assert radius(3.90) == pytest.approx(263, abs=1)
    for d, counted in ((3.90, 0), (3.67, 0), (30.0, 0), (3.0, 1), (8.0, 1)):
        spots = at((500 + radius(d), 500.0))
        assert crystal_spots(spots, (1000, 1000), GEOMETRY) == counted
        assert crystal_spots(spots, (1000, 1000), None) == 1


def test_a_cluster_counts_for_two() -> None:
    """Twenty spots in one corner are a flare; twenty over the frame are a crystal."""
    corner = at(*((10.0 + 4 * i, 20.0) for i in range(20)))
    spread = at(*((25.0 + 50 * i, 975.0 - 50 * i) for i in range(20)))
    assert crystal_spots(corner, (1000, 1000), None) == 2
    assert crystal_spots(spread, (1000, 1000), None) == 20


def test_the_tail_is_the_sum_of_its_terms() -> None:
    """The continued fraction against plain sums, and quick for a hundred thousand."""
    for k, n, p in ((0, 5, 0.3), (4, 5, 0.3), (11, 600, 0.05), (250, 500, 0.5), (3, 4000, 1e-3)):
        plain = math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
        assert _cdf(k, n, p) == pytest.approx(plain, rel=1e-9)
    assert lower_bound(95_000, 100_000, 0.9999) == pytest.approx(0.9474, abs=1e-4)


def test_the_lower_bound_is_the_tabled_one() -> None:
    """k = n: p^n = 1 - confidence. 5 of 100 at 97.5 %: 1.64 % (published tables). 0: none."""
    assert lower_bound(10, 10, 0.9999) == pytest.approx(1e-4**0.1)
    assert lower_bound(5, 100, 0.975) == pytest.approx(0.01643, abs=2e-5)
    assert lower_bound(0, 100, 0.9999) == 0.0


def opened_after(share: float, seed: int, most: int) -> int | None:
    """Audited frames until the gate opens; None when it does not."""
    rng = np.random.default_rng(seed)
    watch = Watch(0.005)
    for number in range(1, most + 1):
        watch.add(bool(rng.random() < share))
        if watch.gate_open:
            return number
    return None


def test_the_gate_opens_in_time_on_five_per_cent_of_hits() -> None:
    """600 audited frames do: 12 of 600 have a lower bound above 0.5 %, and 30 are expected.

    P(X <= 11) of X ~ B(600, 0.05) is 5e-5. At an audit fraction of 5 % that is 12,000 vetoes.
    """
    assert lower_bound(12, 600, 0.9999) > 0.005 > lower_bound(11, 600, 0.9999)
    miss = sum(math.comb(600, k) * 0.05**k * 0.95 ** (600 - k) for k in range(12))
    assert miss == pytest.approx(5e-5, rel=0.1)
    opened = [opened_after(0.05, seed, 600) for seed in range(20)]
    assert all(n is not None for n in opened)
    assert all(n % 100 == 0 for n in opened if n is not None)


def test_the_gate_stays_shut_at_a_twentieth_of_a_per_cent() -> None:
    """100,000 vetoed frames at an audit fraction of 5 % are 5,000 audited ones, twenty times."""
    assert [opened_after(0.0005, seed, 5_000) for seed in range(20)] == [None] * 20


def test_harm_that_begins_late_is_seen() -> None:
    """After 100,000 clean frames, 10 % hits open the gate within 500 more."""
    watch = Watch(0.005)
    for _ in range(100_000):
        watch.add(False)
    for i in range(500):
        watch.add(i % 10 == 0)
    assert watch.gate_open
    for _ in range(1000):
        watch.add(False)
    assert watch.gate_open


VALID = np.ones((200, 240), np.bool_)


class _Metrics:
    def __init__(self) -> None:
        self.reports: list[AuditReport] = []

    def audit(self, report: AuditReport) -> None:
        self.reports.append(report)


def finished(audit: Audit) -> AuditReport:
    assert audit.wait(600.0)
    return audit.finish()


def audited(measured: Any, image_ids: Iterable[int], **options: Any) -> AuditReport:
    """What an audit of its own says of these frames."""
    with contextlib.closing(Audit(measured, limit=0.005, **options)) as audit:
        for image_id in image_ids:
            audit.offer(frame(image_id))
        return finished(audit)


def frame(image_id: int, size_bytes: int = 1000) -> Frame:
    return Frame(series=Series(), image_id=image_id, shape=(200, 240), size_bytes=size_bytes)


@pytest.fixture
def images() -> dict[int, Any]:
    """Even ids are noise, odd ids hits whose spots lie elsewhere in each."""
    made: dict[int, Any] = {}
    for i in range(40):
        image = noise(100 + i, 1.0)
        if i % 2:
            with_spots(image, 21, 150, 0.6)
            image = np.roll(image, (7 * i, 11 * i), (0, 1))
        made[i] = image
    return made


@pytest.fixture
def audit(images: dict[int, Any]) -> Iterator[Audit]:
    made = Audit(lambda f: (images[f.image_id], VALID), limit=0.005)
    yield made
    made.close()


def test_the_audit_tells_hits_from_blanks(audit: Audit) -> None:
    """Half of forty frames; the interval holds a half."""
    for i in range(40):
        audit.offer(frame(i))
    report = finished(audit)
    assert (report.audited, report.hits) == (40, 20)
    assert report.hit_share_low < 0.5 < report.hit_share_high
    assert report.skipped == report.unreadable == 0
    assert not report.gate_open  # a look is taken after 100


def test_lasting_spots_are_bad_pixels() -> None:
    """Twenty clusters at the same places on every frame: no hit, from the first frame on."""
    clusters = noise(50, 0.5)
    with_spots(clusters, 21, 300, 0.8)
    report = audited(lambda f: (clusters, VALID), range(100))
    assert (report.audited, report.hits) == (100, 0)


def test_bad_pixels_that_come_late_do_not_open_the_gate() -> None:
    """320 clean frames, then the same 21 clusters on each of 320: a few hits in one block at most.

    The new ones begin in the middle of a block, on four of its sixteen frames.
    """
    clean, clusters = noise(60, 0.5), noise(61, 0.5)
    with_spots(clusters, 21, 300, 0.8)
    report = audited(lambda f: (clusters if f.image_id >= 316 else clean, VALID), range(640))
    assert report.audited == 640
    assert report.hits == 4
    assert not report.gate_open


def test_what_was_not_looked_at_is_counted(images: dict[int, Any]) -> None:
    """Frames that wait when the run is given up are skipped, not gone."""
    release, entered = threading.Event(), threading.Event()

    def measured(f: Frame) -> Any:
        entered.set()
        release.wait(30.0)
        return images[0], VALID

    audit = Audit(measured, limit=0.005)
    for i in range(10):
        audit.offer(frame(i))
    assert entered.wait(30.0)
    assert not audit.wait(0.01)
    threading.Timer(0.2, release.set).start()
    report = audit.finish()
    assert report.audited + report.skipped == 10
    assert report.audited == 1


def test_a_patient_audit_has_looked_when_it_returns(images: dict[int, Any]) -> None:
    """So a recorded run meets the same gate at the same frame whenever it is replayed."""
    looked: list[int] = []

    def measured(f: Frame) -> Any:
        looked.append(f.image_id)
        return images[f.image_id], VALID

    audit = Audit(measured, limit=0.005, patient=True)
    try:
        for i in range(6):
            audit.offer(frame(i))
            assert looked[-1] == i
    finally:
        audit.close()


def test_a_masked_frame_is_unreadable_and_no_blank(images: dict[int, Any]) -> None:
    """The finder sees no spots where it sees nothing; that is no evidence of blank."""
    report = audited(lambda f: (images[1], np.zeros_like(VALID)), [1])
    assert (report.audited, report.unreadable) == (0, 1)


def test_a_few_frames_are_judged_at_the_end(images: dict[int, Any]) -> None:
    """Fewer than a block; of three nothing can be said to last."""
    report = audited(lambda f: (images[f.image_id], VALID), (1, 2, 3))
    assert (report.audited, report.hits) == (3, 2)


def test_many_frame_sizes_are_each_judged() -> None:
    """Seven sizes of three frames: nothing is left unjudged when one is forgotten."""
    made = [np.random.default_rng(i).poisson(1.0, (120 + i, 140)) for i in range(7)]
    report = audited(
        lambda f: (made[f.image_id], made[f.image_id] >= 0), (i % 7 for i in range(21))
    )
    assert (report.audited, report.hits, report.unreadable) == (21, 0, 0)


def test_a_frame_that_cannot_be_read_is_counted_and_the_next_is_looked_at(
    images: dict[int, Any],
) -> None:
    """Whatever the decoder raises."""

    def measured(f: Frame) -> Any:
        if f.image_id == 0:
            raise DecodeError("broken")
        if f.image_id == 2:
            raise ZeroDivisionError
        return images[f.image_id], VALID

    metrics = _Metrics()
    report = audited(measured, range(4), metrics=metrics)
    assert (report.audited, report.hits, report.unreadable) == (2, 2, 2)
    assert metrics.reports[-1].hits == 2


def test_the_sample_is_bounded_and_never_waits(images: dict[int, Any]) -> None:
    """While the finder hangs, at most 256 MiB wait; the rest is skipped and counted."""
    release, entered = threading.Event(), threading.Event()

    def measured(f: Frame) -> Any:
        entered.set()
        release.wait(30.0)
        return images[0], VALID

    audit = Audit(measured, limit=0.005)
    try:
        audit.offer(frame(0))
        assert entered.wait(30.0)
        for i in range(1, 8):
            audit.offer(frame(i, size_bytes=100 << 20))
        assert audit.report().skipped == 5
        release.set()
        assert finished(audit).audited == 3
    finally:
        release.set()
        audit.close()
    audit.close()
    audit.offer(frame(9))
    assert audit.report().skipped == 6


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux")
@pytest.mark.parametrize(("patient", "further"), [(False, 10), (True, 0)])
def test_a_live_audit_lets_the_frames_go_first(patient: bool, further: int) -> None:
    """Its thread is nicer than the process; that of a recorded run, which waits for it, is not."""
    seen: list[int] = []

    def measured(frame: Frame) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return np.zeros((64, 64), np.uint16), np.ones((64, 64), np.bool_)

    before = os.getpriority(os.PRIO_PROCESS, 0)
    audit = Audit(measured, limit=0.5, patient=patient)
    audit.offer(Frame(series=Series(), image_id=0))
    assert audit.wait(20)
    audit.close()
    assert seen == [min(before + further, 19)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_the_gate_opens_on_six_hits_in_a_hundred_and_not_on_five() -> None:
    """P(X >= 5) of X ~ B(100, 0.005) is 1.7e-4, P(X >= 6) 1.4e-5; 1e-4 is the limit."""
    tails = [
        sum(math.comb(100, k) * 0.005**k * 0.995 ** (100 - k) for k in range(least, 101))
        for least in (5, 6)
    ]
    assert tails[0] > 1e-4 > tails[1]
    for hits, opens in ((5, False), (6, True)):
        watch = Watch(0.005)
        for i in range(100):
            assert not watch.gate_open
            watch.add(i < hits)
        assert watch.gate_open is opens
