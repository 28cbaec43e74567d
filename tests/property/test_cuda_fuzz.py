"""Mutated payloads through the CUDA kernels, built for the host under sanitizers."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
from host_cuda import build

MUTATIONS = int(os.environ.get("TRIAGE_FUZZ_MUTATIONS", "3000"))
GRID = 16
# (dtype, shape, k, pixels of a block): odd sizes, planes off the word, raw tails, many blocks.
SEEDS = [
    ("u1", (13, 11), 2, 64),
    ("<u2", (13, 11), 2, 32),
    ("<u2", (31, 29), 4, 104),
    ("<i2", (31, 29), 2, 256),
    ("<u4", (13, 11), 2, 16),
    ("<u4", (40, 61), 8, 512),
    ("<u2", (1, 7), 2, 8),
]


def corpus() -> bytes:
    """Each good payload, without its first 12 bytes, behind what the kernels are told of it."""
    rng = np.random.default_rng(12)
    data = b""
    for dtype, shape, k, block in SEEDS:
        pixels = rng.poisson(2.0, shape).astype(dtype)
        pixels[shape[0] // 3 : shape[0] // 2] = 3
        pixels[:, shape[1] // 2] = np.iinfo(dtype).max
        with h5py.File("good", "w", driver="core", backing_store=False) as file:
            options = hdf5plugin.Bitshuffle(nelems=block, cname="lz4")
            dataset = file.create_dataset("d", data=pixels, chunks=shape, **options)
            payload = bytes(dataset.id.read_direct_chunk((0, 0))[1])[12:]
        item = pixels.dtype.itemsize
        whole = pixels.size // 8 * 8 * item
        signed = int(pixels.dtype.kind == "i")
        data += struct.pack("<9i", item, signed, *shape, k, GRID, block * item, whole, len(payload))
        data += payload
    return data


def test_no_mutated_payload_leaves_its_buffers(tmp_path: Path) -> None:
    """No sanitizer speaks, and fused and separate kernels agree on faults and cells."""
    (tmp_path / "corpus").write_bytes(corpus())
    program = build(
        tmp_path,
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        appended=Path(__file__).parents[1].joinpath("cuda_fuzz.cpp").read_text(encoding="utf-8"),
    )
    done = subprocess.run(
        [program, tmp_path / "corpus", str(MUTATIONS), "5"],
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    refused, faulty, fine = map(int, done.stdout.split())
    assert refused + faulty + fine == MUTATIONS
    assert min(refused, faulty, fine) > MUTATIONS // 10
