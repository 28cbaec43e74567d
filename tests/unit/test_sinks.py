"""Journal, table, publisher and forwarder, each read back by something that is not ours."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import zmq

from triage.errors import ConfigError
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
from triage.sinks.forwarder import Forwarder
from triage.sinks.journal import Journal
from triage.sinks.publisher import HelloMessage, Publisher, schema
from triage.sinks.table import DecisionTable

SCHEMA_FILE = Path(__file__).resolve().parents[2] / "docs" / "schema" / "decision-v1.json"


def decision(image_id: int = 4, **fields: Any) -> Decision:
    values: dict[str, Any] = {
        "series_id": 12,
        "series_unique_id": "01ABC",
        "image_id": image_id,
        "file": "",
        "frame": -1,
        "ordinal": image_id,
        "verdict": Verdict.VETO,
        "reason": Reason.SCORE,
        "forwarded": False,
        "override": Override.NONE,
        "scores": Scores(p_blank=0.75),
        "model_id": "m",
        "policy_id": "p",
        "latency_us": 1500.0,
    }
    return Decision(**{**values, **fields})


def report() -> SeriesReport:
    return SeriesReport(
        series_id=12,
        series_unique_id="01ABC",
        received=3,
        forwarded=2,
        dropped=1,
        undecided=0,
        missing=0,
        duplicates=0,
        control=0,
        malformed=0,
        kept=2,
        vetoed=1,
        by_reason={"score": 3},
        by_override={},
        ended=True,
    )


@pytest.fixture
def context() -> Any:
    ctx: zmq.Context[Any] = zmq.Context()
    yield ctx
    ctx.destroy(linger=0)


def test_the_journal_has_a_drop_before_the_call_returns(tmp_path: Path) -> None:
    """Another reader sees the line at once, without the journal being closed or flushed."""
    journal = Journal(tmp_path / "j" / "journal.jsonl")
    assert journal.dropped([decision(4)]) == 1
    assert journal.dropped([decision(9, scores=Scores(p_blank=math.nan)), decision(10)]) == 2
    lines = [json.loads(t) for t in (tmp_path / "j" / "journal.jsonl").read_text().splitlines()]
    assert [(line["series_id"], line["image_id"], line["p_blank"]) for line in lines] == [
        (12, 4, 0.75),
        (12, 9, None),
        (12, 10, 0.75),
    ]
    journal.close()
    journal.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_and_not_raised() -> None:
    """/dev/full refuses every write: the caller learns that the drop is not on record."""
    journal = Journal(Path("/dev/full"))
    assert journal.dropped([decision()]) == 0
    journal.close()


def test_a_journal_that_cannot_be_opened_names_file_and_remedy(tmp_path: Path) -> None:
    """Starting without a journal is refused."""
    with pytest.raises(ConfigError, match=r"journal .*directory"):
        Journal(tmp_path)


def test_the_table_has_the_documented_columns_and_nan_for_unscored(tmp_path: Path) -> None:
    """Names, types and order as documented; an unscored head is NaN, not null."""
    table = DecisionTable(tmp_path / "decisions.parquet")
    table.add([decision(4)])
    assert not (tmp_path / "decisions.parquet").exists()
    table.add([decision(5, override=Override.SHADOW, forwarded=True)])
    table.close()
    table.close()
    arrow = pq.read_table(tmp_path / "decisions.parquet")
    documented = {
        "series_id": "int64",
        "series_unique_id": "string",
        "image_id": "int64",
        "file": "string",
        "frame": "int64",
        "verdict": "string",
        "reason": "string",
        "forwarded": "bool",
        "override": "string",
        "p_blank": "float",
        "p_ice": "float",
        "p_bad_ice": "float",
        "p_multilattice": "float",
        "quality": "float",
        "n_lattices": "float",
        "mosaicity_deg": "float",
        "d_vis_angstrom": "float",
        "uncertainty": "float",
        "ood": "bool",
        "model_id": "string",
        "policy_id": "string",
        "latency_us": "float",
    }
    found = {field.name: str(field.type) for field in arrow.schema}
    assert list(found.items())[: len(documented)] == list(documented.items())
    rows = arrow.to_pylist()
    assert [r["image_id"] for r in rows] == [4, 5]
    assert [r["override"] for r in rows] == ["", "shadow"]
    assert rows[0]["p_blank"] == 0.75
    assert math.isnan(rows[0]["p_ice"])


def subscriber(context: Any, endpoint: str) -> Any:
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.RCVTIMEO, 10_000)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(endpoint)
    return socket


def test_a_new_subscriber_is_greeted_and_then_told_decisions_and_ledger(context: Any) -> None:
    """Topics and fields as documented; NaN travels as null."""
    publisher = Publisher(
        "tcp://127.0.0.1:*",
        lambda: HelloMessage(
            version="1",
            model_id="m",
            recipe_fingerprint="f",
            policy_id="p",
            mode="shadow",
            thresholds={"p_blank_veto": 0.9},
        ),
        context=context,
    )
    listener = subscriber(context, publisher.endpoint)
    deadline = 2_000
    while not listener.poll(5) and deadline:
        publisher.greet_newcomers()
        deadline -= 1
    topic, body = listener.recv_multipart()
    assert topic == b"hello/1/"
    hello = json.loads(body)
    assert (hello["v"], hello["type"], hello["mode"]) == (1, "hello", "shadow")
    assert list(hello)[:2] == ["v", "type"]

    publisher.tell([decision(4)])
    topic, body = listener.recv_multipart()
    assert topic == b"decision/1/12/"
    told = json.loads(body)
    assert list(told)[:2] == ["v", "type"]
    assert (told["image_id"], told["verdict"], told["p_blank"]) == (4, "veto", 0.75)
    assert told["p_ice"] is None

    publisher.series_report(report())
    topic, body = listener.recv_multipart()
    listener.close()
    assert topic == b"series_report/1/12/"
    ledger = json.loads(body)
    assert (ledger["received"], ledger["dropped"], ledger["balanced"]) == (3, 1, True)
    publisher.close()


def test_what_one_listener_says_takes_nothing_from_another(context: Any) -> None:
    """An XSUB sends messages of its own and ends subscriptions that nobody had, before it has
    anybody's attention by one; the other listener is told every decision after it."""
    publisher = Publisher(
        "tcp://127.0.0.1:*",
        lambda: HelloMessage(
            version="1", model_id="m", recipe_fingerprint="f", policy_id="p", mode="shadow",
            thresholds={},
        ),
        context=context,
    )  # fmt: skip
    listener = subscriber(context, publisher.endpoint)
    while not listener.poll(5):
        publisher.greet_newcomers()
    listener.recv_multipart()
    other = context.socket(zmq.XSUB)
    other.setsockopt(zmq.RCVTIMEO, 10_000)
    other.connect(publisher.endpoint)
    for _ in range(5):
        other.send(b"something")
        other.send_multipart([b"\x01", b"\x00"])
        other.send(b"\x00another topic")
    other.send(b"\x01hello/")
    while not listener.poll(5):
        publisher.greet_newcomers()
    other.recv_multipart()
    listener.recv_multipart()
    publisher.tell([decision(4)])
    assert listener.recv_multipart()[0] == b"decision/1/12/"
    other.close()
    listener.close()
    publisher.close()


def test_the_published_schema_is_the_one_in_the_documentation() -> None:
    """docs/schema/decision-v1.json is what the code sends."""
    assert json.loads(SCHEMA_FILE.read_text()) == schema()


def test_the_forwarder_sends_parts_unchanged_in_order(context: Any) -> None:
    """Multipart messages and empty parts arrive byte for byte."""
    writer = context.socket(zmq.PULL)
    writer.setsockopt(zmq.RCVTIMEO, 10_000)
    port = writer.bind_to_random_port("tcp://127.0.0.1")
    forwarder = Forwarder(f"tcp://127.0.0.1:{port}", context=context)
    messages = [(b"one",), (b"{}", b"", bytes(range(256)) * 400), (b"end",)]
    for parts in messages:
        assert forwarder.send(Message(kind=MessageKind.CONTROL, parts=parts), 10_000)
    assert [tuple(writer.recv_multipart()) for _ in messages] == messages
    forwarder.close()
    writer.close()


def test_the_forwarder_queues_nothing_for_a_writer_that_is_not_there(context: Any) -> None:
    """Without a peer a message stays the caller's."""
    forwarder = Forwarder("tcp://127.0.0.1:9", context=context)
    assert forwarder.send(Message(kind=MessageKind.CONTROL, parts=(b"frame",)), 0) is False
    forwarder.close(abandon=True)


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://256.0.0.1:1"])
def test_an_address_that_cannot_be_bound_is_a_configuration_error(endpoint: str) -> None:
    """The message names the key and the value."""
    with pytest.raises(ConfigError, match="endpoint"):
        Forwarder(endpoint, bind=True)
