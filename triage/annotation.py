"""Writes what was decided into the messages themselves, where the settings ask for it.

By default nothing here runs and every message leaves as it came. What is written, and where:

==============  ==================  ==============================  =========================
protocol        kept image          placeholder of a dropped image  end of a series
==============  ==================  ==============================  =========================
Stream V2       in ``user_data``    in ``user_data``                ledger in ``user_data``
Stream V1       image appendix      in the second part              as it came
SLS receiver    ``addJsonHeader``   ``addJsonHeader``               as it came
==============  ==================  ==============================  =========================

``user_data`` and the appendix may be in use, by any shape of value. What was there is wrapped and
not changed: ``{"user_data": <what was there>, "triage": {...}}``. All other bytes stay as they
are and where they are, the pixels above all. One ZeroMQ part is one buffer, so a Stream V2
message that is written into is copied once, pixels and all; the other protocols send pixels in a
part of their own, which is not copied.

A placeholder is what is left of a dropped image: its ids and times, the verdict, and the eight
bytes ``SKIPPED\\0`` in place of pixels. In Stream V2 each channel holds them as an array of
1 x 8 uint8, which a strict reader reads like any image, and whose shape no detector has. In
Stream V1 and from the SLS receiver shape and type stay as declared and ``size`` is 8; Stream V1
calls the encoding ``skipped``, so that no reader takes eight bytes for an image, and a ``hash``
that names something is that of the eight bytes. The SLS field ``data`` stays 1, because 0 ends an
acquisition.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import cbor2
from msgspec import structs

from triage.errors import MalformedMessage, WireError
from triage.ingest.cbor import MAGIC, Pair, read_pairs
from triage.ingest.json_text import parsed_json
from triage.records import SCORE_NAMES, Decision, Message, SeriesReport

__all__ = ["SKIPPED", "Annotator"]

SKIPPED = b"SKIPPED\0"
"""In place of pixels; CrystFEL writes the same for frames it leaves out."""

_SKIPPED_MD5 = hashlib.md5(SKIPPED, usedforsecurity=False).hexdigest()
"""Stream V1 names the hash of what it sends for pixels."""

_VERSION = 1
"""Of what is written; a key may be added without a new one."""

_MAX_JSON_BYTES = 1 << 20

_NO_PIXELS = cbor2.CBORTag(40, [[1, len(SKIPPED)], cbor2.CBORTag(64, SKIPPED)])


class Annotator:
    """Makes the messages that go on in place of those received.

    Args:
        verdicts: kept images carry their verdict, and the end of a series its ledger.
        placeholders: dropped images leave a placeholder.
    """

    def __init__(self, *, verdicts: bool, placeholders: bool) -> None:
        self.verdicts = verdicts
        self.placeholders = placeholders

    def kept(self, message: Message, decision: Decision) -> Message:
        """An image with its verdict; as it came where its protocol has no place for one."""
        if not self.verdicts:
            return message
        try:
            return _each(message, lambda parts: _with_verdict(parts, _verdict(decision)))
        except WireError:
            return message

    def placeholder(self, message: Message, decision: Decision) -> Message:
        """What goes on in place of a dropped image.

        Raises:
            WireError: none can be made of this message.
        """
        return _each(message, lambda parts: _skipped(parts, _verdict(decision)))

    def ended(self, message: Message, report: SeriesReport) -> Message:
        """The end of a series with its ledger; as it came where its protocol has no place."""
        if not self.verdicts or _is_json(message.parts):
            return message
        counts = {"v": _VERSION} | {
            name: getattr(report, name)
            for name in (
                "received", "forwarded", "dropped", "undecided", "missing", "duplicates",
                "control", "malformed", "kept", "vetoed",
            )
        }  # fmt: skip
        counts["dropped_as"] = "placeholder" if self.placeholders else "nothing"
        try:
            return _each(message, lambda parts: _with_user_data(parts, counts))
        except WireError:
            return message


def _each(message: Message, rewritten: Any) -> Message:
    """The message with each of its ZeroMQ messages rewritten."""
    return structs.replace(
        message,
        parts=tuple(rewritten(message.parts)),
        followed_by=tuple(tuple(rewritten(parts)) for parts in message.followed_by),
    )


def _verdict(decision: Decision) -> dict[str, Any]:
    """What was decided; scores that are not there are left out, for null is refused by some."""
    found: dict[str, Any] = {
        "v": _VERSION,
        "verdict": decision.verdict.value,
        "reason": decision.reason.value,
        "override": decision.override.value,
    }
    for name in SCORE_NAMES:
        value = float(getattr(decision.scores, name))
        if math.isfinite(value):
            found[name] = value
    found["ood"] = bool(decision.scores.ood)
    found["model_id"] = decision.model_id
    found["policy_id"] = decision.policy_id
    return found


def _is_json(parts: Sequence[Any]) -> bool:
    return bytes(memoryview(parts[0])[:1]) == b"{"


def _with_verdict(parts: Sequence[Any], verdict: Mapping[str, Any]) -> Sequence[Any]:
    if not _is_json(parts):
        return _with_user_data(parts, verdict)
    first = _json(parts[0])
    if "jsonversion" in first:
        return (_sls_header(first, verdict), *parts[1:])
    if not _is_image1(first) or len(parts) not in (4, 5):
        raise MalformedMessage("no image of Stream V1; expected 4 or 5 parts")
    return (*parts[:4], _appendix(parts[4:], verdict))


def _skipped(parts: Sequence[Any], verdict: Mapping[str, Any]) -> Sequence[Any]:
    if not _is_json(parts):
        return _skipped2(parts, verdict)
    first = _json(parts[0])
    if "jsonversion" in first and len(parts) == 2:
        return (_sls_header(first | {"size": len(SKIPPED)}, verdict), SKIPPED)
    if not _is_image1(first) or len(parts) < 3:
        raise MalformedMessage("no image of Stream V1 or from an SLS receiver")
    changed = {"encoding": "skipped", "size": len(SKIPPED), "triage": verdict}
    described = json.dumps({**_json(parts[1]), **changed}).encode()
    head = parts[0]
    if first.get("hash"):
        head = json.dumps({**first, "hash": _SKIPPED_MD5}).encode()
    return (head, described, SKIPPED, *parts[3:])


# -- Stream V2 ---------------------------------------------------------------------------------


def _with_user_data(parts: Sequence[Any], ours: Mapping[str, Any]) -> Sequence[Any]:
    """A map with ``ours`` in its user_data, before the pixels as detectors have it."""
    view, pairs = _pairs(parts)
    written: list[Any] = []
    there = next((pair for pair in pairs if pair.key == "user_data"), None)
    user_data = _wrapped(view, there, ours)
    pixels = next((pair for pair in pairs if pair.key == "data"), None)
    cuts = {pair.begin: (pair.end, user_data) for pair in (there,) if pair is not None}
    if there is None:
        at = pixels.begin if pixels is not None else pairs[-1].end
        cuts[at] = (at, user_data)
    at = pairs[0].begin
    for begin, (end, content) in sorted(cuts.items()):
        written += [view[at:begin], content]
        at = end
    written.append(view[at : pairs[-1].end])
    return (b"".join([_head(view, len(pairs) + (there is None)), *written]),)


def _skipped2(parts: Sequence[Any], verdict: Mapping[str, Any]) -> Sequence[Any]:
    view, pairs = _pairs(parts)
    by_key = {pair.key: pair for pair in pairs}
    data, there = by_key.get("data"), by_key.get("user_data")
    if data is None or not isinstance(data.value, dict) or not data.value:
        raise MalformedMessage("an image without data; expected a map of channels")
    written: list[Any] = [_head(view, len(pairs) + (there is None))]
    for pair in pairs:
        if pair is data:
            written += [
                _wrapped(view, there, verdict),
                view[pair.begin : pair.value_begin],
                cbor2.dumps(dict.fromkeys(data.value, _NO_PIXELS)),
            ]
        elif pair is not there:
            written.append(view[pair.begin : pair.end])
    return (b"".join(written),)


def _pairs(parts: Sequence[Any]) -> tuple[memoryview, list[Pair]]:
    if len(parts) != 1:
        raise MalformedMessage(f"a Stream V2 message of {len(parts)} parts; expected 1")
    view = memoryview(parts[0]).cast("B")
    pairs = read_pairs(view)
    keys = [pair.key for pair in pairs]
    if not pairs or any(keys.count(name) > 1 for name in ("data", "user_data")):
        raise MalformedMessage("a map that is empty or names a key twice")
    return view, pairs


def _head(view: memoryview, count: int) -> bytes:
    """The beginning of a map of ``count`` pairs, always of definite length."""
    magic = MAGIC if view[:3] == MAGIC else b""
    if count < 24:
        return magic + bytes((0xA0 + count,))
    size = 1 if count < 1 << 8 else 2 if count < 1 << 16 else 4
    return magic + bytes((0xB8 + size.bit_length() - 1,)) + count.to_bytes(size, "big")


def _wrapped(view: memoryview, there: Pair | None, ours: Mapping[str, Any]) -> bytes:
    """The pair user_data, with what was there byte for byte."""
    mine = cbor2.dumps("triage") + cbor2.dumps(dict(ours))
    if there is None:
        return cbor2.dumps("user_data") + b"\xa1" + mine
    original = view[there.value_begin : there.end]
    key = cbor2.dumps("user_data")
    pair = b"".join([key, b"\xa2", key, original, mine])
    # A value that is as deep as may be read would be too deep once it is wrapped.
    read_pairs(memoryview(b"\xa1" + pair))
    return pair


# -- JSON --------------------------------------------------------------------------------------


def _json(part: Any) -> dict[str, Any]:
    document = _parsed(part)
    if not isinstance(document, dict):
        raise MalformedMessage(f"JSON {type(document).__name__}; expected an object")
    return document


def _parsed(part: Any) -> Any:
    view = memoryview(part)
    if view.nbytes > _MAX_JSON_BYTES:
        raise MalformedMessage(
            f"a JSON part of {view.nbytes} bytes; expected at most {_MAX_JSON_BYTES}"
        )
    try:
        # Not from bytes: that would take UTF-16 and byte order marks, which nothing goes behind.
        text = str(view, "utf-8")
    except ValueError as err:
        raise MalformedMessage(f"not JSON: {str(err)[:80]}") from err
    return parsed_json(text)


def _is_image1(first: Mapping[str, Any]) -> bool:
    return str(first.get("htype", "")).startswith("dimage-")


def _appendix(there: Sequence[Any], verdict: Mapping[str, Any]) -> bytes:
    """The fifth part; an appendix that is not JSON cannot be wrapped in JSON."""
    mine = b'"triage": ' + json.dumps(verdict).encode() + b"}"
    if not there:
        return b"{" + mine
    _parsed(there[0])
    return b"".join([b'{"user_data": ', memoryview(there[0]), b", ", mine])


def _sls_header(first: Mapping[str, Any], verdict: Mapping[str, Any]) -> bytes:
    """The header with the verdict as text among its texts; it ends as theirs do."""
    texts = first.get("addJsonHeader", {})
    if not isinstance(texts, dict) or "triage" in texts:
        raise MalformedMessage("addJsonHeader is no object, or holds 'triage' already")
    added = {**texts, "triage": json.dumps(verdict)}
    return json.dumps({**first, "addJsonHeader": added}).encode() + b"\n"
