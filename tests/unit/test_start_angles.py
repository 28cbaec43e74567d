"""Angles at which a sweep begins, as detectors tell them."""

from __future__ import annotations

import json

import cbor2

from simulators.detectors import stream1, stream2
from simulators.detectors.frames import StreamInfo
from triage.ingest.stream1 import Stream1Parser
from triage.ingest.stream2 import Stream2Parser

INFO = StreamInfo(shape=(40, 56), series_id=7, series_unique_id="01HXYZ")
MAGIC = b"\xd9\xd9\xf7"


def test_stream2_tells_angles_by_axis() -> None:
    """``goniometer`` holds a map for each axis; an axis without a start tells none."""
    told = cbor2.loads(stream2.start_message(INFO).removeprefix(MAGIC))
    told["goniometer"] = {"omega": {"start": 90.5, "increment": 0.1}, "chi": {"start": 40}}
    message = Stream2Parser().parse((MAGIC + cbor2.dumps(told),), 0)
    assert message.series is not None
    assert message.series.starts_deg == {"omega": 90.5, "chi": 40.0}
    assert message.series.increments_deg["omega"] == 0.1


def test_stream1_tells_angles_in_its_configuration() -> None:
    """``omega_start`` and the like."""
    parts = list(stream1.header_parts(INFO))
    told = json.loads(parts[1]) | {"omega_start": 90.5, "omega_increment": 0.1}
    parts[1] = json.dumps(told).encode()
    message = Stream1Parser().parse(tuple(parts), 0)
    assert message.series is not None
    assert message.series.starts_deg["omega"] == 90.5
