"""A detector for measurements: a process of its own that sends synthetic frames at a set rate.

    python -m triage.bench.detector '{"size": "4M", "hit_every": 10}'

It binds a PUSH socket on loopback and prints ``{"endpoint": ...}``. Every line read then is a
series to send, ``{"series_id": 1, "frames": 100, "rate_hz": 50}``, and is answered by one line when
all of it is sent. Messages are made beforehand, so that it costs the machine little: it writes the
number of the image into a copy of a message and hands that to libzmq.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from dataclasses import dataclass
from typing import Any

import zmq

from triage.bench.frames import (
    Pool,
    PoolSpec,
    end_message,
    image_number_at,
    made_pool,
    stamped,
)

__all__ = ["Sent", "main", "send_series"]

_HELD_BYTES = 256 << 20
"""What may wait in the socket for the reader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """How a series went out.

    Attributes:
        behind_s: by how much the last image left later than it was due.
        sent_ns: monotonic time of each image.
    """

    images: int
    elapsed_s: float
    behind_s: float
    sent_ns: tuple[int, ...]


def send_series(
    socket: zmq.Socket[Any],
    pool: Pool,
    *,
    series_id: int,
    frames: int,
    rate_hz: float,
    started: bool = True,
) -> Sent:
    """Start unless told not to, images at ``rate_hz``, end; images cycle through the pool."""
    templates = [stamped(template, series_id) for template in pool.templates]
    places = [image_number_at(template) for template in templates]
    if started:
        socket.send(stamped(pool.start, series_id))
    stamps: list[int] = []
    began = time.monotonic()
    due = began
    for image_id in range(frames):
        due = began + image_id / rate_hz
        left = due - time.monotonic()
        if left > 0:
            time.sleep(left)
        message = bytearray(templates[image_id % len(templates)])
        struct.pack_into(">I", message, places[image_id % len(templates)], image_id)
        stamps.append(time.monotonic_ns())
        socket.send(message, copy=False)
    ended = time.monotonic()
    socket.send(end_message(series_id))
    return Sent(
        images=frames,
        elapsed_s=ended - began,
        behind_s=max(0.0, ended - due),
        sent_ns=tuple(stamps),
    )


def main() -> None:
    """Answer lines until the input ends."""
    pool = made_pool(PoolSpec(**json.loads(sys.argv[1])))
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, max(8, _HELD_BYTES // len(pool.templates[0])))
    socket.setsockopt(zmq.LINGER, 0)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    _say({"endpoint": f"tcp://127.0.0.1:{port}"})
    for line in sys.stdin:
        sent = send_series(socket, pool, **json.loads(line))
        _say(
            {
                "images": sent.images,
                "elapsed_s": sent.elapsed_s,
                "behind_s": sent.behind_s,
                "sent_ns": sent.sent_ns,
            }
        )
    socket.close()
    context.term()


def _say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
