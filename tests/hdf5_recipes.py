"""HDF5 files from lists of steps, as JSON has them, and changes of such lists."""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import fuzz_grammar as grammar
import h5py
import hdf5plugin
import numpy as np
from pictures import encode, picture

_SHAPE = (36, 40)
_FILTERS = ("none", "bslz4", "lz4", "bszstd", "gzip", "shuffle gzip", "gzip bslz4")
_DTYPES = ("<u2", "u1", "<u4", "<i4", "<f4", "<f8", "<u8", ">u2", "S5", "<i2")
_SIDES = (0, 1, 2, 3, 31, 32, 36, 40, 64, 10241, 65536, 2**20, 2**31, 2**40, 2**62)
_MOST_BYTES = 1 << 22
"""Of what is written; more may be declared."""

_MISUSE = (
    *(OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError),
    *(OverflowError, MemoryError, NotImplementedError, ZeroDivisionError),
)


# -- building ------------------------------------------------------------------------------------


def build(path: Path, steps: list[Any]) -> None:
    """Write a file by steps; one that cannot be taken is left out."""
    try:
        with h5py.File(path, "w") as file:
            for step in steps:
                try:
                    _take(file, step)
                except _MISUSE:
                    continue
    except _MISUSE:
        return
    for step in steps:
        if isinstance(step, dict) and step.get("do") == "damage":
            data = bytearray(path.read_bytes())
            at = int(step["at"]) % len(data)
            data[at] ^= int(step["bits"]) % 256
            path.write_bytes(data)


def _options(name: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "gzip" in name:
        options = {"compression": "gzip", "shuffle": "shuffle" in name}
    if name == "lz4":
        options = dict(hdf5plugin.LZ4())
    if name in ("bslz4", "bszstd"):
        options = dict(hdf5plugin.Bitshuffle(cname=name.removeprefix("bs").replace("zstd", "zstd")))
    return options


def _sides(values: Any) -> tuple[int, ...] | None:
    return None if values is None else tuple(int(side) for side in values[:5])


def _leads_out(file: Any, path: str) -> bool:
    """Whether a place lies behind a link: the library would write to another file, or a device."""
    here = ""
    for name in str(path).strip("/").split("/"):
        here = f"{here}/{name}"
        link = file.get(here, getlink=True)
        if isinstance(link, h5py.SoftLink | h5py.ExternalLink):
            return True
    return False


def _take(file: Any, step: dict[str, Any]) -> None:
    do, path = step["do"], step.get("path", "x")
    if _leads_out(file, path):
        return
    if do == "images":
        _images(file, step)
    elif do == "value":
        value = step["value"]
        made = file.create_dataset(path, data=value.encode() if isinstance(value, str) else value)
        if "units" in step:
            made.attrs["units"] = step["units"]
    elif do == "declared":
        shape, chunks = _sides(step["shape"]), _sides(step.get("chunks"))
        file.create_dataset(
            path, shape, step["dtype"], chunks=chunks, **_options(step.get("filter", "none"))
        )
    elif do == "mask":
        mask = np.zeros(_SHAPE, np.uint32)
        mask[3, 4:9] = 1
        file.create_dataset(path, data=mask, chunks=_SHAPE, **hdf5plugin.Bitshuffle(cname="lz4"))
    elif do == "group":
        for _ in range(min(int(step.get("deep", 1)), 500)):
            file = file.require_group(path)
    elif do == "soft":
        file[path] = h5py.SoftLink(step["to"])
    elif do == "hard":
        file[path] = file[step["to"]]
    elif do == "external":
        file[path] = h5py.ExternalLink(step["file"], step["to"])
    elif do == "virtual":
        layout = h5py.VirtualLayout(_sides(step["shape"]), step["dtype"])
        for source in step["sources"][:8]:
            inner = h5py.VirtualSource(source["file"], source["to"], _sides(source["shape"]))
            first, count = int(source["first"]), int(source["count"])
            layout[first : first + count] = inner
        file.create_virtual_dataset(path, layout)


def _images(file: Any, step: dict[str, Any]) -> None:
    """A dataset whose chunks are given as bytes; what h5py would not write, it is handed."""
    shape, chunks = _sides(step["shape"]), _sides(step.get("chunks"))
    dataset = file.create_dataset(
        step["path"], shape, step["dtype"], chunks=chunks, **_options(step.get("filter", "none"))
    )
    for chunk in step["stored"][:16]:
        data = base64.b64decode(chunk["data"])
        if len(data) < _MOST_BYTES:
            mask = int(chunk.get("skip", 0)) % 2**32
            dataset.id.write_direct_chunk(tuple(int(n) for n in chunk["at"]), data, mask)


# -- runs to begin with --------------------------------------------------------------------------


def _stored(dtype: str, encoding: str, frames: int) -> list[dict[str, Any]]:
    made = []
    for i in range(frames):
        pixels = picture(dtype, _SHAPE, seed=i)
        block = 1024 if encoding != "raw" else 0
        data = base64.b64encode(encode(pixels, encoding, block)).decode()
        made.append({"at": [i, 0, 0], "data": data})
    return made


def _image_steps(path: str, dtype: str = "<u2", encoding: str = "bslz4", frames: int = 3) -> Any:
    return {
        "do": "images",
        "path": path,
        "shape": [frames, *_SHAPE],
        "chunks": [1, *_SHAPE],
        "dtype": dtype,
        "filter": "none" if encoding == "raw" else encoding,
        "stored": _stored(dtype, encoding, frames),
    }


def _header() -> list[Any]:
    at = "entry/instrument/detector/"
    values = [
        *((f"{at}beam_center_x", 20.5, "pixel"), (f"{at}beam_center_y", 18.5, "pixel")),
        *((f"{at}x_pixel_size", 75e-6, "m"), (f"{at}y_pixel_size", 0.075, "mm")),
        *((f"{at}detector_distance", 0.2, "m"), (f"{at}saturation_value", 60000, "")),
        *((f"{at}count_time", 0.01, "s"), (f"{at}description", "made", "")),
        ("entry/instrument/beam/incident_wavelength", 1.0, "angstrom"),
        ("entry/sample/goniometer/omega", [0.0, 0.1, 0.2], "deg"),
        ("entry/sample/goniometer/phi_increment", 0.0, "deg"),
    ]
    steps: list[Any] = [
        {"do": "value", "path": path, "value": value, "units": units}
        for path, value, units in values
    ]
    return [*steps, {"do": "mask", "path": f"{at}pixel_mask"}]


def runs() -> list[dict[str, list[Any]]]:
    """Sound runs: an EIGER master with links, NXmx with a virtual dataset, bare files, a CXI."""
    data = "run_data_000001.h5"
    linked = {
        "run_master.h5": [
            *_header(),
            *(
                {"do": "external", "path": f"entry/data/data_{n:06}", "file": f, "to": "entry/d"}
                for n, f in ((1, data), (2, "run_data_000002.h5"), (3, "run_data_000003.h5"))
            ),
        ],
        data: [_image_steps("entry/d")],
        "run_data_000002.h5": [_image_steps("entry/d", frames=2)],
    }
    source = {"file": data, "to": "entry/d", "shape": [3, *_SHAPE], "first": 0, "count": 3}
    virtual = {
        "run_master.h5": [
            *_header(),
            {
                "do": "virtual",
                "path": "entry/data/data",
                "shape": [3, *_SHAPE],
                "dtype": "<u2",
                "sources": [source],
            },
            {"do": "value", "path": "entry/triage/image_id", "value": [5, 6, 9]},
        ],
        data: [_image_steps("entry/d")],
    }
    bare = [
        {"bare.h5": [*_header(), _image_steps("entry/data/data", dtype, encoding, 2)]}
        for dtype, encoding in (("<i4", "lz4"), ("u1", "raw"), ("<u4", "bszstd"), ("<f4", "raw"))
    ]
    deep = {"far.h5": [_image_steps("a/b/c/d", "<u4", "bslz4", 1), {"do": "group", "path": "g"}]}
    banded = _image_steps("data", "<u2", "bslz4", 1)
    banded["chunks"] = [1, 18, 40]
    banded["stored"] = [
        {
            "at": [0, top, 0],
            "data": base64.b64encode(encode(picture("<u2", (18, 40)), "bslz4", 0)).decode(),
        }
        for top in (0, 18)
    ]
    return [linked, virtual, *bare, deep, {"banded.h5": [banded]}]


# -- changes -------------------------------------------------------------------------------------


def _any_step(rng: random.Random, files: list[str]) -> dict[str, Any]:
    path = rng.choice(
        [
            *("entry/data/data", "entry/data/data_000001", "entry/data/data_000002", "entry/d"),
            *("data", "entry", "entry/data", "entry/instrument/detector", "a/b"),
            "entry/instrument/detector/pixel_mask",
            "entry/instrument/detector/beam_center_x",
            *("entry/triage/image_id", "entry/sample/goniometer/omega", "entry/sample/goniometer"),
        ]
    )
    file = rng.choice([*files, "none.h5", ".", "/dev/null", "", "../run_master.h5"])
    to = rng.choice(["entry/d", "entry/data/data", "/", "entry", "data", "entry/data/data_000001"])
    sides = [rng.choice(_SIDES) for _ in range(rng.choice([0, 1, 2, 3, 3, 3, 4]))]
    if rng.randrange(2):
        sides = [rng.choice([1, 3, 2**31, 2**40]), *_SHAPE]
    chunks = None
    if rng.randrange(3):
        chunks = [rng.choice([1, 2, 36, 40, 64, 2**16]) for _ in sides]
        if rng.randrange(2) and len(sides) == 3:
            chunks = [1, *sides[1:]]
    kind = rng.randrange(9)
    if kind == 0:
        return {"do": "soft", "path": path, "to": to}
    if kind == 1:
        return {"do": "external", "path": path, "file": file, "to": to}
    if kind == 2:
        return {"do": "hard", "path": path, "to": to}
    if kind == 3:
        return {"do": "group", "path": rng.choice([path, "g"]), "deep": rng.choice([1, 40, 300])}
    if kind == 4:
        value = rng.choice([0, -1, 1e30, 2**62, [], [1, 2], "text", True, [[1.0]], float("nan")])
        return {"do": "value", "path": path, "value": value, "units": rng.choice(["mm", "", "x"])}
    if kind < 7:
        return {
            "do": "declared",
            "path": path,
            "shape": sides,
            "chunks": chunks,
            "dtype": rng.choice(_DTYPES),
            "filter": rng.choice(_FILTERS),
        }
    source = {"file": file, "to": to, "shape": sides, "first": 0, "count": sides[0] if sides else 1}
    return {
        "do": "virtual",
        "path": path,
        "shape": sides,
        "dtype": "<u2",
        "sources": [source] * rng.randint(1, 2),
    }


def changed(document: Any, rng: random.Random) -> Any:
    """A run with a step, or a chunk, changed."""
    files = [name for name in document if isinstance(document[name], list)] if document else []
    if not files:
        return rng.choice(runs())
    name = rng.choice(files)
    steps = document[name]
    kind = rng.randrange(10)
    images = [s for s in steps if isinstance(s, dict) and s.get("stored")]
    if kind < 3 and images:
        chunk = rng.choice(rng.choice(images)["stored"])
        if rng.randrange(12) == 0:
            chunk["skip"] = rng.choice([0, 1, 2, 2**32 - 1])
        else:
            data = grammar.changed_payload(base64.b64decode(chunk["data"]), rng)
            chunk["data"] = base64.b64encode(data).decode()
    elif kind == 3 and images:
        step = rng.choice(images)
        which = rng.randrange(4)
        if which == 0:
            step["dtype"] = rng.choice(_DTYPES)
        elif which == 1:
            step["filter"] = rng.choice(_FILTERS)
        elif which == 2:
            step["shape"][rng.randrange(len(step["shape"]))] = rng.choice(_SIDES)
        elif step.get("chunks"):
            step["chunks"][rng.randrange(len(step["chunks"]))] = rng.choice(_SIDES[1:8])
    elif kind == 4 and steps:
        del steps[rng.randrange(len(steps))]
    elif kind == 5 and steps:
        place = rng.randrange(len(steps))
        if isinstance(steps[place], dict) and not steps[place].get("stored"):
            steps[place] = grammar.changed_document(steps[place], rng)
    elif kind == 6 and len(files) > 1:
        del document[name]
    elif kind == 7:
        other = rng.choice(runs())
        document[rng.choice(["run_master.h5", "more.h5"])] = rng.choice(list(other.values()))
    else:
        step = _any_step(rng, files)
        # What stands at a place first keeps it.
        steps.insert(rng.choice([0, len(steps)]), step)
    return document
