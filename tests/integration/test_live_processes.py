"""Three processes on loopback: detector, triage, and a writer that is a plain PULL socket."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cbor2
import pyarrow.parquet as pq
import pytest
from loopback import Writer, run_chain

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"


@pytest.fixture
def writer() -> Iterator[Writer]:
    running = Writer()
    yield running
    running.close()


def read_zcap(path: Path) -> list[tuple[bytes, ...]]:
    """Messages of a capture: u32 parts, then u64 length and bytes per part, little-endian."""
    data, at, messages = path.read_bytes(), 0, []
    while at < len(data):
        (count,) = struct.unpack_from("<I", data, at)
        at += 4
        parts = []
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", data, at)
            at += 8
            parts.append(data[at : at + length])
            at += length
        messages.append(tuple(parts))
    return messages


def run(tmp_path: Path, writer: Writer, *detector_options: str) -> dict[str, Any]:
    """A series that is recorded as it is sent, in enforce mode; the report."""
    report, said = run_chain(
        tmp_path / "out",
        ["--record", str(tmp_path / "sent.zcap"), *detector_options],
        ["--mode", "enforce", "--forward", writer.endpoint],
    )
    assert "ledger balanced" in said
    return report


def body(message: tuple[bytes, ...]) -> dict[str, Any]:
    decoded = cbor2.loads(message[0].removeprefix(b"\xd9\xd9\xf7"))
    assert isinstance(decoded, dict)
    return decoded


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "real").is_dir(), reason="needs ../shared/real")
def test_real_eiger_frames_pass_byte_for_byte_and_drops_are_accounted(
    tmp_path: Path, writer: Writer
) -> None:
    """What the writer gets is what was sent, less the drops in the journal, in order."""
    real = SHARED / "real"
    report = run(
        tmp_path,
        writer,
        *("--frames", "30", "--rate", "5"),
        *("--from", str(real / "eiger4M_dark_hotpixels_lz4.h5")),
        *("--from", str(real / "eiger4M_hdf5plugin_bitshuffle.h5")),
    )
    sent = read_zcap(tmp_path / "sent.zcap")
    journal_path = tmp_path / "out" / "journal.jsonl"
    dropped = {json.loads(line)["image_id"] for line in journal_path.read_text().splitlines()}
    expected = [m for m in sent if body(m)["type"] != "image" or body(m)["image_id"] not in dropped]
    assert writer.messages == expected
    kinds = [body(m)["type"] for m in writer.messages]
    assert (kinds[0], kinds[-1]) == ("start", "end")
    assert (kinds.count("start"), kinds.count("end")) == (1, 1)
    totals = report["totals"]
    assert (totals["received"], totals["dropped"]) == (30, len(dropped))
    assert totals["forwarded"] == kinds.count("image") == 30 - len(dropped)
    rows = pq.read_table(tmp_path / "out" / "decisions.parquet").to_pylist()
    assert [r["image_id"] for r in rows] == list(range(30))
    assert {r["image_id"] for r in rows if not r["forwarded"]} == dropped


@pytest.mark.parametrize("protocol", ["stream2", "stream1"])
def test_simulated_frames_pass_through_both_protocols(
    tmp_path: Path, writer: Writer, protocol: str
) -> None:
    """Every part of every forwarded message is one of those sent, in the order sent."""
    report = run(
        tmp_path,
        writer,
        *("--protocol", protocol, "--frames", "24", "--rate", "20"),
        *("--shape", "512", "512", "--seed", "3"),
    )
    sent = read_zcap(tmp_path / "sent.zcap")
    remaining = iter(sent)
    assert all(message in remaining for message in writer.messages), "order or bytes differ"
    assert report["totals"]["received"] == 24
    assert len(writer.messages) == len(sent) - report["totals"]["dropped"]
