"""What frames are drawn from: ranges and shares, read from one TOML file."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

__all__ = ["SHIPPED", "Recipe", "load_recipe"]

SHIPPED = ("train", "test")
"""Recipes that need no file."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recipe:
    """Ranges and shares by table; ``recipes/train.toml`` says what each means.

    Attributes:
        seed: of a set made by this recipe, unless another is asked for.
        frames: of such a set.
        fingerprint: 16 hex digits over all values but ``seed`` and ``frames``; comments do not
            count.
    """

    name: str
    seed: int
    frames: int
    who: Mapping[str, Any]
    kinds: Mapping[str, Any]
    hits: Mapping[str, Any]
    beam: Mapping[str, Any]
    crystal: Mapping[str, Any]
    ice: Mapping[str, Any]
    fingerprint: str = ""


_TABLES = ("who", "kinds", "hits", "beam", "crystal", "ice")
_MAY_LACK = frozenset({"drawn_cells_share", "drawn_powders_share"})
"""Keys that stand for 0 where a recipe has none; its frames then stay what they were."""


def load_recipe(source: str | Path) -> Recipe:
    """A shipped recipe by name, or one from a file.

    A file has the keys of ``recipes/train.toml`` and no others; only ``drawn_cells_share`` and
    ``drawn_powders_share`` may be left out.

    Raises:
        ValueError: the file cannot be read or is no such recipe; says which key.
    """
    try:
        text = _shipped(str(source)) if str(source) in SHIPPED else Path(source).read_text()
    except OSError as err:
        raise ValueError(
            f"recipe {source}: {err.strerror}; expected a TOML file, or {' or '.join(SHIPPED)}"
        ) from err
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        raise ValueError(f"recipe {source}: {err}; expected TOML") from err
    pattern = found if str(source) == SHIPPED[0] else tomllib.loads(_shipped(SHIPPED[0]))
    _check_like(found, pattern, f"recipe {source}")
    drawn = {key: found[key] for key in _TABLES}
    digest = hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:16]
    return Recipe(
        name=found["name"],
        seed=found["seed"],
        frames=found["frames"],
        fingerprint=digest,
        **drawn,
    )


def _shipped(name: str) -> str:
    return resources.files("simulators.diffraction").joinpath(f"recipes/{name}.toml").read_text()


def _check_like(found: Any, pattern: Any, where: str) -> None:
    """The same keys, numbers where numbers are, ranges of two with the lower end first."""
    if isinstance(pattern, dict):
        if (
            not isinstance(found, dict)
            or found.keys() - pattern.keys()
            or pattern.keys() - found.keys() - _MAY_LACK
        ):
            there = sorted(found) if isinstance(found, dict) else found
            raise ValueError(f"{where}: {there}; expected the keys {sorted(pattern)}")
        for key in found:
            _check_like(found[key], pattern[key], f"{where}, {key}")
    elif isinstance(pattern, list):
        if not isinstance(found, list) or not found:
            raise ValueError(f"{where}: {found!r}; expected a list like {pattern}")
        for value in found:
            _check_like(value, pattern[0], where)
        if len(pattern) == 2 and not (len(found) == 2 and found[0] <= found[1]):
            raise ValueError(f"{where}: {found}; expected two numbers, the lower first")
    elif isinstance(pattern, float):
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise ValueError(f"{where}: {found!r}; expected a number")
    elif type(found) is not type(pattern):
        raise ValueError(f"{where}: {found!r}; expected {type(pattern).__name__}")
