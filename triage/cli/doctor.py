"""``triage doctor``: is this machine ready, and if not, what to do."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from triage.cli.site import Finding, site_findings

__all__ = ["doctor"]


def doctor(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Check these settings here, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Check programs, decoder, model, sockets and disk. Exit 4 when something is missing.

    With settings also their keys, addresses, ports, peers, folder, memory and service; exit 2
    when it is they that are wrong, as 'triage run' would.
    """
    from triage.config import load_settings

    settings = load_settings(config) if config else None
    findings = [check() for check in _CHECKS]
    if settings is not None and config is not None:
        findings += site_findings(settings, config)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        for f in findings:
            remedy = f"  -> {f.remedy}" if f.remedy else ""
            print(f"{f.state:<5} {f.subject:<10} {f.found}{remedy}")
    if codes := [f.exit_code for f in findings if f.state == "fail"]:
        raise typer.Exit(max(codes))


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding(
        subject="python",
        state="ok" if ok else "fail",
        found=f"{platform.python_version()}, {os.cpu_count()} cores",
        remedy="" if ok else "install Python 3.11 or newer",
    )


def _torch() -> Finding:
    import torch

    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ", CPU build"
    return Finding(subject="torch", state="ok", found=torch.__version__ + cuda)


def _device() -> Finding:
    from triage.backends import cuda
    from triage.nets import device_scorer

    no_backend, no_scorer = cuda.unavailable(), device_scorer.unavailable()
    if no_backend is not None:
        return Finding(
            subject="device",
            state="note",
            found=f"frames are reduced and scored on the CPU: {no_backend}",
            remedy="install the extra 'gpu' if this machine has an NVIDIA GPU",
        )
    if no_scorer is not None:
        return Finding(
            subject="device",
            state="note",
            found=f"frames are reduced on the device and scored on the CPU: {no_scorer}",
            remedy="install torch for CUDA: what the network reads need not leave the device then",
        )
    return Finding(
        subject="device", state="ok", found="frames are reduced and scored on the device"
    )


def _filters() -> Finding:
    import h5py
    import hdf5plugin  # noqa: F401 - registers the filters

    missing = [n for n in (32008, 32004) if not h5py.h5z.filter_avail(n)]
    return Finding(
        subject="hdf5",
        state="fail" if missing else "ok",
        found=f"HDF5 {h5py.version.hdf5_version}, filters missing: {missing or 'none'}",
        remedy="reinstall hdf5plugin" if missing else "",
    )


def _decoder() -> Finding:
    import h5py
    import hdf5plugin
    import numpy as np

    from triage.backends import open_backend
    from triage.backends.cpu import CpuBackend
    from triage.records import Frame, Series

    image = np.random.default_rng(0).poisson(0.5, (1065, 1030)).astype(np.uint16)
    with h5py.File.in_memory() as file:
        dataset = file.create_dataset(
            "d", data=image, chunks=image.shape, **hdf5plugin.Bitshuffle(cname="lz4")
        )
        chunk = dataset.id.read_direct_chunk((0, 0))[1]
    frame = Frame(
        series=Series(),
        image_id=0,
        encoding="bslz4",
        dtype=image.dtype,
        shape=image.shape,
        payload=chunk,
    )
    backend = open_backend("auto")
    views = backend.prepare([frame])  # compiles what is not compiled yet
    right = bool(np.array_equal(backend.decode(frame), image)) and (
        int(views.total.sum()) == int(image.sum())
    )
    began = time.perf_counter()
    for _ in range(5):
        backend.prepare([frame])
    milliseconds = (time.perf_counter() - began) / 5 * 1e3
    kernels = backend.kernels if isinstance(backend, CpuBackend) else "CUDA"
    state, remedy = "ok", ""
    if not right:
        state, remedy = "fail", "a frame is decoded wrongly: report this machine, do not use it"
    elif kernels == "numba":
        state = "note"
        remedy = "with a C compiler there, install again: frames are reduced faster by C"
    return Finding(
        subject="decoder",
        state=state,
        found=f"{backend.name}: {milliseconds:.1f} ms to reduce a 1M frame, kernels {kernels}",
        remedy=remedy,
    )


def _model() -> Finding:
    from triage.errors import ModelError
    from triage.nets.model import load_model
    from triage.nets.scorer import Scorer

    try:
        model = load_model()
        runtime = Scorer(model).runtime
    except ModelError as err:
        return Finding(
            subject="model", state="fail", found=str(err), remedy="reinstall the package"
        )
    card = model.card
    may = "may enforce" if card.validation else "shadow only: the card holds no validation"
    return Finding(
        subject="model",
        state="note" if runtime == "torch" else "ok",
        found=f"{card.model_id}, {may}, full exit by {runtime}",
        remedy="install the extra 'fast': OpenVINO is faster" if runtime == "torch" else "",
    )


def _socket() -> Finding:
    import zmq

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    pull = context.socket(zmq.PULL)
    try:
        port = pull.bind_to_random_port("tcp://127.0.0.1")
    except zmq.ZMQError as err:
        return Finding(
            subject="sockets", state="fail", found=str(err), remedy="free loopback ports"
        )
    finally:
        pull.close()
        context.term()
    return Finding(
        subject="sockets", state="ok", found=f"libzmq {zmq.zmq_version()}, bound port {port}"
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return Finding(
        subject="disk",
        state="ok" if free > 10 else "note",
        found=f"{free:.0f} GB free in the working folder",
        remedy="" if free > 10 else "kept frames need room: choose another [output] directory",
    )


_CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _torch,
    _device,
    _filters,
    _decoder,
    _model,
    _socket,
    _disk,
)
