"""``triage demo``: the main job on this machine, nothing to prepare.

Three processes, as at a beamline: ``triage-sim`` plays the detector, this process decides, and
a small writer takes what is forwarded and writes it as NXmx. At the end the kept file is opened
with plain h5py and compared, byte for byte, with what the detector sent.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triage.errors import ConfigError, TriageError

if TYPE_CHECKING:
    from triage.records import Message

__all__ = ["demo"]

_DETECTOR_START_S = 120
"""Rendering the simulated frames and compiling the renderer take up to a minute on a laptop."""


def demo(
    out: Annotated[
        Path,
        typer.Option(help="Folder for everything the demo leaves; an earlier demo's is replaced."),
    ] = Path("demo-out"),
    frames: Annotated[int, typer.Option(min=1, help="Frames to stream.")] = 200,
    rate: Annotated[float, typer.Option(help="Frames per second.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Of the simulated frames.")] = 1,
    quiet: Annotated[bool, typer.Option(help="No progress.")] = False,
) -> None:
    """Simulated detector -> triage in enforce mode -> writer, then a look at what was kept."""
    import shutil

    from rich.console import Console

    from triage.cli.assembly import (
        opened_brain,
        opened_outputs,
        pipeline_options,
        run_to_end,
        show_summary,
        write_report,
    )
    from triage.config import load_settings
    from triage.ingest.subscriber import Subscriber
    from triage.metrics import Metrics
    from triage.pipeline import Pipeline

    console = Console()
    if stale := _earlier_demo(out):
        console.print(f"note: {out} holds an earlier demo, which is replaced", highlight=False)
    for path in stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    overrides: dict[str, Any] = {
        "policy.mode": "enforce",
        "output.directory": str(out),
        "output.state_directory": str(out / "state"),
        "pipeline.deadline_ms": 5000,
    }
    writer = _Writer(out / "kept")
    overrides["forward.endpoint"] = writer.endpoint
    settings = load_settings(None, overrides)
    metrics = Metrics()
    console.print(f"starting a simulated detector: {frames} frames of 1030 x 1065 pixels")
    detector = _Detector(out / _SENT, frames=frames, rate_hz=rate, seed=seed)
    try:
        brain = opened_brain(settings, metrics)
        endpoint = detector.endpoint()
        source = Subscriber(endpoint, queue_bytes=settings.pipeline.queue_bytes)
        with opened_outputs(settings, brain, metrics, live=True) as outputs:
            pipeline = Pipeline(
                _UntilDone(source, detector),
                brain.deciders,
                outputs,
                pipeline_options(settings, brain, live=True),
                metrics,
                model_id=brain.model_id,
            )
            writer.start()
            elapsed_s = run_to_end(pipeline, console, quiet=quiet)
        source.close()
    finally:
        detector.close()
        kept_files = writer.close()
    show_summary(pipeline, brain, elapsed_s, console)
    report = write_report(out, pipeline, brain, elapsed_s)
    _show_truth(out, console)
    totals = pipeline.ledger.totals()
    identical = _compare_kept_with_sent(kept_files, out / _SENT)
    console.print(
        f"kept file: {identical} of {totals.forwarded} forwarded frames are bit-identical to "
        "what the detector sent, under their original image ids",
        highlight=False,
    )
    for path in (*kept_files, out / "decisions.parquet", report):
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    if not totals.balanced or totals.received != frames or identical != totals.forwarded:
        raise TriageError(
            f"demo: {totals.received} of {frames} frames received, {totals.forwarded} "
            f"forwarded, {identical} found again in the kept file; expected all of them; "
            f"see {report}"
        )


_LEFT = (
    *("kept", "state", "decisions.parquet", "report.json", "journal.jsonl", "triage.lock"),
    *("recoveries.jsonl", "decisions.arrows"),
)
_SENT = "sent.zcap"
"""What a demo leaves beside :data:`_LEFT`, and no other run does."""


def _earlier_demo(out: Path) -> list[Path]:
    """What an earlier demo left in a folder.

    Raises:
        ConfigError: the folder holds something else, or a run writes into it.
    """
    from triage.sinks.folder import is_held

    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    others = [name for name in there if name not in (*_LEFT, _SENT)]
    if there and (others or _SENT not in there or is_held(out)):
        shown = ", ".join((others or there)[:5])
        raise ConfigError(
            f"demo: {out} holds {shown}, which no demo that has ended left there; expected a new "
            "or empty folder, or that of an earlier demo: name one with --out"
        )
    return [out / name for name in there]


class _Detector:
    """The ``triage-sim`` process: a stranger that only shares the wire with us."""

    def __init__(self, record: Path, *, frames: int, rate_hz: float, seed: int) -> None:
        command = [
            *(sys.executable, "-m", "simulators", "detector", "--protocol", "stream2"),
            *("--frames", str(frames), "--rate", str(rate_hz), "--seed", str(seed)),
            *("--shape", "1065", "1030", "--blank-share", "0.8"),
            *("--wait-for-peer", "120", "--record", str(record)),
        ]
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except OSError as err:
            raise TriageError(f"demo: the simulated detector did not start: {err}") from err

    def endpoint(self) -> str:
        """Where it is bound; waits until its frames are rendered."""
        line: list[str] = []
        stdout = self._process.stdout
        if stdout is not None:
            reader = threading.Thread(target=lambda: line.append(stdout.readline()), daemon=True)
            reader.start()
            reader.join(_DETECTOR_START_S)
        if not line or not line[0].strip():
            raise TriageError(
                "demo: the simulated detector printed no endpoint; "
                "run 'triage-sim detector --frames 1' to see why"
            )
        return str(json.loads(line[0])["endpoint"])

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        if self.running:
            self._process.terminate()
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()


class _UntilDone:
    """A live source that ends when the series has ended and its detector is gone."""

    def __init__(self, source: Any, detector: _Detector) -> None:
        self._source = source
        self._detector = detector
        self._ended = False
        self._silent = False

    def receive(self, timeout_ms: int) -> list[Message]:
        messages: list[Message] = self._source.receive(timeout_ms)
        self._ended = self._ended or any(m.kind == "end" for m in messages)
        self._silent = not messages
        return messages

    @property
    def exhausted(self) -> bool:
        return self._silent and (self._ended or not self._detector.running)

    def close(self) -> None:
        self._source.close()


class _Writer:
    """What stands downstream at a beamline: takes messages, writes NXmx, knows no verdicts."""

    def __init__(self, directory: Path) -> None:
        from triage.ingest.subscriber import Subscriber
        from triage.sinks.nxmx import KeptWriter

        self._source = Subscriber("tcp://127.0.0.1:*", bind=True)
        self._kept = KeptWriter(directory)
        self._files: list[Path] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)
        self.endpoint = self._source.endpoint

    def start(self) -> None:
        self._thread.start()

    def _write(self) -> None:
        while True:
            messages = self._source.receive(100)
            if not messages and self._closing.is_set():
                return
            for message in messages:
                if message.kind == "start" and message.series is not None:
                    self._kept.start(message.series)
                elif message.frame is not None:
                    self._kept.write(message.frame, None)
                elif message.kind == "end" and message.series is not None:
                    self._files += self._kept.end(message.series.key)

    def close(self) -> list[Path]:
        """The files written, once everything that was sent is in them."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(60)
        self._kept.close()
        self._source.close()
        return self._files


def _show_truth(out: Path, console: Any) -> None:
    """The decisions against the truth that the simulator put into ``user_data``."""
    import pyarrow.parquet as pq

    truth = {
        image_id: values
        for image_id, values in ((i, d.get("truth")) for i, d in _sent_user_data(out))
        if isinstance(values, dict)
    }
    table = pq.read_table(out / "decisions.parquet").to_pylist()
    hits = [r for r in table if (truth.get(r["image_id"]) or {}).get("n_visible", -1) >= 10]
    blanks = [r for r in table if (truth.get(r["image_id"]) or {}).get("n_visible", -1) == 0]
    console.print(
        f"simulated truth: {sum(r['verdict'] == 'keep' for r in hits)} of {len(hits)} hits "
        f"kept, {sum(r['verdict'] == 'veto' for r in blanks)} of {len(blanks)} blanks vetoed; "
        f"{len(table) - len(hits) - len(blanks)} frames show 1 to 9 spots and are neither",
        highlight=False,
    )


def _sent_messages(path: Path) -> list[dict[str, Any]]:
    """Every CBOR message the detector recorded, read by cbor2 and not by our own parser."""
    import struct

    import cbor2

    data = path.read_bytes()
    at = 0
    messages = []
    while at < len(data):
        (parts,) = struct.unpack_from("<I", data, at)
        at += 4
        for _ in range(parts):
            (length,) = struct.unpack_from("<Q", data, at)
            at += 8
            part = data[at : at + length]
            at += length
            messages.append(cbor2.loads(part.removeprefix(b"\xd9\xd9\xf7")))
    return messages


def _sent_user_data(out: Path) -> list[tuple[int, dict[str, Any]]]:
    return [
        (message["image_id"], message["user_data"])
        for message in _sent_messages(out / _SENT)
        if message["type"] == "image" and isinstance(message.get("user_data"), dict)
    ]


def _compare_kept_with_sent(kept_files: list[Path], sent: Path) -> int:
    """Kept frames whose stored chunk and decoded pixels equal what was sent under that id."""
    import h5py
    import hdf5plugin  # noqa: F401 - registers the filters that plain h5py needs
    import numpy as np

    payloads: dict[int, bytes] = {}
    for message in _sent_messages(sent):
        if message["type"] == "image":
            (array,) = message["data"].values()
            _, typed = array.value
            _, _, payload = typed.value.value
            payloads[message["image_id"]] = payload
    identical = 0
    for path in kept_files:
        if not path.name.endswith("_master.h5"):
            continue
        with h5py.File(path) as master:
            image_ids = np.asarray(master["/entry/triage/image_id"])
            group = master["/entry/data"]
            row = 0
            for name in sorted(key for key in group if key.startswith("data_")):
                dataset = group[name]
                for i in range(dataset.shape[0]):
                    _, chunk = dataset.id.read_direct_chunk((i, 0, 0))
                    pixels = dataset[i]
                    through_vds = group["data"][row]
                    same = chunk == payloads[int(image_ids[row])]
                    identical += int(same and np.array_equal(pixels, through_vds))
                    row += 1
    return identical
