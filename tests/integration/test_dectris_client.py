"""DECTRIS' own Stream V2 clients, unchanged, behind our detector and our forwarder.

They stand in the repository dectris/documentation under stream_v2/examples: ``client.py``, named by
the variable ``TRIAGE_DECTRIS_CLIENT``, and a C program, whose built ``example`` is named by
``TRIAGE_DECTRIS_EXAMPLE``. Both connect to port 31001.
"""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pyarrow.parquet as pq
import pytest
from loopback import run_chain
from pictures import on_the_wire

from simulators.detectors.detector import series_messages
from simulators.detectors.frames import StreamInfo

CLIENT = os.environ.get("TRIAGE_DECTRIS_CLIENT")
EXAMPLE = os.environ.get("TRIAGE_DECTRIS_EXAMPLE")
PORT = 31001
pytestmark = pytest.mark.interop
needs_client = pytest.mark.skipif(
    CLIENT is None, reason="needs DECTRIS' client.py, named by TRIAGE_DECTRIS_CLIENT"
)
needs_example = pytest.mark.skipif(
    EXAMPLE is None, reason="needs DECTRIS' built C example, named by TRIAGE_DECTRIS_EXAMPLE"
)


def port_is_free() -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", PORT)) != 0


def heard(
    tmp_path: Path, command: list[str], *detector: str, verdict: str = "none"
) -> tuple[list[int], str]:
    """Image ids forwarded to a client in enforce mode, and what it said up to the series' end."""
    if not port_is_free():
        pytest.skip(f"port {PORT}, which the client asks, is taken")
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as client:
        try:
            run_chain(
                tmp_path / "out",
                ["--frames", "12", "--rate", "20", "--shape", "512", "512", *detector],
                [
                    *("--mode", "enforce", "--forward", f"tcp://127.0.0.1:{PORT}"),
                    *("--set", "forward.bind=true"),
                    *("--set", f"forward.verdict={verdict}"),
                ],
            )
            assert client.stdout is not None
            said = ""
            for line in client.stdout:
                said += line
                if re.search(r"MESSAGE\[end\]|^END MESSAGE", line):
                    break
        finally:
            client.kill()
    rows = pq.read_table(tmp_path / "out" / "decisions.parquet").to_pylist()
    return [row["image_id"] for row in rows if row["forwarded"]], said


@needs_client
@pytest.mark.parametrize("header_detail", ["basic", "all"])
@pytest.mark.parametrize("encoding", ["bslz4", "lz4", "raw"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_client_py_decodes_what_our_detector_sends(
    dtype: str, encoding: str, header_detail: str
) -> None:
    """Its own decoders give the pixels back, of images and of the masks of the start message."""
    hook = runpy.run_path(str(CLIENT), run_name="client")["tag_hook"]
    image = np.random.default_rng(1).poisson(3.0, (40, 56)).astype(dtype)
    frame = on_the_wire(image, encoding)
    info = StreamInfo(shape=image.shape, dtype=image.dtype, number_of_images=1)
    start, sent, end = (
        cbor2.loads(message.parts[0], tag_hook=hook)
        for message in series_messages(info, [frame], header_detail=header_detail)
    )
    assert [m["type"] for m in (start, sent, end)] == ["start", "image", "end"]
    (data,) = sent["data"].values()
    assert data.dtype == image.dtype
    assert np.array_equal(data, image)
    masks: dict[str, Any] = start.get("pixel_mask", {})
    assert bool(masks) == (header_detail == "all")
    assert all(mask.shape == image.shape for mask in masks.values())


@needs_client
@pytest.mark.parametrize("verdict", ["none", "user_data"])
def test_client_py_reads_what_is_forwarded(tmp_path: Path, verdict: str) -> None:
    """Start, the images that were not dropped in their order, end; with or without a verdict."""
    command = [sys.executable, str(CLIENT), "127.0.0.1"]
    forwarded, said = heard(tmp_path, command, verdict=verdict)
    assert re.findall(r"MESSAGE\[(\w+)\]", said) == ["start", *["image"] * len(forwarded), "end"]
    assert [int(i) for i in re.findall(r"'image_id': (\d+)", said)] == forwarded
    assert len(forwarded) > 0
    assert said.count("'verdict'") == (len(forwarded) if verdict == "user_data" else 0)


@needs_example
@pytest.mark.parametrize(("channels", "verdict"), [("1", "none"), ("2", "user_data")])
def test_the_c_example_reads_what_is_forwarded(tmp_path: Path, channels: str, verdict: str) -> None:
    """It ends at the first message that it cannot parse; it says ``error`` of an image that it
    cannot decode."""
    command = ["stdbuf", "-oL", str(EXAMPLE), "127.0.0.1"]
    forwarded, said = heard(tmp_path, command, "--channels", channels, verdict=verdict)
    kinds = re.findall(r"^(START|IMAGE|END) MESSAGE", said, re.MULTILINE)
    assert kinds == ["START", *["IMAGE"] * len(forwarded), "END"]
    assert [int(i) for i in re.findall(r"^image_id: (\d+)", said, re.MULTILINE)] == forwarded
    arrays = re.findall(r'^data: ".*" dim \[512 512\] type', said, re.MULTILINE)
    assert len(arrays) == int(channels) * len(forwarded) > 0
    assert "error" not in said
