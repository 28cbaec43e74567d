"""What comes in cannot ask for memory that it does not bring: every way in, measured.

Each case runs in a process of its own that may grow by so much and no more. The figures are peaks
of resident memory; the bound of the address space also catches what is asked for and never used.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
import shutil
import socket
import struct
import weakref
from pathlib import Path
from typing import Any

import cbor2
import h5py
import hdf5plugin
import numpy as np
import pytest
import zmq
from fuzz_grammar import changed_bytes
from pictures import encode, picture
from sheltered import run_sheltered

from simulators.detectors import stream2
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from triage.errors import ModelError
from triage.ingest import files as recorded
from triage.ingest import series as series_module
from triage.ingest.dectris import DectrisStream
from triage.ingest.files import Files
from triage.ingest.framing import is_framed
from triage.ingest.series import SeriesBook
from triage.ingest.subscriber import Subscriber
from triage.nets import model as models
from triage.nets.model import load_model
from triage.records import Series

BITSHUFFLE: dict[str, Any] = dict(hdf5plugin.Bitshuffle(cname="lz4"))
MEBI = 1 << 20


# -- messages ------------------------------------------------------------------------------------

PARSED = """
import json
import math
import sys
from pathlib import Path
import numpy as np
from triage.backends import open_backend
from triage.ingest.dectris import DectrisStream
from triage.ingest.series import SeriesBook
backend = open_backend("cpu", recycle=True)
stream = DectrisStream(1, SeriesBook(), protocol="stream2")
def outcomes(file):
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        for message in stream.take([data[at + 8 : at + 8 + size]], 0):
            frame, why = message.frame, ""
            if frame is not None:
                error = backend.prepare([frame]).errors[0] if frame.fault is None else None
                why = frame.fault.value if frame.fault else type(error).__name__ if error else ""
            found.append(f"{message.kind.value}:{why}")
        at += 8 + size
    return found
*files, sound = sorted(Path(sys.argv[1]).iterdir())
assert outcomes(sound) == ["start:", "image:"]
began = bound(256 << 20)
for file in [*files, sound]:
    print(json.dumps([outcomes(file), peak() - began]), flush=True)
    assert outcomes(sound) == ["start:", "image:"]
"""
INFO = StreamInfo(shape=(70, 90), number_of_images=2, series_id=3)


def image_of(shape: tuple[int, int], encoding: str, payload: bytes, dtype: str = "<u2") -> bytes:
    info = StreamInfo(shape=shape, number_of_images=2, series_id=4)
    frame = SimFrame(payload=payload, encoding=encoding, dtype=np.dtype(dtype), shape=shape)
    return stream2.image_message(info, frame, 0)


def start_of(shape: tuple[int, int], **fields: Any) -> bytes:
    known = cbor2.loads(stream2.start_message(StreamInfo(shape=shape, series_id=4))[3:])
    return cbor2.dumps({**known, **fields})


def map_of(encoding: str, payload: bytes, shape: tuple[int, int]) -> Any:
    content = cbor2.CBORTag(56500, [encoding, 4, payload])
    return {"threshold_1": cbor2.CBORTag(40, [list(shape), cbor2.CBORTag(70, content)])}


def lz4_bomb(size: int) -> bytes:
    """A framed LZ4 block of ``size`` zeros, a 255th as long."""
    match = size - 1 - 5 - 4 - 15
    block = (
        b"\x1f\x00\x01\x00" + b"\xff" * (match // 255) + bytes([match % 255]) + b"\x50" + bytes(5)
    )
    return struct.pack(">QII", size, size, len(block)) + block


HEADED = struct.pack(">QI", 8192 * 8192 * 2, 8192)
SMALL = compressed(picture("<u2", (70, 90)), "bslz4")
HUGE = (2**31 - 1, 2**31 - 1)
CASES: dict[str, tuple[list[bytes], str]] = {
    "sides of 2^31": ([start_of(HUGE), image_of(HUGE, "bslz4", SMALL)], "image:DecodeError"),
    "8192 squared in a kilobyte": (
        [start_of((8192, 8192)), image_of((8192, 8192), "bslz4", HEADED + bytes(1000))],
        "image:DecodeError",
    ),
    "8192 squared of zstd": (
        [start_of((8192, 8192)), image_of((8192, 8192), "bszstd", HEADED + bytes(1000))],
        "image:DecodeError",
    ),
    "half a gigabyte of zstd in large blocks": (
        [
            start_of((8192, 8192)),
            image_of(
                (8192, 8192),
                "bszstd",
                struct.pack(">QI", 8192 * 8192 * 2, 1 << 24) + struct.pack(">I", 12) * 8 * 4,
            ),
        ],
        "image:DecodeError",
    ),
    "a header of 10 GB": (
        [start_of((70, 90)), image_of((70, 90), "lz4", struct.pack(">QI", 10**10, 2**31) + SMALL)],
        "image:DecodeError",
    ),
    "a block of 2^32 - 1 bytes": (
        [
            start_of((70, 90)),
            image_of((70, 90), "bslz4", struct.pack(">QII", 12600, 8192, 2**32 - 1) + SMALL[16:]),
        ],
        "image:DecodeError",
    ),
    "blocks of 2^32 - 16 bytes": (
        [
            start_of((70, 90)),
            image_of((70, 90), "bslz4", struct.pack(">QI", 12600, 2**32 - 16) + SMALL[12:]),
        ],
        "image:DecodeError",
    ),
    "a block that holds more than it says": (
        [
            start_of((70, 90)),
            image_of((70, 90), "lz4", struct.pack(">QI", 12600, 12600) + lz4_bomb(37800)[12:]),
        ],
        "image:DecodeError",
    ),
    "a mask of 10 GB": (
        [start_of((50000, 50000), pixel_mask=map_of("bslz4", SMALL, (50000, 50000)))],
        "start:",
    ),
    "a mask that lies about a block": (
        [
            start_of(
                (64, 64),
                pixel_mask=map_of(
                    "bslz4", struct.pack(">QII", 16384, 8192, 2**31 - 1) + b"A" * 90, (64, 64)
                ),
            )
        ],
        "start:",
    ),
    "a mask whose blocks stop early": (
        [start_of((64, 64), pixel_mask=map_of("bslz4", struct.pack(">QI", 16384, 8192), (64, 64)))],
        "start:",
    ),
    "lengths of 2^64 - 1": (
        [b"\xa1\x64type" + bytes([major | 27]) + b"\xff" * 8 for major in (64, 96, 128)],
        "malformed:",
    ),
    "a map of 2^40 pairs": ([b"\xbb\x00\x00\x01" + bytes(5)], "malformed:"),
    "nested a million deep": ([b"\xa1\x61x" + b"\x81" * 10**6], "malformed:"),
    "two million empty maps": (
        [b"\xa2\x64type\x65image\x61x\x9a\x00\x20\x00\x00" + b"\xa0" * (2 << 20)],
        "image:malformed",
    ),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], int]]:
    """By case, what each message was, and the bytes by which the process had grown by then."""
    folder = tmp_path_factory.mktemp("messages")
    sound = SimFrame(payload=SMALL, encoding="bslz4", dtype=np.dtype("<u2"), shape=(70, 90))
    kept = {name: messages for name, (messages, _) in CASES.items()}
    kept["sound"] = [stream2.start_message(INFO), stream2.image_message(INFO, sound, 0)]
    for number, messages in enumerate(kept.values()):
        data = b"".join(struct.pack("<Q", len(message)) + message for message in messages)
        (folder / f"{number:03}").write_bytes(data)
    done = run_sheltered(PARSED, str(folder))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (found, peak) for name, (found, peak) in zip(kept, lines, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_a_message_cannot_ask_for_memory(told: dict[str, tuple[list[str], int]], name: str) -> None:
    """The image is a fault of its own, and 160 MiB are never needed: none brings 3 MB.

    After each, a sound series was read and scored in the same process, or that would have ended.
    """
    outcomes, peak = told[name]
    assert outcomes[-1] == CASES[name][1]
    assert peak < 160 * MEBI


def test_a_peer_that_announces_gigabytes_is_refused() -> None:
    """Its connection is closed when the length is read; another peer's image comes through."""
    source = Subscriber("tcp://127.0.0.1:*", bind=True)
    context: zmq.Context[Any] = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.setsockopt(zmq.LINGER, 0)
    try:
        port = int(source.endpoint.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
            peer.sendall(
                b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
            )
            ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 4) + b"PUSH"
            peer.sendall(b"\x04" + bytes([len(ready)]) + ready)
            # A long message: flags 2, eight bytes of length, and some of what was announced.
            peer.sendall(b"\x02" + struct.pack(">Q", 10 * 2**30) + bytes(100))
            while peer.recv(1000):
                pass
        push.connect(source.endpoint)
        push.send(stream2.start_message(INFO))
        assert [message.kind.value for message in source.receive(10_000)] == ["start"]
    finally:
        push.close()
        context.term()
        source.close()


def test_masks_of_many_series_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of 40 kB comes in some hundred bytes: of ten series those of the last three stay."""
    monkeypatch.setattr(series_module, "_MASK_BYTES", 120_000)
    stream = DectrisStream(1, SeriesBook(), protocol="stream2")
    alive = []
    for number in range(10):
        mask = np.zeros((100, 100), np.uint32)
        mask[0, number] = 1
        packed = encode(mask, "bslz4", 8192)
        assert len(packed) < 400
        start = start_of(
            (100, 100), series_id=number, pixel_mask=map_of("bslz4", packed, (100, 100))
        )
        (message,) = stream.take([start], 0)
        assert message.series is not None
        assert message.series.pixel_mask is not None
        alive.append(weakref.ref(message.series))
        del message
    assert [number for number, series in enumerate(alive) if series() is not None] == [7, 8, 9]


def test_a_mask_that_comes_again_is_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Series after series with one mask: one array, and none is forgotten for its bytes."""
    monkeypatch.setattr(series_module, "_MASK_BYTES", 120_000)
    book, held = SeriesBook(), []
    for number in range(10):
        mask = np.zeros((100, 100), np.uint32)
        mask[7, 7] = number >= 5
        held.append(book.start(Series(series_id=number, pixel_mask=mask)))
    masks = [series.pixel_mask for series in held]
    assert all(mask is masks[0] for mask in masks[:5])
    assert all(mask is masks[5] for mask in masks[5:])
    assert [int(mask[7, 7]) for mask in masks if mask is not None] == [0] * 5 + [1] * 5
    assert [book.find(number, "") is series for number, series in enumerate(held)] == [True] * 10


# -- compressed maps, which the HDF5 library decodes ---------------------------------------------

DECODED = """
import random, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[2])
import fuzz_grammar as grammar
from triage.ingest.series import decoded_map
rng, taken = random.Random(5), 0
sound = {file.name: file.read_bytes() for file in Path(sys.argv[1]).iterdir()}
for encoding, data in sound.items():
    assert decoded_map(data, encoding, (64, 64), "<u4") is not None
began = bound(256 << 20)
for number in range(3000):
    for encoding, data in sound.items():
        changed = grammar.changed_payload(data, rng)
        found = decoded_map(changed, encoding, (64, 64), "<u4")
        assert found is None or found.shape == (64, 64)
        taken += found is not None
print(taken, peak() - began)
"""


def test_changed_maps_are_maps_or_nothing(tmp_path: Path) -> None:
    """Thousands of changed masks of each compression end no process and need no memory."""
    pixels = picture("<u4", (64, 64))
    for encoding in ("lz4", "bslz4", "bszstd"):
        (tmp_path / encoding).write_bytes(encode(pixels, encoding, 2048))
    done = run_sheltered(DECODED, str(tmp_path), str(Path(__file__).resolve().parent.parent))
    taken, grown = (int(word) for word in done.stdout.split()[-2:])
    assert 0 < taken < 9000
    assert grown < 64 * MEBI


@pytest.mark.parametrize("encoding", ["lz4", "bslz4", "bszstd"])
def test_what_an_encoder_writes_is_framed(encoding: str) -> None:
    """Whole, with a last block and with raw elements behind it; not with a byte less or more."""
    for shape in ((64, 64), (13, 11), (3, 1)):
        data = encode(picture("<u4", shape), encoding, 512)
        size = 4 * shape[0] * shape[1]
        assert is_framed(data, encoding, size, 4)
        assert not is_framed(data[:-1], encoding, size, 4)
        assert not is_framed(data + b"\0", encoding, size, 4)
        assert not is_framed(data, encoding, size + 4, 4)


# -- recorded runs -------------------------------------------------------------------------------

READ = """
import sys
from pathlib import Path
from triage.ingest.files import Files
Files([Path(sys.argv[1]) / "sound.h5"]).receive(0)
began = bound(256 << 20)
for file in sorted(Path(sys.argv[1]).glob("hostile_*")):
    source, outcomes = Files([file]), []
    while not source.exhausted and len(outcomes) < 20:
        for message in source.receive(0):
            if message.frame is not None:
                outcomes.append(message.frame.fault or "sound")
    assert file.stat().st_size < 100_000, file
    print(file.stem, *outcomes, "skipped" if source.skipped else "", peak() - began, flush=True)
"""


def declared(file: Any, path: str, shape: tuple[int, ...], **fields: Any) -> Any:
    return file.create_dataset(path, shape, fields.pop("dtype", "<u2"), **fields)


def test_a_recorded_run_cannot_ask_for_memory(tmp_path: Path) -> None:
    """Files of some kilobytes that declare gigabytes: faults, each told, and 96 MiB at most."""
    with h5py.File(tmp_path / "sound.h5", "w") as file:
        file["entry/data/data"] = np.stack([picture("<u2", (40, 40))])
    wide, many = (10**5, 10**5), 2**40
    with h5py.File(tmp_path / "hostile_wide.h5", "w") as file:
        declared(file, "entry/data/data", (2, *wide), chunks=(1, 1000, 1000))
    with h5py.File(tmp_path / "hostile_many.h5", "w") as file:
        declared(file, "entry/data/data", (many, 64, 64), chunks=(1, 64, 64))
    with h5py.File(tmp_path / "hostile_hollow.h5", "w") as file:
        declared(file, "entry/data/data", (3, 8192, 8192), dtype="<f8")
    with h5py.File(tmp_path / "hostile_bomb.h5", "w") as file:
        data = declared(
            file, "entry/data/data", (1, 8192, 8192), chunks=(1, 8192, 8192), **hdf5plugin.LZ4()
        )
        data.id.write_direct_chunk((0, 0, 0), struct.pack(">QI", 2**40, 2**30) + bytes(1000))
    with h5py.File(tmp_path / "hostile_tiles.h5", "w") as file:
        data = declared(file, "entry/data/data", (1, 64, 64), chunks=(1, 32, 64), **BITSHUFFLE)
        for top in (0, 32):
            lies = struct.pack(">QII", 2**40, 8192, 2**31 - 1)
            data.id.write_direct_chunk((0, top, 0), lies + bytes(100))
    with h5py.File(tmp_path / "hostile_header.h5", "w") as file:
        file["entry/data/data"] = np.stack([picture("<u2", (40, 40))])
        at = "entry/instrument/detector"
        for name, shape in (("count_time", (many,)), ("pixel_mask", (40, 40)), ("description", ())):
            if name == "pixel_mask":
                mask = declared(
                    file, f"{at}/{name}", shape, chunks=(40, 40), dtype="<u4", **BITSHUFFLE
                )
                mask.id.write_direct_chunk((0, 0), struct.pack(">QII", 6400, 8192, 2**31 - 1))
            elif name == "description":
                declared(file, f"{at}/{name}", shape, dtype="S1000000000")
            else:
                declared(file, f"{at}/{name}", shape, chunks=(10**6,), dtype="<f8")
        declared(file, "entry/triage/image_id", (many,), chunks=(10**6,), dtype="<i8")
        declared(file, "entry/sample/goniometer/omega", (many,), chunks=(2**27,), dtype="<f8")
    with h5py.File(tmp_path / "hostile_links.h5", "w") as file:
        file["entry/data/data_000001"] = h5py.ExternalLink("hostile_links.h5", "entry/data/x")
        file["entry/data/x"] = h5py.ExternalLink("hostile_links.h5", "entry/data/x")
        file["entry/data/data_000002"] = h5py.SoftLink("/entry/data/data_000002")
    done = run_sheltered(READ, str(tmp_path))
    told = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert {name.removeprefix("hostile_"): words[:-1] for name, words in told.items()} == {
        "wide": ["malformed"] * 2,
        "many": ["malformed"],
        "hollow": ["malformed"] * 3,
        "bomb": ["sound"],  # as it is stored; the backend's decoder refuses it
        "tiles": ["malformed"],
        "header": ["sound"],
        "links": ["skipped"],
    }
    assert max(int(words[-1]) for words in told.values()) < 96 * MEBI


def image_files(folder: Path) -> dict[str, Path]:
    """A small image in each of some formats, as fabio writes it."""
    from fabio import adscimage, cbfimage, edfimage, tifimage

    pixels = picture("<i4", (40, 50)).clip(0, 60000)
    made = {
        "a.cbf": cbfimage.CbfImage(data=pixels),
        "a.edf": edfimage.EdfImage(data=pixels),
        "a.tif": tifimage.TifImage(data=pixels.astype(np.uint16)),
        "a.img": adscimage.AdscImage(data=pixels.astype(np.uint16)),
    }
    for name, image in made.items():
        image.write(str(folder / name))
    return {name: folder / name for name in made}


def fault_of(path: Path) -> str:
    source = Files([path])
    frames = [m.frame for m in source.receive(0) if m.frame is not None]
    source.close()
    assert len(frames) == 1
    return frames[0].fault_detail


def test_an_image_file_cannot_ask_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sides that a header makes up, and a packed file that unpacks without end, are refused."""
    files = image_files(tmp_path)
    cbf, edf = files["a.cbf"].read_bytes(), files["a.edf"].read_bytes()
    assert [fault_of(path) for path in files.values()] == [""] * 4
    wide = tmp_path / "wide.cbf"
    wide.write_bytes(cbf.replace(b"-Dimension: 50", b"-Dimension: 9999999"))
    (tmp_path / "wide.edf").write_bytes(edf.replace(b"Dim_1 = 50", b"Dim_1 = 99999999"))
    for path in (wide, tmp_path / "wide.edf"):
        assert "expected one of at most 536870912 bytes" in fault_of(path)
    monkeypatch.setattr(recorded, "LARGEST_FRAME_BYTES", 8 * MEBI)
    packed = tmp_path / "bomb.cbf.gz"
    packed.write_bytes(gzip.compress(cbf) + 9 * gzip.compress(bytes(MEBI)))
    assert packed.stat().st_size < 20_000
    assert "when unpacked" in fault_of(packed)
    packed.write_bytes(gzip.compress(cbf))
    assert fault_of(packed) == ""


def test_a_damaged_image_file_is_a_fault(tmp_path: Path) -> None:
    """Changed bytes in the header or behind it: one image each, sound or not, and no exception."""
    rng, faults = random.Random(3), 0
    for path in image_files(tmp_path).values():
        sound = path.read_bytes()
        for _ in range(60):
            head = rng.choice([300, 1000, len(sound)])
            path.write_bytes(changed_bytes(sound[:head], rng) + sound[head:])
            faults += bool(fault_of(path))
    assert 20 < faults < 220


# -- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"radial_bins": 2**30}, "radial_bins"),
        ({"grid": 10**6}, "grid"),
        ({"tiles": 2.5}, "tiles"),
        ({"levels": 10**9}, "levels"),
        ({"heads": 1000}, "heads"),
        ({"levels": 4, "steps": [1.0, 1.0]}, "steps"),
        ({"levels": 3, "steps": [1.0, math.nan]}, "steps"),
    ],
)
def test_a_card_cannot_ask_for_memory(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """Sizes are looked at before a network of them is made, and before weights are compared."""
    folder = tmp_path / "model"
    shutil.copytree(Path(models.__file__).parent / "default", folder)
    card = json.loads((folder / "card.json").read_text())
    if "levels" in change:
        card["heads"][-1] |= {"kind": "ordinal"} | change
    elif "heads" in change:
        card["heads"] *= change["heads"]
    else:
        card["recipe"] |= change
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match=said):
        load_model(folder)


def test_weights_that_lie_about_their_shapes_are_refused(tmp_path: Path) -> None:
    """A header of safetensors with more numbers than come, or that is longer than the file."""
    folder = tmp_path / "model"
    shutil.copytree(Path(models.__file__).parent / "default", folder)
    card = json.loads((folder / "card.json").read_text())
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    for head in (struct.pack("<Q", len(header)) + header.encode(), struct.pack("<Q", 2**40)):
        (folder / "weights.safetensors").write_bytes(head + bytes(64))
        card["weights_sha256"] = hashlib.sha256(head + bytes(64)).hexdigest()
        (folder / "card.json").write_text(json.dumps(card))
        with pytest.raises(ModelError, match="do not fit"):
            load_model(folder)


def test_a_file_without_end_is_no_model(tmp_path: Path) -> None:
    """A card that never ends is read up to its bound."""
    (tmp_path / "card.json").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="more than 16777216 bytes"):
        load_model(tmp_path)
