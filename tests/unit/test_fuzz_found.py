"""What fuzzing found, each as small as it could be made, with what was wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import cbor2
import h5py
import hdf5plugin
import msgspec
import numpy as np
import pytest
from decided import decided
from pictures import encode, picture
from sheltered import run_sheltered

from triage.annotation import Annotator
from triage.backends import open_backend
from triage.cli.settings import parsed_overrides
from triage.config import load_settings
from triage.errors import ConfigError, MalformedMessage
from triage.ingest import hdf5
from triage.ingest.files import Files
from triage.ingest.json_text import parsed_json
from triage.ingest.karabo import TrainParser
from triage.ingest.stream1 import Stream1Parser
from triage.ingest.stream2 import Stream2Parser
from triage.records import Frame, Recipe, Series, Verdict

PIXELS = picture("<u2", (36, 40))


def start(**fields: Any) -> bytes:
    return cbor2.dumps({"type": "start", "series_id": 1, **fields})


# -- streams -------------------------------------------------------------------------------------


def test_a_boolean_is_no_side_of_an_image() -> None:
    """[5, true] passed for a shape, and the backend raised for every frame of the batch."""
    described = {"htype": "dimage_d-1.0", "shape": [5, True], "type": "uint8", "encoding": "<"}
    parts = [{"htype": "dimage-1.0", "series": 1, "frame": 0, "hash": ""}, described]
    v1 = Stream1Parser().parse([*(json.dumps(part).encode() for part in parts), bytes(5)], 0)
    array = cbor2.CBORTag(40, [[5, True], cbor2.CBORTag(64, bytes(5))])
    image = {"type": "image", "series_id": 1, "image_id": 0, "data": {"a": array}}
    v2 = Stream2Parser().parse([cbor2.dumps(image)], 0)
    header = {"source": "a", "content": "array", "path": "b", "dtype": "uint8"}
    train = msgspec.msgpack.encode({**header, "shape": [1, 5, True]})
    karabo = TrainParser().parse([train, bytes(5)], 0)[-1]
    for message in (v1, v2, karabo):
        assert message.kind == "image"
        assert message.frame is not None
        assert message.frame.fault == "malformed"


@pytest.mark.parametrize(("depth", "kind"), [(32, "image"), (33, "malformed"), (900, "malformed")])
def test_json_is_as_deep_wherever_it_is_read_from(depth: int, kind: str) -> None:
    """Python's own bound moves with the depth of the caller's stack: the same bytes were an image
    here and malformed there. Brackets in texts are none."""

    def read(below: int) -> str:
        if below:
            return read(below - 1)
        inner = "[" * (depth - 1) + "]" * (depth - 1)
        first = f'{{"htype": "dimage-1.0", "t": "\\"{"[{" * 99}", "series": {inner}}}'.encode()
        return Stream1Parser().parse([first, b"", b"", b""], 0).kind.value

    assert [read(below) for below in (0, 700)] == [kind, kind]


def test_a_wall_of_open_texts_costs_no_more_than_its_length() -> None:
    """A part of 1 MiB whose every quote might begin a text is refused at once."""
    for wall in ('"' + '\\"' * 500_000, "[" * 1_000_000, '"\\'):
        with pytest.raises(MalformedMessage):
            parsed_json("[" * 20 + "{" * 20 + wall)
        with pytest.raises(MalformedMessage):
            parsed_json('"' + "[" * 40 + wall)


def test_user_data_that_is_as_deep_as_may_be_is_not_wrapped() -> None:
    """With the verdict around it, it was one level too deep for the next reader."""
    decision = decided(Frame(series=Series(), image_id=0), verdict=Verdict.KEEP)
    for depth in (30, 31):
        user_data: Any = 1
        for _ in range(depth):
            user_data = [user_data]
        image = {"type": "image", "series_id": 1, "image_id": 0, "user_data": user_data}
        pixels = cbor2.CBORTag(40, [[1, 5], cbor2.CBORTag(64, bytes(5))])
        parser = Stream2Parser()
        parser.parse([start()], 0)
        message = parser.parse([cbor2.dumps(image | {"data": {"a": pixels}})], 0)
        assert message.frame is not None
        assert message.frame.fault is None
        written = Annotator(verdicts=True, placeholders=False).kept(message, decision)
        again = parser.parse(list(written.parts), 0)
        assert again.frame is not None
        assert again.frame.fault is None
        assert (written.parts == message.parts) == (depth == 31)


def test_a_header_beyond_single_precision_warns_of_nothing() -> None:
    """A distance of 1e300 made numpy warn, for each start message, on the standard error."""
    message = Stream2Parser().parse([start(detector_distance=1e300, beam_center_x=1.0)], 0)
    assert message.series is not None
    assert message.series.geometry is None


def test_a_float_that_signals_warns_of_nothing() -> None:
    """Rounding a signalling NaN among raw float pixels made numpy warn for each frame."""
    pixels = np.full((4, 4), 2.5, "<f4")
    pixels.view("<u4")[1, 2] = 0x7F800001
    frame = Frame(
        series=Series(), image_id=0, dtype=pixels.dtype, shape=(4, 4), payload=pixels.tobytes()
    )
    views = open_backend("cpu", Recipe(grid=16)).prepare([frame])
    assert views.errors == (None,)
    # 2.5 rounds to 2; fifteen pixels have a value.
    assert (int(views.total.sum()), int(views.count.sum())) == (30, 15)


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[policy]\nmode = " + "[" * 3000,
        "[metrics]\nport = " + "9" * 5000,
        "[geometry]\nbeam_center_x_px = nan\n",
        "[geometry]\nrotation_increment_deg = inf\n",
        "#" * ((1 << 20) + 1),
    ],
    ids=["deep", "digits", "nan", "inf", "large"],
)
def test_a_file_that_goes_too_far_is_a_configuration_error(tmp_path: Path, text: str) -> None:
    """These ended in a traceback, or passed every bound."""
    file = tmp_path / "triage.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=str(file)):
        load_settings(file)


@pytest.mark.parametrize("value", ['{"a":' * 3000, "9" * 5000], ids=["deep", "digits"])
def test_a_flag_that_goes_too_far_is_a_text(value: str) -> None:
    """These ended in a traceback; now they are the texts they are, and refused as such."""
    overrides = parsed_overrides([f"metrics.port={value}"])
    assert overrides == {"metrics.port": value}
    with pytest.raises(ConfigError, match="port"):
        load_settings(None, overrides)


# -- recorded runs -------------------------------------------------------------------------------

READ = """
import sys
from pathlib import Path
from triage.ingest.files import Files
source = Files([Path(sys.argv[1])])
faults = []
while not source.exhausted:
    faults += [m.frame.fault for m in source.receive(0) if m.frame is not None]
assert len(faults) == source.total_frames, (len(faults), source.total_frames)
print(*(fault.value if fault else "sound" for fault in faults))
"""


def outcomes(path: Path) -> list[str]:
    """The fault of each image of a run, read in a process of its own: the library may end it."""
    return run_sheltered(READ, str(path)).stdout.split()


def test_a_chunk_whose_mask_names_another_filter_is_looked_at(tmp_path: Path) -> None:
    """Bit 1 of a mask leaves out the second filter: the first still decodes, and believes."""
    path = tmp_path / "a.h5"
    lies = struct.pack(">QII", PIXELS.nbytes, 8192, 2**31 - 1) + b"A" * 40
    with h5py.File(path, "w") as file:
        data = file.create_dataset(
            "data", (2, 36, 40), "<u2", chunks=(1, 36, 40), **hdf5plugin.Bitshuffle(cname="lz4")
        )
        data.id.write_direct_chunk((0, 0, 0), lies, 2)
        data.id.write_direct_chunk((1, 0, 0), encode(PIXELS, "bslz4"), 2)
    assert outcomes(path) == ["malformed", "sound"]


@pytest.mark.parametrize("files", [("a.h5",), ("a.h5", "b.h5")], ids=["itself", "each other"])
def test_a_virtual_dataset_made_of_itself_is_a_fault(tmp_path: Path, files: Any) -> None:
    """The library followed it until the stack was full."""
    for name, other in zip(files, (*files[1:], files[0]), strict=True):
        layout = h5py.VirtualLayout((3, 36, 40), "<u2")
        layout[0:3] = h5py.VirtualSource(other, "entry/data/data", (3, 36, 40))
        with h5py.File(tmp_path / name, "w") as file:
            file.create_group("entry/data").create_virtual_dataset("data", layout)
    assert outcomes(tmp_path / "a.h5") == ["malformed"] * 3


def test_data_links_to_what_is_no_image_hold_no_frame(tmp_path: Path) -> None:
    """A group, a number or a table behind ``data_000001`` raised out of the search for runs."""
    path = tmp_path / "a_master.h5"
    with h5py.File(path, "w") as file:
        file.create_group("entry/data/data_000001")
        file["entry/data/data_000002"] = 5
        file["entry/data/data_000003"] = np.zeros((2, 3, 36, 40), np.uint16)
        file["entry/data/data_000004"] = np.stack([PIXELS, PIXELS])
    assert outcomes(path) == ["sound"] * 2
    assert Files([path]).total_frames == 2


def test_a_virtual_dataset_of_no_known_extent_is_a_fault(tmp_path: Path) -> None:
    """A source as long as the numbers go has no bounds, which was not thought of."""
    path, many = tmp_path / "a.h5", 2**40
    layout = h5py.VirtualLayout((many, 36, 40), "<u2")
    layout[0:many] = h5py.VirtualSource("none.h5", "data", (many, 36, 40))
    with h5py.File(path, "w") as file:
        file.create_group("entry/data").create_virtual_dataset("data", layout)
    source = Files([path])
    assert source.total_frames == 1
    assert "expected at most 16777216" in source.unreadable[0][1]


def looks(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[bool], int]:
    """Whether each image of a run is sound, and how often a chunk was looked at for them."""
    looked: list[Any] = []
    look = hdf5._check_chunk
    monkeypatch.setattr(hdf5, "_check_chunk", lambda *chunk: looked.append(1) or look(*chunk))
    source = Files([path])
    frames = []
    while not source.exhausted:
        frames += [message.frame for message in source.receive(0) if message.frame is not None]
    source.close()
    return [frame.fault is None for frame in frames], len(looked)


def test_a_run_costs_what_it_holds_and_not_what_it_declares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 10,000 images of 1,639 chunks was asked for every one; two chunks are stored."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset(
            "entry/data/data", (10_241, 36, 65_536), "<u4", chunks=(1, 36, 40)
        )
        data[5, :, :40] = 7
        data[5, :, 400:440] = 7
    sound, looked = looks(path, monkeypatch)
    assert [i for i, each in enumerate(sound) if each] == [5]
    assert (len(sound), looked) == (10_241, 2)


def test_a_source_that_gives_more_images_than_are_taken_is_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of its images are meant is not told, so each was looked at for each."""
    many = 60
    with h5py.File(tmp_path / "b.h5", "w") as file:
        data = file.create_dataset("data", (2 * many, 18, 40), "<u2", chunks=(1, 18, 40))
        data[:] = PIXELS.reshape(2, 18, 40).repeat(many, 0).reshape(data.shape)
    layout = h5py.VirtualLayout((many, 36, 40), "<u2")
    layout[:] = h5py.VirtualSource("b.h5", "data", (2 * many, 18, 40))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("entry/data").create_virtual_dataset("data", layout)
    assert looks(tmp_path / "a.h5", monkeypatch) == ([True] * many, 2 * many)


def test_an_image_of_which_no_source_is_there_is_a_fault(tmp_path: Path) -> None:
    """The library fills in zeros for it: a blank frame of which nothing was ever stored."""
    layout = h5py.VirtualLayout((4, 36, 40), "<u2")
    layout[0:2] = h5py.VirtualSource("there.h5", "data", (2, 36, 40))
    layout[2:4] = h5py.VirtualSource("gone.h5", "data", (2, 36, 40))
    with h5py.File(tmp_path / "there.h5", "w") as file:
        file["data"] = np.stack([PIXELS, PIXELS])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("entry/data").create_virtual_dataset("data", layout)
    assert outcomes(tmp_path / "a.h5") == ["sound", "sound", "malformed", "malformed"]


def test_doubles_beyond_single_precision_warn_of_nothing(tmp_path: Path) -> None:
    """Narrowing them made numpy warn for each frame; they are no counts and are left out."""
    path = tmp_path / "a.h5"
    pixels = PIXELS.astype(np.float64)
    pixels[3, 4] = 1e300
    with h5py.File(path, "w") as file:
        file["entry/data/data"] = pixels[None]
    assert outcomes(path) == ["sound"]
