"""Tables in documents, made from records.

A document says where a table goes and what it shows, and the table between the marks is written by
``triage bench table``, never by hand::

    <!-- bench: benchmarks/records/goals.json goals figure value must -->
    <!-- /bench -->

After the record (relative to the document) come the title of one of its tables and the columns to
show; ``column=value`` keeps only rows with that value. Words with spaces stand in quotes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from triage.bench.record import Record, read_record
from triage.errors import ConfigError

__all__ = ["as_markdown", "filled_in", "number"]

_MARKED = re.compile(
    r"(?P<open><!-- bench: (?P<what>[^\n]*?) -->\n)(?P<table>.*?)(?P<close><!-- /bench -->)",
    re.DOTALL,
)


def filled_in(text: str, folder: Path) -> str:
    """A document's text with every marked table made anew.

    Args:
        folder: where the document lies.

    Raises:
        ConfigError: a mark that names no record, table or column; a mark without an end.
    """
    opened = text.count("<!-- bench: ")
    done, count = _MARKED.subn(lambda match: _filled(match, folder), text)
    if count != opened or count != text.count("<!-- /bench -->"):
        raise ConfigError(
            f"{opened} marks of tables and {text.count('<!-- /bench -->')} ends; expected "
            "'<!-- bench: RECORD TABLE COLUMN... -->', its table, '<!-- /bench -->' for each"
        )
    return done


def as_markdown(record: Record, title: str, words: Sequence[str]) -> str:
    """One table of a record: chosen columns, and rows that pass every ``column=value``.

    Raises:
        ConfigError: no such table or column.
    """
    if title not in record.tables:
        raise ConfigError(
            f"record {record.name}: no table {title!r}; expected one of {', '.join(record.tables)}"
        )
    rows = record.tables[title]
    known = list(rows[0]) if rows else []
    wanted = [word.partition("=")[::2] for word in words if "=" in word]
    columns = [word for word in words if "=" not in word] or known
    for name in (*columns, *(name for name, _ in wanted)):
        if name not in known:
            raise ConfigError(
                f"record {record.name}, table {title}: no column {name!r}; expected some of "
                f"{', '.join(known)}"
            )
    kept = [row for row in rows if all(str(row[name]) == value for name, value in wanted)]
    lines = [_line([name.replace("_", " ") for name in columns])]
    lines.append("|" + "|".join("---:" if _is_number(kept, name) else "---" for name in columns))
    lines[-1] += "|"
    lines += [_line([number(row[name]) for name in columns]) for row in kept]
    return "\n".join(lines) + "\n"


def number(value: Any) -> str:
    """A cell: numbers to three digits, which is what they repeat to."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " to ".join(number(each) for each in value)
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def _filled(match: re.Match[str], folder: Path) -> str:
    words = shlex.split(match["what"])
    if len(words) < 2:
        raise ConfigError(f"mark 'bench: {match['what']}': expected RECORD TABLE COLUMN...")
    record = read_record(folder / words[0])
    return f"{match['open']}{as_markdown(record, words[1], words[2:])}{match['close']}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _is_number(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row[name] for row in rows if row[name] is not None]
    return bool(values) and all(isinstance(value, int | float) for value in values)
