"""``triage-sim``: a detector on loopback, and labelled training shards."""

from __future__ import annotations

import ipaddress
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from simulators.detectors.frames import SimFrame, StreamInfo

__all__ = ["app", "main"]

app = typer.Typer(
    name="triage-sim",
    help="Simulated detectors and diffraction frames for braggtriage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_SLS_SHAPE = (1024, 1024)
"""Two JUNGFRAU modules of one port each."""

_POOL = 64
"""Distinct simulated frames; longer series cycle through them, so that the rate holds."""


@app.command("detector")
def detector(
    protocol: Annotated[
        str, typer.Option(help="stream2, stream1, jungfraujoch, slsdetector or karabo.")
    ] = "stream2",
    frames: Annotated[int, typer.Option(min=1, help="Images per series.")] = 100,
    rate: Annotated[float, typer.Option(min=0.0, help="Images per second, 0 = no limit.")] = 10.0,
    series: Annotated[int, typer.Option(min=1, help="Series, one after the other.")] = 1,
    source: Annotated[
        list[Path] | None, typer.Option("--from", help="Recorded file; may be repeated.")
    ] = None,
    shape: Annotated[tuple[int, int], typer.Option(help="Rows and columns.")] = (1065, 1030),
    blank_share: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.8,
    seed: Annotated[int, typer.Option()] = 1,
    bind: Annotated[
        str, typer.Option(help="Address to bind; Jungfraujoch: several, separated by commas.")
    ] = "tcp://127.0.0.1:*",
    allow_remote: Annotated[
        bool, typer.Option(help="Allow an address that others can reach.")
    ] = False,
    socket: Annotated[
        str, typer.Option(help="push or pub; Karabo: rep too, which it has if none is named.")
    ] = "",
    channels: Annotated[int, typer.Option(min=1, max=3)] = 1,
    header_detail: Annotated[str, typer.Option(help="none, basic or all.")] = "basic",
    encoding: Annotated[
        str, typer.Option(help="Of simulated frames: bslz4, lz4, bszstd or raw.")
    ] = "bslz4",
    rotation_increment: Annotated[float, typer.Option(help="Omega per image, degree.")] = 0.0,
    fault: Annotated[list[str] | None, typer.Option(help="NAME:IMAGE_ID; may be repeated.")] = None,
    appendix: Annotated[bool, typer.Option(help="V1: truth as image appendix.")] = False,
    images_per_file: Annotated[
        int, typer.Option(min=1, help="Jungfraujoch: images in a row that go to one address.")
    ] = 1000,
    pulses: Annotated[int, typer.Option(min=1, max=2700, help="Karabo: images per train.")] = 8,
    train_modules: Annotated[
        int, typer.Option(min=1, help="Karabo: modules that the rows are cut into.")
    ] = 1,
    online: Annotated[bool, typer.Option(help="Karabo: axes turned round, pulses last.")] = False,
    bridge_version: Annotated[str, typer.Option(help="Karabo: 2.2 or 1.0.")] = "2.2",
    record: Annotated[Path | None, typer.Option(help="Capture of all that is sent.")] = None,
    modules: Annotated[str, typer.Option(help="SLS: jungfrau or eiger.")] = "jungfrau",
    ports: Annotated[tuple[int, int], typer.Option(help="SLS: rows and columns of ports.")] = (
        2,
        1,
    ),
    bits: Annotated[int, typer.Option(help="SLS: of a pixel, 4, 8, 12, 16 or 32.")] = 16,
    maps: Annotated[
        Path | None, typer.Option(help="SLS: where to write JUNGFRAU's pedestal and gain (.npz).")
    ] = None,
    lost_part: Annotated[
        list[str] | None, typer.Option(help="SLS: FRAME:PORT not sent; may be repeated.")
    ] = None,
    dead_port: Annotated[
        list[int] | None, typer.Option(help="SLS: a port that says nothing; may be repeated.")
    ] = None,
    skew: Annotated[
        int, typer.Option(min=0, help="SLS: frames that the last port lags behind the first.")
    ] = 0,
    wait_for_peer: Annotated[
        float, typer.Option(min=0.0, help="Seconds to wait for a reader before the start.")
    ] = 30.0,
    linger: Annotated[float, typer.Option(min=0.0, help="Seconds to wait at the end.")] = 30.0,
) -> None:
    """Send series of images as a detector does.

    The first line printed is a JSON document with the endpoint, the last one says what was sent.
    """
    from dataclasses import replace

    import zmq

    from simulators.detectors.detector import Detector
    from simulators.detectors.frames import recorded_frames, simulated_frames

    known = ("stream2", "stream1", "jungfraujoch", "slsdetector", "karabo")
    _check(protocol in known, f"--protocol: expected one of {', '.join(known)}")
    karabo = protocol == "karabo"
    socket = socket or ("rep" if karabo else "push")
    _check(
        socket in ("push", "pub") or (karabo and socket == "rep"),
        "--socket: expected push or pub, or rep with karabo",
    )
    _check(bridge_version in ("2.2", "1.0"), "--bridge-version: expected 2.2 or 1.0")
    _check(not (karabo and (source or record)), "--from, --record: not with karabo")
    addresses = bind.split(",")
    _check(
        len(addresses) == 1 or protocol == "jungfraujoch",
        f"--bind {bind}: several addresses only with jungfraujoch",
    )
    _check(header_detail in ("none", "basic", "all"), "--header-detail: none, basic or all")
    _check(encoding in ("bslz4", "lz4", "bszstd", "raw"), "--encoding: bslz4, lz4, bszstd, raw")
    _check(
        allow_remote or all(_is_loopback(address) for address in addresses),
        f"--bind {bind}: others could reach it; expected loopback, or --allow-remote",
    )
    if protocol == "slsdetector":
        _check(not (source or fault or record), "--from, --fault, --record: not with slsdetector")
        _check(modules in ("jungfrau", "eiger"), "--modules: expected jungfrau or eiger")
        _check(bits in (4, 8, 12, 16, 32), "--bits: expected 4, 8, 12, 16 or 32")
        _check(modules == "eiger" or bits == 16, "--bits: JUNGFRAU words have 16")
        _receivers(
            modules=modules,
            ports=ports,
            bits=bits,
            maps=maps,
            lost=[_frame_and_port(text) for text in lost_part or []],
            dead=dead_port or [],
            skew=skew,
            shape=_SLS_SHAPE if shape == (1065, 1030) else shape,
            frames=frames,
            series=series,
            rate_hz=rate,
            blank_share=blank_share,
            seed=seed,
            bind=bind,
            wait_s=wait_for_peer,
            linger_s=linger,
        )
        return
    faults = _faults(fault or [], karabo=karabo)
    try:
        if source:
            info, pool = recorded_frames(source, frames)
        else:
            info, pool = simulated_frames(
                shape=shape,
                count=min(frames, _POOL),
                seed=seed,
                blank_share=blank_share,
                encoding="raw" if karabo else encoding,
                signed=protocol == "jungfraujoch",
            )
    except (OSError, ValueError) as err:
        _fail(str(err), 1)
    if karabo:
        _bridge(
            info,
            pool,
            bind=bind,
            socket=socket,
            trains=-(-frames // pulses),
            pulses=pulses,
            modules=train_modules,
            online=online,
            rate_hz=rate,
            version=bridge_version,
            faults=faults,
            wait_s=wait_for_peer,
            linger_s=linger,
        )
        return
    info = replace(
        info,
        number_of_images=frames,
        channels=("threshold_1", "threshold_2", "difference")[:channels],
        omega_increment_deg=rotation_increment,
    )
    try:
        playing = Detector(bind, socket=socket)
    except zmq.ZMQError as err:
        _fail(f"--bind {bind}: {err}", 1)
    print(
        json.dumps({"endpoint": playing.endpoint, "protocol": protocol, "frames": frames * series}),
        flush=True,
    )
    if wait_for_peer and not playing.wait_for_peer(wait_for_peer):
        playing.close(0.0)
        _fail(f"no reader within {wait_for_peer:g} s", 1)
    began = time.monotonic()
    try:
        totals = playing.run(
            info,
            pool,
            series=series,
            rate_hz=rate,
            record=record,
            seed=seed,
            protocol=protocol,
            header_detail=header_detail,
            faults=faults,
            appendix=appendix,
            images_per_file=images_per_file,
        )
    except ValueError as err:
        playing.close(0.0)
        _fail(str(err), 1)
    playing.close(linger)
    print(
        json.dumps(
            {
                "sent": totals.messages,
                "images": totals.images,
                "series": totals.series,
                "bytes": totals.size_bytes,
                "elapsed_s": round(time.monotonic() - began, 3),
            }
        ),
        flush=True,
    )


@app.command("play")
def play(
    capture: Annotated[Path, typer.Argument(help="Made by 'triage record', or with --record.")],
    bind: Annotated[
        str, typer.Option(help="Address to bind; several, separated by commas, for several lanes.")
    ] = "tcp://127.0.0.1:*",
    socket: Annotated[str, typer.Option(help="push or pub.")] = "push",
    rate: Annotated[
        float | None,
        typer.Option(min=0.0, help="Messages per second, 0 = no limit; else as recorded."),
    ] = None,
    allow_remote: Annotated[
        bool, typer.Option(help="Allow an address that others can reach.")
    ] = False,
    wait_for_peer: Annotated[
        float, typer.Option(min=0.0, help="Seconds to wait for a reader before the start.")
    ] = 30.0,
    linger: Annotated[float, typer.Option(min=0.0, help="Seconds to wait at the end.")] = 30.0,
) -> None:
    """Send a capture once more, byte for byte; prints what `detector` prints."""
    import zmq

    from simulators.detectors.capture import captured, lanes_of
    from simulators.detectors.detector import Detector

    addresses = bind.split(",")
    _check(socket in ("push", "pub"), "--socket: expected push or pub")
    _check(
        allow_remote or all(_is_loopback(address) for address in addresses),
        f"--bind {bind}: others could reach it; expected loopback, or --allow-remote",
    )
    _check(capture.is_file(), f"{capture}: no such file")
    try:
        _check(any(True for _ in captured(capture)), f"{capture}: holds no message")
    except ValueError as err:
        _fail(str(err), 2)
    lanes = lanes_of(capture)
    _check(
        lanes <= len(addresses),
        f"--bind {bind}: {capture} was recorded from {lanes} sockets; expected as many addresses",
    )
    try:
        playing = Detector(bind, socket=socket, waits=True)
    except zmq.ZMQError as err:
        _fail(f"--bind {bind}: {err}", 1)
    print(json.dumps({"endpoint": playing.endpoint, "capture": str(capture)}), flush=True)
    if wait_for_peer and not playing.wait_for_peer(wait_for_peer):
        playing.close(0.0)
        _fail(f"no reader within {wait_for_peer:g} s", 1)
    began = time.monotonic()
    try:
        totals = playing.play(capture, rate_hz=rate)
    except ValueError as err:
        playing.close(linger)
        _fail(str(err), 1)
    playing.close(linger)
    print(
        json.dumps(
            {
                "sent": totals.messages,
                "bytes": totals.size_bytes,
                "elapsed_s": round(time.monotonic() - began, 3),
            }
        ),
        flush=True,
    )


@app.command("frames")
def frames_command(
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    frames: Annotated[
        int | None, typer.Option(min=1, help="In place of the recipe's number.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the recipe's.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    recipe: Annotated[
        str,
        typer.Option(
            help="What frames are drawn from: a TOML file, or train, or test (other crystals, "
            "detectors and wavelengths)."
        ),
    ] = "train",
    frames_per_shard: Annotated[int, typer.Option(min=1)] = 24,
    quiet: Annotated[bool, typer.Option()] = False,
) -> None:
    """Write labelled shards; resumes, and gives the same bytes for the same seed."""
    from simulators.diffraction import load_recipe, write_shards

    try:
        write_shards(
            out,
            frames=frames,
            seed=seed,
            workers=workers,
            recipe=load_recipe(recipe),
            frames_per_shard=frames_per_shard,
            progress=not quiet,
        )
    except (OSError, ValueError) as err:
        _fail(str(err), 1)


def _receivers(
    *,
    modules: str,
    ports: tuple[int, int],
    bits: int,
    maps: Path | None,
    lost: list[tuple[int, int]],
    dead: list[int],
    skew: int,
    shape: tuple[int, int],
    frames: int,
    series: int,
    rate_hz: float,
    blank_share: float,
    seed: int,
    bind: str,
    wait_s: float,
    linger_s: float,
) -> None:
    """Play receivers of slsDetectorPackage; what is printed as for other protocols."""
    import numpy as np
    import zmq

    from simulators.detectors.frames import simulated_frames
    from simulators.detectors.slsdetector import (
        Layout,
        Receivers,
        SlsFaults,
        SlsMaps,
        acquisition,
    )

    layout = Layout(detector=modules, ports=ports, bits=bits)
    try:
        info, pool = simulated_frames(
            shape=shape,
            count=min(frames, _POOL),
            seed=seed,
            blank_share=blank_share,
            encoding="raw",
        )
        images = [np.frombuffer(one.payload, one.dtype).reshape(shape) for one in pool]
        layout.shape(images[0])
        drawn = None
        if modules == "jungfrau":
            drawn = SlsMaps.drawn(shape, 12.398419843320026 / info.incident_wavelength_angstrom, 1)
            if maps is not None:
                drawn.save(maps)
        playing = Receivers(bind, ports=ports[0] * ports[1])
    except (OSError, ValueError, zmq.ZMQError) as err:
        _fail(str(err), 1)
    geometry = {
        "beam_center_x_px": info.beam_center_x_px,
        "beam_center_y_px": info.beam_center_y_px,
        "pixel_size_m": info.pixel_size_x_m,
        "detector_distance_m": info.detector_distance_m,
        "incident_wavelength_angstrom": info.incident_wavelength_angstrom,
    }
    ready = {
        "endpoint": ",".join(playing.endpoints),
        "protocol": "slsdetector",
        "frames": frames * series,
        "geometry": geometry,
    }
    print(json.dumps(ready), flush=True)
    if wait_s and not playing.wait_for_peer(wait_s):
        playing.close(0.0)
        _fail(f"no reader of every port within {wait_s:g} s", 1)
    began = time.monotonic()
    faults = SlsFaults(lost=frozenset(lost), dead=frozenset(dead), skew=skew)
    messages = size = 0
    for number in range(series):
        sent = playing.send(
            acquisition(
                images,
                layout,
                frames=frames,
                maps=drawn,
                faults=faults,
                file_index=number,
                first_number=1 + number * frames,
            ),
            rate_hz=rate_hz,
        )
        messages, size = messages + sent[0], size + sent[1]
    playing.close(linger_s)
    print(
        json.dumps(
            {
                "sent": messages,
                "images": frames * series,
                "series": series,
                "bytes": size,
                "elapsed_s": round(time.monotonic() - began, 3),
            }
        ),
        flush=True,
    )


def _frame_and_port(text: str) -> tuple[int, int]:
    frame, _, port = text.partition(":")
    _check(frame.isdigit() and port.isdigit(), f"--lost-part {text}: expected FRAME:PORT")
    return int(frame), int(port)


def _bridge(
    info: StreamInfo,
    pool: list[SimFrame],
    *,
    bind: str,
    socket: str,
    trains: int,
    pulses: int,
    modules: int,
    online: bool,
    rate_hz: float,
    version: str,
    faults: dict[int, str],
    wait_s: float,
    linger_s: float,
) -> None:
    """Play a Karabo bridge; faults go by train. What is printed is as for other protocols."""
    import zmq

    from simulators.detectors.karabo import FIRST_TRAIN, Bridge, Train, stack

    try:
        pixels = stack(info, pool, pulses=pulses, modules=modules)
        bridge = Bridge(bind, socket=socket)
    except ValueError as err:
        _fail(str(err), 1)
    except zmq.ZMQError as err:
        _fail(f"--bind {bind}: {err}", 1)
    print(
        json.dumps({"endpoint": bridge.endpoint, "protocol": "karabo", "frames": trains * pulses}),
        flush=True,
    )
    if wait_s and not bridge.wait_for_peer(wait_s):
        bridge.close(0.0)
        _fail(f"no reader within {wait_s:g} s", 1)
    began = time.monotonic()
    sent = [Train(train_id=FIRST_TRAIN + i, pixels=pixels, online=online) for i in range(trains)]
    try:
        totals = bridge.run(
            sent, rate_hz=rate_hz / pulses, version=version, faults=faults, patience_s=linger_s
        )
    except TimeoutError as err:
        bridge.close(0.0)
        _fail(str(err), 1)
    bridge.close(linger_s)
    print(
        json.dumps(
            {
                "sent": totals.messages,
                "images": totals.images,
                "series": totals.series,
                "bytes": totals.size_bytes,
                "elapsed_s": round(time.monotonic() - began, 3),
            }
        ),
        flush=True,
    )


def _faults(texts: list[str], *, karabo: bool) -> dict[int, str]:
    from simulators.detectors import faults as of_images
    from simulators.detectors import karabo as of_trains

    known = of_trains.FAULTS if karabo else tuple(of_images.FAULTS)
    faults = {}
    for text in texts:
        name, _, image_id = text.partition(":")
        _check(name in known, f"--fault {text}: expected one of {', '.join(known)}")
        _check(image_id.isdigit() or not image_id, f"--fault {text}: expected NAME:IMAGE_ID")
        faults[int(image_id or 0)] = name
    return faults


def _is_loopback(endpoint: str) -> bool:
    if endpoint.startswith(("ipc://", "inproc://")):
        return True
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check(right: bool, otherwise: str) -> None:
    if not right:
        _fail(otherwise, 2)


def _fail(why: str, code: int) -> NoReturn:
    print(f"triage-sim: {why}", file=sys.stderr)
    raise typer.Exit(code)


def main() -> None:
    """Run the command line."""
    # Set for other programs' HDF5, it keeps hdf5plugin from registering its filters in ours.
    os.environ.pop("HDF5_PLUGIN_PATH", None)
    app()


if __name__ == "__main__":
    main()
