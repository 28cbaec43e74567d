"""Changes that keep an input almost right: in CBOR, JSON, compressed payloads and captures.

A message whose bytes are changed at random mostly fails at its first byte. These change a message
as a tree, and write it again with whatever lengths are asked for, so that what is wrong lies deep.
Nothing here is the product's: CBOR is read and written by a codec of its own.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Parts = list[bytes]

_MAGIC = b"\xd9\xd9\xf7"
_MOST_DEEP = 200
_MOST_NODES = 20_000

INTEGERS = (
    *(0, 1, 2, 7, 8, 12, 23, 24, 40, 64, 69, 70, 78, 85, 255, 256, 8191, 8192, 8193, 10240, 10241),
    *(65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1),
)
TAGS = (0, 1, 2, 24, 40, 64, 65, 66, 67, 69, 70, 71, 72, 77, 78, 80, 82, 85, 86, 1040, 55799, 56500)
WORDS = (
    *("type", "start", "image", "end", "calibration", "metadata", "series_id", "series_unique_id"),
    *("image_id", "data", "channels", "threshold_1", "default", "difference", "image_size_x"),
    *("image_size_y", "image_dtype", "number_of_images", "saturation_value", "error_value"),
    *("pixel_mask", "flatfield", "goniometer", "increment", "start_time", "user_data", "bslz4"),
    *("lz4", "bszstd", "trpx", "detector_translation", "detector_distance", "incident_energy"),
    *("incident_wavelength", "beam_center_x", "", "\x00", "\N{BLUE HEART}", "x" * 300),
)


# -- bytes ---------------------------------------------------------------------------------------


def changed_bytes(data: bytes, rng: random.Random, most: int = 3) -> bytes:
    """Some bytes changed, cut, repeated or put in."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at = rng.randint(0, len(out)) if out else 0
        kind = rng.randrange(7)
        if kind == 0 or not out:
            out[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 1:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at % len(out)] = rng.choice(b"\x00\x01\x0f\x1f\x7f\x80\xf0\xff\x5b\x9b\xbb")
        elif kind == 3:
            del out[at : at + rng.randint(1, 20)]
        elif kind == 4:
            came = rng.randrange(len(out))
            out[at:at] = out[came : came + rng.randint(1, 32)]
        elif kind == 5:
            word = struct.pack(rng.choice([">I", "<I", ">Q", "<Q"]), rng.choice(INTEGERS) % 2**32)
            out[at : at + len(word)] = word
        else:
            del out[at:]
    return bytes(out)


# -- CBOR ----------------------------------------------------------------------------------------


class Node:
    """An item of CBOR, and how it shall be written.

    Attributes:
        major: 0 to 7.
        value: the argument of 0, 1 and 6, bytes of 2 and 3, the whole item of 7.
        items: of 4 to 6; keys and values in turn for 5.
        claimed: length to be written in place of the right one; -1 for an indefinite one.
        wide: write eight bytes of argument, however small it is.
    """

    __slots__ = ("claimed", "items", "major", "value", "wide")

    def __init__(self, major: int, value: Any = None, items: list[Node] | None = None) -> None:
        self.major = major
        self.value = value
        self.items = items or []
        self.claimed: int | None = None
        self.wide = False

    def nodes(self) -> Iterator[Node]:
        """This one and all inside it."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.items)


def read_cbor(data: bytes) -> Node:
    """The tree of a message, magic or not, of definite or indefinite lengths.

    Raises:
        ValueError: not well-formed, something behind it, or too deep or large to play with.
    """
    at = 3 if data[:3] == _MAGIC else 0
    left = [_MOST_NODES]
    node, at = _read_node(data, at, 0, left)
    if at != len(data):
        raise ValueError("bytes behind the item")
    return node


def _read_node(data: bytes, at: int, depth: int, left: list[int]) -> tuple[Node, int]:
    left[0] -= 1
    if depth > _MOST_DEEP or left[0] < 0 or at >= len(data):
        raise ValueError("too deep, too large or cut short")
    began, first = at, data[at]
    at += 1
    major, info = first >> 5, first & 31
    argument = info
    if 24 <= info < 28:
        size = 1 << (info - 24)
        if at + size > len(data):
            raise ValueError("cut short")
        argument = int.from_bytes(data[at : at + size], "big")
        at += size
    elif info > 27 and (info != 31 or major in (0, 1, 6, 7)):
        raise ValueError("reserved")
    if major == 7:
        return Node(7, data[began:at]), at
    if major < 2:
        return Node(major, argument), at
    if major == 6:
        inner, at = _read_node(data, at, depth + 1, left)
        return Node(6, argument, [inner]), at
    if info == 31:
        return _read_indefinite(data, at, major, depth, left)
    if major < 4:
        if argument > len(data) - at:
            raise ValueError("cut short")
        return Node(major, data[at : at + argument]), at + argument
    items = []
    if argument > len(data):
        raise ValueError("cut short")
    for _ in range(argument * (major - 3)):
        item, at = _read_node(data, at, depth + 1, left)
        items.append(item)
    return Node(major, None, items), at


def _read_indefinite(
    data: bytes, at: int, major: int, depth: int, left: list[int]
) -> tuple[Node, int]:
    items: list[Node] = []
    while data[at : at + 1] != b"\xff":
        item, at = _read_node(data, at, depth + 1, left)
        if major < 4 and (item.major != major or item.claimed is not None):
            raise ValueError("pieces of another type")
        items.append(item)
    if major == 5 and len(items) % 2:
        raise ValueError("a key without a value")
    node = Node(major, None, items)
    if major < 4:
        node = Node(major, b"".join(item.value for item in items))
    node.claimed = -1
    return node, at + 1


def write_cbor(node: Node) -> bytes:
    """The bytes of a tree, without magic; wrong where the tree says so."""
    out: list[bytes] = []
    _write_node(node, out)
    return b"".join(out)


def _head(major: int, argument: int, wide: bool) -> bytes:
    first = major << 5
    argument %= 2**64
    if wide:
        return bytes([first | 27]) + struct.pack(">Q", argument)
    if argument < 24:
        return bytes([first | argument])
    for info, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if argument < 1 << (8 * size):
            return bytes([first | info]) + argument.to_bytes(size, "big")
    raise AssertionError(argument)


def _write_node(node: Node, out: list[bytes]) -> None:
    if node.major == 7:
        out.append(node.value)
        return
    if node.major in (0, 1, 6):
        out.append(_head(node.major, node.value, node.wide))
    elif node.claimed == -1:
        out.append(bytes([node.major << 5 | 31]))
        if node.major < 4:
            half = len(node.value) // 2
            for piece in (node.value[:half], node.value[half:]):
                out += [_head(node.major, len(piece), node.wide), piece]
    else:
        length = len(node.value) if node.major < 4 else len(node.items) // (node.major - 3)
        claimed = length if node.claimed is None else node.claimed
        out.append(_head(node.major, claimed, node.wide))
        if node.major < 4:
            out.append(node.value)
    for item in node.items:
        _write_node(item, out)
    if node.claimed == -1 and node.major in (2, 3, 4, 5):
        out.append(b"\xff")


def _any_node(rng: random.Random, depth: int = 0) -> Node:
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return Node(rng.randrange(2), rng.choice(INTEGERS))
    if kind == 1:
        return Node(2, rng.randbytes(rng.choice([0, 1, 2, 8, 12, 16, 100])))
    if kind == 2:
        return Node(3, rng.choice(WORDS).encode())
    if kind == 3:
        return Node(7, rng.choice([b"\xf4", b"\xf5", b"\xf6", b"\xf7", b"\xe0", b"\xf8\x20"]))
    if kind == 4:
        values = (0.0, -1.0, 1e-3, 75e-6, float("nan"), float("inf"), -float("inf"), 1e300)
        return Node(7, b"\xfb" + struct.pack(">d", rng.choice(values)))
    if kind == 5:
        return Node(6, rng.choice(TAGS), [_any_node(rng, depth + 1)])
    count = rng.randrange(4)
    items = [_any_node(rng, depth + 1) for _ in range(count * (kind - 5))]
    if kind == 7:
        for i in range(0, len(items), 2):
            items[i] = Node(3, rng.choice(WORDS).encode())
    return Node(kind - 2, None, items)


def _change_node(node: Node, whole: Sequence[Node], rng: random.Random) -> None:
    """One change to a node, in place."""
    kind = rng.randrange(12)
    if kind < 4:
        if node.major in (0, 1, 6):
            near = node.value + rng.randint(-2, 2)
            node.value = rng.choice([rng.choice(TAGS if node.major == 6 else INTEGERS), near])
            node.value = max(0, node.value)
        elif node.major == 2:
            node.value = changed_payload(node.value, rng)
        elif node.major == 3:
            node.value = rng.choice(WORDS).encode() if kind else changed_bytes(node.value, rng)
        elif node.major == 7:
            node.value = _any_node(rng, 3).value if kind else rng.choice([b"\xff", b"\xf8\x00"])
            node.value = node.value if isinstance(node.value, bytes) and node.value else b"\xf6"
        elif node.items and kind < 2:
            step = node.major - 3
            at = rng.randrange(max(1, len(node.items) // step)) * step
            if kind:
                del node.items[at : at + step]
            else:
                node.items[at:at] = node.items[at : at + step]
        else:
            rng.shuffle(node.items)
    elif kind == 4:
        node.claimed = -1
    elif kind == 5:
        length = len(node.items) if node.major > 3 else len(node.value or b"") if node.value else 0
        node.claimed = rng.choice([length + 1, max(0, length - 1), rng.choice(INTEGERS)])
    elif kind == 6:
        node.wide = True
    elif kind == 7:
        inner = Node(node.major, node.value, node.items)
        inner.claimed, inner.wide = node.claimed, node.wide
        node.major, node.value, node.items = 6, rng.choice(TAGS), [inner]
        node.claimed, node.wide = None, False
    elif kind == 8 and node.items:
        _become(node, rng.choice(node.items))
    elif kind == 9:
        _become(node, rng.choice(whole))
    elif kind == 10:
        for _ in range(rng.choice([1, 2, 30, 40, 150])):
            inner = Node(node.major, node.value, node.items)
            inner.claimed, inner.wide = node.claimed, node.wide
            node.major, node.value, node.items = 4, None, [inner]
            node.claimed, node.wide = None, False
    else:
        _become(node, _any_node(rng))


def _become(node: Node, other: Node) -> None:
    """Make a node a copy of another, sharing what is inside it unless that would be a ring."""
    if any(inside is node for inside in other.nodes()):
        if other is node:
            return
        written = write_cbor(other)
        try:
            other = read_cbor(written)
        except (ValueError, RecursionError):
            return
    node.major, node.value, node.items = other.major, other.value, list(other.items)
    node.claimed, node.wide = other.claimed, other.wide


def changed_cbor(message: bytes, rng: random.Random) -> bytes:
    """A message of CBOR with something in it changed."""
    if rng.randrange(8) == 0:
        return changed_bytes(message, rng)
    try:
        tree = read_cbor(message)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            nodes = list(tree.nodes())
            _change_node(rng.choice(nodes), nodes, rng)
        written = write_cbor(tree)
    except (ValueError, RecursionError, TypeError):
        return changed_bytes(message, rng)
    return written if rng.randrange(20) == 0 else _MAGIC + written


# -- JSON ----------------------------------------------------------------------------------------

_JSON_WORDS = (
    *("htype", "dheader-1.0", "dimage-1.0", "dimage_d-1.0", "dconfig-1.0", "dseries_end-1.0"),
    *("dpixelmask-1.0", "series", "frame", "hash", "shape", "type", "uint8", "uint16", "uint32"),
    *("int32", "float32", "encoding", "size", "bs8-lz4<", "bs16-lz4<", "bs32-lz4>", "lz4<", "<"),
    *("header_detail", "none", "basic", "all", "x_pixels_in_detector", "nimages", "ntrigger"),
    *("trigger_mode", "exts", "inte", "", "\x00", "\ud800", "9" * 400, "-", "dimage-", "-1.0"),
)
_JSON_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, 1e308, -1e-300, float("nan"), float("inf"), [], {}),
    *INTEGERS,
)


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    found, waiting = [], [document]
    while waiting:
        here = waiting.pop()
        keys: Any = ()
        if isinstance(here, dict):
            keys = list(here)
        elif isinstance(here, list):
            keys = range(len(here))
        for key in keys:
            found.append((here, key))
            waiting.append(here[key])
    return found


def _any_json(rng: random.Random) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(_JSON_WORDS)
    if kind == 1:
        return [rng.choice(_JSON_VALUES) for _ in range(rng.randrange(4))]
    if kind == 2:
        return {rng.choice(_JSON_WORDS): rng.choice(_JSON_VALUES)}
    if kind == 3:
        return 10 ** rng.choice([30, 400, 5000])
    return rng.choice(_JSON_VALUES)


def changed_document(document: Any, rng: random.Random) -> Any:
    """A document of JSON with something in it changed; in place where that is possible."""
    places = _places(document)
    if not places or rng.randrange(30) == 0:
        return _any_json(rng)
    here, key = rng.choice(places)
    kind = rng.randrange(7)
    if kind == 0:
        del here[key]
    elif kind == 1 and isinstance(here, dict):
        here[rng.choice(_JSON_WORDS)] = here.pop(key)
    elif kind == 2:
        other, name = rng.choice(places)
        if not isinstance(other, list) or name < len(other):
            here[key] = json.loads(json.dumps(other[name]))
    elif kind == 3 and isinstance(here[key], int) and not isinstance(here[key], bool):
        here[key] += rng.choice([-2, -1, 1, 2, 2**31, -(2**63)])
    elif kind == 4:
        for _ in range(rng.choice([1, 5, 200, 2000])):
            here[key] = [here[key]]
    elif kind == 5 and isinstance(here, list):
        here[key:key] = here[: rng.randint(1, 4)]
    else:
        here[key] = _any_json(rng)
    return document


def changed_json(part: bytes, rng: random.Random) -> bytes:
    """A part of JSON with something in it changed."""
    if rng.randrange(8) == 0:
        return changed_bytes(part, rng)
    try:
        document = json.loads(part)
        for _ in range(rng.choice([1, 1, 2, 3])):
            document = changed_document(document, rng)
        text = json.dumps(document, ensure_ascii=rng.randrange(4) != 0)
    except (ValueError, RecursionError, TypeError):
        return changed_bytes(part, rng)
    encoded = text.encode("utf-8", "surrogatepass")
    kind = rng.randrange(40)
    if kind == 0:
        return b"\xef\xbb\xbf" + encoded
    if kind == 1:
        return text.encode("utf-16", "surrogatepass")
    return encoded + b"\n" if kind == 2 else encoded


# -- compressed payloads -------------------------------------------------------------------------


def _bomb(rng: random.Random) -> bytes:
    """An LZ4 block of a byte and a match as long as asked for."""
    return b"\x1f\x00\x01\x00" + b"\xff" * rng.choice([1, 30, 31, 32, 33, 1000]) + b"\x00\x50AAAAA"


def changed_payload(payload: bytes, rng: random.Random) -> bytes:
    """A framed payload with its header, a block's length, a block or some bytes changed."""
    if len(payload) < 16 or rng.randrange(4) == 0:
        return changed_bytes(payload, rng)
    total, block = struct.unpack(">QI", payload[:12])
    pieces, at = [], 12
    while len(payload) - at >= 4:
        length = int.from_bytes(payload[at : at + 4], "big")
        if length > len(payload) - at - 4 or len(pieces) > 2000:
            break
        pieces.append([length, payload[at + 4 : at + 4 + length]])
        at += 4 + length
    tail = payload[at:]
    kind = rng.randrange(9)
    if kind == 0:
        total = rng.choice([total + rng.randint(-9, 9), 2 * total, rng.choice(INTEGERS)])
    elif kind == 1:
        block = rng.choice([block + rng.randint(-9, 9), 2 * block, 0, rng.choice(INTEGERS)])
    elif kind == 2:
        tail = changed_bytes(tail, rng)
    elif pieces:
        here = rng.randrange(len(pieces))
        if kind == 3:
            pieces[here][0] = rng.choice([pieces[here][0] + rng.randint(-9, 9), *INTEGERS])
        elif kind == 4:
            pieces[here][1] = _bomb(rng)
            pieces[here][0] = len(pieces[here][1])
        elif kind == 5:
            pieces[here] = list(rng.choice(pieces))
        elif kind == 6:
            del pieces[here]
        else:
            pieces[here][1] = changed_bytes(pieces[here][1], rng)
            pieces[here][0] = len(pieces[here][1])
    out = [struct.pack(">QI", total % 2**64, block % 2**32)]
    for length, content in pieces:
        out += [struct.pack(">I", length % 2**32), content]
    return b"".join([*out, tail])


# -- captures: messages of a stream, one after another -------------------------------------------


def write_capture(messages: Sequence[Sequence[bytes]]) -> bytes:
    """Per message u32 LE parts, then per part u64 LE bytes and the part."""
    out = []
    for parts in messages:
        out.append(struct.pack("<I", len(parts)))
        for part in parts:
            out += [struct.pack("<Q", len(part)), part]
    return b"".join(out)


def read_capture(data: bytes) -> list[Parts]:
    """The messages of a capture; what does not fit in it is brought to fit."""
    messages: list[Parts] = []
    at = 0
    while at < len(data) and len(messages) < 64:
        count = int.from_bytes(data[at : at + 4], "little")
        at += 4
        parts: Parts = []
        while len(parts) < min(count, 32) and at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            at += 8
            parts.append(data[at : at + length])
            at += length
        if parts:
            messages.append(parts)
    return messages


def changed_capture(
    data: bytes,
    rng: random.Random,
    change: Callable[[bytes, int, random.Random], bytes],
    spare: Sequence[Sequence[Sequence[bytes]]],
) -> bytes:
    """A capture with a message changed, moved, repeated, lost, or replaced by another's.

    Args:
        change: makes another part of a part, given its number in the message.
        spare: captures to take messages from.
    """
    messages = read_capture(data)
    if not messages:
        messages = [list(parts) for parts in rng.choice(spare)]
    here = rng.randrange(len(messages))
    kind = rng.randrange(12)
    if kind == 0:
        del messages[here]
    elif kind == 1:
        messages.insert(rng.randrange(len(messages) + 1), list(messages[here]))
    elif kind == 2:
        other = rng.randrange(len(messages))
        messages[here], messages[other] = messages[other], messages[here]
    elif kind == 3:
        messages.insert(here, list(rng.choice(rng.choice(spare))))
    elif kind == 4 and len(messages[here]) > 1:
        parts = messages[here]
        at = rng.randrange(len(parts))
        if rng.randrange(2):
            del parts[at]
        else:
            parts.insert(rng.randrange(len(parts)), parts[at])
    elif kind == 5:
        messages[here].append(rng.choice([b"", b"{}", rng.randbytes(8)]))
    else:
        at = rng.randrange(len(messages[here]))
        messages[here][at] = change(messages[here][at], at, rng)
    return write_capture(messages[:16])
