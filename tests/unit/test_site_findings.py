"""What the doctor says of settings that a site is about to deploy."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from triage.cli import site
from triage.cli.site import site_findings
from triage.config import load_settings
from triage.sinks.folder import RunFolder
from triage.sockets import write_key_pair


@pytest.fixture
def listener() -> Iterator[int]:
    """A port of this machine that is taken, and answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield int(taken.getsockname()[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def findings(**values: Any) -> dict[str, tuple[str, str]]:
    """State and text by subject; keys with two underscores for the dot."""
    settings = load_settings(
        None,
        {
            "metrics.port": 0,
            **{key.replace("__", ".", 1): value for key, value in values.items()},
        },
    )
    found = site_findings(settings, Path("/etc/triage/i04.toml"))
    return {finding.subject: (finding.state, finding.found) for finding in found}


def test_a_port_that_is_taken_is_named(listener: int) -> None:
    """With its section; ports that are free are counted."""
    free = free_port()
    state, text = findings(
        publish__endpoint=f"tcp://127.0.0.1:{listener}", control__endpoint=f"tcp://127.0.0.1:{free}"
    )["ports"]
    assert (state, text) == ("fail", f"cannot be bound now: [publish] 127.0.0.1:{listener}")
    assert findings(metrics__port=free, publish__endpoint="tcp://127.0.0.1:*")["ports"] == (
        "ok",
        "1 to bind, all free",
    )


def test_a_port_that_this_run_holds_already_is_no_failure(listener: int, tmp_path: Path) -> None:
    """The doctor is asked beside a run, too."""
    values = {
        "publish__endpoint": f"tcp://127.0.0.1:{listener}",
        "output__directory": str(tmp_path),
    }
    assert findings(**values)["ports"][0] == "fail"
    held = RunFolder(tmp_path)
    assert findings(**values)["ports"][0] == "note"
    held.close()
    assert findings(**values)["ports"][0] == "fail"


def test_a_detector_or_writer_that_does_not_answer_is_named(
    listener: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each address of several; none is asked where they connect to us; one that hangs is told."""
    monkeypatch.setattr(site, "_CONNECT_S", 0.05)
    free = free_port()
    found = findings(
        source__endpoint=f"tcp://127.0.0.1:{listener},tcp://127.0.0.1:{free}",
        forward__endpoint=f"tcp://127.0.0.1:{listener}",
    )
    assert found["detector"] == ("note", f"nobody listens at 127.0.0.1:{free}")
    assert found["writer"] == (
        "note",
        f"what listens at 127.0.0.1:{listener} says nothing for 0.05 s",
    )
    found = findings(source__endpoint=f"tcp://127.0.0.1:{free}", source__bind=True)
    assert "detector" not in found


@pytest.mark.parametrize(
    ("settings", "peer", "state"),
    [
        ({"source__socket": "pull"}, zmq.PUSH, "ok"),
        ({"source__socket": "pull"}, zmq.PUB, "fail"),
        ({"source__socket": "sub"}, zmq.PUB, "ok"),
        ({"source__socket": "sub"}, zmq.XPUB, "ok"),
        ({"source__socket": "sub"}, zmq.PUSH, "fail"),
        ({"source__protocol": "slsdetector"}, zmq.PUB, "ok"),
        ({"source__protocol": "karabo"}, zmq.REP, "ok"),
        ({"source__protocol": "karabo", "source__karabo_socket": "sub"}, zmq.REP, "fail"),
    ],
)
def test_a_detector_of_another_kind_is_a_failure(
    settings: dict[str, Any], peer: int, state: str
) -> None:
    """It is asked what it is, and keeps every message for the run; a range of ports is known."""
    context: zmq.Context[Any] = zmq.Context()
    detector, reader = context.socket(peer), context.socket(zmq.PULL)
    try:
        port = detector.bind_to_random_port("tcp://127.0.0.1")
        endpoint = f"tcp://127.0.0.1:{port}"
        is_sls = "slsdetector" in settings.values()
        named = f"{endpoint}-{port}" if is_sls else endpoint
        found = findings(source__endpoint=named, **settings)["detector"]
        assert found[0] == state, found
        if peer == zmq.PUSH:
            reader.connect(endpoint)
            detector.send(b"start")
            assert reader.poll(60_000)
    finally:
        detector.close(linger=0)
        reader.close(linger=0)
        context.term()


def test_a_writer_of_another_kind_and_a_server_of_another_language_are_failures() -> None:
    """Named with what they are; a writer that pulls is right."""
    context: zmq.Context[Any] = zmq.Context()
    for kind, state, said in ((zmq.PULL, "ok", "PULL"), (zmq.SUB, "fail", "SUB")):
        writer = context.socket(kind)
        endpoint = f"tcp://127.0.0.1:{writer.bind_to_random_port('tcp://127.0.0.1')}"
        found = findings(forward__endpoint=endpoint)["writer"]
        assert (found[0], said in found[1]) == (state, True), found
        writer.close(linger=0)
    context.term()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while not over.is_set():
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64))

        over = threading.Event()
        thread = threading.Thread(target=answer)
        thread.start()
        port = server.getsockname()[1]
        found = findings(forward__endpoint=f"tcp://127.0.0.1:{port}")["writer"]
        over.set()
        socket.create_connection(("127.0.0.1", port)).close()
        thread.join(60)
    assert (found[0], "no ZeroMQ socket" in found[1]) == ("fail", True), found


def test_settings_that_a_run_would_refuse_are_a_failure(tmp_path: Path) -> None:
    """An address that is none, and a file that is not there; with the exit code of the run."""
    state, said = findings(source__endpoint="tcp//127.0.0.1:1")["settings"]
    assert (state, "[source] endpoint = 'tcp//127.0.0.1:1'" in said) == ("fail", True)
    missing = str(tmp_path / "none.h5")
    settings = load_settings(
        None,
        {
            "metrics.port": 0,
            "source.protocol": "slsdetector",
            "source.pedestal_file": missing,
            "source.gain_file": missing,
            "geometry.incident_wavelength_angstrom": 1.0,
        },
    )
    found = {f.subject: f for f in site_findings(settings, Path("i04.toml"))}["settings"]
    assert (found.state, found.exit_code) == ("fail", 2)
    assert missing in found.found
    assert "settings" not in findings()


def test_what_others_reach_without_a_key_is_named() -> None:
    """Also the sockets of detector and writer, which know no keys."""
    assert findings()["exposure"][0] == "ok"
    state, text = findings(
        source__endpoint="tcp://*:31001",
        source__bind=True,
        control__endpoint="tcp://0.0.0.0:31005",
        security__allow_plain=True,
    )["exposure"]
    assert state == "note"
    assert "[control] tcp://0.0.0.0:31005 from any address" in text
    assert "[source] tcp://*:31001 from any address" in text


def test_keys_are_read_before_the_run_reads_them(tmp_path: Path) -> None:
    """A secret that others read, nobody on the list, and all right."""
    _, kept = write_key_pair(tmp_path, "k")
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    values = {"security__server_key_file": str(kept), "security__authorized_keys": str(allowed)}
    assert findings(**values)["keys"] == ("note", f"{kept}; 0 may connect")
    (allowed / "friend.key").write_text((tmp_path / "k.key").read_text())
    assert findings(**values)["keys"] == ("ok", f"{kept}; 1 may connect")
    kept.chmod(0o644)
    state, text = findings(**values)["keys"]
    assert state == "fail"
    assert "chmod 600" in text


def test_a_folder_that_cannot_be_written_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is none at all where the journal needs it, and little room is told."""
    assert findings(policy__mode="enforce")["output"][0] == "fail"
    assert findings()["output"][0] == "ok"
    file = tmp_path / "file"
    file.write_text("")
    state, text = findings(output__directory=str(file / "out"))["output"]
    assert (state, text) == ("fail", f"{file} cannot be written")
    monkeypatch.setattr(site, "_ROOM_BYTES", 1 << 62)
    state, text = findings(output__directory=str(tmp_path / "a" / "b"))["output"]
    assert state == "note"
    assert str(tmp_path / "a" / "b") in text


@pytest.mark.parametrize(
    ("queue_bytes", "message_bytes", "state"),
    [
        (1 << 50, 16 << 20, "fail"),  # more than any machine has
        (64 << 20, 16 << 20, "note"),  # two of the largest messages in line
        (512 << 20, 16 << 20, "ok"),  # sixteen of them
        (64 << 20, 1 << 50, "fail"),  # the least that ZeroMQ holds is four messages
    ],
)
def test_the_byte_budget_is_held_against_the_machine(
    queue_bytes: int, message_bytes: int, state: str
) -> None:
    """In bytes, with what ZeroMQ may hold; and in messages."""
    found = findings(pipeline__queue_bytes=queue_bytes, source__message_bytes=message_bytes)
    assert found["memory"][0] == state


@pytest.mark.parametrize(
    ("settings", "held_gib"),
    [
        # Half for the line and a quarter before it, beside a process of one; nothing is audited.
        ({}, 0.75 * 8 + 1),
        ({"forward__endpoint": "tcp://127.0.0.1:9"}, 0.875 * 8 + 1),
        ({"output__directory": "."}, 0.875 * 8 + 1),
        # Two writers that may each hold four messages of half a gibibyte.
        (
            {
                "forward__endpoint": "tcp://127.0.0.1:9,tcp://127.0.0.1:10",
                "source__message_bytes": 1 << 29,
            },
            0.5 * 8 + 2 + 4 + 1,
        ),
    ],
)
def test_the_bytes_that_may_be_held_are_those_that_a_run_shares_out(
    settings: dict[str, Any], held_gib: float
) -> None:
    """Of a budget of eight gibibytes."""
    found = findings(pipeline__queue_bytes=8 << 30, policy__audit_fraction=0.0, **settings)
    assert found["memory"][1].startswith(f"at most {held_gib * (1 << 30) / 1e9:.1f} GB of ")


def test_a_model_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    """The one that the settings name, not the one of the package."""
    assert findings()["policy"][0] == "ok"
    assert findings(model__path=str(tmp_path))["policy"][0] == "fail"


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("LoadState=loaded\nType=notify\nWatchdogUSec=1min", "ok"),
        ("LoadState=loaded\nType=notify-reload\nWatchdogUSec=30s", "ok"),
        ("LoadState=loaded\nType=simple\nWatchdogUSec=infinity", "note"),
        ("LoadState=loaded\nType=notify\nWatchdogUSec=0", "note"),
        ("LoadState=not-found\nType=\nWatchdogUSec=infinity", "note"),
        ("", "note"),
    ],
)
def test_the_unit_that_runs_these_settings_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, state: str
) -> None:
    """By the name of the file, as systemd's template does."""
    program = tmp_path / "systemctl"
    program.write_text(f"#!/bin/sh\n[ $2 = triage@i04.service ] && printf '{answer}\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = findings()["service"]
    assert found[0] == state
    assert "triage@i04.service" in found[1]
