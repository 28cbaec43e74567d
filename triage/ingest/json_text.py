"""JSON that may say anything of itself: its size and depth are bounded before it is parsed."""

from __future__ import annotations

import json
import re
from typing import Any

from triage.errors import MalformedMessage

__all__ = ["JSON_DEPTH", "parsed_json", "parsed_object"]

JSON_DEPTH = 32
"""Of objects and arrays in each other. Python's parser has a bound too, but one that depends on
how deep its caller stands, so that the same bytes would be read here and refused there."""

_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.?)*+"?|[][{}]', re.DOTALL)
"""Strings, which may hold brackets, and brackets. Possessive: nothing is tried twice."""


def parsed_json(text: str) -> Any:
    """What ``text`` says.

    Raises:
        MalformedMessage: it is no JSON, or deeper than :data:`JSON_DEPTH`.
    """
    if text.count("[") + text.count("{") > JSON_DEPTH:
        depth = 0
        for found in _BRACKETS.finditer(text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
            if depth > JSON_DEPTH:
                raise MalformedMessage(f"JSON nested deeper than {JSON_DEPTH}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        raise MalformedMessage(f"not JSON: {str(err)[:80]}") from err


def parsed_object(part: Any, most_bytes: int, trailing: bytes = b"") -> dict[str, Any]:
    """The object in a part of a message, in any encoding of Unicode.

    Args:
        part: anything with the buffer protocol.
        most_bytes: that it may have.
        trailing: bytes that may follow it, any number of each.

    Raises:
        MalformedMessage: it is larger, no JSON, too deep, or no object.
    """
    view = memoryview(part)
    if view.nbytes > most_bytes:
        raise MalformedMessage(f"JSON of {view.nbytes} bytes; expected at most {most_bytes}")
    content = bytes(view).rstrip(trailing) if trailing else bytes(view)
    try:
        text = content.decode(json.detect_encoding(content), "surrogatepass")
    except ValueError as err:
        raise MalformedMessage(f"not JSON: {str(err)[:80]}") from err
    document = parsed_json(text)
    if not isinstance(document, dict):
        raise MalformedMessage(f"JSON {type(document).__name__}; expected an object")
    return document
