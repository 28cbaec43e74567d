"""What forwarding costs the publish thread, by size of image and mode.

    python benchmarks/forwarding.py --record benchmarks/records/forwarding.json

``send`` hands a message to ZeroMQ, to one writer and to the next of three; it does not depend on
the size. ``verdict`` and ``placeholder`` make the message that goes on instead of the one
received; a verdict in Stream V2 copies the image. CPU time of the calling thread; the median of
the rounds, and the fastest, which neighbours disturb least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from simulators.detectors import stream1, stream2
from simulators.detectors.frames import SimFrame, StreamInfo
from triage.annotation import Annotator
from triage.machine import machine, versions
from triage.records import (
    Decision,
    Message,
    MessageKind,
    Override,
    Reason,
    Scores,
    Verdict,
)
from triage.sinks.forwarder import Forwarder

_SIZES_BYTES = (1_000, 500_000, 4_000_000, 16_000_000)
_ROUNDS = 15
_ROUND_S = 0.05
_INFO = StreamInfo(shape=(2162, 2068), number_of_images=10)
_DECISION = Decision(
    series_id=1,
    series_unique_id="01J000000000000000000000AA",
    image_id=1,
    file="",
    frame=-1,
    ordinal=1,
    verdict=Verdict.KEEP,
    reason=Reason.SCORE,
    forwarded=True,
    override=Override.NONE,
    scores=Scores(
        p_blank=0.1,
        p_ice=0.2,
        p_bad_ice=0.1,
        p_multilattice=0.3,
        quality=2.5,
        n_lattices=1.5,
        mosaicity_deg=0.2,
        d_vis_angstrom=2.1,
        uncertainty=0.1,
    ),
    model_id="triagenet-00000000",
    policy_id="00000000",
    latency_us=1000.0,
)


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {
        "send_one_writer_us": sent(1),
        "send_round_robin_us": sent(3),
    }
    annotator = Annotator(verdicts=True, placeholders=True)
    for size in _SIZES_BYTES:
        frame = SimFrame(
            payload=np.random.default_rng(size).bytes(size),
            encoding="bslz4",
            dtype=np.dtype("<u2"),
            shape=_INFO.shape,
        )
        for protocol, parts in (
            ("stream2", [stream2.image_message(_INFO, frame, 1)]),
            ("stream1", stream1.image_parts(_INFO, frame, 1)),
        ):
            message = Message(kind=MessageKind.IMAGE, parts=tuple(parts))
            for what, write in (
                ("verdict", annotator.kept),
                ("placeholder", annotator.placeholder),
            ):
                figures[f"{protocol}_{what}_{size}_bytes_us"] = timed(
                    lambda write=write, message=message: write(message, _DECISION)  # type: ignore[misc]
                )
    for name, figure in figures.items():
        print(f"{name:<42}{figure['median']:10.1f} us, fastest {figure['fastest']:.1f}")
    record = {
        "name": "forwarding",
        "command": "python benchmarks/forwarding.py",
        "figures": figures,
        "machine": machine(),
        "versions": versions(),
    }
    if arguments.record is not None:
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")


def timed(call: Callable[[], object]) -> dict[str, float]:
    """CPU microseconds of a call on this thread: median and fastest of the rounds."""
    call()
    began = time.perf_counter()
    call()
    calls = max(1, round(_ROUND_S / (time.perf_counter() - began)))
    rounds = []
    for _ in range(_ROUNDS):
        before = time.thread_time()
        for _ in range(calls):
            call()
        rounds.append((time.thread_time() - before) / calls * 1e6)
    return {"median": round(statistics.median(rounds), 2), "fastest": round(min(rounds), 2)}


def sent(writers: int) -> dict[str, float]:
    """A small message to writers that have room for all of them."""
    context: zmq.Context[Any] = zmq.Context()
    pulls = [context.socket(zmq.PULL) for _ in range(writers)]
    addresses = []
    for pull in pulls:
        pull.setsockopt(zmq.RCVHWM, 0)
        pull.setsockopt(zmq.LINGER, 0)
        addresses.append(f"tcp://127.0.0.1:{pull.bind_to_random_port('tcp://127.0.0.1')}")
    forwarder = Forwarder(",".join(addresses), context=context, held_bytes=1 << 30, message_bytes=1)
    start = Message(kind=MessageKind.START, parts=(b"start",))
    image = Message(kind=MessageKind.IMAGE, parts=(bytes(300),))
    while not forwarder.send(start, 1000):
        pass
    figure = timed(lambda: forwarder.send(image, 0))
    forwarder.close(abandon=True)
    context.destroy(linger=0)
    return figure


if __name__ == "__main__":
    main()
