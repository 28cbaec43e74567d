"""Reads CBOR (RFC 8949) without copying byte strings: they come back as memoryviews.

A frame of megabytes is a few hundred bytes of structure round one byte string, so walking it
costs microseconds whatever its size. Depth and lengths are checked against the bytes that are
there before anything is allocated. Where ``_cbor.c`` was built it walks messages of the usual
kind, and leaves all others, what is wrong among them, to the walk here.
"""

from __future__ import annotations

import contextlib
import importlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from triage.errors import MalformedMessage

__all__ = ["MAGIC", "Pair", "Tagged", "read_map", "read_map_in_python", "read_pairs"]

MAGIC = b"\xd9\xd9\xf7"
"""Tag 55799, self-described CBOR: the first bytes of every message of a real detector."""

_compiled: Any
try:
    _compiled = importlib.import_module("triage.ingest._cbor")
except ImportError:
    _compiled = None

_MAX_DEPTH = 32
_MAX_STRUCTURE_BYTES = 1 << 20
"""Beside the content of strings: a byte of it becomes an object of up to a hundred. Messages of
detectors have a few hundred, with all that Jungfraujoch tells of an image some ten thousand."""

_TRANSPARENT_TAGS = frozenset({0, 1, 55799})
"""Date texts, epochs and self-description say nothing that we read."""


@dataclass(slots=True)
class Tagged:
    """A tag and what it stands before; not frozen, because that triples what making one costs."""

    tag: int
    value: Any


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair of a message's map and where it stands, in bytes from the message's beginning."""

    key: Any
    value: Any
    begin: int
    value_begin: int
    end: int


def read_map(buffer: Any, into: dict[Any, Any]) -> None:
    """Read the map that a message is into ``into``, key by key.

    What was read before an error stays in ``into``, so a message that is cut short can still be
    told for what it is.

    Raises:
        MalformedMessage: no map, cut short, nested too deep, or not CBOR.
    """
    view = memoryview(buffer).cast("B")
    if _compiled is not None:
        found = _compiled.walk(view, Tagged)
        if found is not None:
            into.update(found)
            return
    read_map_in_python(view, into)


def read_map_in_python(view: memoryview, into: dict[Any, Any]) -> None:
    """As :func:`read_map`, of a view of bytes and without the compiled walk."""
    with _complaints(view):
        walk = _Walk(view)
        argument, at = _map_head(walk)
        if argument is None:
            while view[at] != 0xFF:
                at = _pair(walk, at, into)
        else:
            for _ in range(argument):
                at = _pair(walk, at, into)


@dataclass(slots=True)
class _Walk:
    """A message, and how many of its bytes read so far were the content of strings."""

    view: memoryview
    strings: int = 0


def _map_head(walk: _Walk) -> tuple[int | None, int]:
    """How many pairs the map has that a message is (None = indefinite), and where they begin."""
    major, argument, at = _head(walk, 3 if walk.view[:3] == MAGIC else 0)
    if major != 5:
        raise MalformedMessage(f"CBOR major type {major}; expected a map (5)")
    return argument, at


@contextlib.contextmanager
def _complaints(view: memoryview) -> Iterator[None]:
    try:
        yield
    except (IndexError, struct.error) as err:
        raise MalformedMessage(f"CBOR of {len(view)} bytes is cut short") from err
    except UnicodeDecodeError as err:
        raise MalformedMessage(f"CBOR text is not UTF-8: {err.reason}") from err


def read_pairs(buffer: Any) -> list[Pair]:
    """The pairs of the map that a message is, in order, for those who change one of them.

    Raises:
        MalformedMessage: as :func:`read_map`, and where bytes follow the map.
    """
    view = memoryview(buffer).cast("B")
    pairs: list[Pair] = []
    with _complaints(view):
        walk = _Walk(view)
        argument, at = _map_head(walk)
        while len(pairs) != argument:
            if argument is None and view[at] == 0xFF:
                at += 1
                break
            key, value_begin = _key(walk, at)
            value, end = _item(walk, value_begin, 1)
            pairs.append(Pair(key, value, at, value_begin, end))
            at = end
    if at != len(view):
        raise MalformedMessage(f"{len(view) - at} bytes after the CBOR map; expected none")
    return pairs


def _pair(walk: _Walk, at: int, into: dict[Any, Any]) -> int:
    key, at = _key(walk, at)
    into[key], at = _item(walk, at, 1)
    return at


def _key(walk: _Walk, at: int) -> tuple[Any, int]:
    key, at = _item(walk, at, 1)
    if not isinstance(key, str | int | float | bool):
        raise MalformedMessage(f"CBOR map key of type {type(key).__name__}; expected text")
    return key, at


def _head(walk: _Walk, at: int) -> tuple[int, int | None, int]:
    """Major type, argument (None = indefinite) and where the content begins."""
    first = walk.view[at]
    at += 1
    major, info = first >> 5, first & 31
    if info < 24:
        return major, info, at
    if info < 28:
        size = 1 << (info - 24)
        if len(walk.view) - at < size:
            raise IndexError
        return major, int.from_bytes(walk.view[at : at + size], "big"), at + size
    if info == 31:
        return major, None, at
    raise MalformedMessage(f"CBOR initial byte 0x{first:02x} is reserved")


def _item(walk: _Walk, at: int, depth: int) -> tuple[Any, int]:
    if depth > _MAX_DEPTH:
        raise MalformedMessage(f"CBOR nested deeper than {_MAX_DEPTH}")
    if at - walk.strings > _MAX_STRUCTURE_BYTES:
        raise MalformedMessage(f"CBOR of more than {_MAX_STRUCTURE_BYTES} bytes beside its strings")
    first = walk.view[at]
    if first < 24:
        return first, at + 1
    if first >= 0xE0:
        return _simple(walk, at)
    major, argument, at = _head(walk, at)
    if major in (2, 3):
        return _string(walk, at, major, argument, depth)
    if major == 4:
        return _array(walk, at, argument, depth)
    if major == 5:
        return _map(walk, at, argument, depth)
    if argument is None:
        raise MalformedMessage("CBOR integer or tag of indefinite length")
    if major == 0:
        return argument, at
    if major == 1:
        return -1 - argument, at
    value, at = _item(walk, at, depth + 1)
    return (value if argument in _TRANSPARENT_TAGS else Tagged(argument, value)), at


def _string(walk: _Walk, at: int, major: int, length: int | None, depth: int) -> tuple[Any, int]:
    if length is None:
        chunks = []
        while walk.view[at] != 0xFF:
            if walk.view[at] >> 5 != major or walk.view[at] & 31 == 31:
                raise MalformedMessage("CBOR string in pieces of another type")
            piece, at = _item(walk, at, depth + 1)
            chunks.append(piece)
        joined = "".join(chunks) if major == 3 else memoryview(b"".join(chunks))
        return joined, at + 1
    if length > len(walk.view) - at:
        raise MalformedMessage(
            f"CBOR string claims {length} bytes; the message has {len(walk.view) - at} left"
        )
    walk.strings += length
    content = walk.view[at : at + length]
    return (str(content, "utf-8") if major == 3 else content), at + length


def _array(walk: _Walk, at: int, length: int | None, depth: int) -> tuple[list[Any], int]:
    items: list[Any] = []
    if length is None:
        while walk.view[at] != 0xFF:
            value, at = _item(walk, at, depth + 1)
            items.append(value)
        return items, at + 1
    if length > len(walk.view) - at:
        raise MalformedMessage(
            f"CBOR array claims {length} items; the message has {len(walk.view) - at} bytes left"
        )
    for _ in range(length):
        value, at = _item(walk, at, depth + 1)
        items.append(value)
    return items, at


def _map(walk: _Walk, at: int, length: int | None, depth: int) -> tuple[dict[Any, Any], int]:
    items: dict[Any, Any] = {}
    if length is not None and 2 * length > len(walk.view) - at:
        raise MalformedMessage(
            f"CBOR map claims {length} pairs; the message has {len(walk.view) - at} bytes left"
        )
    left = length
    while left != 0:
        if left is None:
            if walk.view[at] == 0xFF:
                return items, at + 1
        else:
            left -= 1
        key, at = _item(walk, at, depth + 1)
        value, at = _item(walk, at, depth + 1)
        if isinstance(key, str | int | float | bool):
            items[key] = value
    return items, at


def _simple(walk: _Walk, at: int) -> tuple[Any, int]:
    info = walk.view[at] & 31
    at += 1
    if info == 20:
        return False, at
    if info == 21:
        return True, at
    if info in (22, 23):
        return None, at
    if info == 24:
        return walk.view[at], at + 1
    if info == 25:
        return struct.unpack_from(">e", walk.view, at)[0], at + 2
    if info == 26:
        return struct.unpack_from(">f", walk.view, at)[0], at + 4
    if info == 27:
        return struct.unpack_from(">d", walk.view, at)[0], at + 8
    if info == 31:
        raise MalformedMessage("CBOR break where nothing is open")
    return info, at
