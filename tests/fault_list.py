"""The catalogue of faults: what goes wrong, how it is brought about, what must come of it.

One description for the tests and for ``benchmarks/fault_catalogue.py``, which writes the table.
Every fault is brought about on a :class:`fault_rig.Rig` in enforce mode; a healthy series follows.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import zmq
from fault_rig import (
    BLANK,
    HIT,
    SHAPE,
    Account,
    Journey,
    Rig,
    limited_files,
    picture,
    resident_bytes,
    sim_frame,
    swapped,
    wait_for,
)
from zmq.utils.monitor import recv_monitor_message

from simulators.detectors.faults import FAULTS
from triage.errors import DeviceError
from triage.health import Trouble
from triage.pipeline import Outputs
from triage.records import Scores, Views

__all__ = ["CATALOGUE", "Fault", "run_fault"]

IMAGES = 20
FAULTY = 5
"""The image that is changed: one without a spot, so that dropping it unscored would be seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One entry of the catalogue.

    Attributes:
        group: what is at fault: wire, series, network, compute, disk, process.
        act: brings it about; may give the account itself.
        options: of the rig.
        next_series: what must become of the series after it.
        reasons: decisions other than by score that must come of it; None: any number.
        missing: gaps in the image numbers that must be counted.
        gone: messages may be lost with the connection of a writer.
        undecided: images may be left undecided.
        own_process: memory is looked at, so that nothing else may be in the process.
        slow: more than a few seconds.
    """

    name: str
    what: str
    group: str
    act: Callable[[Rig], Account | None]
    options: Mapping[str, Any] = field(default_factory=dict)
    next_series: str = "scored"
    reasons: Mapping[str, int] | None = None
    missing: int = 0
    gone: bool = False
    undecided: bool = False
    own_process: bool = False
    slow: bool = False

    def shortcomings(self, account: Account) -> list[str]:
        """What an account shows that must not be; nothing when all is well."""
        found = []
        for name, value, must in (
            ("dropped without a scored veto", account.dropped_without_veto, 0),
            ("ids balanced", account.balanced, True),
            ("undecided", account.undecided > 0, self.undecided),
            ("missing", account.missing, self.missing),
            ("next series", account.next_series, self.next_series),
        ):
            if value != must:
                found.append(f"{name}: {value}, expected {must}")
        if self.reasons is not None and account.reasons != self.reasons:
            found.append(f"reasons: {account.reasons}, expected {dict(self.reasons)}")
        if account.gone_with_writer and not self.gone:
            found.append(f"gone: {account.gone_with_writer}")
        return found


CATALOGUE: dict[str, Fault] = {}


def run_fault(fault: Fault, folder: Path, *, real_time: bool = False) -> Account:
    """Bring a fault about, let a healthy series follow, and count."""
    if fault.own_process and __name__ != "__main__":
        return _in_own_process(fault, folder, real_time=real_time)
    with Rig(folder, real_time=real_time, **fault.options) as rig:
        account = fault.act(rig)
        if account is None:
            account = rig.account(gone_with_writer=fault.gone)
    return replace(account, fault=fault.name, what=fault.what)


def _in_own_process(fault: Fault, folder: Path, *, real_time: bool) -> Account:
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(
            [sys.executable, __file__, fault.name, str(folder), "real" if real_time else "stepped"],
            cwd=root,
            env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
            capture_output=True,
            text=True,
            timeout=600 if real_time else 110,
            check=False,
        )
    except subprocess.TimeoutExpired as err:
        raise TimeoutError(f"its process was not done in {err.timeout:.0f} s") from err
    if done.returncode:
        raise TimeoutError(done.stderr.strip().splitlines()[-1])
    return Account(**json.loads(done.stdout.splitlines()[-1]))


def _enter(fault: Fault) -> None:
    if fault.name in CATALOGUE:
        raise ValueError(f"two faults are called {fault.name!r}")
    CATALOGUE[fault.name] = fault


def _fault(
    group: str, name: str, **fields: Any
) -> Callable[[Callable[[Rig], Account | None]], Callable[[Rig], Account | None]]:
    """Enter a function in the catalogue; its docstring says what happens."""

    def enter(act: Callable[[Rig], Account | None]) -> Callable[[Rig], Account | None]:
        what = " ".join((act.__doc__ or "").split())
        _enter(Fault(name=name, what=what, group=group, act=act, **fields))
        return act

    return enter


# -- wire: one message is wrong ---------------------------------------------------------------

_OF_THE_TWIN = {
    "truncated": "malformed",
    "wrong_tag": "malformed",
    "wrong_dtype": "malformed",
    "duplicate": "",
    "gap": "",
    "garbage": "",
    "big_json": "",
    "image_before_start": "geometry_changed",
    "missing_end": "",
    "changed_size": "geometry_changed",
}
"""Faults that the simulated detector sends on request, and why the image goes on unscored."""


def _from_twin(protocol: str, name: str, reason: str) -> None:
    first = name == "image_before_start"

    def act(rig: Rig) -> None:
        # Where the first image is the faulty one, that one has no spot.
        frames = (BLANK, HIT) if first else (HIT, BLANK)
        sound = {0} if first else {FAULTY} if reason else set()
        info = rig.info(IMAGES)
        rig.send(
            rig.messages(
                info,
                frames=frames,
                faults={0 if first else FAULTY: name},
                may_drop=lambda i: i not in sound and i % 2 == (0 if first else 1),
            )
        )

    doc = " ".join((FAULTS[name].__doc__ or _SAID[name]).split())
    if name == "wrong_tag" and protocol == "stream1":
        reason = "unknown_encoding"
    _enter(
        Fault(
            name=f"{protocol}: {name}",
            what=doc,
            group="wire",
            act=act,
            options={"protocol": protocol},
            reasons={reason: 1} if reason else {},
            missing=int(name == "gap"),
        )
    )


_SAID = {
    "duplicate": "An image comes twice.",
    "gap": "An image never comes.",
    "image_before_start": "The first image comes before the start.",
    "missing_end": "The series has no end.",
    "changed_size": "One image has another size.",
}

for _protocol, (_name, _reason) in itertools.product(
    ("stream2", "stream1", "jungfraujoch"), _OF_THE_TWIN.items()
):
    _from_twin(_protocol, _name, _reason)


Parts = tuple[bytes, ...]
_MAGIC = b"\xd9\xd9\xf7"


def _fields(parts: Parts) -> dict[str, Any]:
    """The map of a Stream V2 message, as another library reads it."""
    return dict(cbor2.loads(parts[0].removeprefix(_MAGIC)))


def _v2(fields: Mapping[str, Any]) -> list[Parts]:
    return [(_MAGIC + cbor2.dumps(dict(fields)),)]


def _with(**changes: Any) -> Callable[[Parts], list[Parts]]:
    """Fields set, or left out where None."""

    def edit(parts: Parts) -> list[Parts]:
        fields = {**_fields(parts), **changes}
        return _v2({k: v for k, v in fields.items() if k not in changes or v is not None})

    return edit


def _array(
    content: Any, shape: Sequence[Any] = SHAPE, tag: int = 69, outer: int = 40
) -> dict[str, Any]:
    return {"threshold_1": cbor2.CBORTag(outer, [list(shape), cbor2.CBORTag(tag, content)])}


def _compressed(algorithm: Any, modifier: Any, payload: bytes) -> cbor2.CBORTag:
    return cbor2.CBORTag(56500, [algorithm, modifier, payload])


_RAW = picture(spot=False).tobytes()
_LZ4 = sim_frame(picture(spot=False), "lz4").payload
_BSLZ4 = BLANK.payload
_BYTES = len(_RAW)


def _type_last(parts: Parts) -> list[Parts]:
    fields = _fields(parts)
    kind = fields.pop("type")
    return _v2({**fields, "type": kind})


def _indefinite(parts: Parts) -> list[Parts]:
    pairs = b"".join(cbor2.dumps(k) + cbor2.dumps(v) for k, v in _fields(parts).items())
    return [(_MAGIC + b"\xbf" + pairs + b"\xff",)]


def _cut(share: float) -> Callable[[Parts], list[Parts]]:
    return lambda parts: [(parts[0][: round(share * len(parts[0]))],)]


def _before(*parts: bytes) -> Callable[[Parts], list[Parts]]:
    return lambda image: [tuple(parts), image]


_ODD_TAG = cbor2.CBORTag(999, 1)
_HUGE = {"note": "x" * 4_000_000, "list": list(range(100_000))}
_NESTED = _MAGIC + b"\xa1\x64type" + b"\x81" * 100_000 + b"\x00"

_V2_IMAGES: dict[str, tuple[str, str, Callable[[Parts], list[Parts]]]] = {
    # name: what, reason why the image goes on unscored ("": it is scored), what is sent instead
    "no magic": ("The first three bytes are left out.", "", lambda p: [(p[0][3:],)]),
    "type last": ("The type is the last key.", "", _type_last),
    "indefinite map": ("The map does not say how long it is.", "", _indefinite),
    "unknown keys": (
        "Keys that nobody knows.",
        "",
        _with(x=[1, {"y": None}], z=cbor2.CBORTag(9, 1)),
    ),
    "null fields": ("Known fields hold null.", "", _with(real_time=cbor2.undefined, start_time=0)),
    "huge user_data": ("4 MB of user_data.", "", _with(user_data=_HUGE)),
    "raw": ("Pixels that are not compressed.", "", _with(data=_array(_RAW))),
    "lz4": ("LZ4 with HDF5 framing.", "", _with(data=_array(_compressed("lz4", 0, _LZ4)))),
    "lz4 unframed": (
        "LZ4 without its 12 bytes of header.",
        "malformed",
        _with(data=_array(_compressed("lz4", 0, _LZ4[12:]))),
    ),
    "trpx": (
        "A compression that we do not read.",
        "unknown_encoding",
        _with(data=_array(_compressed("trpx", 2, _BSLZ4))),
    ),
    "unknown array": (
        "A typed array that does not exist.",
        "unknown_encoding",
        _with(data=_array(_compressed("bslz4", 2, _BSLZ4), tag=76)),
    ),
    "wrong element size": (
        "bslz4 of 4-byte elements in an array of 2-byte ones.",
        "malformed",
        _with(data=_array(_compressed("bslz4", 4, _BSLZ4))),
    ),
    "block size zero": (
        "The header says blocks of 0 bytes, which means 8192.",
        "",
        _with(data=_array(_compressed("bslz4", 2, _BSLZ4[:8] + bytes(4) + _BSLZ4[12:]))),
    ),
    "claims 10 GB": (
        "The header says 10 GB of pixels.",
        "malformed",
        _with(data=_array(_compressed("bslz4", 2, struct.pack(">Q", 10**10) + _BSLZ4[8:]))),
    ),
    "block too long": (
        "A block is longer than the message.",
        "malformed",
        _with(
            data=_array(
                _compressed("bslz4", 2, _BSLZ4[:12] + struct.pack(">I", 2**31 - 1) + _BSLZ4[16:])
            )
        ),
    ),
    "empty payload": (
        "No bytes where pixels should be.",
        "malformed",
        _with(data=_array(_compressed("bslz4", 2, b""))),
    ),
    "dimensions of 0": (
        "An array of 0 x 0.",
        "malformed",
        _with(data=_array(_compressed("bslz4", 2, _BSLZ4), shape=(0, 0))),
    ),
    "huge dimensions": (
        "An array of 2^30 x 2^30.",
        "geometry_changed",
        _with(data=_array(_compressed("bslz4", 2, _BSLZ4), shape=(2**30, 2**30))),
    ),
    "dimensions in text": (
        "Dimensions that are no numbers.",
        "malformed",
        _with(data=_array(_RAW, shape=("a", "b"))),
    ),
    "columns first": (
        "Dimensions as [columns, rows].",
        "geometry_changed",
        _with(data=_array(_RAW, shape=SHAPE[::-1])),
    ),
    "no data": ("An image without data.", "malformed", _with(data=None)),
    "data in text": ("Data that is a text.", "malformed", _with(data="none")),
    "no channels": ("Data without a channel.", "malformed", _with(data={})),
    "no image_id": ("An image without its number.", "malformed", _with(image_id=None)),
    "negative image_id": ("An image numbered -3.", "malformed", _with(image_id=-3)),
    "image_id in text": ("An image numbered 'five'.", "malformed", _with(image_id="five")),
    "image_id beyond 2^63": ("An image numbered 2^64 - 1.", "malformed", _with(image_id=2**64 - 1)),
    "unknown series": (
        "An image of a series that was never started.",
        "geometry_changed",
        _with(series_id=4711),
    ),
    "no series_id": (
        "An image without its series.",
        "geometry_changed",
        _with(series_id=None, series_unique_id=None),
    ),
    "cut after a tenth": ("The message ends after a tenth.", "malformed", _cut(0.1)),
    "last byte missing": (
        "The message ends one byte early.",
        "malformed",
        lambda p: [(p[0][:-1],)],
    ),
    "empty message": ("A message of no bytes, before the image.", "", _before(b"")),
    "unknown type": (
        "A message of an unknown type, before the image.",
        "",
        _before(cbor2.dumps({"type": "calibration", "data": bytes(100)})),
    ),
    "no type": ("A map without a type, before the image.", "", _before(cbor2.dumps({"a": 1}))),
    "nested": ("Arrays 100,000 deep, before the image.", "", _before(_NESTED)),
    "no map": ("CBOR that is no map, before the image.", "", _before(cbor2.dumps([1, 2, 3]))),
}


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _v1_part(number: int, **changes: Any) -> Callable[[Parts], list[Parts]]:
    def edit(parts: Parts) -> list[Parts]:
        fields = {**json.loads(parts[number]), **changes}
        kept = {k: v for k, v in fields.items() if v is not None}
        return [(*parts[:number], _json(kept), *parts[number + 1 :])]

    return edit


def _v1_blob(blob: Callable[[bytes], bytes], **changes: Any) -> Callable[[Parts], list[Parts]]:
    def edit(parts: Parts) -> list[Parts]:
        (changed,) = _v1_part(1, **changes)(parts)
        return [(*changed[:2], blob(parts[2]), *changed[3:])]

    return edit


_V1_IMAGES: dict[str, tuple[str, str, Callable[[Parts], list[Parts]]]] = {
    "wrong hash": ("The hash is of other bytes.", "", _v1_part(0, hash="0" * 32)),
    "empty hash": ("The hash is empty.", "", _v1_part(0, hash="")),
    "zeroed header": (
        "The blob's header is all zeros.",
        "",
        _v1_blob(lambda b: bytes(12) + b[12:]),
    ),
    "no header": ("The blob has no header.", "", _v1_blob(lambda b: b[12:])),
    "raw": ("Pixels that are not compressed.", "", _v1_blob(lambda b: _RAW, encoding="<")),
    "lz4": ("One bare LZ4 block.", "", _v1_blob(lambda b: _LZ4[16:], encoding="lz4<")),
    "appendix": ("An appendix of 4 MB.", "", lambda p: [(*p, b"x" * 4_000_000)]),
    "no times": ("The last part is missing.", "", lambda p: [p[:3]]),
    "one part": ("Only the first part comes.", "malformed", lambda p: [p[:1]]),
    "two parts": ("The blob is missing.", "malformed", lambda p: [p[:2]]),
    "blob cut": ("Half a blob is missing.", "malformed", _v1_blob(lambda b: b[: len(b) // 2])),
    "empty blob": ("A blob of no bytes.", "malformed", _v1_blob(lambda b: b"")),
    "unknown encoding": (
        "An encoding nobody knows.",
        "unknown_encoding",
        _v1_part(1, encoding="zz<"),
    ),
    "wrong width": ("bs32 of 16-bit pixels.", "malformed", _v1_part(1, encoding="bs32-lz4<")),
    "unknown type": ("Pixels of type complex.", "unknown_encoding", _v1_part(1, type="complex")),
    "no shape": ("The shape is missing.", "malformed", _v1_part(1, shape=None)),
    "rows first": ("Shape as [rows, columns].", "geometry_changed", _v1_part(1, shape=list(SHAPE))),
    "broken JSON": (
        "The second part is no JSON.",
        "malformed",
        lambda p: [(p[0], b"{" + p[1], *p[2:])],
    ),
    "no frame": ("An image without its number.", "malformed", _v1_part(0, frame=None)),
    "unknown series": (
        "An image of a series that was never started.",
        "geometry_changed",
        _v1_part(0, series=4711),
    ),
    "unknown htype": (
        "A message of an unknown type, before the image.",
        "",
        _before(_json({"htype": "deseries_end-1.0", "series": 1})),
    ),
    "no htype": ("JSON without a type, before the image.", "", _before(_json({"a": 1}))),
    "nested": ("JSON 100,000 deep, before the image.", "", _before(b"{" + b"[" * 100_000)),
}


def _changed_image(protocol: str, name: str, what: str, reason: str, edit: Any) -> None:
    def act(rig: Rig) -> None:
        info = rig.info(IMAGES)
        for message in rig.messages(info):
            if message.image_id != FAULTY:
                rig.send([message])
                continue
            *before, image = edit(message.parts)
            rig.send(Journey(kind="junk", parts=parts) for parts in before)
            rig.send([replace(message, parts=image, may_drop=not reason)])

    # A number that cannot be read leaves a gap where it was.
    lost_id = any(word in name for word in ("image_id", "no frame", "series"))
    _enter(
        Fault(
            name=f"{protocol}: {name}",
            what=what,
            group="wire",
            act=act,
            options={"protocol": protocol},
            reasons={reason: 1} if reason else {},
            missing=int(lost_id),
        )
    )


for _name, (_what, _reason, _edit) in _V2_IMAGES.items():
    _changed_image("stream2", _name, _what, _reason, _edit)
for _name, (_what, _reason, _edit) in _V1_IMAGES.items():
    _changed_image("stream1", _name, _what, _reason, _edit)


# -- series: the messages are sound, their order is not ----------------------------------------


def _for_both(name: str, **fields: Any) -> Callable[[Callable[[Rig], None]], Callable[[Rig], None]]:
    """Enter a fault of a series for both protocols."""

    def enter(act: Callable[[Rig], None]) -> Callable[[Rig], None]:
        for protocol in ("stream2", "stream1"):
            _fault("series", f"{protocol}: {name}", options={"protocol": protocol}, **fields)(act)
        return act

    return enter


@_for_both("detector dies", reasons={})
def _detector_dies(rig: Rig) -> None:
    """The detector stops in mid-series, without an end; a new series follows."""
    rig.send(rig.messages(rig.info(IMAGES))[: IMAGES // 2])


@_for_both("series repeated", reasons={})
def _series_repeated(rig: Rig) -> None:
    """The detector restarts in mid-series and counts from the same series_id again; one image of
    the second series is missing."""
    info = rig.info(IMAGES)
    messages = rig.messages(info)
    rig.send(messages[:13])
    rig.send(replace(m) for m in messages if m.image_id != 7)


CATALOGUE["stream2: series repeated"] = replace(CATALOGUE["stream2: series repeated"], missing=1)
CATALOGUE["stream1: series repeated"] = replace(CATALOGUE["stream1: series repeated"], missing=1)


@_for_both("series complete, then repeated", reasons={})
def _series_reused(rig: Rig) -> None:
    """After its end, a series_id is used for another series."""
    info = rig.info(IMAGES)
    rig.send(rig.messages(info))
    rig.send(rig.messages(info))


@_for_both("two series interleaved", reasons={})
def _interleaved(rig: Rig) -> None:
    """Images of two series come in turns, as from two detectors on one socket."""
    both = (rig.messages(rig.info(IMAGES)), rig.messages(rig.info(IMAGES)))
    rig.send(message for pair in zip(*both, strict=True) for message in pair)


@_for_both("end twice", reasons={})
def _end_twice(rig: Rig) -> None:
    """The end comes twice, as at completion and at disarm."""
    messages = rig.messages(rig.info(IMAGES))
    rig.send([*messages, replace(messages[-1])])


@_for_both("end without images", reasons={})
def _end_without_images(rig: Rig) -> None:
    """A series is armed and disarmed, and has no image; another has not even a start."""
    rig.send(rig.messages(rig.info(0)))
    rig.send(rig.messages(rig.info(0))[-1:])


@_for_both("start twice", reasons={})
def _start_twice(rig: Rig) -> None:
    """The start comes twice before the first image."""
    start, *rest = rig.messages(rig.info(IMAGES))
    rig.send([start, replace(start), *rest])


@_for_both("start lost", reasons={"geometry_changed": IMAGES})
def _start_lost(rig: Rig) -> None:
    """The start never comes: nobody knows mask or rotation, and nothing is dropped."""
    messages = rig.messages(rig.info(IMAGES), may_drop=lambda image_id: False)
    rig.send(messages[1:])


@_for_both("start malformed", reasons={"geometry_changed": IMAGES})
def _start_malformed(rig: Rig) -> None:
    """The start is cut short: nothing is dropped."""
    start, *rest = rig.messages(rig.info(IMAGES), may_drop=lambda image_id: False)
    last = start.parts[-1]
    rig.send([replace(start, parts=(*start.parts[:-1], last[: len(last) // 2])), *rest])


@_for_both("joined late", reasons={"geometry_changed": IMAGES - 8})
def _joined_late(rig: Rig) -> None:
    """The first that comes is the ninth image: start and eight images went elsewhere."""
    messages = rig.messages(rig.info(IMAGES), may_drop=lambda image_id: False)
    rig.send(messages[9:])


@_for_both("images out of order", reasons={})
def _out_of_order(rig: Rig) -> None:
    """Images come in reverse."""
    start, *images, end = rig.messages(rig.info(IMAGES))
    rig.send([start, *reversed(images), end])


@_for_both("bit depth between series", reasons={})
def _depth_between_series(rig: Rig) -> None:
    """Exposure time changes the bit depth from 16 to 8 to 32 bit between series."""
    for dtype in ("<u2", "u1", "<u4"):
        frames = [sim_frame(picture(dtype, spot=spot)) for spot in (True, False)]
        info = rig.info(IMAGES, dtype=np.dtype(dtype), saturation_value=_saturation(dtype))
        rig.send(rig.messages(info, frames=frames))


@_for_both("bit depth within a series", reasons={})
def _depth_within_series(rig: Rig) -> None:
    """Auto-summation changes the bit depth in mid-series; the start said 16 bit."""
    frames = [
        sim_frame(picture(dtype, spot=spot))
        for dtype in ("<u2", "<u4", "u1")
        for spot in (True, False)
    ]
    rig.send(rig.messages(rig.info(IMAGES - IMAGES % 6), frames=frames))


@_for_both("overloads of 8 bit", reasons={})
def _eight_bit_overload(rig: Rig) -> None:
    """In 8 bit a count above 255 is stored as 255, which is no count: a hit whose peak rolled
    over is kept by its flanks, and a blank with dead pixels at 255 is blank."""
    hit, blank = picture("u1", spot=True), picture("u1", spot=False)
    y, x = np.unravel_index(int(hit.argmax()), SHAPE)
    hit[y - 1 : y + 2, x - 1 : x + 2] = 60
    hit[y, x] = 255
    blank[::9, ::7] = 255
    info = rig.info(IMAGES, dtype=np.dtype("u1"), saturation_value=_saturation("u1"))
    rig.send(rig.messages(info, frames=[sim_frame(hit), sim_frame(blank)]))


@_for_both("image number passes 255", reasons={})
def _number_passes_a_byte(rig: Rig) -> None:
    """300 images: the number grows from one byte to two in mid-series."""
    rig.send(rig.messages(rig.info(300)))


@_for_both("image size changes", reasons={"geometry_changed": 10})
def _size_changes(rig: Rig) -> None:
    """The second half of a series has another size than its start said."""
    small = [sim_frame(picture(shape=(64, 64), spot=spot)) for spot in (True, False)]
    info = rig.info(IMAGES)
    whole = rig.messages(info)
    other = rig.messages(info, frames=small, may_drop=lambda image_id: False)
    rig.send([*whole[:11], *other[11:]])


@_for_both("rotation", reasons={"rotation": IMAGES})
def _rotation(rig: Rig) -> None:
    """A rotation sweep: nothing is dropped, whatever the scores say."""
    info = rig.info(IMAGES, omega_increment_deg=0.1)
    rig.send(rig.messages(info, may_drop=lambda image_id: False))


def _saturation(dtype: str) -> int:
    return int(np.iinfo(np.dtype(dtype)).max) - 2


@_fault(
    "series",
    "jungfraujoch: two sockets",
    options={"protocol": "jungfraujoch", "lanes": 2},
    reasons={},
)
def _two_sockets(rig: Rig) -> None:
    """Images of a series come by turns of three over two sockets, start and end over both."""
    rig.series(IMAGES)


@_fault(
    "series",
    "jungfraujoch: one of two sockets falls silent",
    options={"protocol": "jungfraujoch", "lanes": 2},
    reasons={},
    missing=9,
)
def _silent_socket(rig: Rig) -> None:
    """One of two sockets sends nothing any more after the start, its end neither."""
    messages = rig.messages(rig.info(IMAGES))
    rig.send(m for m in messages if m.lane == 0 or m.kind == "start")


_PORTS = {"protocol": "slsdetector", "lanes": 2}


def _of_receivers(
    name: str, what: str, *, missing: int = 0, malformed: int = 0, **faults: Any
) -> None:
    def act(rig: Rig) -> None:
        rig.send(rig.acquisition(IMAGES, **faults))

    _enter(
        Fault(
            name=f"slsdetector: {name}",
            what=what,
            group="series",
            act=act,
            options=_PORTS,
            reasons={"malformed": malformed} if malformed else {},
            missing=missing,
        )
    )


_of_receivers("two ports", "Each frame is two messages, and is forwarded or dropped whole.")
_of_receivers(
    "a part is lost",
    "A port's part of a blank frame never comes.",
    lost=frozenset({(FAULTY, 1)}),
    malformed=1,
)
_of_receivers(
    "a frame is lost",
    "No port sends its part of a frame.",
    lost=frozenset({(FAULTY, 0), (FAULTY, 1)}),
    missing=1,
)
_of_receivers(
    "a part is incomplete",
    "Packets of a part were lost: it says so, and holds ones.",
    incomplete=frozenset({(FAULTY, 1)}),
)
_of_receivers("a port lags", "One port is three frames behind the other.", skew=3)
_of_receivers("an end is missing", "One port never says that it is over.", endless=frozenset({1}))


# -- network: sockets -------------------------------------------------------------------------

BIG = (700, 900)
"""A frame of 1.26 MB: a few of them fill what sockets hold."""

_SMALL_BUFFERS = {"settings": {"pipeline.queue_bytes": 256 << 20}}
_SMALL_BUDGET = {"settings": {"pipeline.queue_bytes": 32 << 20, "source.message_bytes": 1 << 20}}


@_fault("network", "another reader steals", missing=7)
def _another_reader(rig: Rig) -> None:
    """A second PULL connects to the detector in mid-series and takes every other message."""
    messages = rig.messages(rig.info(30))
    rig.send(messages[:5])
    rig.await_received()
    monitor = rig.detector.get_monitor_socket(
        zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
    )
    thief = rig.context.socket(zmq.PULL)
    thief.connect(rig.detector_endpoint)
    _await_event(monitor)
    at, stolen = 5, 0
    while stolen < 7:
        before = rig.received()
        rig.send([messages[at]])
        wait_for("either reader", lambda: thief.poll(2) != 0 or rig.received() > before)  # noqa: B023
        if thief.poll(0):
            thief.recv_multipart()
            rig.sent[-1] = replace(rig.sent[-1], stolen=True)
            stolen += 1
        at += 1
    thief.close(linger=0)
    _await_event(monitor)
    rig.detector.disable_monitor()
    monitor.close()
    rig.send(messages[at:])


def _await_event(monitor: zmq.Socket[Any]) -> None:
    if not monitor.poll(30_000):
        raise TimeoutError("no event of the detector's socket within 30 s")
    recv_monitor_message(monitor)


def _sent_too_soon(rig: Rig) -> None:
    """Nine messages of a series, before anybody listens."""
    rig.early = rig.messages(rig.info(IMAGES), may_drop=lambda image_id: False)
    for message in rig.early[:9]:
        if rig.detector.type == zmq.XPUB:
            rig.send([replace(message, stolen=True)])
        elif rig.try_send(message, 0.02):
            raise TimeoutError("a PUSH socket took a message that nobody reads")


@_fault(
    "network",
    "slow joiner, PUSH",
    options={"before_joining": _sent_too_soon},
    reasons={},
)
def _slow_joiner(rig: Rig) -> None:
    """The detector sends before triage is there: a PUSH socket waits, and nothing is lost."""
    rig.send(replace(m, may_drop=m.image_id % 2 == 1) for m in rig.early)


@_fault(
    "network",
    "slow joiner, PUB",
    options={
        "before_joining": _sent_too_soon,
        "settings": {"source.socket": "sub"},
    },
    reasons={"geometry_changed": IMAGES - 8},
)
def _slow_joiner_sub(rig: Rig) -> None:
    """The detector publishes before triage has subscribed: start and eight images are lost
    before they reach anybody, and the rest of the series is kept."""
    rig.send(rig.early[9:])


@_fault("network", "writer stalls 30 s", reasons={}, options=_SMALL_BUFFERS)
def _writer_stalls(rig: Rig) -> None:
    """The writer takes nothing for 30 seconds and stays connected; then it goes on."""
    _stalled(rig, 30.0)
    rig.writer.go_on()


def _is_stalled(rig: Rig) -> bool:
    return Trouble.WRITER_STALLED in rig.pipeline.snapshot().troubles


def _stalled(rig: Rig, seconds: float) -> None:
    """More than the sockets hold is on its way to a writer that takes nothing."""
    frames = [sim_frame(picture(shape=BIG, spot=spot), "raw") for spot in (True, False)]
    rig.send(rig.messages(rig.info(IMAGES, shape=BIG), frames=frames)[:5])
    rig.await_released()
    rig.writer.stall()
    messages = rig.messages(rig.info(60, shape=BIG), frames=frames)
    rig.send(messages[:-1])
    wait_for("the stall to be noticed", lambda: _is_stalled(rig))
    rig.await_received()
    rig.pass_time(seconds)
    rig.send(messages[-1:])


@_fault("network", "writer stalls beyond the byte budget", options=_SMALL_BUDGET)
def _writer_stalls_long(rig: Rig) -> None:
    """The writer stalls until the byte budget is full: the detector is held back, and what it
    could not send it still has."""
    frames = [sim_frame(picture(shape=BIG, spot=spot), "raw") for spot in (True, False)]
    rig.writer.stall()
    messages = rig.messages(rig.info(200, shape=BIG), frames=frames)
    held_back = len(messages)
    for at, message in enumerate(messages):
        if not rig.try_send(message, 0.5):
            held_back = at
            break
    if held_back == len(messages):
        raise TimeoutError("the detector was never held back")
    rig.pass_time(30.0)
    rig.writer.go_on()
    rig.send(messages[held_back:])


@_fault("network", "writer dies and comes back", reasons={}, gone=True, options=_SMALL_BUFFERS)
def _writer_dies(rig: Rig) -> None:
    """The writer's process ends and another takes its address. What ZeroMQ had in hand for the
    first is lost with the connection; what triage had is forwarded to the second."""
    frames = [sim_frame(picture(shape=BIG, spot=spot), "raw") for spot in (True, False)]
    messages = rig.messages(rig.info(60, shape=BIG), frames=frames)
    rig.send(messages[:20])
    rig.await_released()
    rig.writer.die()
    rig.send(messages[20:])
    wait_for("the stall to be noticed", lambda: _is_stalled(rig))
    rig.pass_time(5.0)
    rig.writer.come()


@_fault(
    "network",
    "decision listener stalls",
    reasons={},
    options={"hold": {"triage.sinks.publisher._SEND_HWM": 100}, "publish_over": "ipc"},
)
def _listener_stalls(rig: Rig) -> None:
    """A listener subscribes to the decisions and takes none; its queues fill and overflow."""
    listener = rig.context.socket(zmq.SUB)
    listener.setsockopt(zmq.RCVHWM, 1)
    listener.setsockopt(zmq.SUBSCRIBE, b"decision/")
    listener.connect(rig.outputs.publisher.endpoint)
    frames = [sim_frame(picture(shape=(16, 16), spot=spot)) for spot in (True, False)]
    wait_for("the listener to be heard of", lambda: _heard(rig, listener))
    rig.send(rig.messages(rig.info(1500, shape=(16, 16)), frames=frames))
    rig.await_released()
    taken = 0
    while listener.poll(100):
        listener.recv_multipart()
        taken += 1
    listener.close(linger=0)
    if taken >= 1500:
        raise TimeoutError("the listener's queues never filled")


def _heard(rig: Rig, listener: zmq.Socket[Any]) -> bool:
    """One more frame, until its decision reaches the listener."""
    rig.send(rig.messages(rig.info(1)))
    return bool(listener.poll(50))


# -- compute: what scores ----------------------------------------------------------------------


def _while_broken(rig: Rig, before: Callable[[Views], list[Scores] | None]) -> None:
    """One series during which the scorer does something else."""
    rig.scorer.before = before
    rig.series(IMAGES)
    rig.await_released()
    rig.scorer.before = lambda views: None


def _raising(error: BaseException) -> Callable[[Views], list[Scores] | None]:
    def before(views: Views) -> list[Scores] | None:
        raise error

    return before


@_fault("compute", "scorer raises", reasons={"scorer_error": IMAGES})
def _scorer_raises(rig: Rig) -> None:
    """The network fails on every frame of a series."""
    _while_broken(rig, _raising(RuntimeError("no such kernel")))


@_fault("compute", "out of memory", reasons={"scorer_error": IMAGES})
def _out_of_memory(rig: Rig) -> None:
    """The network finds no memory, for a whole series."""
    _while_broken(rig, _raising(MemoryError()))


@_fault("compute", "scorer returns NaN", reasons={"scorer_error": IMAGES})
def _scorer_nan(rig: Rig) -> None:
    """Every probability is NaN."""
    _while_broken(rig, lambda views: [Scores(p_blank=math.nan)] * len(views.errors))


@_fault("compute", "scorer returns infinity", reasons={"scorer_error": IMAGES})
def _scorer_infinite(rig: Rig) -> None:
    """Every probability is infinite, which is above any threshold."""
    _while_broken(rig, lambda views: [Scores(p_blank=math.inf)] * len(views.errors))


@_fault("compute", "scorer returns too few", reasons={"scorer_error": IMAGES})
def _scorer_too_few(rig: Rig) -> None:
    """One score less than there are frames."""
    _while_broken(rig, lambda views: [Scores(p_blank=1.0)] * (len(views.errors) - 1))


@_fault("compute", "scorer returns too many", reasons={"scorer_error": IMAGES})
def _scorer_too_many(rig: Rig) -> None:
    """One score more than there are frames."""
    _while_broken(rig, lambda views: [Scores(p_blank=1.0)] * (len(views.errors) + 1))


@_fault("compute", "scorer hangs", reasons={"late": IMAGES})
def _scorer_hangs(rig: Rig) -> None:
    """Both workers hang in the network, for longer than the deadline; then they come back."""
    let_go = threading.Event()
    _while_hung(rig, lambda views: let_go.wait(60) and None, let_go)


def _while_hung(rig: Rig, hang: Callable[[Views], None], let_go: threading.Event) -> None:
    rig.scorer.before = hang
    rig.series(IMAGES)
    rig.await_received()
    rig.step_clock(DEADLINE_S)
    rig.await_released()
    rig.scorer.before = lambda views: None
    let_go.set()


DEADLINE_S = 601
"""Beyond the deadline of a rig; only its clock goes by so long."""


@_fault("compute", "one worker hangs", reasons={"late": 1})
def _one_worker_hangs(rig: Rig) -> None:
    """One of two workers hangs with one frame; the other one decides the rest in time."""
    hung, let_go = threading.Event(), threading.Event()

    def hang_once(views: Views) -> None:
        if not hung.is_set():
            hung.set()
            let_go.wait(60)

    rig.scorer.before = hang_once
    start, first, *rest = rig.messages(rig.info(IMAGES))
    rig.send([start, first])
    hung.wait(30)
    rig.send(rest)
    rig.await_received()
    wait_for("the other worker", lambda: rig.unjudged() == 1)
    rig.step_clock(DEADLINE_S)
    rig.await_released()
    let_go.set()


@_fault("compute", "scorer is slow", reasons={"late": 5})
def _scorer_slow(rig: Rig) -> None:
    """Each frame takes longer than the deadline."""

    def slow(views: Views) -> None:
        # What went on only grows; a frame may be scored before it is counted as undecided.
        before = rig.pipeline.ledger.totals().forwarded
        rig.step_clock(DEADLINE_S)
        wait_for("frames to go on", lambda: rig.pipeline.ledger.totals().forwarded > before)

    rig.scorer.before = slow
    for message in rig.messages(rig.info(5)):
        rig.send([message])
        rig.await_released()
    rig.scorer.before = lambda views: None


@_fault("compute", "device lost", reasons={"device_lost": IMAGES})
def _device_lost(rig: Rig) -> None:
    """The accelerator fails while frames are prepared, for a whole series."""
    _without_device(rig, rig.backend, "before_prepare")


@_fault("compute", "device lost in the full exit", reasons=None)
def _device_lost_in_full_exit(rig: Rig) -> None:
    """The accelerator fails in the full exit, which frames with spots go through."""
    _without_device(rig, rig.scorer, "before_full")


def _without_device(rig: Rig, who: Any, when: str) -> None:
    def lost() -> None:
        raise DeviceError("the device fell off the bus")

    setattr(who, when, lost)
    rig.series(IMAGES)
    rig.await_released()
    setattr(who, when, lambda: None)
    if not rig.pipeline.ledger.totals().by_reason.get("device_lost"):
        raise TimeoutError("no frame was kept because the device was lost")


@_fault("compute", "a worker thread dies", reasons={"scorer_error": 1})
def _worker_dies(rig: Rig) -> None:
    """One of two worker threads ends in mid-series."""
    died = threading.Event()

    def die_once(views: Views) -> None:
        if not died.is_set():
            died.set()
            raise SystemExit

    rig.scorer.before = die_once
    start, first, *rest = rig.messages(rig.info(IMAGES))
    rig.send([start, first])
    rig.await_released()
    rig.send(rest)


@_fault(
    "compute",
    "all worker threads die",
    reasons={"scorer_error": 2 * IMAGES},
    next_series="unscored",
)
def _workers_die(rig: Rig) -> None:
    """Every worker thread ends: frames go on unscored from then on."""
    rig.scorer.before = _raising(SystemExit())
    rig.series(IMAGES)


@_fault("compute", "overload")
def _overload(rig: Rig) -> None:
    """More frames come than can be scored: the oldest go on unscored before the byte budget is
    full, and the detector is not held back."""
    frames = [sim_frame(picture(shape=BIG, spot=spot), "raw") for spot in (True, False)]
    let_go = threading.Event()
    rig.scorer.before = lambda views: let_go.wait(60) and None
    messages = rig.messages(rig.info(12, shape=BIG), frames=frames)
    for message in messages:
        if not rig.try_send(message, 10.0):
            raise TimeoutError("the detector was held back")
    rig.await_received()
    let_go.set()
    rig.await_released()
    rig.scorer.before = lambda views: None
    if not rig.pipeline.ledger.totals().by_reason.get("overload"):
        raise TimeoutError("no frame went on because of overload")


CATALOGUE["overload"] = replace(CATALOGUE["overload"], options=_SMALL_BUDGET)


@_fault("compute", "the clock jumps ahead", reasons={})
def _clock_ahead(rig: Rig) -> None:
    """The monotonic clock is an hour ahead from one image to the next."""
    _clock_steps(rig, 3600)


@_fault("compute", "the clock jumps back", reasons={})
def _clock_back(rig: Rig) -> None:
    """The monotonic clock is an hour behind from one image to the next."""
    _clock_steps(rig, -3600)


def _clock_steps(rig: Rig, seconds: float) -> None:
    messages = rig.messages(rig.info(IMAGES))
    rig.send(messages[:11])
    rig.await_released()
    rig.step_clock(seconds)
    rig.send(messages[11:])
    rig.await_released()


_TIMES = itertools.cycle((0.0, 4e9, 1.8e9))


@_fault(
    "compute",
    "the time of day jumps",
    reasons={},
    options={"hold": {"time.time": lambda: next(_TIMES)}},
)
def _time_of_day(rig: Rig) -> None:
    """The time of day jumps by decades at every look, as where no time server answers."""
    rig.series(IMAGES)


# -- disk --------------------------------------------------------------------------------------


@_fault("disk", "disk full: journal", reasons={})
def _journal_full(rig: Rig) -> None:
    """In mid-series the disk takes no more of the journal: nothing is dropped until it does."""
    messages = rig.messages(rig.info(IMAGES))
    rig.send(messages[:11])
    rig.await_released()
    before = rig.pipeline.ledger.totals().dropped
    # Room for one line and a half: the first write of two is torn.
    with limited_files((rig.folder / "journal.jsonl").stat().st_size + 300):
        rig.send(messages[11:])
        rig.await_released()
    if rig.pipeline.ledger.totals().dropped > before + 2:
        raise TimeoutError("frames were dropped without a journal")


@_fault(
    "disk",
    "disk full: decision table",
    reasons={},
    options={"hold": {"triage.sinks.table._ROWS_PER_TURN": 1}},
)
def _table_full(rig: Rig) -> None:
    """The disk takes no more of the decision table."""
    rig.series(IMAGES)
    rig.await_released()
    with swapped(rig.folder / "decisions.arrows", os.open("/dev/full", os.O_WRONLY)):
        rig.series(IMAGES)
        rig.await_released()
        wait_for("the table to fail", lambda: _has_failed(rig, "decision table"))


@_fault(
    "disk",
    "journal hangs",
    options={
        "change": lambda outputs: _hung(outputs, "journal"),
        "settings": {"pipeline.deadline_ms": 2000},
    },
)
def _journal_hangs(rig: Rig) -> None:
    """A write to the journal does not come back, as on a network file system that is gone:
    nothing is dropped and frames go on; then it comes back, and what it took late is withdrawn."""
    rig.series(IMAGES)
    rig.await_released()
    dropped = rig.pipeline.ledger.totals().dropped
    rig.outputs.journal.let_go.set()
    path = rig.folder / "journal.jsonl"
    wait_for("the journal to answer", lambda: b"withdrawn" in path.read_bytes())
    if dropped:
        raise TimeoutError("frames were dropped without a journal")


@_fault("disk", "decision table hangs", reasons={}, options={"change": lambda o: _hung(o, "table")})
def _table_hangs(rig: Rig) -> None:
    """The decision table takes no row and does not come back."""
    rig.series(IMAGES)
    rig.await_released()
    rig.outputs.table.let_go.set()


@_fault(
    "disk",
    "kept file hangs",
    options={
        "change": lambda o: _hung(o, "kept"),
        "settings": {"output.write_kept": True, "pipeline.queue_bytes": 2 << 20},
    },
)
def _kept_hangs(rig: Rig) -> None:
    """The file of kept frames takes none and does not come back: what does not fit the memory
    that may wait for it is left out of it, and the writer gets all."""
    for _ in range(4):
        rig.series(100)
        rig.await_released()
    if not rig.pipeline.sink_errors:
        raise TimeoutError("everything fitted the memory that may wait")
    rig.outputs.kept.let_go.set()


def _has_failed(rig: Rig, sink: str) -> bool:
    return any(error.startswith(sink) for error in rig.pipeline.sink_errors)


class _Hung:
    """A sink that waits before it does anything."""

    def __init__(self, sink: Any) -> None:
        self._sink = sink
        self.let_go = threading.Event()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._sink, name)

        def after_all(*args: Any) -> Any:
            self.let_go.wait(60)
            return method(*args)

        return after_all


def _hung(outputs: Outputs, name: str) -> Outputs:
    return replace(outputs, **{name: _Hung(getattr(outputs, name))})


# -- process -----------------------------------------------------------------------------------


@_fault(
    "process", "stopped while the writer stalls", reasons={}, options=_SMALL_BUFFERS, next_series=""
)
def _stopped_in_a_stall(rig: Rig) -> Account:
    """SIGTERM while the writer takes nothing: triage drains, and waits until the writer goes on."""
    _in_a_stall(rig)
    rig.stop()
    rig.pass_time(5.0)
    rig.writer.go_on()
    rig.close()
    return rig.counted()


@_fault(
    "process",
    "stopped twice while the writer stalls",
    reasons={},
    options={**_SMALL_BUFFERS, "hold": {"triage.sinks.forwarder._LINGER_MS": 200}},
    next_series="",
    undecided=True,
    gone=True,
)
def _stopped_twice(rig: Rig) -> Account:
    """A second SIGTERM while the writer takes nothing: what it did not get is counted as
    undecided, none of it as dropped."""
    _in_a_stall(rig)
    rig.stop()
    rig.stop()
    rig.close()
    return rig.counted(abandoned=True)


def _in_a_stall(rig: Rig) -> None:
    frames = [sim_frame(picture(shape=BIG, spot=spot), "raw") for spot in (True, False)]
    rig.writer.stall()
    rig.send(rig.messages(rig.info(40, shape=BIG), frames=frames))
    rig.await_received()
    wait_for("the stall to be noticed", lambda: _is_stalled(rig))


SIXTEEN = (4371, 4150)
"""A frame of 18 MB in 8 bit, which noise does not let anything compress."""

BUDGET_BYTES = 1 << 30


@_fault(
    "process",
    "16M frames against 1 GB",
    options={
        "settings": {
            "pipeline.queue_bytes": BUDGET_BYTES,
            "source.message_bytes": SIXTEEN[0] * SIXTEEN[1] + 1000,
            "pipeline.deadline_ms": 5000,
        },
    },
    own_process=True,
    slow=True,
)
def _memory(rig: Rig) -> None:
    """A writer stalls and 1.6 GB of 16M frames come: what triage, with its detector and writer in
    one process, holds of them stays within a byte budget of 1 GB, and the detector is held back."""
    frames = [
        sim_frame(picture("u1", SIXTEEN, spot=spot), "raw") for spot in (True, True, True, False)
    ]
    info = rig.info(90, shape=SIXTEEN, dtype=np.dtype("u1"), saturation_value=_saturation("u1"))
    messages = rig.messages(info, frames=frames, may_drop=lambda image_id: image_id % 4 == 3)
    # Buffers that are made once, whatever comes.
    rig.send(messages[:5])
    rig.await_released()
    before = resident_bytes()
    rig.writer.stall()
    held_back, most = len(messages), before
    for at, message in enumerate(messages[5:], 5):
        if not rig.try_send(message, 3.0):
            held_back = at
            break
        most = max(most, resident_bytes())
    rig.remarks["memory grew by MB"] = round((most - before) / 1e6)
    if held_back == len(messages):
        raise TimeoutError("the detector was never held back")
    if most - before > BUDGET_BYTES:
        raise TimeoutError(f"memory grew by {(most - before) / 1e6:.0f} MB")
    rig.writer.go_on()
    rig.send(messages[held_back:])
    # What waited so long that it goes on unscored does not stand before the series that comes next.
    rig.await_released()


@_fault("process", "addresses are taken", reasons={}, slow=True)
def _addresses_taken(rig: Rig) -> None:
    """A second triage is started on the same detector; its decision address, and that of a third
    its metrics port, is taken: both end with exit code 2 before they take a message away."""
    messages = rig.messages(rig.info(IMAGES))
    rig.send(messages[:11])
    # Triage itself has connected by then.
    rig.await_received()
    monitor = rig.detector.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    taken = socket.create_server(("127.0.0.1", 0))
    wrong = (
        f"publish.endpoint={rig.outputs.publisher.endpoint}",
        f"metrics.port={taken.getsockname()[1]}",
    )
    others = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "triage", "run", "--quiet"),
                *("--endpoint", rig.detector_endpoint, "--set", setting),
                *(("--set", "metrics.port=0") if "metrics" not in setting else ()),
            ],
            cwd=Path(__file__).resolve().parent.parent,
            stderr=subprocess.DEVNULL,
        )
        for setting in wrong
    ]
    try:
        codes = [other.wait(100) for other in others]
    finally:
        for other in others:
            other.kill()
            other.wait()
        taken.close()
    has_connected = monitor.poll(0)
    rig.detector.disable_monitor()
    monitor.close()
    if codes != [2, 2] or has_connected:
        raise TimeoutError(f"exit codes {codes}, connected {bool(has_connected)}")
    rig.send(messages[11:])


if __name__ == "__main__":
    _name, _folder, _clock = sys.argv[1:]
    _account = run_fault(CATALOGUE[_name], Path(_folder), real_time=_clock == "real")
    sys.stdout.write(json.dumps(asdict(_account)) + "\n")
