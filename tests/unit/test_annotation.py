"""What is written into messages that go on, read back by readers that are not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest
from strict_reader import array, strictly

from simulators.detectors import stream1, stream2
from simulators.detectors.frames import SimFrame, StreamInfo, compressed
from triage.annotation import SKIPPED, Annotator
from triage.errors import MalformedMessage
from triage.ingest.stream1 import Stream1Parser
from triage.ingest.stream2 import Stream2Parser
from triage.records import (
    Decision,
    Message,
    MessageKind,
    Override,
    Reason,
    Scores,
    SeriesReport,
    Verdict,
)

IMAGE = np.random.default_rng(2).poisson(2.0, (40, 56)).astype(np.uint16)
FRAME = SimFrame(
    payload=compressed(IMAGE, "bslz4"), encoding="bslz4", dtype=IMAGE.dtype, shape=IMAGE.shape
)
INFO = StreamInfo(
    shape=IMAGE.shape,
    dtype=IMAGE.dtype,
    series_id=7,
    series_unique_id="01HXYZ",
    channels=("threshold_1", "difference"),
    number_of_images=3,
)
DECISION = Decision(
    series_id=7,
    series_unique_id="01HXYZ",
    image_id=2,
    file="",
    frame=-1,
    ordinal=2,
    verdict=Verdict.VETO,
    reason=Reason.SCORE,
    forwarded=True,
    override=Override.AUDIT,
    # A whole number is where an encoder would be tempted to write an integer.
    scores=Scores(p_blank=1.0, p_ice=0.25),
    model_id="m-1",
    policy_id="p-1",
    latency_us=10.0,
)
EXPECTED = {
    "v": 1,
    "verdict": "veto",
    "reason": "score",
    "override": "audit",
    "p_blank": 1.0,
    "p_ice": 0.25,
    "ood": False,
    "model_id": "m-1",
    "policy_id": "p-1",
}
SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "samples"
BOTH = Annotator(verdicts=True, placeholders=True)
ABSENT = object()

USER_DATA: dict[str, Any] = {
    "absent": ABSENT,
    "list": [1, "\N{BLUE HEART}"],
    "text": "crystal 7",
    "number": 7,
    "float": 0.5,
    "null": None,
    "map": {"user_data": 1, "triage": 2},
    "bytes": b"\x00\xff" * 40,
    "nested": {"a": [{"b": [[], {}, [cbor2.CBORTag(0, "2024-01-15T10:00:00Z")]]}]},
    "magic": cbor2.CBORTag(55799, [1]),
}


def message(*parts: bytes, kind: MessageKind = MessageKind.IMAGE) -> Message:
    return Message(kind=kind, parts=parts, lane=3)


def plain(value: Any) -> Any:
    """Maps and lists as such, whatever the library makes of those inside a tag."""
    if hasattr(value, "items"):
        return {key: plain(content) for key, content in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("what", sorted(USER_DATA))
def test_user_data_of_any_shape_is_wrapped_byte_for_byte(what: str) -> None:
    """A strict client reads the message; taking our bytes out gives the message as it came."""
    original = USER_DATA[what]
    sent = stream2.image_message(INFO, FRAME, 2, None if original is ABSENT else original)
    if original is None:
        at = sent.index(b"\x64data")
        sent = sent[:3] + bytes((sent[3] + 1,)) + sent[4:at] + b"\x69user_data\xf6" + sent[at:]
    went = BOTH.kept(message(sent), DECISION)
    fields = strictly(went.parts[0])
    told = plain(fields["user_data"])
    assert told["triage"] == EXPECTED
    assert [type(told["triage"][name]) for name in ("p_blank", "p_ice")] == [float, float]
    ours = cbor2.dumps("triage") + cbor2.dumps(told["triage"])
    new, key = went.parts[0], cbor2.dumps("user_data")
    if original is ABSENT:
        assert set(told) == {"triage"}
        assert new.count(key + b"\xa1" + ours) == 1
        back = new.replace(key + b"\xa1" + ours, b"")
        assert back[3] == sent[3] + 1
        back = back[:3] + sent[3:4] + back[4:]
    else:
        there = b"\xf6" if original is None else cbor2.dumps(original)
        assert new.count(key + b"\xa2" + key + there + ours) == 1
        back = new.replace(key + b"\xa2" + key + there + ours, key + there)
    assert back == sent
    for data in fields["data"].values():
        assert np.array_equal(array(data), IMAGE)
    assert list(fields)[-2:] == ["user_data", "data"]
    assert (went.kind, went.lane) == (MessageKind.IMAGE, 3)


def test_scores_that_are_not_there_are_left_out() -> None:
    """NaN is neither null nor a number that a reader could take for a score."""
    nothing = DECISION.__class__(
        **{
            **{name: getattr(DECISION, name) for name in DECISION.__slots__},
            "scores": Scores(),
            "reason": Reason.LATE,
        }
    )
    went = BOTH.kept(message(stream2.image_message(INFO, FRAME, 2)), nothing)
    told = strictly(went.parts[0])["user_data"]["triage"]
    assert sorted(told) == ["model_id", "ood", "override", "policy_id", "reason", "v", "verdict"]


def test_a_map_of_indefinite_length_or_of_many_keys_is_written_with_its_length() -> None:
    """The head counts the pairs; keys that we do not know stay where they are."""
    sent = stream2.image_message(INFO, FRAME, 2)
    open_ended = sent[:3] + b"\xbf" + sent[4:] + b"\xff"
    assert BOTH.kept(message(open_ended), DECISION).parts == (
        BOTH.kept(message(sent), DECISION).parts
    )
    for extra in (14, 15, 300):
        fields = cbor2.loads(sent[3:])
        fields |= {f"x{i}": i for i in range(extra)}
        many = b"\xd9\xd9\xf7" + cbor2.dumps(fields)
        told = strictly(BOTH.kept(message(many), DECISION).parts[0])
        assert len(told) == len(fields) + 1
        assert {name: told[name] for name in fields if name != "data"} == {
            name: fields[name] for name in fields if name != "data"
        }


def test_a_message_without_the_magic_bytes_stays_without_them() -> None:
    """An emulator's message is not mended."""
    sent = stream2.image_message(INFO, FRAME, 2)[3:]
    assert BOTH.kept(message(sent), DECISION).parts[0][:1] == bytes((sent[0] + 1,))


@pytest.mark.parametrize(
    "parts",
    [
        (b"\xd9\xd9\xf7\xa1",),
        (b"\xd9\xd9\xf7\xa0",),
        (b"",),
        (b"\xd9\xd9\xf7" + cbor2.dumps({"type": "image"}) + b"\x00",),
        (b"\xd9\xd9\xf7\xa2\x69user_data\x01\x69user_data\x02",),
        (b"{", b"{}", b"", b"{}"),
        (b'{"htype": "dimage-1.0"}', b"{}", b"x"),
        (b'{"htype": "dimage-1.0"}', b"{}", b"x", b"{}", b"not JSON"),
        # JSON in bytes that no other JSON can stand beside.
        (b'{"htype": "dimage-1.0"}', b"{}", b"x", b"{}", '{"a": 1}'.encode("utf-16")),
        (b'{"htype": "dimage-1.0"}', b"{}", b"x", b"{}", b'\xef\xbb\xbf{"a": 1}'),
        (b'{"jsonversion": 5, "addJsonHeader": {"triage": ""}}', b"x"),
        (b"\x00", b"\x00"),
    ],
)
def test_what_cannot_be_written_into_goes_on_as_it_came(parts: tuple[bytes, ...]) -> None:
    """A kept image is never lost, or spoilt, for want of a place for its verdict."""
    came = message(*parts)
    assert BOTH.kept(came, DECISION) is came
    if len(parts) < 2:
        end = message(*parts, kind=MessageKind.END)
        assert BOTH.ended(end, REPORT).parts == parts


def test_a_placeholder_of_stream2_is_an_image_to_a_strict_reader() -> None:
    """Ids, times and unknown keys are the original's; every channel holds the eight bytes."""
    sent = cbor2.loads(stream2.image_message(INFO, FRAME, 2, ["mine"])[3:])
    sent["spot_count"] = 5
    came = message(b"\xd9\xd9\xf7" + cbor2.dumps(sent))
    fields = strictly(BOTH.placeholder(came, DECISION).parts[0])
    assert list(fields)[:4] == ["type", "series_id", "series_unique_id", "image_id"]
    assert {k: plain(v) for k, v in fields.items() if k not in ("data", "user_data")} == {
        k: plain(v) for k, v in sent.items() if k not in ("data", "user_data")
    }
    assert plain(fields["user_data"]) == {"user_data": ["mine"], "triage": EXPECTED}
    assert list(fields["data"]) == ["threshold_1", "difference"]
    for data in fields["data"].values():
        assert array(data).tobytes() == b"SKIPPED\0"
        assert array(data).shape == (1, 8)


def test_a_placeholder_is_kept_by_another_triage() -> None:
    """Behind us it is an image of another size, or of unknown encoding: never scored."""
    start = stream2.start_message(INFO)
    parser = Stream2Parser()
    parser.parse((start,), 0)
    came = message(stream2.image_message(INFO, FRAME, 2))
    frame = parser.parse(BOTH.placeholder(came, DECISION).parts, 0).frame
    assert frame is not None
    assert (frame.image_id, frame.fault) == (2, Reason.GEOMETRY_CHANGED)
    parser1 = Stream1Parser()
    parser1.parse(stream1.header_parts(INFO), 0)
    came = message(*stream1.image_parts(INFO, FRAME, 2, None))
    frame = parser1.parse(BOTH.placeholder(came, DECISION).parts, 0).frame
    assert frame is not None
    assert (frame.image_id, frame.fault) == (2, Reason.UNKNOWN_ENCODING)


@pytest.mark.parametrize("appendix", [None, {"a": [1.5, None]}, [1, 2], "text"])
def test_a_verdict_of_stream1_is_an_appendix(appendix: Any) -> None:
    """The four parts are the same objects; an appendix that was there is found again."""
    parts = stream1.image_parts(INFO, FRAME, 2, appendix)
    went = BOTH.kept(message(*parts), DECISION).parts
    assert len(went) == 5
    assert all(now is before for now, before in zip(went, parts[:4], strict=False))
    told = json.loads(went[4])
    assert told["triage"] == EXPECTED
    if appendix is None:
        assert set(told) == {"triage"}
    else:
        assert told["user_data"] == appendix
        assert parts[4] in went[4]


def test_a_placeholder_of_stream1_keeps_ids_shape_and_type() -> None:
    """What follows the pixels is untouched, and the first part but for its hash."""
    parts = stream1.image_parts(INFO, FRAME, 2, {"a": 1})
    went = BOTH.placeholder(message(*parts), DECISION).parts
    assert [went[i] is parts[i] for i in (3, 4)] == [True, True]
    assert json.loads(went[0]) | {"hash": ""} == json.loads(parts[0]) | {"hash": ""}
    assert went[2] == SKIPPED
    before, now = json.loads(parts[1]), json.loads(went[1])
    assert now["triage"] == EXPECTED
    assert (now["shape"], now["type"], now["size"]) == (before["shape"], before["type"], 8)
    assert now["encoding"] == "skipped"


SLS = {
    "jsonversion": 5, "bitmode": 16, "shape": [1024, 512], "size": 1048576, "acqIndex": 3,
    "frameIndex": 9, "progress": 1.5, "fname": "run", "data": 1, "completeImage": 1,
    "frameNumber": 2**63, "detSpec1": 2**64 - 1, "row": 0, "column": 1,
}  # fmt: skip


def test_a_placeholder_of_stream1_has_the_hash_of_what_it_holds() -> None:
    """Where the image named one: that of the eight bytes, by ``printf 'SKIPPED\\0' | md5sum``."""
    named = b'{"htype": "dimage-1.0", "series": 7, "frame": 2, "hash": "0123"}'
    skipping = Annotator(verdicts=False, placeholders=True)
    for first, wanted in (
        (named, "2f6f868359002bb609143089cda15899"),
        (named.replace(b"0123", b""), ""),
    ):
        made = skipping.placeholder(message(first, b"{}", b"pixels", b"{}"), DECISION)
        found = json.loads(made.parts[0])
        assert found == {"htype": "dimage-1.0", "series": 7, "frame": 2, "hash": wanted}


def sls(column: int, **more: Any) -> tuple[bytes, bytes]:
    header = {**SLS, "column": column, **more}
    return json.dumps(header).encode() + b"\n", bytes(16)


def test_every_port_of_an_sls_frame_is_told_or_skipped() -> None:
    """All headers carry the verdict as text; pixels stay, or become eight bytes in each port."""
    ports = [sls(0, addJsonHeader={"run": "4"}), sls(1)]
    came = Message(kind=MessageKind.IMAGE, parts=ports[0], followed_by=(ports[1],))
    kept, gone = BOTH.kept(came, DECISION), BOTH.placeholder(came, DECISION)
    for went, size, pixels in ((kept, SLS["size"], None), (gone, 8, SKIPPED)):
        for now, before in zip((went.parts, *went.followed_by), ports, strict=True):
            header, sent = json.loads(now[0]), json.loads(before[0])
            assert now[0].endswith(b"}\n")
            assert json.loads(header.pop("addJsonHeader")["triage"]) == EXPECTED
            sent.pop("addJsonHeader", None)
            assert header == {**sent, "size": size}
            assert now[1] is before[1] if pixels is None else now[1] == pixels
    assert json.loads(kept.parts[0])["addJsonHeader"]["run"] == "4"


@pytest.mark.parametrize(
    "parts",
    [
        (b"\xd9\xd9\xf7" + cbor2.dumps({"type": "image", "data": []}),),
        (b'{"htype": "dimage-1.0"}', b"[]", b"x"),
        (b'{"htype": "array-1.0"}', b"x"),
    ],
)
def test_no_placeholder_is_made_of_what_is_no_image(parts: tuple[bytes, ...]) -> None:
    """The caller is told, and lets the image go on."""
    with pytest.raises(MalformedMessage):
        BOTH.placeholder(message(*parts), DECISION)


VENDOR = sorted(p for p in SAMPLES.glob("stream2_*/**/*.cbor") if p.stem != "start")


@pytest.mark.shared
@pytest.mark.skipif(not VENDOR, reason="needs ../shared/samples")
@pytest.mark.parametrize("path", VENDOR, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recorded_messages_can_be_written_into(path: Path) -> None:
    """A detector's own images and ends: all but user_data and length is there, byte for byte."""
    sent = path.read_bytes()
    before = cbor2.loads(sent.removeprefix(b"\xd9\xd9\xf7"))
    if before["type"] == "end":
        (went,) = BOTH.ended(message(sent, kind=MessageKind.END), REPORT).parts
    else:
        (went,) = BOTH.kept(message(sent), DECISION).parts
    now = strictly(went)
    told = plain(now.pop("user_data"))
    assert "triage" in told
    assert told.get("user_data") == plain(before.pop("user_data", None))
    assert plain(now) == plain(before)
    tail = sent[sent.index(b"\x64data") :] if b"\x64data" in sent else b""
    assert went.endswith(tail)
    if before["type"] == "image":
        small = strictly(BOTH.placeholder(message(sent), DECISION).parts[0])
        assert list(small["data"]) == list(before["data"])
        assert small["image_id"] == before["image_id"]


REPORT = SeriesReport(
    series_id=7,
    series_unique_id="01HXYZ",
    received=10,
    forwarded=6,
    dropped=4,
    undecided=0,
    missing=1,
    duplicates=0,
    control=2,
    malformed=0,
    kept=5,
    vetoed=5,
    by_reason={"score": 10},
    by_override={"audit": 1},
    ended=False,
)


def test_the_end_of_a_series_carries_its_ledger() -> None:
    """Integers that a consumer can add up, and how dropped frames show."""
    end = message(stream2.end_message(INFO), kind=MessageKind.END)
    told = strictly(BOTH.ended(end, REPORT).parts[0])
    assert [told["series_id"], told["series_unique_id"]] == [7, "01HXYZ"]
    assert told["user_data"] == {
        "triage": {
            "v": 1, "received": 10, "forwarded": 6, "dropped": 4, "undecided": 0, "missing": 1,
            "duplicates": 0, "control": 2, "malformed": 0, "kept": 5, "vetoed": 5,
            "dropped_as": "placeholder",
        }
    }  # fmt: skip
    end1 = message(*stream1.end_parts(INFO), kind=MessageKind.END)
    assert BOTH.ended(end1, REPORT) is end1
    assert Annotator(verdicts=False, placeholders=True).ended(end, REPORT) is end
