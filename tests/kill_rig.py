"""A detector and a writer that survive, and between them a process that is killed again and again.

All three are processes of their own, joined by TCP. The conductor is the writer: it knows what was
sent, because the detector sends image_ids from 0, and what came; it reads the rest from the files
that any operator has: the journal of drops, the record of recoveries and the last report.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import cbor2
import zmq

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

__all__ = [
    "PATIENCE_S",
    "ROOT",
    "Account",
    "Zygote",
    "accounted",
    "kill_again_and_again",
    "opened_detector",
]

PATIENCE_S = 60.0


class Killed(Protocol):
    """What starts the process under test, one at a time."""

    def start(self) -> int:
        """Start it, once the one before is gone; its process id."""
        ...

    def wait(self, seconds: float) -> None:
        """Until the last one is gone."""
        ...


@dataclass(frozen=True, kw_only=True)
class Account:
    """What became of the images of a series, by image_id.

    Attributes:
        sent: that the detector's socket took.
        at_writer: in the order seen.
        journalled: whole lines of the journal.
        undecided, in_doubt: named by the record of recoveries.
        report: of the last process, the series.
        kills: SIGKILLs.
        kills_at_start: those before anything of the new process had reached the writer.
    """

    sent: int
    at_writer: list[int]
    journalled: list[int]
    undecided: list[int]
    in_doubt: list[int]
    report: dict[str, Any]
    kills: int
    kills_at_start: int
    starts_seen: int
    seconds: float

    @property
    def unnamed(self) -> set[int]:
        """Images that no file and no message names."""
        named = {*self.at_writer, *self.journalled, *self.undecided, *self.in_doubt}
        return set(range(self.sent)) - named

    def wrong(self) -> list[str]:
        """What is not as promised; empty when all is."""
        report, writer = self.report, set(self.at_writer)
        dropped, undecided = set(self.journalled), set(self.undecided)
        doubt = set(self.in_doubt)
        handed_and_undecided = len(doubt & undecided)
        checks = {
            "an image is at the writer twice": len(writer) == len(self.at_writer),
            "an image is in the journal twice": len(dropped) == len(self.journalled),
            "an image is at the writer and in the journal": not writer & dropped,
            "an image at the writer was undecided and not in doubt": (
                not writer & undecided - doubt
            ),
            "a dropped image is called undecided": not dropped & undecided,
            "missing is not what nothing names": report["missing"] == len(self.unnamed),
            "received and missing are not what was sent": (
                report["received"] + report["missing"] == self.sent
            ),
            "dropped is not what the journal holds": report["dropped"] == len(dropped),
            "undecided is not what the recoveries name": report["undecided"] == len(undecided),
            "in_doubt is not what the recoveries name": report["in_doubt"] == len(doubt),
            "the ledger does not add up": report["received"]
            == report["forwarded"] + report["dropped"] + report["undecided"],
            "more of what was forwarded is not at the writer than is in doubt": (
                report["forwarded"] - report["in_doubt"] + handed_and_undecided
                <= len(writer - undecided)
            ),
            "more is at the writer than was forwarded": (
                len(writer - undecided) <= report["forwarded"]
            ),
            "more restarts than kills": report["restarts"] <= self.kills,
            "the end of the series was not seen": report["ended"],
            "lost frames are called balanced": report["balanced"] == (not undecided),
        }
        return [what for what, holds in checks.items() if not holds]


class Writer:
    """A PULL socket; knows each image by what is in its message.

    Args:
        small: buffers, so that it soon holds back who sends when it takes nothing.

    Attributes:
        takes: it takes messages; clear it, and it takes none.
    """

    def __init__(self, *, small: bool = False) -> None:
        self.takes = threading.Event()
        self.takes.set()
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        if small:
            self._socket.setsockopt(zmq.RCVHWM, 1)
            self._socket.setsockopt(zmq.RCVBUF, 1 << 14)
        self._socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.image_ids: list[int] = []
        self.starts = self.ends = 0
        self.highest = -1
        self.came = threading.Condition()
        self._stop = False
        self._thread = threading.Thread(target=self._take, name="writer", daemon=True)
        self._thread.start()

    def _take(self) -> None:
        while not self._stop:
            if not (self.takes.wait(0.05) and self._socket.poll(50)):
                continue
            message = cbor2.loads(self._socket.recv())
            with self.came:
                if message["type"] == "image":
                    self.image_ids.append(message["image_id"])
                    self.highest = max(self.highest, message["image_id"])
                self.starts += message["type"] == "start"
                self.ends += message["type"] == "end"
                self.came.notify_all()

    def wait(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Until so much has come.

        Raises:
            TimeoutError: it has not.
        """
        with self.came:
            if not self.came.wait_for(condition, seconds):
                raise TimeoutError(
                    f"waited {seconds:g} s for {what}; {len(self.image_ids)} images came, the "
                    f"last was {self.highest}"
                )

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        self._socket.close()
        self._context.term()


def kill_again_and_again(
    process: Killed,
    writer: Writer,
    detector: subprocess.Popen[str],
    *,
    frames: int,
    kills: int,
    seed: int,
    until: float = 0.97,
    patience_s: float = PATIENCE_S,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[int, int, int]:
    """Kill at moments told by what the writer has seen; images sent, kills, kills at the start.

    The moments are random image numbers, and after each of them a few messages more, or none: a
    process is killed while it starts too, and while it takes over from the one before.

    Args:
        until: share of the images after which there is no kill any more: a kill may take along
            all that the detector still sends.
        before, after: called around each kill of a process from which something has come.
    """
    chance = random.Random(seed)
    moments = sorted(chance.sample(range(frames // 100, round(frames * until)), kills))
    pid, at_start = process.start(), 0
    for number, moment in enumerate(moments):
        seen = len(writer.image_ids)
        more = 0 if number and chance.random() < 0.2 else chance.randrange(1, 40)
        if more:
            writer.wait(
                f"image {moment}",
                lambda m=moment, n=seen + more: (  # type: ignore[misc]
                    writer.highest >= m and len(writer.image_ids) >= n
                ),
                patience_s,
            )
            before()
        else:
            time.sleep(chance.random() * 0.05)
        at_start += len(writer.image_ids) == seen
        os.kill(pid, signal.SIGKILL)
        if more:
            after()
        pid = process.start()
        if number % 10 == 9:
            say(f"{number + 1} kills, the writer has {len(writer.image_ids)} images")
    said, _ = detector.communicate(timeout=patience_s)
    writer.wait("the end of the series", lambda: writer.ends > 0, patience_s)
    os.kill(pid, signal.SIGTERM)
    process.wait(patience_s)
    return json.loads(said.splitlines()[-1])["images"], kills, at_start


def accounted(
    out: Path, writer: Writer, sent: int, kills: int, at_start: int, seconds: float
) -> Account:
    """Read what the processes left in ``out``."""
    report = json.loads((out / "report.json").read_text())
    undecided, in_doubt = _recoveries(out / "recoveries.jsonl")
    (series,) = report["series"]
    return Account(
        sent=sent,
        at_writer=list(writer.image_ids),
        journalled=[line["image_id"] for line in _lines(out / "journal.jsonl")],
        undecided=undecided,
        in_doubt=in_doubt,
        report=series,
        kills=kills,
        kills_at_start=at_start,
        starts_seen=writer.starts,
        seconds=seconds,
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text().splitlines():
        yield json.loads(text)


def _recoveries(path: Path) -> tuple[list[int], list[int]]:
    """Image_ids undecided and in doubt; of a run that was recovered twice the last record counts,
    because the process that wrote the first was killed before it had taken over."""
    last = {line["died"]: line for line in _lines(path)}

    def named(what: str) -> list[int]:
        return [i for line in last.values() for a, b in line[what] for i in range(a, b + 1)]

    return named("undecided"), named("in_doubt")


# -- processes -----------------------------------------------------------------------------------


@contextlib.contextmanager
def opened_detector(
    *, frames: int, rate_hz: float, side_px: int, simulated: bool = False
) -> Iterator[tuple[Any, str]]:
    """A detector process that has bound its socket, and its address.

    Args:
        simulated: images with and without diffraction, instead of noise.
    """
    kind = "simulated" if simulated else "noise"
    command = [__file__, "detector", str(frames), str(rate_hz), str(side_px), kind]
    detector = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert detector.stdout is not None
        yield detector, json.loads(detector.stdout.readline())["endpoint"]
    finally:
        detector.kill()
        detector.wait()
        if detector.stdout is not None:
            detector.stdout.close()


class Zygote:
    """Starts the process under test by a fork: what it needs was imported once.

    Everything of ``triage run`` between the sockets is in it, put together by the same code; only
    the network is replaced, by a rule on image numbers.
    """

    def __init__(
        self,
        endpoint: str,
        writer: str,
        out: Path,
        state: Path,
        *,
        queue_bytes: int = 1 << 24,
        message_bytes: int = 1 << 18,
    ) -> None:
        settings = {
            "source.endpoint": endpoint,
            "source.message_bytes": message_bytes,
            "forward.endpoint": writer,
            "policy.mode": "enforce",
            "policy.audit_fraction": 0.0,
            "pipeline.queue_bytes": queue_bytes,
            "pipeline.deadline_ms": 20_000,
            "output.directory": str(out),
            "output.state_directory": str(state),
            "metrics.port": 0,
        }
        command = [__file__, "zygote", json.dumps(settings)]
        self._process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self) -> int:
        """Start one; its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write("start\n")
        self._process.stdin.flush()
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def wait(self, seconds: float) -> None:
        """Until the last one is gone."""
        self._process.communicate("", timeout=seconds)
        if self._process.returncode:
            raise RuntimeError(f"the last process ended with {self._process.returncode}")

    def close(self) -> None:
        """Whatever became of it."""
        self._process.kill()
        self._process.wait()


def _pool(side_px: int, kind: str) -> tuple[Any, list[Any]]:
    """What tells of a series, and a few images."""
    import numpy as np

    from simulators.detectors.frames import SimFrame, StreamInfo, simulated_frames

    shape = (side_px, side_px)
    if kind == "simulated":
        return simulated_frames(count=20, shape=shape, blank_share=0.5, seed=3)
    chance = np.random.default_rng(5)
    pool = [
        SimFrame(
            payload=chance.poisson(1.0, shape).astype("<u2").tobytes(),
            encoding="raw",
            dtype=np.dtype("<u2"),
            shape=shape,
        )
        for _ in range(4)
    ]
    return StreamInfo(shape=shape), pool


def _detect(frames: int, rate_hz: float, side_px: int, kind: str) -> None:
    """Send a series, with small buffers and never to catch up: what a kill takes along is what
    was on its way at that rate."""
    from simulators.detectors.detector import series_messages

    info, pool = _pool(side_px, kind)
    info = replace(info, number_of_images=frames, series_id=7, series_unique_id="KILLS")
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 4)
    socket.setsockopt(zmq.SNDBUF, 1 << 16)
    socket.bind("tcp://127.0.0.1:*")
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    _say(json.dumps({"endpoint": endpoint}))
    images = 0
    for sent in series_messages(info, pool):
        began_s = time.monotonic()
        socket.send_multipart(sent.parts)
        images += sent.kind == "image"
        if (left_s := began_s + 1 / rate_hz - time.monotonic()) > 0:
            time.sleep(left_s)
    socket.close(linger=30_000)
    context.term()
    _say(json.dumps({"images": images}))


def _zygote(settings: str) -> None:
    import pyarrow  # noqa: F401

    import triage.cli.assembly
    import triage.cli.books
    import triage.ledger.state
    import triage.pipeline
    import triage.sinks.nxmx
    import triage.sinks.table  # noqa: F401

    pid = 0
    for _ in sys.stdin:
        if pid:
            os.waitpid(pid, 0)
        pid = os.fork()
        if not pid:
            os._exit(_serve(json.loads(settings)))
        _say(str(pid))
    _, status = os.waitpid(pid, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


def _serve(settings: dict[str, Any]) -> int:
    """What ``triage run --mode enforce`` does, with another decider."""
    try:
        _run(settings)
    except BaseException:  # noqa: BLE001 - the edge of a process
        # Nothing of the zygote's may run here: the test reads what the process left.
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _run(overrides: dict[str, Any]) -> None:
    from rich.console import Console

    from triage.cli.assembly import (
        Brain,
        opened_outputs,
        pipeline_options,
        run_to_end,
        write_report,
    )
    from triage.config import load_settings
    from triage.ingest import open_source
    from triage.metrics import Metrics
    from triage.pipeline import Judgement, Pipeline
    from triage.policy import Policy
    from triage.records import Frame, Reason, Scores, Verdict

    policy = Policy(mode="enforce", p_blank_veto=0.5, audit_fraction=0.0)

    class Rule:
        """Two of five images are vetoed; those of a series whose header is not known never get
        here."""

        def __init__(self) -> None:
            self.policy = policy

        def decide(self, frames: Sequence[Frame]) -> list[Judgement]:
            now = time.monotonic_ns()
            return [
                Judgement(
                    verdict=Verdict.VETO if frame.image_id * 7919 % 5 < 2 else Verdict.KEEP,
                    reason=Reason.SCORE,
                    scores=Scores(p_blank=float(frame.image_id * 7919 % 5 < 2)),
                    decided_ns=now,
                )
                for frame in frames
            ]

    settings = load_settings(None, overrides)
    metrics = Metrics()
    brain = Brain(
        deciders=[Rule()],
        model_id="rule",
        recipe_fingerprint="",
        thresholds={"p_blank_veto": 0.5},
        mode="enforce",
        on_device=False,
    )
    with opened_outputs(settings, brain, metrics, live=True) as outputs:
        source = open_source(settings, metrics)
        try:
            pipeline = Pipeline(
                source,
                brain.deciders,
                outputs,
                pipeline_options(settings, brain, live=True),
                metrics,
                model_id="rule",
            )
            run_to_end(pipeline, Console(stderr=True), quiet=True)
        finally:
            source.close()
    write_report(Path(settings.output.directory), pipeline, brain, 0.0)


if __name__ == "__main__":
    if sys.argv[1] == "detector":
        _detect(int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        _zygote(*sys.argv[2:])
