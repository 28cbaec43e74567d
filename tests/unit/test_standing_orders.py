"""What stopped all drops of a run, as the next run and the doctor read it from its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from triage.cli.site import site_findings
from triage.config import load_settings
from triage.sinks.orders import StandingOrders, orders_in


def test_orders_are_read_as_they_were_written(tmp_path: Path) -> None:
    """By another process; the last ones written are the only ones that stand."""
    assert orders_in(tmp_path) == {}
    orders = StandingOrders(tmp_path)
    assert orders.standing == orders_in(tmp_path) == {}
    orders.write({"shadow": "one", "gate_open": "two"})
    assert StandingOrders(tmp_path).standing == {"shadow": "one", "gate_open": "two"}
    orders.write({"gate_open": "a"})
    assert orders_in(tmp_path) == {"gate_open": "a"}
    orders.write({})
    assert orders_in(tmp_path) == {}


def test_the_file_keeps_its_size(tmp_path: Path) -> None:
    """One block from the start: a disk that has become full has room for an order."""
    orders = StandingOrders(tmp_path)
    sizes = {orders.path.stat().st_size}
    orders.write({"shadow": "x" * 5000, "gate_open": "\u00e9" * 5000})
    sizes.add(orders.path.stat().st_size)
    assert sizes == {4096}
    assert set(orders_in(tmp_path)) == {"shadow", "gate_open"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 4096,
        b'{"shadow": "an op',
        b"[]",
        b'"shadow"',
        b'{"drop_all": "later version"}',
        b'{"shadow": 1}',
        b"[" * 4096,
        b"\xff\xfe",
        b"{}" + b" " * 5000,
    ],
)
def test_what_cannot_be_read_stops_all_drops(tmp_path: Path, content: bytes) -> None:
    """And says which file; it stands until it is taken back."""
    (tmp_path / "override.json").write_bytes(content)
    if content == b"{}" + b" " * 5000:
        assert orders_in(tmp_path) == {}
        return
    orders = StandingOrders(tmp_path)
    assert list(orders.standing) == ["shadow"]
    assert str(tmp_path / "override.json") in orders.standing["shadow"]
    orders.write({})
    assert json.loads(orders.path.read_bytes()) == {}
    assert orders_in(tmp_path) == {}


def test_a_place_that_cannot_be_opened_stops_all_drops(tmp_path: Path) -> None:
    """A folder where the file should be."""
    (tmp_path / "override.json").mkdir()
    assert list(orders_in(tmp_path)) == ["shadow"]


def test_the_doctor_says_what_stands(tmp_path: Path) -> None:
    """With who gave it and how it is taken back; nothing where nothing stands."""
    file = tmp_path / "i04.toml"
    settings = load_settings(
        None, {"output.directory": str(tmp_path), "source.endpoint": "ipc:///nowhere"}
    )
    StandingOrders(tmp_path).write({"shadow": "an operator asked"})
    (found,) = [f for f in site_findings(settings, file) if f.subject == "orders"]
    assert (found.state, "an operator asked" in found.found) == ("note", True)
    assert "resume" in found.remedy
    StandingOrders(tmp_path).write({})
    assert not [f for f in site_findings(settings, file) if f.subject == "orders"]
