"""Reciprocal lattices on the Ewald sphere: where spots fall, how strong and how wide.

Laboratory axes: z along the beam, x along the detector's fast axis, y along its slow axis. A
reciprocal vector g of a crystal in orientation R diffracts when s1 = s0 + g has the length of
s0 = (0, 0, 1/lambda); the distance by which it misses is the excitation error.

Mosaic blocks, finite domains, bandwidth, divergence and rotation each shift the excitation error
and the diffracted beam together. What is recorded are the shifts that bring a point onto the
sphere: with all of them Gaussian, place and width of a spot are the mean and the covariance of the
beam given that the error is cancelled. A mosaic crystal so diffracts at twice its Bragg angle
whatever the orientation's miss, a perfect one in a wide band where the orientation says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numba as nb
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CELLS",
    "DOMAIN_SIGMA",
    "Cell",
    "Reflections",
    "drawn_cell",
    "random_rotation",
    "reciprocal_axes",
    "reflections",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A unit cell: edges in angstrom, angles in degree, lattice centring, and reach.

    Attributes:
        d_min_angstrom: best resolution worth looking for; large cells diffract less far.
        held_out: kept out of the training preset.
    """

    name: str
    edges_angstrom: tuple[float, float, float]
    angles_deg: tuple[float, float, float] = (90.0, 90.0, 90.0)
    centring: str = "P"
    d_min_angstrom: float = 1.6
    held_out: bool = False


CELLS: tuple[Cell, ...] = (
    Cell(name="lysozyme tetragonal", edges_angstrom=(79.1, 79.1, 37.9)),
    Cell(name="insulin cubic", edges_angstrom=(78.9, 78.9, 78.9), centring="I"),
    Cell(name="proteinase K", edges_angstrom=(67.7, 67.7, 102.5)),
    Cell(name="trypsin", edges_angstrom=(54.8, 58.4, 67.6)),
    Cell(
        name="myoglobin",
        edges_angstrom=(64.5, 30.9, 34.8),
        angles_deg=(90.0, 105.8, 90.0),
    ),
    Cell(name="concanavalin A", edges_angstrom=(89.1, 87.4, 63.1), centring="I"),
    Cell(name="glucose isomerase", edges_angstrom=(92.9, 98.6, 102.9), centring="I"),
    Cell(name="ferritin", edges_angstrom=(181.0, 181.0, 181.0), centring="F", d_min_angstrom=2.0),
    Cell(name="catalase", edges_angstrom=(84.0, 140.4, 232.0), d_min_angstrom=2.6),
    Cell(
        name="photosystem I",
        edges_angstrom=(281.0, 281.0, 165.2),
        angles_deg=(90.0, 90.0, 120.0),
        d_min_angstrom=3.5,
    ),
    Cell(
        name="phycocyanin",
        edges_angstrom=(187.0, 187.0, 60.0),
        angles_deg=(90.0, 90.0, 120.0),
        d_min_angstrom=2.0,
    ),
    Cell(
        name="granulovirus", edges_angstrom=(103.4, 103.4, 103.4), centring="I", d_min_angstrom=2.0
    ),
    Cell(name="crambin", edges_angstrom=(40.8, 18.5, 22.4), angles_deg=(90.0, 90.5, 90.0)),
    Cell(
        name="glycine",
        edges_angstrom=(5.1, 11.8, 5.5),
        angles_deg=(90.0, 111.7, 90.0),
        d_min_angstrom=0.75,
    ),
    Cell(
        name="sucrose",
        edges_angstrom=(10.9, 8.7, 7.8),
        angles_deg=(90.0, 103.0, 90.0),
        d_min_angstrom=0.75,
    ),
    Cell(name="thaumatin", edges_angstrom=(57.8, 57.8, 150.2), held_out=True),
    Cell(
        name="thermolysin",
        edges_angstrom=(93.0, 93.0, 130.0),
        angles_deg=(90.0, 90.0, 120.0),
        held_out=True,
    ),
    Cell(
        name="photosystem II",
        edges_angstrom=(117.0, 222.0, 309.0),
        d_min_angstrom=3.5,
        held_out=True,
    ),
    Cell(name="beta-lactamase", edges_angstrom=(41.8, 41.8, 233.0), held_out=True),
    Cell(
        name="carbonic anhydrase",
        edges_angstrom=(42.4, 41.5, 72.4),
        angles_deg=(90.0, 104.6, 90.0),
        held_out=True,
    ),
    Cell(
        name="cysteine",
        edges_angstrom=(8.1, 12.2, 5.4),
        d_min_angstrom=0.75,
        held_out=True,
    ),
)
"""Published cells rounded to what matters here: spot spacing. Held-out ones test, never train."""

_SYSTEMS = {
    "triclinic": (0.05, "P"),
    "monoclinic": (0.25, "PPC"),
    "orthorhombic": (0.3, "PPPCIF"),
    "tetragonal": (0.15, "PPI"),
    "hexagonal": (0.15, "P"),
    "cubic": (0.1, "PIF"),
}
"""Share of the drawn cells, and centrings, each as often as it stands there."""
_EDGES_ANGSTROM, _SMALL_EDGES_ANGSTROM = (30.0, 320.0), (4.5, 18.0)
_SMALL_D_MIN_ANGSTROM = 0.75
_POINTS_WITHIN_REACH = 2e5
"""Cell volume over d_min cubed at most, as photosystem II has it: more reflections take long."""
_ALIKE = 0.05
"""A drawn cell whose edges are all within this share of a held-out one's is drawn again."""

DOMAIN_SIGMA = 0.886 / 2.355
"""Width of a lattice point times the size of the domain: the FWHM of sinc^2, as a Gaussian."""

_CENTRING_CODE = {"P": 0, "I": 1, "F": 2, "C": 3}


def drawn_cell(rng: np.random.Generator, *, small: bool = False) -> Cell:
    """A cell drawn at random: any system and lattice, edges evenly in the logarithm.

    None is like a held-out one.

    Args:
        small: of a small molecule, in place of a protein.
    """
    while True:
        systems, shares = list(_SYSTEMS), [share for share, _ in _SYSTEMS.values()]
        system = systems[int(rng.choice(len(systems), p=shares))]
        low, high = _SMALL_EDGES_ANGSTROM if small else _EDGES_ANGSTROM
        a, b, c = (float(v) for v in np.exp(rng.uniform(math.log(low), math.log(high), 3)))
        angles = (90.0, 90.0, 90.0)
        if system == "triclinic":
            angles = tuple(float(v) for v in rng.uniform(75.0, 110.0, 3))  # type: ignore[assignment]
        elif system == "monoclinic":
            angles = (90.0, float(rng.uniform(90.0, 125.0)), 90.0)
        elif system == "hexagonal":
            b, angles = a, (90.0, 90.0, 120.0)
        elif system in ("tetragonal", "cubic"):
            b, c = a, a if system == "cubic" else c
        _, centrings = _SYSTEMS[system]
        cell = Cell(
            name="drawn",
            edges_angstrom=(a, b, c),
            angles_deg=angles,
            centring=centrings[int(rng.integers(len(centrings)))],
        )
        if any(_is_like(cell, other) for other in CELLS if other.held_out):
            continue
        volume = 1.0 / abs(float(np.linalg.det(reciprocal_axes(cell))))
        finest = _SMALL_D_MIN_ANGSTROM if small else cell.d_min_angstrom
        reach = (volume / _POINTS_WITHIN_REACH) ** (1.0 / 3.0)
        return replace(cell, d_min_angstrom=max(finest, reach))


def _is_like(cell: Cell, other: Cell) -> bool:
    """Whether all edges, by length, are nearly those of another cell."""
    pairs = zip(sorted(cell.edges_angstrom), sorted(other.edges_angstrom), strict=True)
    return all(abs(math.log(a / b)) < _ALIKE for a, b in pairs)


def reciprocal_axes(cell: Cell) -> NDArray[np.float64]:
    """Rows a*, b*, c* in 1/angstrom, a along x and b in the xy plane (the usual setting)."""
    a, b, c = cell.edges_angstrom
    ca, cb, cg = (np.cos(np.deg2rad(t)) for t in cell.angles_deg)
    sg = np.sin(np.deg2rad(cell.angles_deg[2]))
    c_y = (ca - cb * cg) / sg
    direct = np.array(
        [
            [a, 0.0, 0.0],
            [b * cg, b * sg, 0.0],
            [c * cb, c * c_y, c * np.sqrt(1.0 - cb**2 - c_y**2)],
        ]
    )
    return np.linalg.inv(direct).T


def random_rotation(rng: np.random.Generator) -> NDArray[np.float64]:
    """A uniformly distributed rotation, from a random unit quaternion (Shoemake 1992)."""
    q = rng.normal(size=4)
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reflections:
    """Spots of one lattice; arrays of equal length, unscaled.

    Attributes:
        direction: (n, 3) unit vectors of the diffracted beams.
        s_inverse_angstrom2: 1/d^2.
        partiality: what is recorded over what a perfect crystal of one such domain records on the
            sphere in a still, 0..1. Its integral over the excitation error is sqrt(2 pi)
            :data:`DOMAIN_SIGMA` over the domain size, whatever widens the point or turns it.
        hkl: (n, 3) Miller indices.
        covariance_rad2: (n, 3) of the beam's direction: away from the primary beam, across that
            (along the Debye-Scherrer ring), and between the two.
    """

    direction: NDArray[np.float64]
    s_inverse_angstrom2: NDArray[np.float64]
    partiality: NDArray[np.float64]
    hkl: NDArray[np.int64]
    covariance_rad2: NDArray[np.float64]


def reflections(
    axes: NDArray[np.float64],
    *,
    centring: str,
    wavelength_angstrom: float,
    d_min_angstrom: float,
    mosaicity_fwhm_deg: float,
    domain_angstrom: float,
    bandwidth: float,
    divergence_rad: float,
    rotation_deg: float = 0.0,
) -> Reflections:
    """Reflections within three widths of the Ewald sphere.

    Args:
        axes: rows a*, b*, c* in the laboratory, 1/angstrom.
        mosaicity_fwhm_deg: FWHM of the block orientation distribution about one axis.
        domain_angstrom: size of coherent blocks; lattice points are :data:`DOMAIN_SIGMA` over
            it wide (sigma).
        bandwidth: relative wavelength spread (sigma).
        divergence_rad: beam divergence (sigma).
        rotation_deg: turn during the exposure, about x.
    """
    g_max = 1.0 / d_min_angstrom
    # |h| is at most g_max times the direct edge a, and so on.
    h_max, k_max, _ = (
        int(edge * g_max) + 1 for edge in np.linalg.norm(np.linalg.inv(axes), axis=0)
    )
    found = _near_sphere(
        np.ascontiguousarray(axes),
        h_max,
        k_max,
        _CENTRING_CODE[centring],
        1.0 / wavelength_angstrom,
        g_max,
        np.deg2rad(mosaicity_fwhm_deg) / 2.355,
        DOMAIN_SIGMA / domain_angstrom,
        bandwidth,
        divergence_rad,
        np.deg2rad(rotation_deg),
    )
    return Reflections(
        direction=found[:, 0:3],
        s_inverse_angstrom2=found[:, 3],
        partiality=found[:, 4],
        hkl=found[:, 5:8].astype(np.int64),
        covariance_rad2=found[:, 8:11],
    )


@nb.njit(cache=True)
def _absent(centring: int, h: int, k: int, l: int) -> bool:  # noqa: E741 - Miller indices
    if centring == 1:
        return (h + k + l) % 2 != 0
    if centring == 2:
        return (h + k) % 2 != 0 or (k + l) % 2 != 0
    if centring == 3:
        return (h + k) % 2 != 0
    return False


@nb.njit(cache=True)
def _near_sphere(
    axes: NDArray[np.float64],
    h_max: int,
    k_max: int,
    centring: int,
    k0: float,
    g_max: float,
    mosaic_rad: float,
    domain: float,
    bandwidth: float,
    divergence_rad: float,
    rotation_rad: float,
) -> NDArray[np.float64]:
    # For each row (h, k) the lattice points g = p + l c* meet the sphere |g + s0| = k0 at the
    # roots of a quadratic in l; only integers near a root can be in reflecting position.
    capacity = 4096
    out = np.empty((capacity, 11))
    n = 0
    cx, cy, cz = axes[2]
    cc = cx * cx + cy * cy + cz * cz
    for h in range(-h_max, h_max + 1):
        for k in range(-k_max, k_max + 1):
            px = h * axes[0, 0] + k * axes[1, 0]
            py = h * axes[0, 1] + k * axes[1, 1]
            pz = h * axes[0, 2] + k * axes[1, 2]
            pc = px * cx + py * cy + pz * cz
            pp = px * px + py * py + pz * pz
            # Miss distance of the row from the origin decides whether it can be in reach at all.
            if pp - pc * pc / cc > g_max * g_max:
                continue
            b = pc + k0 * cz
            c = pp + 2.0 * k0 * pz
            disc = b * b - cc * c
            if disc < 0.0:
                # The row passes the sphere by; its nearest point may still be within the width.
                disc = 0.0
            root = np.sqrt(disc)
            # How many indices beside a root lie within the width, from the slope there.
            sigma_max = np.sqrt(
                domain**2
                + (g_max * (mosaic_rad + divergence_rad + rotation_rad)) ** 2
                + (g_max * bandwidth) ** 2
            )
            slope = max(root / k0, 1e-6)
            reach = min(int(3.0 * sigma_max / slope) + 1, int(2.0 * g_max / np.sqrt(cc)) + 1)
            last = -(2**31)
            for sign in (-1.0, 1.0):
                middle = int(np.round((-b + sign * root) / cc))
                for l in range(middle - reach, middle + reach + 1):  # noqa: E741
                    if l <= last:
                        continue
                    last = l
                    gx, gy, gz = px + l * cx, py + l * cy, pz + l * cz
                    gg = gx * gx + gy * gy + gz * gz
                    if gg > g_max * g_max or gg < 1e-6:
                        continue
                    if _absent(centring, h, k, l):
                        continue
                    sx, sy, sz = gx, gy, gz + k0
                    length = np.sqrt(sx * sx + sy * sy + sz * sz)
                    miss = length - k0
                    g = np.sqrt(gg)
                    sin_theta = 0.5 * g / k0
                    if sin_theta >= 1.0 or sz <= 0.0:
                        continue
                    cos_theta = np.sqrt(1.0 - sin_theta * sin_theta)
                    # Unit vectors: u along the diffracted beam, r away from the primary beam and
                    # t along the Debye-Scherrer ring, both across u.
                    ux, uy, uz = sx / length, sy / length, sz / length
                    flat = np.sqrt(ux * ux + uy * uy)
                    rx, ry, rz = ux * uz / flat, uy * uz / flat, -flat
                    tx, ty = -uy / flat, ux / flat
                    # What each spread does per unit to the error (e) and the beam (r, t).
                    mosaic, beam = mosaic_rad * g, divergence_rad * k0
                    e_mosaic, r_mosaic = -mosaic * cos_theta, mosaic * sin_theta
                    e_beam, r_beam = beam * flat, beam * uz
                    e_band, r_band = (
                        -bandwidth * g * sin_theta,
                        -bandwidth * g * cos_theta,
                    )
                    # A turn about x moves g by (0, -gz, gy).
                    turn_e = rotation_rad * (gy * uz - gz * uy)
                    turn_r = rotation_rad * (gy * rz - gz * ry)
                    turn_t = rotation_rad * -gz * ty
                    still = domain**2 + e_mosaic**2 + e_beam**2 + e_band**2
                    turned = abs(turn_e)
                    sigma = np.sqrt(still)
                    if abs(miss) > 3.0 * sigma + 0.5 * turned:
                        continue
                    ee = still + turn_e**2 / 12.0
                    er = (
                        e_mosaic * r_mosaic
                        + e_beam * r_beam
                        + e_band * r_band
                        + turn_e * turn_r / 12.0
                    )
                    et = turn_e * turn_t / 12.0
                    rr = domain**2 + r_mosaic**2 + r_beam**2 + r_band**2 + turn_r**2 / 12.0
                    tt = domain**2 + mosaic**2 + beam**2 + turn_t**2 / 12.0
                    rt = turn_r * turn_t / 12.0
                    shift_r, shift_t = -miss * er / ee / length, -miss * et / ee / length
                    if turned > 0.1 * sigma:
                        high = math.erf((miss + 0.5 * turned) / (sigma * math.sqrt(2.0)))
                        low = math.erf((miss - 0.5 * turned) / (sigma * math.sqrt(2.0)))
                        recorded = domain * math.sqrt(0.5 * math.pi) / turned * (high - low)
                    else:
                        recorded = domain / sigma * np.exp(-0.5 * (miss / sigma) ** 2)
                    if n == capacity:
                        capacity *= 2
                        grown = np.empty((capacity, 11))
                        grown[:n] = out
                        out = grown
                    out[n, 0] = ux + shift_r * rx + shift_t * tx
                    out[n, 1] = uy + shift_r * ry + shift_t * ty
                    out[n, 2] = uz + shift_r * rz
                    out[n, 3] = gg
                    out[n, 4] = recorded
                    out[n, 5], out[n, 6], out[n, 7] = h, k, l
                    out[n, 8] = (rr - er * er / ee) / k0**2
                    out[n, 9] = (tt - et * et / ee) / k0**2
                    out[n, 10] = (rt - er * et / ee) / k0**2
                    n += 1
    return out[:n]
