"""What a benchmark leaves behind: one JSON document, and the comparison of two."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from triage.errors import ConfigError

__all__ = ["Comparison", "Record", "Result", "compared", "read_record"]

_HIGHER_IS_BETTER = ("_per_s", "_efficiency", "_hz")
"""Ends of names of figures that should grow; all others are times and ratios of times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a benchmark found.

    Attributes:
        figures: name to number; what later runs are compared by.
        spread: name to [lower quartile, upper quartile, rounds] of the figures that have them.
        tables: title to rows; the rows of a table have the same keys.
        absent: what could not be measured on this machine, and why.
        notes: what a reader must know to use the figures.
        input: what was measured on, by name, hash included.
    """

    figures: Mapping[str, float]
    spread: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    input: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(Result):
    """A :class:`Result` with where, when busy and by which command it was measured."""

    name: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    load: Mapping[str, float | None] = field(default_factory=dict)
    elapsed_s: float = 0.0

    def as_json(self, indent: int | None = None) -> str:
        """The document; numbers to four digits, which is more than they repeat to."""
        return json.dumps(_rounded(asdict(self)), indent=indent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One figure of two records.

    Attributes:
        ratio: b over a; None where either has none.
        worse: beyond the tolerance, or gone.
    """

    figure: str
    a: float | None
    b: float | None
    ratio: float | None
    worse: bool


def read_record(path: Path) -> Record:
    """A record from its file.

    Raises:
        ConfigError: no such file, or not a record.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"{path}: {err.strerror}; expected a record of triage bench") from err
    except ValueError as err:
        raise ConfigError(f"{path}: {err}; expected the JSON of triage bench --record") from err
    known = {f.name for f in fields(Record)}
    needed = {"name", "figures", "machine", "versions", "command", "input"}
    if not isinstance(document, dict) or not needed <= document.keys():
        raise ConfigError(
            f"{path}: not a record; expected the keys {', '.join(sorted(needed))}, as "
            "triage bench --record writes them"
        )
    return Record(**{key: value for key, value in document.items() if key in known})


def compared(a: Record, b: Record, tolerance: float) -> list[Comparison]:
    """Every figure of either record, in a's order.

    Args:
        tolerance: share by which b may be worse than a.
    """
    names = [*a.figures, *(name for name in b.figures if name not in a.figures)]
    return [_compared(name, a.figures.get(name), b.figures.get(name), tolerance) for name in names]


def _compared(name: str, a: float | None, b: float | None, tolerance: float) -> Comparison:
    if a is None or b is None:
        # A figure that is gone was there to be held to; a new one has nothing to be held to.
        return Comparison(figure=name, a=a, b=b, ratio=None, worse=b is None)
    rises = name.endswith(_HIGHER_IS_BETTER)
    if not a:
        return Comparison(figure=name, a=a, b=b, ratio=None, worse=b > 0 and not rises)
    ratio = b / a
    worse = ratio < 1 - tolerance if rises else ratio > 1 + tolerance
    return Comparison(figure=name, a=a, b=b, ratio=ratio, worse=worse)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.4g}")
    return value
