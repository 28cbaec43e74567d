"""Reciprocal lattices on the Ewald sphere: where spots fall, how strong and how wide.

Laboratory axes: z along the beam, x along the detector's fast axis, y along its slow axis. A
reciprocal vector g of a crystal in orientation R diffracts when s1 = s0 + g has the length of
s0 = (0, 0, 1/lambda); the distance by which it misses is the excitation error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba as nb
import numpy as np
from numpy.typing import NDArray

__all__ = ["CELLS", "Cell", "Reflections", "random_rotation", "reciprocal_axes", "reflections"]


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

_CENTRING_CODE = {"P": 0, "I": 1, "F": 2, "C": 3}


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
        partiality: 0..1, share of the spot's full intensity that a still records.
        hkl: (n, 3) Miller indices.
    """

    direction: NDArray[np.float64]
    s_inverse_angstrom2: NDArray[np.float64]
    partiality: NDArray[np.float64]
    hkl: NDArray[np.int64]


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
        domain_angstrom: size of coherent blocks; widens the lattice points by its inverse.
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
        0.5 / domain_angstrom,
        bandwidth,
        divergence_rad,
        np.deg2rad(rotation_deg),
    )
    return Reflections(
        direction=found[:, 0:3],
        s_inverse_angstrom2=found[:, 3],
        partiality=found[:, 4],
        hkl=found[:, 5:8].astype(np.int64),
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
    out = np.empty((capacity, 8))
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
                    turned = rotation_rad * abs(gy * k0) / length
                    sigma = np.sqrt(
                        domain**2
                        + (mosaic_rad * g * cos_theta) ** 2
                        + (divergence_rad * g * cos_theta) ** 2
                        + (bandwidth * g * sin_theta) ** 2
                        + turned**2 / 12.0
                    )
                    if abs(miss) > 3.0 * sigma:
                        continue
                    if n == capacity:
                        capacity *= 2
                        grown = np.empty((capacity, 8))
                        grown[:n] = out
                        out = grown
                    out[n, 0], out[n, 1], out[n, 2] = sx / length, sy / length, sz / length
                    out[n, 3] = gg
                    out[n, 4] = np.exp(-0.5 * (miss / sigma) ** 2)
                    out[n, 5], out[n, 6], out[n, 7] = h, k, l
                    n += 1
    return out[:n]
