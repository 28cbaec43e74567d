"""What goes wrong on a wire, by name: pure functions over a series' messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

__all__ = ["FAULTS", "Sent", "with_faults"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One message to send: ``kind`` is start, image, end, control or junk.

    Attributes:
        lane: the socket it goes to, where there are several; start and end go to all.
    """

    kind: str
    parts: tuple[bytes, ...]
    image_id: int = -1
    lane: int = 0


def _truncated(sent: Sent) -> list[Sent]:
    """The longest part ends half way."""
    longest = max(range(len(sent.parts)), key=lambda i: len(sent.parts[i]))
    cut = sent.parts[longest][: len(sent.parts[longest]) // 2]
    return [replace(sent, parts=(*sent.parts[:longest], cut, *sent.parts[longest + 1 :]))]


def _edited(sent: Sent, old: bytes, new: bytes, old1: bytes, new1: bytes) -> list[Sent]:
    if len(sent.parts) == 1:
        return [replace(sent, parts=(sent.parts[0].replace(old, new, 1),))]
    return [replace(sent, parts=tuple(part.replace(old1, new1, 1) for part in sent.parts))]


def _wrong_tag(sent: Sent) -> list[Sent]:
    """Tag 41 where 40 belongs; on V1 an encoding that nobody knows."""
    return _edited(sent, b"\xd8\x28\x82", b"\xd8\x29\x82", b'"encoding": "bs', b'"encoding": "xx')


def _wrong_dtype(sent: Sent) -> list[Sent]:
    """A pixel type that the payload does not have."""
    if b"\xd8\x4e\xd9" in sent.parts[0]:
        return _edited(sent, b"\xd8\x4e\xd9", b"\xd8\x4d\xd9", b"", b"")
    return _edited(sent, b"\xd8\x45\xd9", b"\xd8\x46\xd9", b'"uint16"', b'"uint32"')


def _garbage(sent: Sent) -> list[Sent]:
    """Bytes of no protocol, before the image."""
    return [Sent(kind="junk", parts=(bytes(range(255, 0, -1)),), lane=sent.lane), sent]


def _big_json(sent: Sent) -> list[Sent]:
    """Ten megabytes of JSON, before the image."""
    text = b'{"htype": "dheader-1.0", "x": [' + b"1," * 5_000_000 + b"1]}"
    return [Sent(kind="junk", parts=(text,), lane=sent.lane), sent]


FAULTS: Mapping[str, Callable[[Sent], list[Sent]]] = {
    "truncated": _truncated,
    "wrong_tag": _wrong_tag,
    "wrong_dtype": _wrong_dtype,
    "duplicate": lambda sent: [sent, sent],
    "gap": lambda sent: [],
    "garbage": _garbage,
    "big_json": _big_json,
    "image_before_start": lambda sent: [sent],
    "missing_end": lambda sent: [sent],
    "changed_size": lambda sent: [sent],
}
"""What becomes of the one image a fault is set on; the last three concern the series."""


def with_faults(
    messages: Iterable[Sent],
    faults: Mapping[int, str],
    resized: Callable[[int], Sent] | None = None,
) -> Iterator[Sent]:
    """The messages with faults at the given image_ids.

    Args:
        faults: image_id -> name in :data:`FAULTS`.
        resized: makes an image of another size, for ``changed_size``.

    Raises:
        KeyError: an unknown fault.
    """
    names = set(faults.values())
    held: list[Sent] = []
    for sent in messages:
        if sent.kind == "start" and "image_before_start" in names:
            held.append(sent)
            continue
        if sent.kind == "end" and "missing_end" in names:
            continue
        name = faults.get(sent.image_id, "") if sent.kind == "image" else ""
        if name == "changed_size" and resized is not None:
            yield resized(sent.image_id)
        elif name:
            yield from FAULTS[name](sent)
        else:
            yield sent
        if held and sent.kind == "image":
            yield from held
            held = []
