"""One simulated frame: a specification drawn at random, the photons it asks for, the truth.

The noise-free spots and the noise-free background are made apart, so that the truth says what
is visible (signal to noise of each reflection) and not what was put in. The nominal inputs are
kept beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from simulators.diffraction.cameras import CAMERAS, Camera, module_gaps
from simulators.diffraction.crystals import (
    CELLS,
    Cell,
    random_rotation,
    reciprocal_axes,
    reflections,
)

__all__ = ["ICE_D_ANGSTROM", "FrameSpec", "Rendered", "draw_camera", "draw_spec", "render"]

ICE_D_ANGSTROM = (3.90, 3.67, 3.44, 2.67, 2.25, 2.07, 1.95, 1.92, 1.88)
"""Powder lines of hexagonal ice; cubic ice has the second, fifth and eighth of them."""
_ICE_STRENGTH = (1.0, 0.8, 0.9, 0.3, 0.5, 0.4, 0.1, 0.35, 0.1)
_CUBIC = (1, 4, 7)
_OTHER_RINGS_D_ANGSTROM = (
    (3.26, 2.82, 1.99, 1.70, 1.63),  # NaCl
    (3.12, 2.71, 1.91, 1.63),  # CeO2
    (58.4, 29.2, 19.5, 14.6, 11.7, 9.7, 8.3),  # silver behenate
    (4.6, 4.15, 3.75),  # lipid chains
    (5.9, 5.2, 4.3),  # polymer of a mount
)

VISIBLE_SNR = 5.0
"""A reflection is visible when I / sqrt(I + B n) exceeds this."""

_SMALL_ANGSTROM = 20.0
"""Longest edge of a small molecule's cell."""

HIT_SPOTS = 10
"""Visible spots from which a frame counts as a hit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameSpec:
    """Everything that is drawn before photons are; see :func:`draw_spec` for the ranges."""

    camera: Camera
    kind: str
    seed: int
    wavelength_angstrom: float
    distance_m: float
    beam_px: tuple[float, float]
    mean_background: float
    cell: Cell | None = None
    spots_wanted: float = 0.0
    overexposure: float = 1.0
    lattice_weights: tuple[float, ...] = ()
    lattice_turn_deg: tuple[float, ...] = ()
    mosaicity_deg: float = 0.2
    domain_angstrom: float = 2000.0
    bandwidth: float = 3e-4
    divergence_rad: float = 3e-4
    rotation_deg: float = 0.0
    b_factor: float = 25.0
    psf_sigma_px: float = 0.5
    smear: float = 1.0
    water_d_angstrom: float = 3.3
    water_share: float = 0.5
    halo_share: float = 0.3
    ice_contrast: float = 0.0
    ice_width: float = 0.006
    ice_cubic: bool = False
    ice_grains: int = 0
    other_rings: int = -1
    other_contrast: float = 0.0
    beamstop_px: float = 20.0
    arm_rad: float = 0.0
    shadow: float = 0.0
    tube_px: float = 0.0
    flare: float = 0.0
    flare_px: float = 10.0
    hot_pixels: int = 0
    tracks: int = 0
    zingers: int = 0
    gain: float = 1.0
    offset: float = 0.0
    read_noise: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rendered:
    """A frame and what is true of it.

    Attributes:
        image: (y, x) in the camera's dtype.
        mask: (y, x) uint32, NXmx bits: 1 = gap, 2 = known dead.
        truth: labels, NaN where undefined.
        nominal: the inputs behind them.
        spots_px: (n, 2) x, y of the visible reflections, pixels from the outer corner.
    """

    image: NDArray[Any]
    mask: NDArray[np.uint32]
    truth: dict[str, float] = field(default_factory=dict)
    nominal: dict[str, float] = field(default_factory=dict)
    spots_px: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))


def draw_camera(rng: np.random.Generator, *, held_out: bool = False) -> Camera:
    """A detector, by weight."""
    cameras = [c for c in CAMERAS if c.held_out == held_out]
    weights = np.array([c.weight for c in cameras])
    return cameras[int(rng.choice(len(cameras), p=weights / weights.sum()))]


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(math.exp(rng.uniform(math.log(low), math.log(high))))


def draw_spec(
    rng: np.random.Generator,
    *,
    camera: Camera,
    held_out: bool = False,
    blank_share: float = 0.45,
    between_share: float = 0.07,
) -> FrameSpec:
    """A frame to render. Crystals, ice and lattices are drawn independently of each other.

    Args:
        held_out: draw from the crystals that no training frame has.
        blank_share: share of frames on which no crystal diffracts.
        between_share: share with 1 to 9 visible spots, neither blank nor hit.
    """
    ccd = camera.family == "ccd"
    u = rng.random()
    kind = "blank" if u < blank_share else "between" if u < blank_share + between_share else "hit"
    wavelength = float(rng.uniform(0.7, 1.4))
    fields: dict[str, object] = {}
    small = rng.random() < 0.1
    if kind != "blank":
        fields |= _draw_crystal(rng, kind, held_out)
        small = max(fields["cell"].edges_angstrom) < _SMALL_ANGSTROM  # type: ignore[attr-defined]
    width_m = max(camera.shape) * camera.pixel_m
    # The edge of the detector at 1.5 to 4 angstrom, so that rings and spots fall on it; the few
    # reflections of a small molecule are worth recording further out.
    edge_d = _log_uniform(rng, 0.75, 1.6) if small else _log_uniform(rng, 1.5, 4.0)
    two_theta = 2.0 * math.asin(min(0.95, wavelength / (2.0 * edge_d)))
    distance = float(np.clip(0.5 * width_m / math.tan(two_theta), 0.05, 0.8))
    y, x = camera.shape
    beam = (
        float(x * (0.5 + rng.normal(0.0, 0.06))),
        float(y * (0.5 + rng.normal(0.0, 0.06))),
    )
    if rng.random() < 0.12:
        beam = (float(x * rng.uniform(-0.1, 1.1)), float(y * rng.uniform(-0.1, 1.1)))
    background = _log_uniform(rng, 0.003, 150.0)
    if ccd:
        background = _log_uniform(rng, 2.0, 150.0)
    dark = kind == "blank" and rng.random() < 0.28
    if dark:
        background = 0.0 if rng.random() < 0.6 else _log_uniform(rng, 1e-5, 3e-3)
    if rng.random() < 0.35 and background > 0:
        fields |= {
            "ice_contrast": _log_uniform(rng, 0.02, 5.0),
            "ice_width": _log_uniform(rng, 0.002, 0.012),
            "ice_cubic": bool(rng.random() < 0.25),
            "ice_grains": 0 if rng.random() < 0.9 else int(_log_uniform(rng, 3, 400)),
        }
    if rng.random() < 0.15 and background > 0:
        fields |= {
            "other_rings": int(rng.integers(len(_OTHER_RINGS_D_ANGSTROM))),
            "other_contrast": _log_uniform(rng, 0.05, 4.0),
        }
    if rng.random() < 0.35 and background > 0:
        fields |= {
            "flare": min(background * _log_uniform(rng, 3.0, 3000.0), 2000.0),
            "flare_px": _log_uniform(rng, 2.0, 0.02 * max(camera.shape)),
        }
    if rng.random() < (0.9 if dark else 0.6):
        most = 500 if dark or rng.random() < 0.3 else 30
        fields["hot_pixels"] = int(_log_uniform(rng, 10 if dark else 1, most))
    if rng.random() < (0.6 if dark else 0.15):
        fields["tracks"] = int(_log_uniform(rng, 1, 30))
    if ccd and rng.random() < 0.7:
        fields["zingers"] = int(_log_uniform(rng, 3, 250))
    gain, offset, noise = 1.0, 0.0, 0.0
    if ccd:
        gain, offset, noise = (
            float(rng.uniform(0.8, 3.0)),
            float(rng.uniform(8.0, 45.0)),
            float(rng.uniform(1.0, 4.0)),
        )
    elif camera.family == "jungfrau" and rng.random() < 0.3:
        gain, noise = float(rng.uniform(0.9, 2.5)), float(rng.uniform(0.05, 0.4))
    return FrameSpec(
        camera=camera,
        kind="dark" if dark else kind,
        seed=int(rng.integers(2**31)),
        wavelength_angstrom=wavelength,
        distance_m=distance,
        beam_px=beam,
        mean_background=background,
        domain_angstrom=_log_uniform(rng, 500.0, 8000.0),
        bandwidth=_log_uniform(rng, 1e-4, 8e-3) if rng.random() < 0.5 else 2e-4,
        divergence_rad=_log_uniform(rng, 5e-5, 1.5e-3),
        rotation_deg=float(rng.choice([0.0, 0.0, 0.1, 0.25, 0.5])),
        b_factor=_log_uniform(rng, 8.0, 90.0),
        psf_sigma_px=float(rng.uniform(0.7, 1.4) if ccd else rng.uniform(0.3, 0.75)),
        water_d_angstrom=float(rng.uniform(3.0, 4.4)),
        water_share=float(rng.uniform(0.0, 0.9)),
        halo_share=float(rng.uniform(0.0, 0.8)),
        beamstop_px=_log_uniform(rng, 5.0, 0.06 * max(camera.shape)),
        arm_rad=float(rng.uniform(0.0, 2 * math.pi)) if rng.random() < 0.5 else math.nan,
        shadow=float(rng.uniform(0.3, 1.0)) if rng.random() < 0.15 else 0.0,
        tube_px=max(camera.shape) * float(rng.uniform(0.4, 0.8)) if rng.random() < 0.1 else 0.0,
        gain=gain,
        offset=offset,
        read_noise=noise,
        **fields,  # type: ignore[arg-type]
    )


def _draw_crystal(rng: np.random.Generator, kind: str, held_out: bool) -> dict[str, object]:
    cells = [c for c in CELLS if c.held_out == held_out]
    lattices = int(rng.choice([1, 2, 3, 4], p=[0.55, 0.3, 0.1, 0.05]))
    weights = (1.0, *(_log_uniform(rng, 0.05, 1.0) for _ in range(lattices - 1)))
    turns = (0.0, *(_log_uniform(rng, 0.2, 180.0) for _ in range(lattices - 1)))
    cell = cells[int(rng.integers(len(cells)))]
    wanted = float(rng.uniform(1.0, 9.0))
    if kind == "hit":
        u = rng.random()
        fewest, most = (10.0, 30.0) if u < 0.4 else (30.0, 700.0) if u < 0.85 else (700.0, 8000.0)
        wanted = _log_uniform(rng, fewest, most)
    overexposure = 1.0
    if max(cell.edges_angstrom) < _SMALL_ANGSTROM:
        # All few reflections of a small molecule are up, and strong.
        overexposure = _log_uniform(rng, 1.0, 60.0)
    elif wanted > 700.0:
        # A strong crystal covers the frame with spots, each far above the background.
        overexposure = _log_uniform(rng, 1.0, 30.0)
    elif kind == "hit" and rng.random() < 0.2:
        overexposure = _log_uniform(rng, 1.0, 6.0)
    return {
        "cell": cell,
        "spots_wanted": wanted,
        "overexposure": overexposure,
        "lattice_weights": weights,
        "lattice_turn_deg": turns,
        "mosaicity_deg": _log_uniform(rng, 0.03, 1.0),
        "smear": _log_uniform(rng, 1.5, 4.0) if rng.random() < 0.15 else 1.0,
    }


def render(spec: FrameSpec, known_dead: NDArray[np.bool_] | None = None) -> Rendered:
    """The frame of a specification; the same specification gives the same bytes.

    Args:
        known_dead: (y, x) pixels that the detector's own mask names dead.
    """
    rng = np.random.default_rng(spec.seed)
    camera = spec.camera
    gaps = module_gaps(camera)
    dead = np.zeros(camera.shape, np.bool_) if known_dead is None else known_dead & ~gaps
    ring_d, ring_strength, ring_width = _rings(spec)
    background = _background(
        camera.shape,
        camera.pixel_m,
        spec.distance_m,
        spec.wavelength_angstrom,
        spec.beam_px[0],
        spec.beam_px[1],
        spec.water_d_angstrom,
        spec.water_share,
        spec.halo_share,
        ring_d,
        ring_strength,
        ring_width,
        float(rng.uniform(0.0, 0.35)),
    )
    transmission = _shadows(spec, rng)
    background *= transmission
    background *= spec.mean_background / max(float(background.mean()), 1e-12)
    _flare(spec, rng, background, transmission)
    truth, spots, spot_photons = _spots(spec, rng, background, transmission, gaps | dead)
    expected = background
    if spot_photons is not None:
        expected = background + spot_photons
    grains = _ice_grains(spec, rng, background, expected)
    _double_edges(expected, gaps, camera)
    counts = _poisson(expected, int(rng.integers(2**31))).astype(np.float64)
    image = _electronics(spec, rng, counts, gaps, dead)
    truth |= _ice_truth(spec, background, ring_d, ring_strength, grains)
    mask = gaps.astype(np.uint32) + 2 * dead.astype(np.uint32)
    return Rendered(
        image=image,
        mask=mask,
        truth=truth,
        nominal={
            "mean_background": spec.mean_background,
            "mosaicity_deg": spec.mosaicity_deg if spec.cell else math.nan,
            "lattices": float(len(spec.lattice_weights)),
            "ice_contrast": spec.ice_contrast,
            "hot_pixels": float(spec.hot_pixels),
            "b_factor": spec.b_factor,
        },
        spots_px=spots,
    )


def _rings(
    spec: FrameSpec,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Smooth powder rings: d, contrast over the background, width in 1/d."""
    rings: list[tuple[float, float, float]] = []
    if spec.ice_contrast > 0 and spec.ice_grains == 0:
        for i, (d, strength) in enumerate(zip(ICE_D_ANGSTROM, _ICE_STRENGTH, strict=True)):
            if not spec.ice_cubic or i in _CUBIC:
                rings.append((d, spec.ice_contrast * strength, spec.ice_width))
    if spec.other_rings >= 0:
        for d in _OTHER_RINGS_D_ANGSTROM[spec.other_rings]:
            rings.append((d, spec.other_contrast, 0.004))
    table = np.array(rings, np.float64).reshape(-1, 3)
    return table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy()


@nb.njit(cache=True)
def _background(
    shape: tuple[int, int],
    pixel_m: float,
    distance_m: float,
    wavelength: float,
    beam_x: float,
    beam_y: float,
    water_d: float,
    water_share: float,
    halo_share: float,
    ring_d: NDArray[np.float64],
    ring_strength: NDArray[np.float64],
    ring_width: NDArray[np.float64],
    polarisation: float,
) -> NDArray[np.float64]:
    # The radial part by look-up in half pixels of radius, the polarisation per pixel.
    ny, nx = shape
    far_x = max(abs(beam_x), abs(nx - beam_x))
    far_y = max(abs(beam_y), abs(ny - beam_y))
    steps = int(2.0 * np.sqrt(far_x * far_x + far_y * far_y)) + 4
    profile = np.empty(steps)
    for i in range(steps):
        radius_m = 0.5 * i * pixel_m
        two_theta = np.arctan2(radius_m, distance_m)
        q = 2.0 * np.sin(0.5 * two_theta) / wavelength
        air = np.exp(-6.0 * q) + 0.08
        water = np.exp(-0.5 * ((q - 1.0 / water_d) / 0.045) ** 2)
        halo = np.exp(-25.0 * q)
        smooth = air + 2.0 * water_share * water + 4.0 * halo_share * halo
        for j in range(ring_d.shape[0]):
            z = (q - 1.0 / ring_d[j]) / ring_width[j]
            if abs(z) < 5.0:
                smooth *= 1.0 + ring_strength[j] * np.exp(-0.5 * z * z)
        profile[i] = smooth * np.cos(two_theta) ** 3
    out = np.empty(shape)
    for y in range(ny):
        dy = y + 0.5 - beam_y
        for x in range(nx):
            dx = x + 0.5 - beam_x
            rr = dx * dx + dy * dy
            at = 2.0 * np.sqrt(rr)
            i = int(at)
            value = profile[i] + (at - i) * (profile[i + 1] - profile[i])
            out[y, x] = value * (1.0 - polarisation * dx * dx / (rr + 1e4))
    return out


def _shadows(spec: FrameSpec, rng: np.random.Generator) -> NDArray[np.float64]:
    """(y, x) transmission: beamstop disc, its arm, a holder that covers one side, a tube."""
    ny, nx = spec.camera.shape
    out = np.ones((ny, nx))
    bx, by = spec.beam_px
    radius = spec.beamstop_px
    y0, y1 = max(0, int(by - radius)), min(ny, int(by + radius) + 1)
    x0, x1 = max(0, int(bx - radius)), min(nx, int(bx + radius) + 1)
    if y1 > y0 and x1 > x0:
        yy, xx = np.ogrid[y0:y1, x0:x1]
        disc = (xx + 0.5 - bx) ** 2 + (yy + 0.5 - by) ** 2 < radius**2
        out[y0:y1, x0:x1][disc] = 0.01
    if not math.isnan(spec.arm_rad):
        length = np.arange(0.0, float(max(ny, nx)), 0.7)
        half = max(1, int(0.25 * radius))
        xs = (bx + np.cos(spec.arm_rad) * length).astype(int)
        ys = (by + np.sin(spec.arm_rad) * length).astype(int)
        for offset in range(-half, half + 1):
            if abs(math.cos(spec.arm_rad)) > 0.7:
                px, py = xs, ys + offset
            else:
                px, py = xs + offset, ys
            inside = (px >= 0) & (px < nx) & (py >= 0) & (py < ny)
            out[py[inside], px[inside]] = 0.05
    if spec.shadow > 0:
        edge = int(nx * rng.uniform(0.6, 0.95))
        out[:, edge:] *= 1.0 - spec.shadow
    if spec.tube_px > 0:
        yy, xx = np.ogrid[:ny, :nx]
        x, y = nx * rng.uniform(0.3, 0.7), ny * rng.uniform(0.3, 0.7)
        out[(xx - x) ** 2 + (yy - y) ** 2 > spec.tube_px**2] *= 0.02
    return out


def _flare(
    spec: FrameSpec,
    rng: np.random.Generator,
    background: NDArray[np.float64],
    transmission: NDArray[np.float64],
) -> None:
    """Parasitic scatter past the beamstop, added to ``background``: grainy lobes and streaks.

    Slits, windows and the stop's own rim scatter to the smallest angles, unevenly. It is brighter
    than all else on a frame of a weak sample, and no crystal.
    """
    if spec.flare == 0.0:
        return
    ny, nx = background.shape
    (bx, by), radius = spec.beam_px, spec.beamstop_px
    lobes, streaks = int(rng.integers(1, 5)), int(rng.integers(0, 5))
    lobe_rad, width_rad = rng.uniform(-math.pi, math.pi, lobes), rng.uniform(0.1, 1.0, lobes)
    streak_rad = rng.uniform(-math.pi, math.pi, streaks)
    length_px = np.exp(rng.uniform(math.log(5.0), math.log(80.0), streaks))
    reach = int(radius + 8.0 * max(spec.flare_px, *length_px, 0.0))
    y0, y1 = max(0, int(by) - reach), min(ny, int(by) + reach)
    x0, x1 = max(0, int(bx) - reach), min(nx, int(bx) + reach)
    if y1 <= y0 or x1 <= x0:
        return
    dy = (np.arange(y0, y1) + 0.5 - by)[:, None]
    dx = (np.arange(x0, x1) + 0.5 - bx)[None, :]
    outside = np.hypot(dx, dy) - radius
    turn = np.arctan2(dy, dx)
    pattern = np.full(outside.shape, 0.02)
    for angle, width in zip(lobe_rad, width_rad, strict=True):
        apart = (turn - angle + math.pi) % (2.0 * math.pi) - math.pi
        pattern += rng.random() * np.exp(-0.5 * (apart / width) ** 2)
    pattern *= np.exp(-np.maximum(outside, 0.0) / spec.flare_px)
    for angle, length in zip(streak_rad, length_px, strict=True):
        along = dx * math.cos(angle) + dy * math.sin(angle)
        across = (dy * math.cos(angle) - dx * math.sin(angle)) / rng.uniform(0.7, 2.0)
        pattern += (
            rng.random()
            * np.exp(-0.5 * across**2 - np.maximum(outside, 0.0) / length)
            * (along > 0)
        )
    # Grains of two pixels: the scatter of a coherent beam is speckled.
    grains = rng.gamma(2.0, 0.5, ((y1 - y0) // 2 + 1, (x1 - x0) // 2 + 1))
    pattern *= grains.repeat(2, 0).repeat(2, 1)[: y1 - y0, : x1 - x0]
    background[y0:y1, x0:x1] += spec.flare * pattern * transmission[y0:y1, x0:x1]


def _spots(
    spec: FrameSpec,
    rng: np.random.Generator,
    background: NDArray[np.float64],
    transmission: NDArray[np.float64],
    unusable: NDArray[np.bool_],
) -> tuple[dict[str, float], NDArray[np.float64], NDArray[np.float64] | None]:
    """Truth of the crystal, visible spots, and the noise-free photons of all spots."""
    blank_truth = {
        "blank": 1.0,
        "multilattice": math.nan,
        "mosaicity_deg": math.nan,
        "n_lattices": 0.0,
        "d_vis_angstrom": math.nan,
        "n_visible": 0.0,
        "median_snr": math.nan,
        "quality": 0.0 if spec.mean_background < 1e-4 else 1.0,
    }
    if spec.cell is None:
        return blank_truth, np.zeros((0, 2)), None
    table = _lattice_table(spec, rng)
    inside = _on_detector(table, unusable)
    table = table[inside]
    at = table[:, 1].astype(int), table[:, 0].astype(int)
    # A spot in a shadow is as weak as it is seen there, and read noise hides like background.
    table[:, 2] *= transmission[at]
    local = background[at] + (spec.read_noise / spec.gain) ** 2
    scale = _scale_for(table, local, spec.spots_wanted) * spec.overexposure
    intensity = scale * table[:, 2]
    snr = intensity / np.sqrt(intensity + local * table[:, 6] + 1e-9)
    # A reflection also needs photons enough to be told from a single count.
    visible = (snr > VISIBLE_SNR) & (intensity > VISIBLE_SNR**2)
    photons = np.zeros(spec.camera.shape)
    keep = intensity > 0.02
    _draw_spots(photons, table[keep], intensity[keep])
    truth = dict(blank_truth)
    n_visible = int(visible.sum())
    truth["n_visible"] = float(n_visible)
    if n_visible == 0:
        return truth, np.zeros((0, 2)), photons
    truth["blank"] = 0.0 if n_visible >= HIT_SPOTS else math.nan
    truth["median_snr"] = float(np.median(snr[visible]))
    if n_visible >= HIT_SPOTS:
        truth |= _hit_truth(spec, table[visible], intensity[visible], truth["median_snr"])
    else:
        truth["quality"] = math.nan
        truth["n_lattices"] = math.nan
    return truth, table[visible, :2], photons


def _hit_truth(
    spec: FrameSpec, spots: NDArray[np.float64], intensity: NDArray[np.float64], snr: float
) -> dict[str, float]:
    n_visible = len(spots)
    lattices = [intensity[spots[:, 7] == i] for i in range(len(spec.lattice_weights))]
    strongest = max(float(i.sum()) for i in lattices)
    apart = [
        i == 0 or turn > 1.5 * spec.mosaicity_deg for i, turn in enumerate(spec.lattice_turn_deg)
    ]
    seen = sum(
        len(i) >= HIT_SPOTS and i.sum() >= 0.1 * strongest and far
        for i, far in zip(lattices, apart, strict=True)
    )
    smeared = spec.smear > 1.5 or any(not far for far in apart)
    return {
        "n_lattices": float(max(1, seen)),
        "multilattice": float(seen > 1 or smeared),
        "mosaicity_deg": spec.mosaicity_deg,
        "d_vis_angstrom": float(1.0 / math.sqrt(np.quantile(spots[:, 8], 0.9))),
        "quality": 2.0 + float(n_visible >= 40 and snr > 6.0) + float(n_visible >= 200),
    }


def _lattice_table(spec: FrameSpec, rng: np.random.Generator) -> NDArray[np.float64]:
    """Rows: x, y [px], unscaled intensity, sigma along, sigma across [px], angle of the long
    axis, pixels under the spot, lattice number, 1/d^2."""
    cell = spec.cell
    if cell is None:
        return np.zeros((0, 9))
    base = random_rotation(rng)
    rows = []
    for number, (weight, turn_deg) in enumerate(
        zip(spec.lattice_weights, spec.lattice_turn_deg, strict=True)
    ):
        axis = rng.normal(size=3)
        turned = _turn(axis / np.linalg.norm(axis), math.radians(turn_deg)) @ base
        found = reflections(
            reciprocal_axes(cell) @ turned.T,
            centring=cell.centring,
            wavelength_angstrom=spec.wavelength_angstrom,
            d_min_angstrom=cell.d_min_angstrom,
            mosaicity_fwhm_deg=spec.mosaicity_deg,
            domain_angstrom=spec.domain_angstrom,
            bandwidth=spec.bandwidth,
            divergence_rad=spec.divergence_rad,
            rotation_deg=spec.rotation_deg,
        )
        n = len(found.partiality)
        wilson = rng.exponential(size=n)
        debye = np.exp(-0.5 * spec.b_factor * found.s_inverse_angstrom2)
        forward = spec.distance_m / spec.camera.pixel_m
        dx = forward * found.direction[:, 0] / found.direction[:, 2]
        dy = forward * found.direction[:, 1] / found.direction[:, 2]
        radius = np.hypot(dx, dy)
        mosaic = math.radians(spec.mosaicity_deg) / 2.355
        domain_px = 0.5 * spec.wavelength_angstrom / spec.domain_angstrom * forward
        focus_px = spec.divergence_rad * forward
        still = spec.psf_sigma_px**2 + domain_px**2 + focus_px**2
        across = np.sqrt(still + (spec.bandwidth * radius) ** 2)
        along = np.sqrt(still + (mosaic * radius) ** 2) * spec.smear
        along = np.minimum(along, 15.0)
        area = np.maximum(4.0, 4.0 * math.pi * along * across)
        angle = np.arctan2(dy, dx) + 0.5 * math.pi
        # A smeared crystal's streaks lean away from the tangent, alike over the frame.
        angle += 0.0 if spec.smear == 1.0 else rng.normal(0.0, 0.4)
        rows.append(
            np.column_stack(
                [
                    spec.beam_px[0] + dx,
                    spec.beam_px[1] + dy,
                    weight * wilson * debye * found.partiality,
                    along,
                    across,
                    angle,
                    area,
                    np.full(n, float(number)),
                    found.s_inverse_angstrom2,
                ]
            )
        )
    return np.concatenate(rows)


def _turn(axis: NDArray[np.float64], angle_rad: float) -> NDArray[np.float64]:
    """Rotation about a unit axis (Rodrigues)."""
    x, y, z = axis
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    turned: NDArray[np.float64] = (
        np.eye(3) + math.sin(angle_rad) * cross + (1 - math.cos(angle_rad)) * cross @ cross
    )
    return turned


def _on_detector(table: NDArray[np.float64], unusable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    ny, nx = unusable.shape
    inside = (table[:, 0] >= 0) & (table[:, 0] < nx) & (table[:, 1] >= 0) & (table[:, 1] < ny)
    where: NDArray[np.intp] = np.nonzero(inside)[0]
    inside[where] = ~unusable[table[where, 1].astype(int), table[where, 0].astype(int)]
    return np.asarray(inside, np.bool_)


def _scale_for(
    table: NDArray[np.float64], local: NDArray[np.float64], spots_wanted: float
) -> float:
    """The exposure at which about ``spots_wanted`` reflections are visible.

    Intensity needed for visibility follows from I / sqrt(I + B n) = 5; the exposure is the one
    that lifts as many reflections over their bound as are wanted.
    """
    if not len(table):
        return 0.0
    noise = local * table[:, 6]
    least = 0.5 * (VISIBLE_SNR**2 + np.sqrt(VISIBLE_SNR**4 + 4 * VISIBLE_SNR**2 * noise))
    needed = np.sort(least / np.maximum(table[:, 2], 1e-12))
    # The last third of the reflections are barely excited: lifting them overloads the others.
    reachable = max(1, (2 * len(needed)) // 3)
    return float(needed[min(reachable, max(1, round(spots_wanted))) - 1]) * 1.0001


@nb.njit(cache=True)
def _draw_spots(
    photons: NDArray[np.float64], table: NDArray[np.float64], intensity: NDArray[np.float64]
) -> None:
    # Rotated Gaussians, each normalised over the pixels it is drawn on.
    ny, nx = photons.shape
    for i in range(table.shape[0]):
        x, y, along, across, angle = (
            table[i, 0],
            table[i, 1],
            table[i, 3],
            table[i, 4],
            table[i, 5],
        )
        c, s = np.cos(angle), np.sin(angle)
        reach = int(3.5 * along) + 2
        x0, x1 = max(0, int(x) - reach), min(nx, int(x) + reach + 1)
        y0, y1 = max(0, int(y) - reach), min(ny, int(y) + reach + 1)
        norm = 1.0 / (2.0 * np.pi * along * across)
        for py in range(y0, y1):
            for px in range(x0, x1):
                dx, dy = px + 0.5 - x, py + 0.5 - y
                u, v = (c * dx + s * dy) / along, (c * dy - s * dx) / across
                z = u * u + v * v
                if z < 12.0:
                    photons[py, px] += intensity[i] * norm * np.exp(-0.5 * z)


def _ice_grains(
    spec: FrameSpec,
    rng: np.random.Generator,
    background: NDArray[np.float64],
    expected: NDArray[np.float64],
) -> float:
    """Spotty ice rings, added to ``expected``; the best signal to noise of a grain."""
    if spec.ice_grains == 0 or spec.ice_contrast == 0:
        return 0.0
    ny, nx = spec.camera.shape
    forward = spec.distance_m / spec.camera.pixel_m
    rows, strengths, best = [], [], 0.0
    lines = _CUBIC if spec.ice_cubic else tuple(range(len(ICE_D_ANGSTROM)))
    for _ in range(spec.ice_grains):
        line = int(rng.choice(lines))
        d = ICE_D_ANGSTROM[line] * (1.0 + rng.normal(0.0, 0.002))
        if spec.wavelength_angstrom >= 2 * d:
            continue
        radius = forward * math.tan(2.0 * math.asin(spec.wavelength_angstrom / (2.0 * d)))
        azimuth = rng.uniform(0.0, 2.0 * math.pi)
        x = spec.beam_px[0] + radius * math.cos(azimuth)
        y = spec.beam_px[1] + radius * math.sin(azimuth)
        if not (0 <= x < nx and 0 <= y < ny):
            continue
        along = float(rng.uniform(1.0, 6.0))
        across = float(rng.uniform(0.6, 1.6))
        local = float(background[int(y), int(x)])
        photons = (
            spec.ice_contrast * _ICE_STRENGTH[line] * rng.exponential() * 60.0 * (local + 0.05)
        )
        area = 4.0 * math.pi * along * across
        best = max(best, photons / math.sqrt(photons + local * area + 1e-9))
        rows.append([x, y, 0.0, along, across, azimuth + 0.5 * math.pi])
        strengths.append(photons)
    if rows:
        _draw_spots(expected, np.array(rows), np.array(strengths))
    return best


def _ice_truth(
    spec: FrameSpec,
    background: NDArray[np.float64],
    ring_d: NDArray[np.float64],
    ring_strength: NDArray[np.float64],
    grains_snr: float,
) -> dict[str, float]:
    """Ice is present when its strongest feature stands five sigma out of the noise.

    For a ring: contrast times the square root of the photons that the smooth background puts
    under it, on the part of the ring that the detector covers.
    """
    best = grains_snr
    if spec.ice_contrast > 0 and spec.ice_grains == 0:
        yy, xx = np.ogrid[: spec.camera.shape[0] : 4, : spec.camera.shape[1] : 4]
        radius = np.hypot(xx + 0.5 - spec.beam_px[0], yy + 0.5 - spec.beam_px[1])
        two_theta = np.arctan2(radius * spec.camera.pixel_m, spec.distance_m)
        q = 2.0 * np.sin(0.5 * two_theta) / spec.wavelength_angstrom
        coarse = background[::4, ::4]
        for d, strength in zip(ring_d, ring_strength, strict=True):
            if not any(abs(d - ice) < 1e-6 for ice in ICE_D_ANGSTROM):
                continue
            under = 16.0 * float(coarse[np.abs(q - 1.0 / d) < spec.ice_width].sum())
            smooth = under / (1.0 + 0.8 * strength)
            best = max(best, 0.8 * strength * math.sqrt(smooth))
    if spec.ice_contrast == 0:
        best = 0.0
    return {
        "ice": float(best >= 5.0) if best >= 5.0 or best < 3.0 else math.nan,
        "bad_ice": float(best >= 5.0 and spec.ice_contrast >= 0.9),
    }


def _double_edges(expected: NDArray[np.float64], gaps: NDArray[np.bool_], camera: Camera) -> None:
    """Pixels beside a gap are twice as large on JUNGFRAU; other families share their counts out."""
    if camera.family != "jungfrau":
        return
    for axis in (0, 1):
        beside = (np.roll(gaps, 1, axis) | np.roll(gaps, -1, axis)) & ~gaps
        expected[beside] *= 2.0


@nb.njit(cache=True)
def _poisson(expected: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    np.random.seed(seed)
    out = np.empty(expected.shape, np.int64)
    flat, values = out.ravel(), expected.ravel()
    for i in range(values.size):
        mean = values[i]
        if mean < 10.0:
            # Inversion: cheapest where most pixels of a sparse frame are.
            u = np.random.random()
            term = np.exp(-mean)
            total = term
            n = 0
            while u > total and n < 100:
                n += 1
                term *= mean / n
                total += term
            flat[i] = n
        else:
            flat[i] = np.random.poisson(mean)
    return out


def _electronics(
    spec: FrameSpec,
    rng: np.random.Generator,
    counts: NDArray[np.float64],
    gaps: NDArray[np.bool_],
    dead: NDArray[np.bool_],
) -> NDArray[Any]:
    """Gain, offset, read noise, hot pixels, tracks, saturation, and what gaps read."""
    camera = spec.camera
    values = counts
    if spec.gain != 1.0 or spec.offset or spec.read_noise:
        values = spec.gain * counts + spec.offset
        if spec.read_noise:
            values += rng.normal(0.0, spec.read_noise, counts.shape)
        values = np.maximum(np.rint(values), 0.0)
    _hot_pixels(spec, rng, values)
    _tracks(spec, rng, values)
    _zingers(spec, rng, values)
    top = camera.saturation_value
    np.minimum(values, top, out=values)
    image: NDArray[Any] = values.astype(camera.dtype)
    if camera.family == "pilatus":
        image[gaps], image[dead] = -1, -2
    elif camera.family == "ccd":
        image[gaps | dead] = 0
    else:
        image[gaps], image[dead] = 65535, 65534
    return image


def _hot_pixels(spec: FrameSpec, rng: np.random.Generator, values: NDArray[np.float64]) -> None:
    """Single hot pixels and small clusters, from a few counts to overload."""
    ny, nx = values.shape
    for _ in range(spec.hot_pixels):
        y, x = int(rng.integers(ny)), int(rng.integers(nx))
        height = _log_uniform(rng, 3.0, 2e5 if rng.random() < 0.3 else 300.0)
        values[y, x] += height
        if rng.random() < (0.3 if spec.kind == "dark" else 0.12):
            for _ in range(int(rng.integers(1, 5))):
                y = min(ny - 1, max(0, y + int(rng.integers(-1, 2))))
                x = min(nx - 1, max(0, x + int(rng.integers(-1, 2))))
                values[y, x] += height * rng.random()


def _tracks(spec: FrameSpec, rng: np.random.Generator, values: NDArray[np.float64]) -> None:
    """Cosmic rays: short straight tracks, one pixel wide."""
    ny, nx = values.shape
    for _ in range(spec.tracks):
        length = int(_log_uniform(rng, 2.0, 40.0))
        angle, height = rng.uniform(0.0, math.pi), _log_uniform(rng, 3.0, 400.0)
        y, x = rng.uniform(0.0, ny), rng.uniform(0.0, nx)
        for step in range(length):
            py, px = int(y + step * math.sin(angle)), int(x + step * math.cos(angle))
            if 0 <= py < ny and 0 <= px < nx:
                values[py, px] += height * rng.uniform(0.3, 1.7) * spec.gain


def _zingers(spec: FrameSpec, rng: np.random.Generator, values: NDArray[np.float64]) -> None:
    """Decays in a CCD's fibre taper: blobs and worms of a few pixels, without the optics' blur."""
    ny, nx = values.shape
    for _ in range(spec.zingers):
        y, x = int(rng.integers(ny)), int(rng.integers(nx))
        height = _log_uniform(rng, 15.0, 8000.0)
        for _ in range(1 + int(rng.geometric(0.35))):
            values[y, x] += height * rng.random()
            y = min(ny - 1, max(0, y + int(rng.integers(-1, 2))))
            x = min(nx - 1, max(0, x + int(rng.integers(-1, 2))))
