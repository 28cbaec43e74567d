"""What is made of real frames: rings of ice, turns, and the figures of a gallery."""

from __future__ import annotations

import math
from pathlib import Path

import h5py
import numpy as np
import pytest

from triage.errors import UnreadableFile
from triage.nets.model import load_model
from triage.records import Geometry
from triage.training.real_frames import (
    alarm_threshold,
    ice_curve,
    ice_places,
    real_figures,
    source_of,
    turned,
    with_rings,
)

GEOMETRY = Geometry(
    beam_center_x_px=110.0,
    beam_center_y_px=70.0,
    pixel_size_x_m=4e-4,
    pixel_size_y_m=4e-4,
    detector_distance_m=0.12,
    incident_wavelength_angstrom=1.0,
)


def test_rings_stand_at_the_spacings_of_ice_and_nowhere_else() -> None:
    """Background 400: a ring of half of it at 3.90 angstrom, nothing at 3.0; spots change little.

    The frame's own spots stand in a few sectors, and the ring does not grow by them.
    """
    rng = np.random.default_rng(1)
    counts = rng.poisson(400.0, (180, 200)).astype(np.int64)
    counts[20:24, 30:34] = 50_000
    valid = np.ones(counts.shape, bool)
    valid[:, 100] = False
    places = ice_places(counts, valid, GEOMETRY)
    iced = with_rings(counts, places, 0.5, 0.003, rng)
    y, x = np.indices(counts.shape)
    inverse_d = GEOMETRY.inverse_d(x + 0.5, y + 0.5)
    added = iced - counts
    on = valid & (np.abs(inverse_d - 1 / 3.90) < 5e-4)
    off = valid & (np.abs(inverse_d - 1 / 3.0) < 3e-3)
    assert added[on].mean() == pytest.approx(200.0, rel=0.05)
    assert added[off].sum() == 0
    assert added[~valid].sum() == 0


@pytest.mark.parametrize("turn", range(8))
def test_a_turned_frame_keeps_the_resolution_of_each_pixel(turn: int) -> None:
    """A pixel of its own count is found after the turn, and 1/d there is what it was."""
    counts = np.arange(180 * 200).reshape(180, 200)
    moved, _, geometry = turned(counts, counts > 0, GEOMETRY, turn)
    for y, x in ((0, 0), (17, 160), (179, 3)):
        ((there_y, there_x),) = np.argwhere(moved == counts[y, x])
        assert geometry.inverse_d(
            np.array([there_x + 0.5]), np.array([there_y + 0.5])
        ) == pytest.approx(GEOMETRY.inverse_d(np.array([x + 0.5]), np.array([y + 0.5])), rel=1e-5)


def test_the_alarm_threshold_lets_so_many_through_and_no_more() -> None:
    """Of 200 frames two may be called at one in a hundred, of 50 none."""
    p = np.arange(200) / 200.0
    assert (p >= alarm_threshold(p, 0.01)).sum() == 2
    assert (p[:50] >= alarm_threshold(p[:50], 0.01)).sum() == 0


def test_the_recall_of_ice_is_read_off_where_few_frames_without_it_are_called() -> None:
    """Of 100 without ice one may be called: 0.8 and not 0.7 is passed, by 3 of 4 hits."""

    def row(kind: str, contrast: float, p_ice: float) -> dict[str, object]:
        return {"kind": kind, "contrast": contrast, "p_ice": p_ice}

    without = [row("blank", 0.0, p) for p in (0.9, 0.8, 0.7, *[0.1] * 97)]
    iced = [row("hit", 0.2, p) for p in (0.95, 0.85, 0.81, 0.75)]
    found = ice_curve([*without, *iced, row("blank", 0.1, 0.2)])
    assert found["without_ice"] == 100
    assert found["called_at_half_without_ice"] == 3
    assert 0.8 < found["threshold"] < 0.81
    assert found["hit_20"]["recall"] == 0.75
    assert found["hit_20"]["recall_at_half"] == 1.0
    assert found["blank_10"]["recall"] == 0.0
    assert ice_curve(iced) == {}


def test_a_source_is_a_name_without_its_numbers() -> None:
    """Frames of one scan belong together, and so do frames of one file."""
    assert source_of("thau_3_2_0001.cbf.bz2") == source_of("thau_3_2_0019.cbf.bz2") == "thau"
    assert source_of("l-cyst_01_00006.cbf.gz") == "l-cyst"
    assert source_of("0001.cbf") == "0001"


def test_a_gallery_is_counted_by_source(tmp_path: Path) -> None:
    """Two dark frames and a file of strong spots: as many rows as lines; nothing is made of
    frames without geometry; what was not measured is not there."""
    rng = np.random.default_rng(2)
    spots = rng.poisson(2.0, (1, 256, 256)).astype(np.uint16)
    for y, x in rng.integers(10, 246, (60, 2)):
        spots[0, y : y + 3, x : x + 3] += 200
    for name, pixels in (("dark_001.h5", np.zeros((2, 256, 256), np.uint16)), ("hit.h5", spots)):
        with h5py.File(tmp_path / name, "w") as file:
            file["data"] = pixels
    (tmp_path / "manifest.csv").write_text(
        "file,frame,kind,label,multilattice,n_spots_auto\n"
        "dark_001.h5,0,blank_nobeam,blank,n/a,\ndark_001.h5,1,blank_nobeam,blank,n/a,\n"
        "hit.h5,0,mx_hit,weak,unknown,60\n"
    )
    model = load_model()
    found = real_figures(model, tmp_path)
    assert found["frames"] == 3
    assert [(row["source"], row["frames"]) for row in found["sources"]] == [("dark", 2), ("hit", 1)]
    assert found["kept"]["mx_hit"]["frames"] == 1
    assert found["kept"]["xfel_hit"]["share"] is None
    assert set(found["blank_sources"]) == {"dark"}
    for row in found["rows"]:
        assert row["vetoed"] == (row["p_blank"] >= model.card.thresholds["p_blank_veto"])
    # Without geometry ice is not scored, and none is put there.
    assert math.isnan(found["rows"][0]["p_ice"])
    assert found["ice"] == {"rows": []}
    assert found["lattices"] == {}
    assert found["powder"]["called_ice"] is None


def test_a_folder_without_labels_is_refused(tmp_path: Path) -> None:
    """With what was expected."""
    with pytest.raises(UnreadableFile, match=r"manifest\.csv"):
        real_figures(load_model(), tmp_path)
