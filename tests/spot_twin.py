"""The slow twin of the list of spots: whole images, sets and plain loops, nothing of the product.

Pixels come as counts, GAP where masked and BEYOND where above saturation. What decides between
neighbours is computed in float32 and in the order that the list is defined by, so that ties fall
alike.
"""

from __future__ import annotations

import math

import numpy as np

GAP, BEYOND = -1, -2
NAMES = (
    *("y", "x", "intensity", "background", "noise", "snr", "pixels", "yy", "yx", "xx"),
    *("peak", "cut", "peaks", "lone", "saturated", "at_gap", "valid", "matched", "width"),
    *("fitted", "fitted_px2", "brightest"),
)
AROUND = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
F = np.float32
STRIP, HALO, BLOCK, BESIDE = 256, 32, 16, 3


def box(values: np.ndarray, reach: int) -> np.ndarray:
    out = np.zeros(values.shape)
    for y, x in np.ndindex(*values.shape):
        rows = slice(max(0, y - reach), y + reach + 1)
        out[y, x] = values[rows, max(0, x - reach) : x + reach + 1].sum()
    return out


def cells_of(counts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Valid pixels of each cell, and their sum."""
    shape = tuple(-(-side // k) for side in counts.shape)
    pixels, total = np.zeros(shape), np.zeros(shape)
    for y, x in np.ndindex(*shape):
        cell = counts[y * k : y * k + k, x * k : x * k + k]
        valid = cell[cell >= 0]
        pixels[y, x], total[y, x] = valid.size, valid.sum()
    return pixels, total


def levels_of(
    pixels: np.ndarray, total: np.ndarray, k: int, beam: tuple[float, float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Background per pixel by the cells near, and by those farther, each in units of its ring
    around the ``beam``, (y, x) in pixels."""
    bounded, by_ring = total, np.ones(pixels.shape)
    for _ in range(2):
        if beam is not None:
            by_ring = ring_means(pixels, bounded, k, beam)
        near, far = (share(box(bounded, r), box(by_ring * pixels, r)) * by_ring for r in (2, 4))
        rough = far * pixels
        bounded = np.minimum(total, rough + 3 * np.sqrt(rough + 0.5))
    return near, far


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)


def ring_means(
    pixels: np.ndarray, total: np.ndarray, k: int, beam: tuple[float, float]
) -> np.ndarray:
    """Mean per pixel at the distance of each cell, between the middles of rings one cell wide."""
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]] + 0.5
    away = np.minimum(np.hypot(y - beam[0] / k, x - beam[1] / k), 1e5).astype(F).astype(float)
    inside = [away.astype(int) == ring for ring in range(int(away.max()) + 2)]
    area = np.array([pixels[ring].sum() for ring in inside])
    sums = np.array([total[ring].sum() for ring in inside])
    for _ in range(11):
        before = sums
        mean = share(sums, area)
        sums = np.array(
            [
                np.minimum(total[ring], 3 * each * pixels[ring] + 3).sum()
                for ring, each in zip(inside, mean, strict=True)
            ]
        )
        if (sums >= 0.9 * before).all():
            break
    means = np.full(len(inside), np.nan)
    for i in np.flatnonzero(area):
        beside = slice(max(0, i - 2), i + 3)
        prior = 64 * sums[beside].sum() / area[beside].sum()
        means[i] = (sums[i] + prior) / (area[i] + 64)
    known = np.flatnonzero(area)
    for i in np.flatnonzero(area == 0):
        means[i] = means[known[np.argmin(abs(known - i))]]
    return np.interp(away, np.arange(len(means)) + 0.5, means)


def at_cells(side: int, size: int, halo: int, k: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Cell before the middle of each bin, from -1 to ``cells`` - 1, and how far behind it."""
    at = ((np.arange(side) - halo) * size + 0.5 * size) / k - 0.5
    return np.clip(np.floor(at).astype(int), -1, cells - 1), (at - np.floor(at)).astype(F)


def sigma_of(bins: np.ndarray, level: np.ndarray, size: int, k: int) -> np.ndarray:
    """By how much (1 2 1) x (1 2 1) exceeds the background between the middles of cells."""
    halo = HALO // size
    roots = np.sqrt(np.pad(level, 1, "edge") * (16.0 * size * size / 2.25) + 0.375).astype(F)
    rows, below = at_cells(bins.shape[0], size, halo, k, level.shape[0])
    columns, part = at_cells(bins.shape[1], size, halo, k, level.shape[1])
    left, right = roots[:, columns + 1], roots[:, columns + 2]
    along = left + part * (right - left)
    root = along[rows + 1] + below[:, None] * (along[rows + 2] - along[rows + 1])
    down = np.zeros_like(bins)
    down[1:-1] = (bins[:-2] + bins[2:]) + F(2) * bins[1:-1]
    sums = np.zeros_like(bins)
    sums[:, 1:-1] = (down[:, :-2] + down[:, 2:]) + F(2) * down[:, 1:-1]
    return F(2) * (np.sqrt(sums * F(1 / 2.25) + F(0.375)) - root)


def block_of(
    sigma: np.ndarray, y: int, x: int, size: int, k: int, pixels: np.ndarray, level: np.ndarray
) -> tuple[float, float, bool, float]:
    """Mean and scatter of the block whose first bin (of the frame) is (y, x), whether a scatter
    below one is believed, and how many bins are measured."""
    halo = HALO // size
    part = sigma[y + halo : y + halo + BLOCK, x + halo : x + halo + BLOCK]
    total, squares = np.zeros(BLOCK, F), np.zeros(BLOCK, F)
    for row in np.clip(part, F(-4), F(4)):
        total += row
        squares += row * row
    top, left = y * size // k, x * size // k
    bottom = min(-(-(y + BLOCK) * size // k), pixels.shape[0])
    right = min(-(-(x + BLOCK) * size // k), pixels.shape[1])
    valid = pixels[top:bottom, left:right].sum() / size**2
    n = max(min(valid, BLOCK**2), 0.1 * BLOCK**2)
    mean = sum(total.tolist()) / n
    scatter = math.sqrt(max(sum(squares.tolist()) / n - mean * mean, 0.0))
    counts = level[(top + bottom) // 2, (left + right) // 2] * 16 * size**2 / 2.25
    return mean, min(max(scatter, 0.2 if counts >= 20 else 1.0), 4.0), counts >= 20, n


def levelled(around: np.ndarray, mean: float, scatter: float, n: float) -> tuple[np.ndarray, float]:
    """A block with its margin less the curved surface under the block, and the scatter that is
    left of ``n`` bins; or both as they were."""
    y, x = np.mgrid[: len(around), : len(around)] - 0.5 * (len(around) - 1)
    terms = np.stack([np.ones_like(y), y, x, y * y, y * x, x * x], -1)
    inner = np.s_[BESIDE : BESIDE + BLOCK, BESIDE : BESIDE + BLOCK]
    design, values = terms[inner].reshape(-1, 6), around[inner].ravel().astype(float)
    surface, cut, left = np.array([mean, 0, 0, 0, 0, 0.0]), 4.0, math.inf
    for step in range(8):
        rest = np.clip(values - design @ surface, -cut, cut)
        left = math.sqrt(np.sum(rest**2) / n)
        rise = np.linalg.lstsq(design, rest, rcond=None)[0]
        if step == 0 and np.sum((design @ rise) ** 2) < 0.25 * np.sum(rest**2):
            return around, scatter
        surface = surface + rise
        cut = min(4.0, max(3.0 * left, 1.0))
    if left > 0.8 * scatter:
        return around, scatter
    return (around - (terms @ surface - mean)).astype(F), left


def peaks_of(
    counts: np.ndarray, k: int, beam: tuple[float, float] | None
) -> tuple[list[tuple[float, float, int, int, int]], ...]:
    """(sigma, scatter, y, x, scale) of every local maximum, in bins; and the farther level."""
    ny, nx = counts.shape
    pixels, total = cells_of(counts, k)
    near, far = levels_of(pixels, total, k, beam)
    high, wide = (-(-side // STRIP) * STRIP + HALO for side in counts.shape)
    of_rows = np.clip(np.arange(-HALO, high) // k, 0, near.shape[0] - 1)
    of_columns = np.clip(np.arange(-HALO, wide) // k, 0, near.shape[1] - 1)
    bins = near.astype(F)[of_rows][:, of_columns]
    inner = bins[HALO : HALO + ny, HALO : HALO + nx]
    inner[counts >= 0] = counts[counts >= 0]
    found = []
    for scale in range(4):
        size = 1 << scale
        if scale:
            upper, lower = bins[::2], bins[1::2]
            bins = (upper[:, ::2] + upper[:, 1::2]) + (lower[:, ::2] + lower[:, 1::2])
        level = near if scale < 2 else far
        sigma = sigma_of(bins, level, size, k)
        halo = HALO // size
        for y in range(0, -(-ny // size), BLOCK):
            for x in range(0, -(-nx // size), BLOCK):
                mean, scatter, is_sure, n = block_of(sigma, y, x, size, k, pixels, level)
                top, left = y + halo, x + halo
                part = sigma[
                    top - BESIDE : top + BLOCK + BESIDE, left - BESIDE : left + BLOCK + BESIDE
                ]
                # A block that lies below its background has no spot, however low the rest of it is.
                best = part[BESIDE:-BESIDE, BESIDE:-BESIDE].max()
                if best < 3.5 * 0.2 or best <= mean + 3.5 * min(scatter, 1.3):
                    continue
                if scatter > 1.3 and n >= 0.75 * BLOCK**2:
                    part, scatter = levelled(part, mean, scatter, n)
                    scatter = min(max(scatter, 0.2 if is_sure else 1.0), 4.0)
                around = [np.roll(part, (-dy, -dx), (0, 1)) for dy, dx in AROUND]
                before, behind = np.max(around[:4], 0), np.max(around[5:], 0)
                is_top = (part > before) & (part >= behind) & (part > mean + 3.5 * scatter)
                for i, j in BESIDE + np.argwhere(is_top[BESIDE:-BESIDE, BESIDE:-BESIDE]):
                    on = max(
                        min(part[i - dy, j - dx], part[i + dy, j + dx])
                        for dy, dx in ((0, 3), (3, 0), (3, 3), (-3, 3))
                    )
                    by = (float(part[i, j]) - mean - max(float(on) - mean, 0.0)) / scatter
                    if by > 3.5:
                        place = (y * size // STRIP, scale, y, x)
                        at = int(y + i - BESIDE), int(x + j - BESIDE)
                        found.append((place, (by, scatter, *at, scale)))
    return [each for _, each in sorted(found, key=lambda f: f[0])], far


def chosen(peaks: list[tuple[float, float, int, int, int]]) -> list[tuple]:
    """Those that are measured, in order."""
    kept = []
    for scale, most in enumerate((512, 384, 256, 128)):
        own = sorted((p for p in peaks if p[4] == scale), key=lambda p: -p[0])
        kept += own[:most]
    kept.sort(key=lambda p: -p[0])
    return sorted(kept, key=lambda p: -p[0] * 0.85 ** p[4])


def spots(
    counts: np.ndarray,
    k: int,
    high: int,
    beam: tuple[float, float] | None = None,
    most: int = 512,
) -> np.ndarray:
    """(most, 22) float64; ``high``: the saturation value; ``beam``: where it is known, (y, x)."""
    ny, nx = counts.shape
    peaks, level = peaks_of(counts, k, beam)

    def at(y: int, x: int) -> int:
        return int(counts[y, x]) if 0 <= y < ny and 0 <= x < nx else GAP

    def pixels_of(y: int, x: int, size: int) -> list[tuple[int, int]]:
        return [(y * size + i, x * size + j) for i in range(size) for j in range(size)]

    def binned(y: int, x: int, size: int) -> float:
        values = [at(*p) for p in pixels_of(y, x, size)]
        valid = [v for v in values if v >= 0]
        if 2 * len(valid) < len(values) or not valid:
            return BEYOND if BEYOND in values else GAP
        return sum(valid) * (len(values) / len(valid))

    def nine(y: int, x: int, background: float) -> float:
        found = [at(y + dy, x + dx) for dy, dx in AROUND]
        return sum(v if v >= 0 else background for v in found)

    owner: dict[tuple[int, int], int] = {}
    found: list[dict[str, float]] = []
    first: list[tuple[int, int]] = []
    for by_filter, scatter, y, x, scale in chosen(peaks):
        width = size = 1 << scale
        while size > 1 and by_filter >= 5 * (2 * width // size):
            size //= 2
        steps = width // size
        beside = [
            (i, j)
            for i in range((y - 1) * steps + steps // 2, (y + 2) * steps - steps // 2)
            for j in range((x - 1) * steps + steps // 2, (x + 2) * steps - steps // 2)
        ]
        top, place = max((binned(*p, size), (-p[0], -p[1])) for p in beside)
        by, bx = -place[0], -place[1]
        middle = by * size + size // 2, bx * size + size // 2
        if top < 1 or middle[0] >= ny or middle[1] >= nx:
            continue
        b = level[middle[0] // k, middle[1] // k]
        if middle in owner:
            spot = owner[middle]
            ty, tx = first[spot]
            steps = max(abs(ty - y), abs(tx - x))
            own = math.sqrt(nine(y, x, b) + 0.375)
            dips = [
                2 * (own - math.sqrt(nine(i, j, b) + 0.375))
                for i, j in (
                    (round(y + (ty - y) * s / steps), round(x + (tx - x) * s / steps))
                    for s in range(1, steps)
                )
            ]
            found[spot]["peaks"] += width == 1 and any(dip > 2.5 for dip in dips)
            continue
        plane, noise, over = background(binned, y, x, width, b)

        def ground(
            i: float, j: float, size: int, plane: np.ndarray = plane, middle=(width * y, width * x),
            half: float = width / 2,
        ) -> float:  # fmt: skip
            """Counts of the plane in bin (i, j)."""
            away = size * (i + 0.5) - middle[0] - half, size * (j + 0.5) - middle[1] - half
            return float(plane @ (1.0, *away)) * size**2

        whole, under = 0.0, 0.0
        for i, j in np.ndindex(3 * width, 3 * width):
            weight = (1 + (width <= i < 2 * width)) * (1 + (width <= j < 2 * width))
            p = (y - 1) * width + i, (x - 1) * width + j
            if 0 <= p[0] < ny and 0 <= p[1] < nx:
                mean = max(ground(*p, 1), 0.0)
                whole += weight * (at(*p) if at(*p) >= 0 and p not in owner else mean)
                under += weight * mean
        rest = 2 * (math.sqrt(whole / 2.25 + 0.375) - math.sqrt(under / 2.25 + 0.375))
        matched = min(by_filter * scatter, rest) / over
        if matched < 3.5:
            continue
        noise *= size
        cut = max(2 * noise, 0.1 * (top - ground(by, bx, size)))
        if top - ground(by, bx, size) < cut:
            continue
        reach = (8 if size == 1 else 3) * (width // size)
        mine = [(by, bx)]
        owner |= dict.fromkeys(pixels_of(by, bx, size), len(found))
        for py, px in mine:
            for dy, dx in AROUND:
                q = py + dy, px + dx
                near = max(abs(q[0] - by), abs(q[1] - bx)) <= reach
                v = binned(*q, size)
                free = not any(p in owner for p in pixels_of(*q, size))
                above = v >= max(ground(*q, size) + cut, 0)
                if near and above and free and len(mine) < 1024:
                    owner |= dict.fromkeys(pixels_of(*q, size), len(found))
                    mine.append(q)
        first.append((y * width, x * width))
        found.append(measured(binned, mine, ground, noise, cut, by, bx, size))
        found[-1] |= {"matched": matched, "width": width, "rise": plane[1:]}
        inside = [at(*p) for q in mine for p in pixels_of(*q, size)]
        found[-1]["brightest"] = 1.0 if found[-1]["saturated"] else max(inside) / high
    found = sorted(found, key=lambda f: -F(f["matched"]))[:most]
    out = np.zeros((most, len(NAMES)))
    for row, each in enumerate(found):
        rise = each.pop("rise")
        each |= fitted(counts, rise, {name: float(F(value)) for name, value in each.items()})
        out[row] = [each[name] for name in NAMES]
    return out


def background(binned, y: int, x: int, size: int, level: float) -> tuple[np.ndarray, float, float]:
    """Mean and rises down and along of a pixel, its sigma, and a bin's sigma over Poisson's."""
    reach, core = (8, 3) if size == 1 else (4, 2)
    ring = [
        (i - y, j - x, binned(i, j, size))
        for i in range(y - reach, y + reach + 1)
        for j in range(x - reach, x + reach + 1)
        if max(abs(i - y), abs(j - x)) > core
    ]
    table = np.array([each for each in ring if each[2] >= 0], float).reshape(-1, 3)
    if len(table) < 20:
        return np.array([level, 0, 0]), math.sqrt(max(level, 1 / 20)), 1.0
    plane, noise, over = clipped(table, 1)
    if over > 1.15:
        plane, noise, over = clipped(table, 3)
        plane[0] = max(plane[0], 0.0)
    return plane / size**2 / (1, size, size), noise / size, over


def clipped(table: np.ndarray, terms: int) -> tuple[np.ndarray, float, float]:
    """Least squares with that many of 1, y, x, without what lies three sigma above; a plane of 20
    values at least."""
    columns, values = np.insert(table[:, :2], 0, 1.0, axis=1)[:, :terms], table[:, 2]
    use = np.ones(len(values), bool)
    for _ in range(10):
        plane = np.linalg.lstsq(columns[use], values[use])[0]
        left = values - columns @ plane
        variance, counts = np.mean(left[use] ** 2), values[use].mean()
        poisson = counts + 1 / use.sum()
        noise = math.sqrt(max(variance, min(poisson, 3.0)))
        over = max(math.sqrt(variance / poisson), 0.2 if counts * 16 / 2.25 >= 20 else 1.0)
        before, use = use, left <= 3 * noise + 1
        if use.sum() == before.sum() or (terms == 3 and use.sum() < 20):
            break
    return np.append(plane, [0.0] * (3 - terms)), noise, over


def measured(binned, mine, ground, noise, cut, by, bx, size) -> dict[str, float]:
    """Of bins ``mine``; the noise is a bin's."""
    net = np.array([binned(*p, size) - ground(*p, size) for p in mine])
    places = np.array(mine, float)
    total, peak = net.sum(), net.max()
    centre = (net[:, None] * places).sum(0) / total
    away = places - centre
    around = [(by + dy, bx + dx) for dy, dx in AROUND if dy or dx]
    beside = [binned(*p, size) - ground(*p, size) for p in around if binned(*p, size) >= 0]
    touched = [binned(y + dy, x + dx, size) for y, x in mine for dy, dx in AROUND]
    least = max(2 * math.sqrt(len(beside) * noise**2 + 1), 0.02 * peak)
    wider = (size**2 - 1) / 12
    return {
        "y": size * (centre[0] + 0.5),
        "x": size * (centre[1] + 0.5),
        "intensity": total,
        "background": max(ground(by, bx, size), 0.0) / size**2,
        "noise": noise / size,
        "snr": total / math.sqrt(total + len(mine) * noise**2),
        "pixels": len(mine) * size**2,
        "yy": max(size**2 * (net * away[:, 0] ** 2).sum() / total - wider, 0.0),
        "yx": size**2 * (net * away[:, 0] * away[:, 1]).sum() / total,
        "xx": max(size**2 * (net * away[:, 1] ** 2).sum() / total - wider, 0.0),
        "peak": peak,
        "cut": cut / peak,
        "peaks": 1,
        "lone": sum(beside) < least,
        "saturated": BEYOND in touched,
        "at_gap": GAP in touched,
        "valid": 1,
    }


def fitted(counts: np.ndarray, rise: np.ndarray, spot: dict[str, float]) -> dict[str, float]:
    """Five steps to the Gaussian whose weight gives back its place and half its covariance."""
    variance = max(spot["noise"] ** 2, spot["background"], 0.01)
    at = np.array([spot["y"], spot["x"]]) - 0.5
    cut = min(max(spot["cut"], 0.005), 0.8)
    wide = np.array([[spot["yy"], spot["yx"]], [spot["yx"], spot["xx"]]])
    wide /= 1 + cut * math.log(cut) / (1 - cut)
    every = np.stack(np.indices(counts.shape), -1)
    surest, photons, area = 0.0, 0.0, 0.0
    begun, best = at, (at, wide)
    for _ in range(5):
        short_long, axes = np.linalg.eigh(wide)
        short_long = np.clip(short_long, 0.16, [64.0, 100.0])
        wide = axes @ np.diag(short_long) @ axes.T
        reach = int(min(3 * math.sqrt(short_long[1]) + 1.5, 12))
        away = every - at
        far = np.einsum("...i,ij,...j", away, np.linalg.inv(wide), away)
        near = (np.abs(every - np.rint(at)) <= reach).all(-1) & (far <= 12) & (counts >= 0)
        weight, away = np.exp(-far[near] / 2), away[near]
        net = weight * (counts[near] - spot["background"] - (every[near] - begun) @ rise)
        total = net.sum()
        if not len(net) or total <= 0:
            break
        sigma = total / math.sqrt((weight**2).sum() * variance)
        if sigma > surest:
            surest, area, best = sigma, math.sqrt(short_long.prod()), (at, wide)
            photons = 2 * math.pi * area * total / (weight**2).sum()
        moved = net @ away / total
        seen = 2 * ((net[:, None] * away).T @ away / total - np.outer(moved, moved))
        for i in (0, 1):
            seen[i, i] = np.clip(seen[i, i], wide[i, i] / 4, 3 * wide[i, i])
        wide = 0.4 * wide + 0.6 * seen
        most = 0.95 * math.sqrt(wide[0, 0] * wide[1, 1])
        wide[0, 1] = wide[1, 0] = np.clip(wide[0, 1], -most, most)
        at = at + np.clip(moved, -1, 1)
    noise = max(4, 4 * math.pi * area) * spot["noise"] ** 2
    (y, x), ((yy, yx), (_, xx)) = best[0] + 0.5, best[1]
    return {
        "fitted": photons / math.sqrt(photons + noise + 1e-9), "fitted_px2": area,
        "y": y, "x": x, "yy": yy, "yx": yx, "xx": xx,
    }  # fmt: skip
