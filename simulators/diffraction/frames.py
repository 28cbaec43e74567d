"""One simulated frame: a specification drawn at random, the photons it asks for, the truth.

The noise-free spots and the noise-free background are made apart, so that the truth says what
is visible (signal to noise of each reflection) and not what was put in. The nominal inputs are
kept beside it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from simulators.diffraction.cameras import CAMERAS, Camera, module_gaps
from simulators.diffraction.crystals import (
    CELLS,
    DOMAIN_SIGMA,
    Cell,
    drawn_cell,
    random_rotation,
    reciprocal_axes,
    reflections,
)
from simulators.diffraction.poisson import poisson
from simulators.diffraction.recipes import Recipe, load_recipe
from simulators.diffraction.truth import (
    BOUNDS,
    FWHM,
    REFLECTION,
    SPOT,
    crystal_truth,
    ice_truth,
    is_visible,
    signal_to_noise,
)

__all__ = [
    "ICE_D_ANGSTROM",
    "FrameSpec",
    "Rendered",
    "draw_camera",
    "draw_spec",
    "render",
    "scatter",
]

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
_OTHER_WIDTH = 0.004
"""Sigma of those rings in 1/d, 1/angstrom."""
_POWDER_LINES, _POWDER_D_ANGSTROM, _POWDER_WIDTH = (1, 12), (0.9, 10.0), (0.0006, 0.006)
"""Of a powder that is drawn: how many lines, where, and their sigma in 1/d, 1/angstrom."""

_LONGEST_PX = 30.0
"""Spots are not drawn wider than this (sigma)."""

_SMALL_ANGSTROM = 20.0
"""Longest edge of a small molecule's cell."""


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
    ice_cubicity: float = 0.0
    ice_grains: int = 0
    ice_grain_boost: float = 1.0
    other_lines: tuple[tuple[float, float], ...] = ()
    other_width: float = _OTHER_WIDTH
    other_contrast: float = 0.0
    other_grains: int = 0
    other_grain_boost: float = 1.0
    beamstop_px: float = 20.0
    arm_rad: float = 0.0
    shadow: float = 0.0
    tube_px: float = 0.0
    flare: float = 0.0
    flare_px: float = 10.0
    hot_pixels: int = 0
    tracks: int = 0
    zingers: int = 0
    zinger_sigma_px: float = 0.35
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
        reflections: (n,) of :data:`REFLECTION`, all that are more than a trace, the visible ones
            and those that a spot finder may see.
    """

    image: NDArray[Any]
    mask: NDArray[np.uint32]
    truth: dict[str, float] = field(default_factory=dict)
    nominal: dict[str, float] = field(default_factory=dict)
    reflections: NDArray[Any] = field(default_factory=lambda: np.zeros(0, REFLECTION))


def draw_camera(rng: np.random.Generator, *, held_out: bool = False) -> Camera:
    """A detector, by weight."""
    cameras = [c for c in CAMERAS if c.held_out == held_out]
    weights = np.array([c.weight for c in cameras])
    return cameras[int(rng.choice(len(cameras), p=weights / weights.sum()))]


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(math.exp(rng.uniform(math.log(low), math.log(high))))


def _drawn(rng: np.random.Generator, ends: Sequence[float]) -> float:
    """From a range, evenly in the logarithm."""
    return _log_uniform(rng, ends[0], ends[1])


def _from_bands(rng: np.random.Generator, bands: Sequence[Sequence[float]]) -> float:
    lengths = np.array([high - low for low, high in bands])
    low, high = bands[int(rng.choice(len(bands), p=lengths / lengths.sum()))]
    return float(rng.uniform(low, high))


def draw_spec(
    rng: np.random.Generator,
    *,
    camera: Camera,
    recipe: Recipe | None = None,
    blank_share: float | None = None,
    between_share: float | None = None,
) -> FrameSpec:
    """A frame to render. Crystals, ice and lattices are drawn independently of each other.

    Args:
        recipe: ranges and shares; the shipped ``train`` without one.
        blank_share: share of frames on which no crystal diffracts, in place of the recipe's.
        between_share: share with 1 to 9 visible spots, neither blank nor hit, likewise.
    """
    recipe = recipe or _train_recipe()
    kinds, of_beam, of_ice = recipe.kinds, recipe.beam, recipe.ice
    blank_share = kinds["blank_share"] if blank_share is None else blank_share
    between_share = kinds["between_share"] if between_share is None else between_share
    ccd = camera.family == "ccd"
    u = rng.random()
    kind = "blank" if u < blank_share else "between" if u < blank_share + between_share else "hit"
    wavelength = _from_bands(rng, of_beam["wavelength_angstrom"])
    fields: dict[str, object] = {}
    small = rng.random() < recipe.crystal["small_share"]
    if kind != "blank":
        fields |= _draw_crystal(rng, kind, recipe, small)
    width_m = max(camera.shape) * camera.pixel_m
    # Rings and spots are to fall on the detector; the few reflections of a small molecule are
    # worth recording further out.
    edge_d = _drawn(rng, of_beam["small_edge_d_angstrom" if small else "edge_d_angstrom"])
    two_theta = 2.0 * math.asin(min(0.6, wavelength / (2.0 * edge_d)))
    distance = float(np.clip(0.5 * width_m / math.tan(two_theta), *of_beam["distance_m"]))
    y, x = camera.shape
    beam = (
        float(x * (0.5 + rng.normal(0.0, 0.06))),
        float(y * (0.5 + rng.normal(0.0, 0.06))),
    )
    if rng.random() < of_beam["swung_share"]:
        beam = (float(x * rng.uniform(-0.1, 1.1)), float(y * rng.uniform(-0.1, 1.1)))
    background = _drawn(rng, of_beam["ccd_mean_background" if ccd else "mean_background"])
    dark = kind == "blank" and rng.random() < kinds["dark_share"]
    if dark:
        background = 0.0 if rng.random() < 0.6 else _log_uniform(rng, 1e-5, 3e-3)
    if rng.random() < of_ice["share"] and background > 0:
        fields |= _draw_ice(rng, of_ice)
    if rng.random() < of_ice["other_share"] and background > 0:
        known = _OTHER_RINGS_D_ANGSTROM[int(rng.integers(len(_OTHER_RINGS_D_ANGSTROM)))]
        fields |= {
            "other_lines": tuple((d, 1.0) for d in known),
            "other_contrast": _drawn(rng, of_ice["other_contrast"]),
        }
        drawn_share = of_ice.get("drawn_powders_share", 0.0)
        if drawn_share and rng.random() < drawn_share:
            fields |= _draw_powder(rng, known)
        if rng.random() < of_ice["grains_share"]:
            fields |= {
                "other_grains": int(_drawn(rng, of_ice["grains"])),
                "other_grain_boost": _drawn(rng, of_ice["grain_boost"]),
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
        fields["zinger_sigma_px"] = float(rng.uniform(0.2, 0.5))
    gain, offset, noise = 1.0, 0.0, 0.0
    if ccd:
        gain, offset, noise = (
            float(rng.uniform(0.8, 3.0)),
            float(rng.uniform(8.0, 45.0)),
            float(rng.uniform(1.0, 4.0)),
        )
    elif camera.family == "jungfrau" and rng.random() < 0.3:
        gain, noise = float(rng.uniform(0.9, 2.5)), float(rng.uniform(0.05, 0.4))
    wide = rng.random() < of_beam["bandwidth_share"]
    return FrameSpec(
        camera=camera,
        kind="dark" if dark else kind,
        seed=int(rng.integers(2**31)),
        wavelength_angstrom=wavelength,
        distance_m=distance,
        beam_px=beam,
        mean_background=background,
        domain_angstrom=_drawn(rng, recipe.crystal["domain_angstrom"]),
        bandwidth=_drawn(rng, of_beam["bandwidth"]) if wide else 2e-4,
        divergence_rad=_drawn(rng, of_beam["divergence_rad"]),
        rotation_deg=float(rng.choice(of_beam["rotation_deg"])),
        b_factor=_drawn(rng, recipe.crystal["b_factor"]),
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


@functools.cache
def _train_recipe() -> Recipe:
    return load_recipe("train")


def _draw_ice(rng: np.random.Generator, of_ice: Mapping[str, Any]) -> dict[str, object]:
    u, grains = rng.random(), rng.random() < of_ice["grains_share"]
    cubicity = 0.0
    if u < of_ice["cubic_share"]:
        cubicity = 1.0
    elif u < of_ice["cubic_share"] + of_ice["disordered_share"]:
        cubicity = float(rng.uniform(0.1, 0.9))
    return {
        "ice_contrast": _drawn(rng, of_ice["contrast"]),
        "ice_width": _drawn(rng, of_ice["width"]),
        "ice_cubicity": cubicity,
        "ice_grains": int(_drawn(rng, of_ice["grains"])) if grains else 0,
        "ice_grain_boost": _drawn(rng, of_ice["grain_boost"]) if grains else 1.0,
    }


def _draw_powder(rng: np.random.Generator, known: Sequence[float]) -> dict[str, object]:
    """Rings at the lines of a known powder or anywhere, of any strength and width."""
    lines = list(known)
    if rng.random() < 0.5:
        low, high = _POWDER_LINES
        lines = [_drawn(rng, _POWDER_D_ANGSTROM) for _ in range(int(rng.integers(low, high + 1)))]
    strength = rng.exponential(size=len(lines)) + 0.05
    strength /= strength.max()
    return {
        "other_lines": tuple(zip(lines, strength.tolist(), strict=True)),
        "other_width": _drawn(rng, _POWDER_WIDTH),
    }


def _draw_crystal(
    rng: np.random.Generator, kind: str, recipe: Recipe, small: bool
) -> dict[str, object]:
    cells = [
        c
        for c in CELLS
        if c.held_out == recipe.who["held_out"]
        and (max(c.edges_angstrom) < _SMALL_ANGSTROM) == small
    ]
    of_crystal, hits = recipe.crystal, recipe.hits
    shares = np.array(of_crystal["lattices"])
    lattices = 1 + int(rng.choice(len(shares), p=shares / shares.sum()))
    weights = (1.0, *(_drawn(rng, of_crystal["lattice_weight"]) for _ in range(lattices - 1)))
    turns = (0.0, *(_drawn(rng, of_crystal["lattice_turn_deg"]) for _ in range(lattices - 1)))
    cell = cells[int(rng.integers(len(cells)))]
    drawn_share = of_crystal.get("drawn_cells_share", 0.0)
    # Without a share no number is drawn either, and a recipe's frames stay what they were.
    if drawn_share > 0 and rng.random() < drawn_share:
        cell = drawn_cell(rng, small=small)
    wanted = float(rng.uniform(1.0, 9.0))
    if kind == "hit":
        u = rng.random()
        wanted = _drawn(
            rng,
            hits["weak_spots"]
            if u < hits["weak_share"]
            else hits["strong_spots"]
            if u > 1.0 - hits["strong_share"]
            else hits["spots"],
        )
    overexposure = 1.0
    if small:
        # All few reflections of a small molecule are up, and strong.
        overexposure = _log_uniform(rng, 1.0, 60.0)
    elif wanted > hits["spots"][1]:
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
        "mosaicity_deg": _drawn(rng, of_crystal["mosaicity_deg"]),
        "smear": _drawn(rng, of_crystal["smear"])
        if rng.random() < of_crystal["smear_share"]
        else 1.0,
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
    unusable = gaps | dead
    ring_d, ring_strength, ring_width = _rings(spec)
    transmission = _shadows(spec, rng)
    background = _background(
        transmission,
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
    background *= spec.mean_background / max(float(background.mean()), 1e-12)
    ring_snr, contrast, brightest = _ice_rings(spec, background, unusable)
    _flare(spec, rng, background, transmission)
    truth, listed, spot_photons = _spots(spec, rng, background, transmission, unusable)
    expected = background
    if spot_photons is not None:
        spot_photons += background
        expected = spot_photons
    grain_snr, grain_contrast, grain_photons = _ice_grains(
        spec, rng, background, expected, unusable
    )
    _other_grains(spec, rng, background, expected, unusable)
    _double_edges(expected, gaps, camera)
    counts = poisson(expected, int(rng.integers(2**31)))
    image = _electronics(spec, rng, counts, gaps, dead)
    full = (camera.saturation_value - spec.offset) / spec.gain
    truth |= ice_truth(
        ring_snr,
        grain_snr,
        max(contrast, grain_contrast),
        max(brightest, grain_photons) / full,
    )
    mask = (gaps.view(np.uint8) + 2 * dead.view(np.uint8)).astype(np.uint32)
    return Rendered(
        image=image,
        mask=mask,
        truth=truth,
        nominal={
            "mean_background": spec.mean_background,
            "spots_wanted": spec.spots_wanted,
            "mosaicity_deg": spec.mosaicity_deg if spec.cell else math.nan,
            "lattices": float(len(spec.lattice_weights)),
            "lattice_weight": max(spec.lattice_weights[1:], default=math.nan),
            "lattice_turn_deg": max(spec.lattice_turn_deg[1:], default=math.nan),
            "smear": spec.smear if spec.cell else math.nan,
            "ice_contrast": spec.ice_contrast,
            "ice_cubicity": spec.ice_cubicity,
            "ice_grains": float(spec.ice_grains),
            "hot_pixels": float(spec.hot_pixels),
            "b_factor": spec.b_factor,
        },
        reflections=listed,
    )


def _rings(
    spec: FrameSpec,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Smooth powder rings: d, contrast over the background, width in 1/d."""
    rings = []
    if spec.ice_contrast > 0 and spec.ice_grains == 0:
        rings = [
            (d, spec.ice_contrast * strength, spec.ice_width * widening)
            for d, strength, widening in _ice_lines(spec.ice_cubicity)
        ]
    if spec.other_grains == 0:
        for d, strength in spec.other_lines:
            rings.append((d, spec.other_contrast * strength, spec.other_width))
    table = np.array(rings, np.float64).reshape(-1, 3)
    return table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy()


def _ice_lines(cubicity: float) -> list[tuple[float, float, float]]:
    """d, strength and widening of the lines of ice with that share of cubic layers.

    Faults in the stacking leave the lines that both forms have as they are; those of the hexagonal
    form alone fade and widen (Malkin et al. 2015).
    """
    lines = []
    for i, (d, strength) in enumerate(zip(ICE_D_ANGSTROM, _ICE_STRENGTH, strict=True)):
        own = i not in _CUBIC
        if own and cubicity >= 1.0:
            continue
        fades, widens = (1.0 - cubicity, 1.0 + 3.0 * cubicity) if own else (1.0, 1.0)
        lines.append((d, strength * fades / widens, widens))
    return lines


@nb.njit(cache=True)
def scatter(q: float, water_d: float) -> tuple[float, float, float]:
    """Air, water or other solvent, and parasitic halo at 1/d = ``q``, each about 1 at its highest.

    The shapes of air and water are those of the background in nanoBragg's frames.

    Args:
        water_d: of the solvent's ring [angstrom].
    """
    air = np.exp(-6.0 * q) + 0.08
    beyond = q - 1.0 / water_d
    water = np.exp(-0.5 * (beyond / 0.06) ** 2) + 0.42 * np.exp(-0.5 * ((beyond - 0.16) / 0.1) ** 2)
    return air, water, np.exp(-25.0 * q)


@nb.njit(cache=True)
def _background(
    transmission: NDArray[np.float64],
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
    ny, nx = transmission.shape
    far_x = max(abs(beam_x), abs(nx - beam_x))
    far_y = max(abs(beam_y), abs(ny - beam_y))
    steps = int(2.0 * np.sqrt(far_x * far_x + far_y * far_y)) + 4
    profile = np.empty(steps)
    for i in range(steps):
        radius_m = 0.5 * i * pixel_m
        two_theta = np.arctan2(radius_m, distance_m)
        q = 2.0 * np.sin(0.5 * two_theta) / wavelength
        air, water, halo = scatter(q, water_d)
        smooth = air + 2.0 * water_share * water + 4.0 * halo_share * halo
        for j in range(ring_d.shape[0]):
            z = (q - 1.0 / ring_d[j]) / ring_width[j]
            if abs(z) < 5.0:
                smooth *= 1.0 + ring_strength[j] * np.exp(-0.5 * z * z)
        profile[i] = smooth * np.cos(two_theta) ** 3
    out = np.empty((ny, nx))
    for y in range(ny):
        dy = y + 0.5 - beam_y
        for x in range(nx):
            dx = x + 0.5 - beam_x
            rr = dx * dx + dy * dy
            at = 2.0 * np.sqrt(rr)
            i = int(at)
            value = profile[i] + (at - i) * (profile[i + 1] - profile[i])
            polarised = 1.0 - polarisation * dx * dx / (rr + 1e4)
            out[y, x] = value * polarised * transmission[y, x]
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
    heights = rng.random(lobes)
    pattern = _lobes(dx[0], dy[:, 0], radius, spec.flare_px, lobe_rad, width_rad, heights)
    across_px = rng.uniform(0.7, 2.0, streaks)
    brightness = rng.random(streaks)
    for angle, length, width, bright in zip(
        streak_rad, length_px, across_px, brightness, strict=True
    ):
        _streak(pattern, dx[0], dy[:, 0], radius, angle, length, width, bright)
    # Grains of two pixels: the scatter of a coherent beam is speckled.
    grains = rng.gamma(2.0, 0.5, ((y1 - y0) // 2 + 1, (x1 - x0) // 2 + 1))
    pattern *= grains.repeat(2, 0).repeat(2, 1)[: y1 - y0, : x1 - x0]
    background[y0:y1, x0:x1] += spec.flare * pattern * transmission[y0:y1, x0:x1]


@nb.njit(cache=True)
def _lobes(
    dx: NDArray[np.float64],
    dy: NDArray[np.float64],
    radius: float,
    fall_px: float,
    lobe_rad: NDArray[np.float64],
    width_rad: NDArray[np.float64],
    heights: NDArray[np.float64],
) -> NDArray[np.float64]:
    # Falls off outwards from the beamstop's rim, by e in ``fall_px``.
    pattern = np.zeros((dy.size, dx.size))
    for i in range(dy.size):
        for j in range(dx.size):
            outside = max(np.hypot(dx[j], dy[i]) - radius, 0.0)
            if outside > 30.0 * fall_px:
                continue
            turn = np.arctan2(dy[i], dx[j])
            value = 0.02
            for k in range(lobe_rad.size):
                apart = (turn - lobe_rad[k] + np.pi) % (2.0 * np.pi) - np.pi
                value += heights[k] * np.exp(-0.5 * (apart / width_rad[k]) ** 2)
            pattern[i, j] = value * np.exp(-outside / fall_px)
    return pattern


@nb.njit(cache=True)
def _streak(
    pattern: NDArray[np.float64],
    dx: NDArray[np.float64],
    dy: NDArray[np.float64],
    radius: float,
    angle: float,
    length: float,
    width: float,
    brightness: float,
) -> None:
    # One ray outwards from the beamstop's rim, added to ``pattern``.
    c, s = np.cos(angle), np.sin(angle)
    for i in range(dy.size):
        for j in range(dx.size):
            across = (dy[i] * c - dx[j] * s) / width
            if dx[j] * c + dy[i] * s > 0.0 and abs(across) < 6.0:
                outside = max(np.hypot(dx[j], dy[i]) - radius, 0.0)
                pattern[i, j] += brightness * np.exp(-0.5 * across * across - outside / length)


def _spots(
    spec: FrameSpec,
    rng: np.random.Generator,
    background: NDArray[np.float64],
    transmission: NDArray[np.float64],
    unusable: NDArray[np.bool_],
) -> tuple[dict[str, float], NDArray[Any], NDArray[np.float64] | None]:
    """Truth of the crystal, its reflections, and the noise-free photons of all spots."""
    usable = background[::4, ::4][~unusable[::4, ::4]]
    seen_background = float(usable.mean()) if usable.size else 0.0
    table, orientations = _lattice_table(spec, rng)
    table = table[_on_detector(table, unusable)]
    photons, listed = None, np.zeros(0, REFLECTION)
    if len(table):
        at = table["y"].astype(int), table["x"].astype(int)
        # A spot in a shadow is as weak as it is seen there; read noise hides like background.
        table["photons"] *= transmission[at]
        noise = (background[at] + (spec.read_noise / spec.gain) ** 2) * table["pixels"]
        table["photons"] *= _scale_for(table["photons"], noise, spec.spots_wanted)
        table["photons"] *= spec.overexposure
        # What is far below the noise even in sum over the frame is left out.
        drawn = table[table["photons"] > 0.02 * np.sqrt(1.0 + noise)]
        photons = np.zeros(spec.camera.shape)
        _draw_spots(
            photons,
            *(
                np.ascontiguousarray(drawn[name])
                for name in ("x", "y", "along", "across", "angle", "photons")
            ),
        )
        listed = _more_than_a_trace(table, signal_to_noise(table["photons"], noise))
        visible = is_visible(table["photons"], noise)
        table, noise = table[visible], noise[visible]
    truth = crystal_truth(
        table,
        signal_to_noise(table["photons"], noise) if len(table) else np.zeros(0),
        mosaicity_deg=spec.mosaicity_deg,
        orientations=orientations,
        background_photons=seen_background,
    )
    return truth, listed, photons


def _more_than_a_trace(table: NDArray[Any], snr: NDArray[np.float64]) -> NDArray[Any]:
    """What is listed of reflections (n,) of :data:`SPOT` with that signal to noise."""
    seen = snr > BOUNDS["visible"]["trace_snr"]
    listed = np.zeros(int(seen.sum()), REFLECTION)
    listed["y_px"], listed["x_px"] = table["y"][seen], table["x"][seen]
    listed["snr"], listed["sigma_px"] = snr[seen], table["along"][seen]
    return listed


def _lattice_table(
    spec: FrameSpec, rng: np.random.Generator
) -> tuple[NDArray[Any], list[NDArray[np.float64]]]:
    """Reflections of every lattice, (n,) of :data:`SPOT` with photons unscaled; orientations."""
    cell = spec.cell
    if cell is None:
        return np.zeros(0, SPOT), []
    base = random_rotation(rng)
    parts, orientations = [], []
    forward = spec.distance_m / spec.camera.pixel_m
    d_min = max(cell.d_min_angstrom, _finest_d_angstrom(spec))
    mosaic_rad = math.radians(spec.mosaicity_deg) / FWHM
    # The detector's own blur: of its optics, and of a pixel's area.
    sharp2 = spec.psf_sigma_px**2 + 1.0 / 12.0
    # A smeared crystal's streaks lean away from the ring, alike over the frame.
    lean = 0.0 if spec.smear == 1.0 else float(rng.normal(0.0, 0.4))
    for number, (weight, turn_deg) in enumerate(
        zip(spec.lattice_weights, spec.lattice_turn_deg, strict=True)
    ):
        axis = rng.normal(size=3)
        turned = _turn(axis / np.linalg.norm(axis), math.radians(turn_deg)) @ base
        orientations.append(turned)
        found = reflections(
            reciprocal_axes(cell) @ turned.T,
            centring=cell.centring,
            wavelength_angstrom=spec.wavelength_angstrom,
            d_min_angstrom=d_min,
            mosaicity_fwhm_deg=spec.mosaicity_deg,
            domain_angstrom=spec.domain_angstrom,
            bandwidth=spec.bandwidth,
            divergence_rad=spec.divergence_rad,
            rotation_deg=spec.rotation_deg,
        )
        n = len(found.partiality)
        rows = np.zeros(n, SPOT)
        wilson = rng.exponential(size=n)
        debye = np.exp(-0.5 * spec.b_factor * found.s_inverse_angstrom2)
        to_px = forward / found.direction[:, 2]
        dx, dy = to_px * found.direction[:, 0], to_px * found.direction[:, 1]
        turn = np.arctan2(dy, dx)
        # Beams that lie aslant on the detector are stretched outwards once more.
        radial_px = to_px / found.direction[:, 2]
        rr = found.covariance_rad2[:, 0] * radial_px**2 + sharp2
        tt = found.covariance_rad2[:, 1] * to_px**2 + sharp2
        rt = found.covariance_rad2[:, 2] * radial_px * to_px
        rows["own"] = np.sqrt(tt)
        rows["smear"] = np.sqrt((spec.smear**2 - 1.0) * np.maximum(rr, tt))
        streak = rows["smear"] ** 2
        rr = rr + streak * math.sin(lean) ** 2
        tt = tt + streak * math.cos(lean) ** 2
        rt = rt - streak * math.sin(lean) * math.cos(lean)
        half, mean = np.hypot(0.5 * (tt - rr), rt), 0.5 * (rr + tt)
        rows["along"] = np.minimum(np.sqrt(mean + half), _LONGEST_PX)
        rows["across"] = np.minimum(np.sqrt(np.maximum(mean - half, 1e-3)), _LONGEST_PX)
        rows["angle"] = turn + 0.5 * np.arctan2(2.0 * rt, rr - tt)
        rows["x"], rows["y"] = spec.beam_px[0] + dx, spec.beam_px[1] + dy
        rows["photons"] = weight * wilson * debye * found.partiality
        rows["pixels"] = np.maximum(4.0, 4.0 * math.pi * rows["along"] * rows["across"])
        rows["lattice"], rows["s"] = number, found.s_inverse_angstrom2
        g = np.sqrt(found.s_inverse_angstrom2) * spec.wavelength_angstrom
        rows["mosaic"] = mosaic_rad * g * to_px
        domain_px = DOMAIN_SIGMA * spec.wavelength_angstrom / spec.domain_angstrom * radial_px
        beam_px = spec.divergence_rad * to_px
        band_px = 2.0 * np.tan(np.arcsin(0.5 * g)) * spec.bandwidth * radial_px
        known = sharp2 + domain_px**2 + beam_px**2 + rows["mosaic"] ** 2
        turned_px = np.sqrt(np.maximum(rows["own"] ** 2 - known, 0.0))
        rows["other"] = np.maximum.reduce(
            [np.full(n, math.sqrt(sharp2)), domain_px, beam_px, band_px, turned_px]
        )
        # The turn t = (-sin, cos, 0) about an axis w moves g by w x g, along the ring by
        # w . (g x t).
        gx, gy = found.direction[:, 0], found.direction[:, 1]
        gz = found.direction[:, 2] - 1.0
        tx, ty = -np.sin(turn), np.cos(turn)
        rows["ring"] = np.column_stack([-gz * ty, gz * tx, gx * ty - gy * tx]) * to_px[:, None]
        parts.append(rows)
    return np.concatenate(parts), orientations


def _finest_d_angstrom(spec: FrameSpec) -> float:
    """d at the detector's farthest corner: nothing beyond it is recorded."""
    ny, nx = spec.camera.shape
    (bx, by), pixel_m = spec.beam_px, spec.camera.pixel_m
    far_m = pixel_m * math.hypot(max(abs(bx), abs(nx - bx)), max(abs(by), abs(ny - by)))
    return (
        0.99 * spec.wavelength_angstrom / (2.0 * math.sin(0.5 * math.atan2(far_m, spec.distance_m)))
    )


def _turn(axis: NDArray[np.float64], angle_rad: float) -> NDArray[np.float64]:
    """Rotation about a unit axis (Rodrigues)."""
    x, y, z = axis
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    turned: NDArray[np.float64] = (
        np.eye(3) + math.sin(angle_rad) * cross + (1 - math.cos(angle_rad)) * cross @ cross
    )
    return turned


def _on_detector(table: NDArray[Any], unusable: NDArray[np.bool_]) -> NDArray[np.bool_]:
    ny, nx = unusable.shape
    x, y = table["x"], table["y"]
    inside = (x >= 0) & (x < nx) & (y >= 0) & (y < ny)
    where: NDArray[np.intp] = np.nonzero(inside)[0]
    inside[where] = ~unusable[y[where].astype(int), x[where].astype(int)]
    return np.asarray(inside, np.bool_)


def _scale_for(
    photons: NDArray[np.float64], noise: NDArray[np.float64], spots_wanted: float
) -> float:
    """The exposure at which about ``spots_wanted`` reflections are visible.

    Intensity needed for visibility follows from I / sqrt(I + B n) = 5; the exposure is the one
    that lifts as many reflections over their bound as are wanted.
    """
    square = BOUNDS["visible"]["snr"] ** 2
    least = 0.5 * (square + np.sqrt(square**2 + 4 * square * noise))
    needed = np.sort(least / np.maximum(photons, 1e-12))
    # The last third of the reflections are barely excited: lifting them overloads the others.
    reachable = max(1, (2 * len(needed)) // 3)
    return float(needed[min(reachable, max(1, round(spots_wanted))) - 1]) * 1.0001


@nb.njit(cache=True)
def _draw_spots(
    photons: NDArray[np.float64],
    xs: NDArray[np.float64],
    ys: NDArray[np.float64],
    alongs: NDArray[np.float64],
    acrosses: NDArray[np.float64],
    angles: NDArray[np.float64],
    intensities: NDArray[np.float64],
) -> None:
    for i in range(xs.shape[0]):
        c, s = np.cos(angles[i]), np.sin(angles[i])
        u2, v2 = 1.0 / alongs[i] ** 2, 1.0 / acrosses[i] ** 2
        xx, yy, xy = c * c * u2 + s * s * v2, s * s * u2 + c * c * v2, c * s * (u2 - v2)
        height = intensities[i] / (2.0 * np.pi * alongs[i] * acrosses[i])
        if acrosses[i] < 0.7:
            # Too narrow for the sum over pixels to be the integral.
            height = intensities[i] / max(_gaussian(photons, xs[i], ys[i], xx, yy, xy, 0.0), 1e-3)
        _gaussian(photons, xs[i], ys[i], xx, yy, xy, height)


@nb.njit(cache=True)
def _gaussian(
    photons: NDArray[np.float64], x: float, y: float, xx: float, yy: float, xy: float, height: float
) -> float:
    # Adds height exp(-(xx dx^2 + 2 xy dx dy + yy dy^2) / 2), at the middles of pixels, out to 3.5
    # widths; with height 0 gives the sum of the exponentials over all pixels, on the image or not.
    # Along a row each value follows from the one before by two multiplications.
    ny, nx = photons.shape
    total, edge = 0.0, 12.0
    step = np.exp(-xx)
    reach = np.sqrt(edge * xx / (xx * yy - xy * xy))
    first, last = int(np.ceil(y - reach - 0.5)), int(np.floor(y + reach - 0.5))
    if height > 0.0:
        first, last = max(first, 0), min(last, ny - 1)
    for py in range(first, last + 1):
        dy = py + 0.5 - y
        inside = edge * xx - (xx * yy - xy * xy) * dy * dy
        if inside <= 0.0:
            continue
        half, middle = np.sqrt(inside) / xx, x - xy * dy / xx
        left, right = int(np.ceil(middle - half - 0.5)), int(np.floor(middle + half - 0.5))
        if height > 0.0:
            left, right = max(left, 0), min(right, nx - 1)
        dx = left + 0.5 - x
        value = np.exp(-0.5 * (xx * dx * dx + 2.0 * xy * dx * dy + yy * dy * dy))
        ratio = np.exp(-0.5 * (xx * (2.0 * dx + 1.0) + 2.0 * xy * dy))
        for px in range(left, right + 1):
            if height > 0.0:
                photons[py, px] += height * value
            else:
                total += value
            value *= ratio
            ratio *= step
    return total


def _ice_rings(
    spec: FrameSpec, background: NDArray[np.float64], unusable: NDArray[np.bool_]
) -> tuple[float, float, float]:
    """Of smooth rings: signal to noise of the strongest, highest contrast, brightest pixel.

    The signal of a ring are its photons within a width on either side, on the pixels that are
    there; the noise is the root of all photons there and of the read noise. Of each 16 pixels one
    is looked at.
    """
    if spec.ice_contrast == 0 or spec.ice_grains or spec.mean_background == 0:
        return 0.0, 0.0, 0.0
    q, coarse = _coarse(spec, background, unusable)
    read = (spec.read_noise / spec.gain) ** 2
    strongest, contrast, brightest = 0.0, 0.0, 0.0
    for d, strength, widening in _ice_lines(spec.ice_cubicity):
        height = spec.ice_contrast * strength
        z = (q - 1.0 / d) / (spec.ice_width * widening)
        near = np.abs(z) < 1.0
        here, height_here = coarse[near], height * np.exp(-0.5 * z[near] ** 2)
        if not here.size:
            continue
        ring = here * height_here / (1.0 + height_here)
        snr = 4.0 * float(ring.sum()) / math.sqrt(float((here + read).sum()) + 1e-9)
        strongest = max(strongest, snr)
        if snr >= BOUNDS["ice"]["snr"]:
            contrast, brightest = max(contrast, height), max(brightest, float(ring.max()))
    return strongest, contrast, brightest


def _coarse(
    spec: FrameSpec, image: NDArray[np.float64], unusable: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """1/d and value of every fourth usable pixel of every fourth row."""
    yy, xx = np.ogrid[: spec.camera.shape[0] : 4, : spec.camera.shape[1] : 4]
    radius = np.hypot(xx + 0.5 - spec.beam_px[0], yy + 0.5 - spec.beam_px[1])
    two_theta = np.arctan2(radius * spec.camera.pixel_m, spec.distance_m)
    usable = ~unusable[::4, ::4]
    q = 2.0 * np.sin(0.5 * two_theta[usable]) / spec.wavelength_angstrom
    return q, image[::4, ::4][usable]


def _ice_grains(
    spec: FrameSpec,
    rng: np.random.Generator,
    background: NDArray[np.float64],
    expected: NDArray[np.float64],
    unusable: NDArray[np.bool_],
) -> tuple[float, float, float]:
    """Spotty ice rings, added to ``expected``: signal to noise of the strongest grain, highest
    contrast of a ring of grains taken all round, brightest pixel."""
    if spec.ice_grains == 0 or spec.ice_contrast == 0:
        return 0.0, 0.0, 0.0
    lines = [
        (d, spec.ice_contrast * strength * spec.ice_grain_boost)
        for d, strength, _ in _ice_lines(spec.ice_cubicity)
    ]
    of_line, table = _grains(spec, rng, lines, spec.ice_grains, background, unusable)
    if not len(table):
        return 0.0, 0.0, 0.0
    x, y, along, across, _, photons = table.T
    under = background[y.astype(np.intp), x.astype(np.intp)]
    read = (spec.read_noise / spec.gain) ** 2
    snr = photons / np.sqrt(photons + (under + read) * 4.0 * math.pi * along * across + 1e-9)
    brightest = float((photons / (2.0 * math.pi * along * across)).max())
    q, coarse = _coarse(spec, background, unusable)
    contrast = 0.0
    for line in np.unique(of_line):
        # Grains lie within two widths of their line, and a pixel's.
        near = np.abs(q * lines[line][0] - 1.0) < 0.005
        ring = 16.0 * float(coarse[near].sum())
        if ring > 0:
            contrast = max(contrast, float(photons[of_line == line].sum()) / ring)
    # Only now: on a frame without a crystal ``expected`` is the background.
    _draw_spots(expected, *(np.ascontiguousarray(column) for column in table.T))
    return float(snr.max()), contrast, brightest


def _other_grains(
    spec: FrameSpec,
    rng: np.random.Generator,
    background: NDArray[np.float64],
    expected: NDArray[np.float64],
    unusable: NDArray[np.bool_],
) -> None:
    """Spotty rings of something else than ice, added to ``expected``."""
    if not spec.other_lines or spec.other_grains == 0:
        return
    height = spec.other_contrast * spec.other_grain_boost
    lines = [(d, height * strength) for d, strength in spec.other_lines]
    _, table = _grains(spec, rng, lines, spec.other_grains, background, unusable)
    _draw_spots(expected, *(np.ascontiguousarray(column) for column in table.T))


def _grains(
    spec: FrameSpec,
    rng: np.random.Generator,
    lines: Sequence[tuple[float, float]],
    grains: int,
    background: NDArray[np.float64],
    unusable: NDArray[np.bool_],
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Reflections of single grains on lines (d, contrast).

    Returns:
        Of each that falls on the detector, its line, and what is drawn of it: x, y, sigma along
        the ring and across it in pixels, direction of the former, photons.
    """
    ny, nx = spec.camera.shape
    forward = spec.distance_m / spec.camera.pixel_m
    of_line, rows = [], []
    for _ in range(grains):
        line = int(rng.choice(len(lines)))
        d = lines[line][0] * (1.0 + rng.normal(0.0, 0.002))
        azimuth, along = rng.uniform(0.0, 2.0 * math.pi), float(rng.uniform(1.0, 6.0))
        across, luck = float(rng.uniform(0.6, 1.6)), float(rng.exponential())
        if spec.wavelength_angstrom >= math.sqrt(2.0) * d:
            continue
        radius = forward * math.tan(2.0 * math.asin(spec.wavelength_angstrom / (2.0 * d)))
        x = spec.beam_px[0] + radius * math.cos(azimuth)
        y = spec.beam_px[1] + radius * math.sin(azimuth)
        if not (0 <= x < nx and 0 <= y < ny) or unusable[int(y), int(x)]:
            continue
        photons = 60.0 * lines[line][1] * luck * (float(background[int(y), int(x)]) + 0.05)
        of_line.append(line)
        rows.append([x, y, along, across, azimuth + 0.5 * math.pi, photons])
    return np.array(of_line, np.intp), np.array(rows, np.float64).reshape(-1, 6)


def _double_edges(expected: NDArray[np.float64], gaps: NDArray[np.bool_], camera: Camera) -> None:
    """Pixels beside a gap are twice as large on JUNGFRAU; other families share their counts out."""
    if camera.family != "jungfrau":
        return
    for axis in (0, 1):
        beside = (np.roll(gaps, 1, axis) | np.roll(gaps, -1, axis)) & ~gaps
        expected[beside] *= 2.0


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
        values *= spec.gain
        values += spec.offset
        if spec.read_noise:
            values += spec.read_noise * rng.standard_normal(counts.shape, np.float32)
        np.rint(values, out=values)
        np.maximum(values, 0.0, out=values)
    _hot_pixels(spec, rng, values)
    _tracks(spec, rng, values)
    _zingers(spec, rng, values)
    in_gap, in_dead = {"pilatus": (-1, -2), "ccd": (0, 0)}.get(camera.family, (65535, 65534))
    image: NDArray[Any] = np.empty(camera.shape, camera.dtype)
    _digitise(values, camera.saturation_value, gaps, dead, in_gap, in_dead, image)
    return image


@nb.njit(cache=True)
def _digitise(
    values: NDArray[np.float64],
    top: int,
    gaps: NDArray[np.bool_],
    dead: NDArray[np.bool_],
    in_gap: int,
    in_dead: int,
    image: NDArray[Any],
) -> None:
    for y in range(values.shape[0]):
        for x in range(values.shape[1]):
            if gaps[y, x]:
                image[y, x] = in_gap
            elif dead[y, x]:
                image[y, x] = in_dead
            else:
                image[y, x] = int(min(values[y, x], top))


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
    """Decays in a CCD's fibre taper: blobs and worms of a few pixels.

    The optics do not blur them, but charge spreads in the chip: of a single one the brightest pixel
    keeps two fifths of the light, as on both frames of a Quantum CCD in bioxtasraw's BSA series.
    There the number of those with more than so many counts falls with its power of -0.75.
    """
    ny, nx = values.shape
    for _ in range(spec.zingers):
        y, x = rng.uniform(0.0, ny), rng.uniform(0.0, nx)
        light = min(30.0 * rng.random() ** (-1.0 / 0.75), 3e4)
        shares = rng.random(1 + int(rng.geometric(0.35)))
        heading = rng.uniform(0.0, 2.0 * math.pi)
        for share in shares / shares.sum():
            _point(values, y, x, spec.zinger_sigma_px, light * share)
            heading += rng.normal(0.0, 0.7)
            y, x = y + 0.7 * math.sin(heading), x + 0.7 * math.cos(heading)


@nb.njit(cache=True)
def _point(values: NDArray[np.float64], y: float, x: float, sigma: float, light: float) -> None:
    """Adds a round Gaussian, integrated over each pixel."""
    ny, nx = values.shape
    row, column, scale = math.floor(y), math.floor(x), 1.0 / (math.sqrt(2.0) * sigma)
    for py in range(max(0, row - 3), min(ny, row + 4)):
        down = 0.5 * (math.erf((py + 1 - y) * scale) - math.erf((py - y) * scale))
        for px in range(max(0, column - 3), min(nx, column + 4)):
            over = 0.5 * (math.erf((px + 1 - x) * scale) - math.erf((px - x) * scale))
            values[py, px] += light * down * over
