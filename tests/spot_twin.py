"""The slow twin of the list of spots: whole images, sets and plain loops, nothing of the product.

Pixels come as counts, GAP where masked and BEYOND where above saturation.
"""

from __future__ import annotations

import math

import numpy as np

GAP, BEYOND = -1, -2
EXPECTED_MAXIMUM = {2: 1.03, 4: 1.77, 8: 2.37, 16: 2.83, 32: 3.24}
NAMES = (
    *("y", "x", "intensity", "background", "noise", "snr", "pixels", "yy", "yx", "xx"),
    *("peak", "cut", "peaks", "lone", "saturated", "at_gap", "valid"),
)
AROUND = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


def box(values: np.ndarray, reach: int) -> np.ndarray:
    out = np.zeros(values.shape)
    for y, x in np.ndindex(*values.shape):
        rows = slice(max(0, y - reach), y + reach + 1)
        out[y, x] = values[rows, max(0, x - reach) : x + reach + 1].sum()
    return out


def scores_of_cells(counts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """By how many sigma each cell stands out (-inf without pixels), and its background."""
    shape = tuple(-(-side // k) for side in counts.shape)
    pixels, total, excess = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for y, x in np.ndindex(*shape):
        cell = counts[y * k : y * k + k, x * k : x * k + k]
        valid = cell[cell >= 0]
        pixels[y, x], total[y, x] = valid.size, valid.sum()
        if valid.size:
            top = valid.max()
            others = (valid.sum() - top) / (valid.size - 1) if valid.size > 1 else top
            gap = math.sqrt(top + 0.375) - math.sqrt(others + 0.375)
            excess[y, x] = 2 * gap - float(np.float32(EXPECTED_MAXIMUM[k]))
    inside = (pixels > 0).astype(float)
    area = np.maximum(box(pixels, 4), 1)
    rough = box(total, 4) / area * pixels
    level = box(np.minimum(total, rough + 3 * np.sqrt(rough + 0.5)), 4) / area
    whole = 2 * (np.sqrt(total + 0.375) - np.sqrt(level * pixels + 0.375)) * inside
    near = np.maximum(box(inside, 8), 1)
    scaled = []
    for sigma in (excess, whole):
        scatter = box(np.minimum(abs(sigma), 6) * inside, 8) / near / 0.8
        scaled.append(sigma / np.clip(scatter, 0.25, 2))
    score = scaled[0].copy()
    whole = scaled[1]
    for y, x in np.ndindex(*shape):
        beside = 0.0
        for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
            ends = [(y - dy, x - dx), (y + dy, x + dx)]
            if all(0 <= a < shape[0] and 0 <= b < shape[1] for a, b in ends):
                beside = max(beside, min(whole[end] for end in ends))
        score[y, x] = max(score[y, x], whole[y, x] - beside)
    score[pixels == 0] = -math.inf
    return score, level


def spots(counts: np.ndarray, k: int, most: int = 512) -> np.ndarray:
    """(most, 17) float64."""
    ny, nx = counts.shape
    score, level = scores_of_cells(counts, k)
    ranked = sorted((-score[cell], cell) for cell in np.ndindex(*score.shape))
    cells = [cell for s, cell in ranked if -s > 2.0][:1024]

    def at(y: int, x: int) -> int:
        return int(counts[y, x]) if 0 <= y < ny and 0 <= x < nx else GAP

    def nine(y: int, x: int, background: float) -> float:
        found = [at(y + dy, x + dx) for dy, dx in AROUND]
        return sum(v if v >= 0 else background for v in found)

    centres: dict[tuple[int, int], float] = {}
    for cy, cx in cells:
        b = level[cy, cx]
        for y in range(cy * k - 1, cy * k + k + 1):
            for x in range(cx * k - 1, cx * k + k + 1):
                own = nine(y, x, b)
                over = 2 * (math.sqrt(own + 0.375) - math.sqrt(9 * b + 0.375))
                if over < 2.5 or (y, x) in centres:
                    continue
                before = max(nine(y + dy, x + dx, b) for dy, dx in AROUND[:4])
                behind = max(nine(y + dy, x + dx, b) for dy, dx in AROUND[5:])
                if own > before and own >= behind:
                    centres[y, x] = over
    owner: dict[tuple[int, int], int] = {}
    found: list[dict[str, float]] = []
    first: list[tuple[int, int]] = []
    for y, x in sorted(centres, key=lambda c: -centres[c]):
        if not (0 <= y < ny and 0 <= x < nx):
            continue
        b = level[y // k, x // k]
        top, place = max(
            ((at(y + dy, x + dx), (-dy, -dx)) for dy, dx in AROUND), key=lambda t: (t[0], t[1])
        )
        by, bx = y - place[0], x - place[1]
        if top < 1:
            continue
        if (by, bx) in owner:
            spot = owner[by, bx]
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
            found[spot]["peaks"] += any(dip > 2.5 for dip in dips)
            continue
        mean, noise = background(counts, y, x, b)
        cut = max(2 * noise, 0.1 * (top - mean))
        if top - mean < cut:
            continue
        mine = [(by, bx)]
        owner[by, bx] = len(found)
        for py, px in mine:
            for dy, dx in AROUND:
                q = py + dy, px + dx
                if at(*q) >= mean + cut and at(*q) >= 0 and q not in owner and len(mine) < 1024:
                    owner[q] = len(found)
                    mine.append(q)
        first.append((y, x))
        found.append(measured(at, mine, mean, noise, cut, by, bx))
    found = [f for f in sorted(found, key=lambda f: -f["snr"]) if f["snr"] >= 3][:most]
    out = np.zeros((most, len(NAMES)))
    for row, each in enumerate(found):
        out[row] = [each[name] for name in NAMES]
    return out


def background(counts: np.ndarray, y: int, x: int, level: float) -> tuple[float, float]:
    ring = [
        counts[i, j]
        for i in range(max(0, y - 8), min(counts.shape[0], y + 9))
        for j in range(max(0, x - 8), min(counts.shape[1], x + 9))
        if max(abs(i - y), abs(j - x)) > 3 and counts[i, j] >= 0
    ]
    if len(ring) < 20:
        return level, math.sqrt(max(level, 1 / 20))
    highest, used = math.inf, []
    for _ in range(10):
        before, used = used, [v for v in ring if v <= highest]
        if len(used) == len(before):
            break
        mean = float(np.mean(used))
        noise = math.sqrt(max(np.var(used), mean, (sum(used) + 1) / len(used)))
        highest = mean + 3 * noise + 1
    return mean, noise


def measured(at, mine, mean, noise, cut, by, bx) -> dict[str, float]:
    net = np.array([at(*p) - mean for p in mine])
    places = np.array(mine, float)
    total, peak = net.sum(), net.max()
    centre = (net[:, None] * places).sum(0) / total
    away = places - centre
    beside = [
        at(by + dy, bx + dx) - mean for dy, dx in AROUND if (dy or dx) and at(by + dy, bx + dx) >= 0
    ]
    touched = [at(y + dy, x + dx) for y, x in mine for dy, dx in AROUND]
    least = max(2 * math.sqrt(len(beside) * noise**2 + 1), 0.02 * peak)
    return {
        "y": centre[0] + 0.5,
        "x": centre[1] + 0.5,
        "intensity": total,
        "background": mean,
        "noise": noise,
        "snr": total / math.sqrt(total + len(mine) * noise**2),
        "pixels": len(mine),
        "yy": (net * away[:, 0] ** 2).sum() / total,
        "yx": (net * away[:, 0] * away[:, 1]).sum() / total,
        "xx": (net * away[:, 1] ** 2).sum() / total,
        "peak": peak,
        "cut": cut / peak,
        "peaks": 1,
        "lone": sum(beside) < least,
        "saturated": BEYOND in touched,
        "at_gap": GAP in touched,
        "valid": 1,
    }
