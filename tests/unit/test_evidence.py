"""The evidence on a CPU: every program of it against its description."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from triage.backends import open_backend
from triage.nets.evidence import LANES, evidence_on_cpu
from triage.nets.scorer import occupied_cells
from triage.nets.triagenet import (
    CANDIDATES,
    LEAST,
    PEAKS,
    THRESHOLDS,
    Evidence,
    around_and_own,
    evidence,
)
from triage.records import Frame, Series

ROOT = Path(__file__).resolve().parents[2]

PROGRAMS = [
    pytest.param(
        lanes,
        id=f"{lanes} lanes" if lanes else "numba",
        marks=[] if lanes in LANES else [pytest.mark.skip(reason=f"no program of {lanes} lanes")],
    )
    for lanes in (16, 8, 4, 0)
]
COMPILED = pytest.mark.skipif(LANES == (0,), reason="the C extension was not built")


@dataclass(frozen=True)
class Case:
    overview: NDArray[np.float32]
    bin_factor: int


def case(image: NDArray[Any]) -> Case:
    """An image as the scorer passes it on; the largest value of its type is no measurement."""
    frame = Frame(series=Series(), image_id=0, dtype=image.dtype, shape=image.shape,
                  payload=image.tobytes())  # fmt: skip
    views = open_backend("cpu").prepare([frame])
    assert list(views.errors) == [None]
    y, x = occupied_cells(views.count[0])
    return Case(views.overview[0, :, :y, :x], int(views.bin_factor[0]))


def noise(shape: tuple[int, int], level: float, *, spots: int = 30) -> NDArray[np.uint16]:
    """Poisson noise, spots, a hot pixel and a gap."""
    rng = np.random.default_rng(round(100 * level) + shape[0])
    image = rng.poisson(level, shape).astype(np.uint16)
    for y, x in rng.integers(0, min(shape) - 3, (spots, 2)):
        image[y : y + 3, x : x + 3] += np.uint16(rng.integers(2, 150))
    image[shape[0] // 2, shape[1] // 3] += 5000
    image[:, shape[1] // 2 : shape[1] // 2 + 6] = 65535
    image[shape[0] // 4 : shape[0] // 4 + 9, : shape[1] // 3] = 65535
    return image


def one_pixel() -> NDArray[np.uint16]:
    image = np.full((64, 64), 65535, np.uint16)
    image[20, 31] = 7
    return image


def counts_beyond_all() -> NDArray[np.uint32]:
    image = np.random.default_rng(3).integers(0, 2**31, (100, 90)).astype(np.uint32)
    image[40:44, 50:54] = 2**32 - 3
    return image


def steep() -> NDArray[np.uint16]:
    """From nothing to 60000 counts within few cells."""
    y, x = np.ogrid[:300, :260]
    level = 60000.0 * np.exp(-np.hypot(y - 150, x - 90) / 12.0)
    return np.random.default_rng(4).poisson(level).astype(np.uint16)


CASES = {
    "dark": noise((240, 300), 0.01),
    "dim": noise((512, 200), 0.6),
    "bright": noise((1030, 1065), 40.0),
    "full of spots": noise((700, 640), 2.0, spots=4000),
    "narrow": noise((640, 60), 1.0),
    "wide": noise((60, 640), 1.0),
    "no count": np.zeros((90, 70), np.uint16),
    "all masked": np.full((90, 70), 65535, np.uint16),
    "one pixel": one_pixel(),
    "one row": noise((4, 640), 3.0, spots=0),
    "counts beyond all": counts_beyond_all(),
    "steep": steep(),
}

COARSER = {"steep": 1e-4, "counts beyond all": 3e-3}
"""Sigma are differences of square roots of counts, of which single precision keeps 24 bits."""


def close(mine: torch.Tensor, exact: torch.Tensor, atol: float) -> bool:
    return torch.allclose(mine.double(), exact, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("lanes", PROGRAMS)
@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_the_description(name: str, lanes: int) -> None:
    """Maps and counts against the description in double precision."""
    given = case(CASES[name])
    found = evidence_on_cpu(given.overview, given.bin_factor, lanes=lanes)
    exact = evidence(
        torch.from_numpy(given.overview.astype(np.float64))[None],
        torch.tensor([given.bin_factor], dtype=torch.float64),
    )
    assert close(found.planes, exact.planes, COARSER.get(name, 2e-5))
    assert close(found.counts, exact.counts, 2e-5)


@pytest.mark.parametrize("lanes", PROGRAMS)
@pytest.mark.parametrize("name", CASES)
def test_candidates_are_the_strongest_cells_of_equals_the_first(name: str, lanes: int) -> None:
    """By a full sort of the maps, and what is seen of them by the description."""
    given = case(CASES[name])
    found = evidence_on_cpu(given.overview, given.bin_factor, lanes=lanes)
    peak = found.planes[0, list(PEAKS)].amax(0).flatten().numpy()
    at = np.lexsort((np.arange(peak.size), -peak))[:CANDIDATES]
    assert np.array_equal(found.places[0].numpy(), at)
    counting = torch.from_numpy(peak[at] > LEAST)[None, :, None]
    seen = around_and_own(found.planes, torch.from_numpy(at)[None]) * counting
    assert torch.equal(found.candidates, seen)


def same(a: Evidence, b: Evidence) -> bool:
    return (
        torch.equal(a.planes, b.planes)
        and torch.equal(a.counts, b.counts)
        and torch.equal(a.candidates, b.candidates)
        and torch.equal(a.places, b.places)
    )


@pytest.mark.parametrize("lanes", PROGRAMS)
def test_a_corner_of_a_larger_array_gives_the_bits_of_its_copy(lanes: int) -> None:
    """The scorer passes the occupied corner of a grid; it need not copy it."""
    given = case(CASES["dim"])
    assert not given.overview.flags.c_contiguous
    copied = np.ascontiguousarray(given.overview)
    assert same(
        evidence_on_cpu(given.overview, given.bin_factor, lanes=lanes),
        evidence_on_cpu(copied, given.bin_factor, lanes=lanes),
    )


@pytest.mark.parametrize("lanes", PROGRAMS)
def test_a_frame_gives_the_same_bits_whatever_ran_before_or_runs_beside_it(lanes: int) -> None:
    """Frames of several sizes in turn on four threads."""
    cases = [case(CASES[name]) for name in ("dark", "full of spots", "narrow", "one pixel")]
    alone = [evidence_on_cpu(each.overview, each.bin_factor, lanes=lanes) for each in cases]
    wrong: list[int] = []

    def work(first: int) -> None:
        for i in range(12):
            number = (first + i) % len(cases)
            found = evidence_on_cpu(cases[number].overview, cases[number].bin_factor, lanes=lanes)
            if not same(found, alone[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("lanes", PROGRAMS)
def test_planes_stay_as_long_as_anything_looks_at_them(lanes: int) -> None:
    """Through a tensor, or through an array over a part of it, while other frames come."""
    first, second = case(CASES["bright"]), case(noise((1030, 1065), 3.0))
    found = evidence_on_cpu(first.overview, first.bin_factor, lanes=lanes)
    row, before = found.planes[0, 3].numpy()[5:9], found.planes[0, 3, 5:9].clone()
    others = [evidence_on_cpu(second.overview, second.bin_factor, lanes=lanes) for _ in range(3)]
    assert torch.equal(found.planes[0, 3, 5:9], before)
    del found, others
    for _ in range(3):
        evidence_on_cpu(second.overview, second.bin_factor, lanes=lanes)
    assert np.array_equal(row, before.numpy())


@pytest.mark.parametrize("lanes", PROGRAMS)
def test_what_is_no_number_names_no_cell_beyond_the_frame(lanes: int) -> None:
    """An overview of NaN, which no backend makes."""
    found = evidence_on_cpu(np.full((3, 32, 64), np.nan, np.float32), 2, lanes=lanes)
    assert found.places.min() >= 0
    assert found.places.max() < 32 * 64


def arguments() -> dict[str, Any]:
    """What the C function takes, in its order."""
    return {
        "overview": np.zeros((3, 32, 64), np.float32),
        "bin_factor": 2,
        "chance": 1.03,
        "floors": np.array(THRESHOLDS, np.float32),
        "least": LEAST,
        "planes": np.empty((12, 32, 64), np.float32),
        "counts": np.empty(105, np.float32),
        "candidates": np.empty((512, 39), np.float32),
        "places": np.empty(512, np.int64),
        "lanes": LANES[0],
    }


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


def misaligned(shape: tuple[int, ...]) -> NDArray[np.float32]:
    block = np.zeros(4 * int(np.prod(shape)) + 1, np.uint8)
    return block[1:].view(np.float32).reshape(shape)


BAD: list[tuple[str, Any]] = [
    ("overview", np.zeros((3, 32, 64))),
    ("overview", np.zeros((3, 32, 64), ">f4")),
    ("overview", np.zeros((3, 32, 64), np.int32)),
    ("overview", np.zeros((32, 64), np.float32)),
    ("overview", np.zeros((2, 32, 64), np.float32)),
    ("overview", np.zeros((3, 32, 128), np.float32)[:, :, ::2]),
    ("overview", np.zeros((3, 32, 96), np.float32)),
    ("overview", np.zeros((3, 33, 64), np.float32)),
    ("overview", np.zeros((3, 0, 64), np.float32)),
    ("overview", misaligned((3, 32, 64))),
    ("overview", bytes(3 * 32 * 64 * 4)),
    ("bin_factor", 0),
    ("bin_factor", 100_000),
    ("floors", np.zeros(8, np.float32)),
    ("floors", np.zeros(9)),
    ("planes", np.empty((12, 64, 64), np.float32)[:, ::2]),
    ("planes", np.empty((11, 32, 64), np.float32)),
    ("planes", read_only(np.empty((12, 32, 64), np.float32))),
    ("counts", np.empty(104, np.float32)),
    ("counts", np.empty(105)),
    ("candidates", np.empty((39, 512), np.float32)),
    ("candidates", np.empty((1024, 39), np.float32)[::2]),
    ("places", np.empty(512, np.int32)),
    ("places", np.empty(512)),
    ("lanes", 7),
]


@COMPILED
@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{n} {i}" for i, (n, _) in enumerate(BAD)])
def test_buffers_that_do_not_fit_are_refused(name: str, value: Any) -> None:
    """Type, sides, layout, alignment, and what is not to be written to."""
    from triage.nets import _evidence

    with pytest.raises(ValueError):  # noqa: PT011
        _evidence.evidence(*(arguments() | {name: value}).values())


@COMPILED
def test_sides_that_do_not_fit_are_refused_together() -> None:
    """Planes and overview agree, but in no multiple of 32."""
    from triage.nets import _evidence

    given = arguments()
    given["overview"] = np.zeros((3, 48, 64), np.float32)
    given["planes"] = np.empty((12, 48, 64), np.float32)
    with pytest.raises(ValueError, match="multiples of 32"):
        _evidence.evidence(*given.values())
    _evidence.evidence(*arguments().values())


CHECKED = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import _evidence
rng = np.random.default_rng(1)
for lanes in _evidence.LANES:
    for height, width in ((32, 32), (32, 320), (320, 32), (96, 160)):
        overview = rng.normal(0.4, 0.6, (3, height, width)).astype(np.float32)
        overview[2] = rng.integers(0, 5, (height, width)) / 4
        for scale in (0.0, 1.0, 1e3, np.nan):
            _evidence.evidence(
                overview * np.float32(scale), 2, 1.03, np.arange(9, dtype=np.float32) / 2, 0.8,
                np.empty((12, height, width), np.float32), np.empty(105, np.float32),
                np.empty((512, 39), np.float32), np.empty(512, np.int64), lanes)
print("checked")
"""


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="needs gcc on Linux"
)
def test_no_byte_outside_the_buffers_is_touched(tmp_path: Path) -> None:
    """The C program under the address and undefined-behaviour sanitizers."""
    found = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    library = Path(found.stdout.strip())
    headers = Path(sysconfig.get_path("include"))
    if not library.is_absolute() or not (headers / "Python.h").exists():
        pytest.skip("no sanitizer or no headers of Python")
    subprocess.run(
        [
            *("gcc", "-O1", "-g", "-std=gnu11", "-fno-strict-aliasing", "-ffp-contract=off"),
            *("-Wno-psabi", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"),
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
            *("-DPy_LIMITED_API=0x030B0000", f"-I{headers}"),
            *(str(ROOT / "triage" / "nets" / "_evidence.c"), "-lm"),
            *("-o", str(tmp_path / "_evidence.abi3.so")),
        ],
        check=True,
    )
    done = subprocess.run(
        [sys.executable, "-c", CHECKED, str(tmp_path)],
        env=os.environ | {"LD_PRELOAD": str(library), "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "checked", done.stderr[-4000:]
