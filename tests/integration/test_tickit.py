"""tickit-devices' EIGER, Diamond's emulator with the detector's own REST interface.

It needs cbor2 < 6 and so an environment of its own; its command ``tickit`` is found on PATH or
named by the variable ``TRIAGE_TICKIT``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from simplon import Emulator, free_ports

from triage.backends import open_backend
from triage.ingest.subscriber import Subscriber

TICKIT = os.environ.get("TRIAGE_TICKIT") or shutil.which("tickit")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        TICKIT is None, reason="needs tickit-devices in an environment of its own: TRIAGE_TICKIT"
    ),
]


@pytest.fixture
def ports() -> dict[str, int]:
    return dict(zip(("rest", "legacy", "cbor"), free_ports(3), strict=True))


@pytest.fixture
def emulator(tmp_path: Path, ports: dict[str, int]) -> Emulator:
    (tmp_path / "eiger.yaml").write_text(
        "- type: tickit_devices.eiger.Eiger\n  inputs: {}\n  name: eiger\n"
        f"  host: 127.0.0.1\n  port: {ports['rest']}\n  stream_host: 127.0.0.1\n"
        f"  stream_legacy_port: {ports['legacy']}\n  stream_cbor_port: {ports['cbor']}\n"
    )
    return Emulator([str(TICKIT), "all", "eiger.yaml"], tmp_path, ports["rest"], "1.8.0")


@pytest.mark.parametrize("stream", ["legacy", "cbor"])
def test_a_series_of_a_16m_eiger_is_read(
    emulator: Emulator, ports: dict[str, int], stream: str
) -> None:
    """Armed and triggered over REST: three frames with the figures that wire.md gives.

    Stream V2 sends another frame than Stream V1, with one pixel more at the maximum.
    """

    def set_up(emulator: Emulator) -> Subscriber:
        emulator.initialize()
        assert emulator.put("detector/config/trigger_mode", "ints")
        assert emulator.put("detector/config/nimages", 3)
        assert emulator.put("stream/config/mode", "enabled")
        assert emulator.put("stream/config/format", stream)
        return Subscriber(f"tcp://127.0.0.1:{ports[stream]}")

    messages = emulator.series(set_up, images=3)
    assert [m.kind.value for m in messages[:5]] == ["start", "image", "image", "image", "end"]
    frames = [m.frame for m in messages if m.frame is not None]
    assert [f.image_id for f in frames] == [0, 1, 2]
    for frame in frames:
        assert frame.fault is None
        pixels = open_backend("cpu").decode(frame)
        assert pixels.shape == (4362, 4148)
        if stream == "legacy":
            assert int((pixels == 65535).sum()) == 1253074
            assert int(pixels[pixels < 65534].sum()) == 9876
        else:
            assert int((pixels == 65535).sum()) == 1253075
            assert int(pixels[pixels < 65534].max()) == 6504
