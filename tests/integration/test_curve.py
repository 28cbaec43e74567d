"""Who may listen to decisions and steer a run: keys, the list of them, and addresses."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import zmq
import zmq.auth

from triage.cli.assembly import opened_doors
from triage.config import Settings, load_settings
from triage.control import Answer, Control, State, ask
from triage.errors import ConfigError, TriageError
from triage.records import (
    NOT_SCORED,
    Decision,
    Override,
    Reason,
    Verdict,
)
from triage.sinks.publisher import HelloMessage, Publisher
from triage.sockets import (
    Connections,
    Doorkeeper,
    authorized_keys,
    key_pair,
    open_client,
    public_key,
    write_key_pair,
)

_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def a_decision() -> Decision:
    return Decision(
        series_id=1, series_unique_id="", image_id=7, file="", frame=-1, ordinal=0,
        verdict=Verdict.KEEP, reason=Reason.SCORE, forwarded=True, override=Override.NONE,
        scores=NOT_SCORED, model_id="", policy_id="", latency_us=1.0,
    )  # fmt: skip


def a_hello() -> HelloMessage:
    return HelloMessage(
        version="1",
        model_id="",
        recipe_fingerprint="",
        policy_id="",
        mode="shadow",
        thresholds={},
    )


class Keys:
    """A server, a friend whose key is on the list, and a stranger whose key is not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("server", "friend", "stranger"):
            write_key_pair(folder / name, name)
        self.authorized = folder / "authorized"
        self.authorized.mkdir()
        (self.authorized / "friend.key").write_text((folder / "friend" / "friend.key").read_text())

    def pair(self, name: str) -> tuple[bytes, bytes]:
        return key_pair(self.folder / name / f"{name}.key_secret")

    @property
    def server(self) -> bytes:
        return public_key(self.folder / "server" / "server.key")

    def settings(self, **more: Any) -> Settings:
        return load_settings(
            None,
            {
                "security.server_key_file": str(self.folder / "server" / "server.key_secret"),
                "security.authorized_keys": str(self.authorized),
                **more,
            },
        )


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


class HoldingContext(zmq.Context[Any]):
    """Keeps its sockets until it is destroyed."""

    held: ClassVar[list[Any]] = []

    def socket(self, *args: Any, **options: Any) -> Any:
        made = super().socket(*args, **options)
        self.held.append(made)
        return made


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    made = HoldingContext()
    yield made
    made.destroy(linger=0)
    HoldingContext.held.clear()


class Listener:
    """A SUB socket, and whether it got in."""

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, pair: Any = None, server: Any = None
    ) -> None:
        self.socket = open_client(context, zmq.SUB, pair, server)
        self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._monitor = self.socket.get_monitor_socket(
            _FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self.socket.connect(endpoint)

    def got_in(self) -> bool:
        """Wait for the end of the handshake."""
        assert self._monitor.poll(60_000), "no end of the handshake in a minute"
        event = int.from_bytes(self._monitor.recv_multipart()[0][:2], "little")
        return event == zmq.EVENT_HANDSHAKE_SUCCEEDED


def test_only_a_key_on_the_list_gets_decisions(keys: Keys, context: zmq.Context[Any]) -> None:
    """A listener without a key, with a key not on the list, and with the key of another server
    as ours gets nothing, not even the greeting."""
    with opened_doors(keys.settings()) as doors:
        publisher = Publisher("tcp://127.0.0.1:*", a_hello, context=doors.keyed)
        shut_out = [
            Listener(context, publisher.endpoint),
            Listener(context, publisher.endpoint, keys.pair("stranger"), keys.server),
            Listener(context, publisher.endpoint, keys.pair("friend"), keys.pair("stranger")[0]),
        ]
        assert [listener.got_in() for listener in shut_out] == [False, False, False]
        friend = Listener(context, publisher.endpoint, keys.pair("friend"), keys.server)
        assert friend.got_in()
        _greet_until(publisher, friend)
        publisher.tell([a_decision()])
        assert friend.socket.poll(60_000)
        topic, body = friend.socket.recv_multipart()
        assert topic == b"decision/1/1/"
        assert msgspec.json.decode(body)["image_id"] == 7
        assert not any(listener.socket.poll(0) for listener in shut_out)
        publisher.close()


def _greet_until(publisher: Publisher, listener: Listener) -> None:
    for _ in range(6000):
        publisher.greet_newcomers()
        if listener.socket.poll(10):
            assert listener.socket.recv_multipart()[0] == b"hello/1/"
            return
    raise AssertionError("no greeting in a minute")


class Operated:
    """Counts what an operator asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def state(self) -> State:
        return State(
            version="", state="ready", degraded={}, series=[], mode="shadow", gate_open=False,
            model_id="", policy_id="", p_blank_veto=0.5, audit_fraction=0.0, audit_limit=0.0,
            all_heads=False, log_level="", uptime_s=0.0, received=0, forwarded=0, dropped=0,
            undecided=0, missing=0, malformed=0, queue_frames=0, queue_bytes=0,
            latency_p50_us=None, latency_p99_us=None,
        )  # fmt: skip

    def reload(self) -> list[str]:
        self.asked.append("reload")
        return []

    def shadow(self) -> None:
        self.asked.append("shadow")

    def open_gate(self) -> None:
        self.asked.append("open_gate")

    def resume(self) -> None:
        self.asked.append("resume")

    def drain(self) -> None:
        self.asked.append("drain")


def test_only_a_key_on_the_list_steers_a_run(keys: Keys) -> None:
    """The others get no answer, and what they asked is not done."""
    operated = Operated()
    with opened_doors(keys.settings()) as doors:
        control = Control("tcp://127.0.0.1:*", operated, context=doors.keyed)
        for pair, server in ((None, None), (keys.pair("stranger"), keys.server)):
            with pytest.raises(TriageError, match="no answer"):
                ask(control.endpoint, "drain", timeout_s=0.5, keys=pair, server=server)
        text = ask(
            control.endpoint, "shadow", timeout_s=60, keys=keys.pair("friend"), server=keys.server
        )
        assert msgspec.json.decode(text, type=Answer).ok
        control.close()
    assert operated.asked == ["shadow"]


def test_a_key_added_to_the_list_gets_in_after_a_reload_and_one_removed_does_not(
    keys: Keys, context: zmq.Context[Any]
) -> None:
    """The doorkeeper asks the list that it has now."""
    with opened_doors(keys.settings()) as doors:
        assert doors.doorkeeper is not None
        publisher = Publisher("tcp://127.0.0.1:*", a_hello, context=doors.keyed)
        stranger = keys.pair("stranger")
        (keys.authorized / "friend.key").rename(keys.folder / "friend.was")
        (keys.authorized / "new.key").write_text(
            (keys.folder / "stranger" / "stranger.key").read_text()
        )
        assert doors.doorkeeper.let_in(authorized_keys(keys.authorized)) == 1
        assert Listener(context, publisher.endpoint, stranger, keys.server).got_in()
        friend = Listener(context, publisher.endpoint, keys.pair("friend"), keys.server)
        assert not friend.got_in()
        publisher.close()


def test_who_is_connected_when_its_key_is_taken_off_the_list_is_shut_out(
    keys: Keys, context: zmq.Context[Any]
) -> None:
    """From decisions and from control; one whose key stays connects again by itself."""
    (keys.authorized / "new.key").write_text(
        (keys.folder / "stranger" / "stranger.key").read_text()
    )
    operated = Operated()
    with opened_doors(keys.settings()) as doors:
        assert doors.doorkeeper is not None
        opened = {"context": doors.keyed, "doorkeeper": doors.doorkeeper}
        publisher = Publisher("tcp://127.0.0.1:*", a_hello, **opened)
        control = Control("tcp://127.0.0.1:*", operated, **opened)
        friend, other = (
            Listener(context, publisher.endpoint, keys.pair(name), keys.server)
            for name in ("friend", "stranger")
        )
        for listener in (friend, other):
            assert listener.got_in()
            _greet_until(publisher, listener)
        steering = open_client(context, zmq.REQ, keys.pair("stranger"), keys.server)
        watched = steering.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | _FAILED)
        steering.connect(control.endpoint)
        assert watched.poll(60_000)
        watched.recv_multipart()
        (keys.authorized / "new.key").unlink()
        assert doors.doorkeeper.let_in(authorized_keys(keys.authorized)) == 1
        assert watched.poll(60_000), "it was not asked again"
        event = int.from_bytes(watched.recv_multipart()[0][:2], "little")
        assert event != zmq.EVENT_HANDSHAKE_SUCCEEDED
        # What is sent to nobody, or waits for a connection, must not be heard either.
        with contextlib.suppress(zmq.Again):
            steering.send(b'{"v":1,"type":"drain"}', zmq.NOBLOCK)
        while other.socket.poll(0):
            other.socket.recv_multipart()
        while friend.socket.poll(0):
            friend.socket.recv_multipart()
        _greet_until(publisher, friend)
        publisher.tell([a_decision()])
        assert friend.socket.poll(60_000)
        assert friend.socket.recv_multipart()[0] == b"decision/1/1/"
        assert not other.socket.poll(0)
        pair = keys.pair("friend")
        text = ask(control.endpoint, "shadow", timeout_s=60, keys=pair, server=keys.server)
        assert msgspec.json.decode(text, type=Answer).ok
        watched.close()
        control.close()
        publisher.close()
    assert operated.asked == ["shadow"]


def test_who_comes_without_a_key_is_told_of(
    keys: Keys, context: zmq.Context[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """An operator's client without one gets no answer, and the log says at which socket."""
    said = threading.Event()

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "it has no key" in record.getMessage():
                said.set()

    handler = Heard()
    logging.getLogger("triage.sockets").addHandler(handler)
    with opened_doors(keys.settings()) as doors:
        control = Control(
            "tcp://127.0.0.1:*", Operated(), context=doors.keyed, doorkeeper=doors.doorkeeper
        )
        client = open_client(context, zmq.REQ, None, None)
        client.connect(control.endpoint)
        heard = said.wait(60)
        control.close()
    logging.getLogger("triage.sockets").removeHandler(handler)
    assert heard
    assert any(control.endpoint in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("networks", "let_in"),
    [
        (["127.0.0.0/8"], True),
        (["10.0.0.0/8", "127.0.0.1"], True),
        (["10.0.0.0/8"], False),
        (["::1/128"], False),
    ],
)
def test_addresses_decide_where_there_are_no_keys(
    context: zmq.Context[Any], networks: list[str], let_in: bool
) -> None:
    """For a plain socket that binds, as those for detector and writer do."""
    settings = load_settings(None, {"security.allowed_addresses": networks})
    with opened_doors(settings) as doors:
        assert doors.plain is not None
        pull = doors.plain.socket(zmq.PULL)
        pull.bind("tcp://127.0.0.1:*")
        push = context.socket(zmq.PUSH)
        push.setsockopt(zmq.IMMEDIATE, 1)
        monitor = push.get_monitor_socket(_FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        push.connect(pull.getsockopt_string(zmq.LAST_ENDPOINT))
        assert monitor.poll(60_000)
        event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
        assert (event == zmq.EVENT_HANDSHAKE_SUCCEEDED) is let_in
        pull.close(linger=0)


def test_a_question_that_is_not_right_is_refused() -> None:
    """What ZeroMQ itself never asks: too short, another version, keys where none are expected."""
    keyed = Doorkeeper(zmq.curve_keypair(), frozenset({b"k" * 32}))
    plain = Doorkeeper(None, networks=[ipaddress.ip_network("127.0.0.0/8")])
    try:
        for request, status in (
            ([], b"500"),
            ([b"1.0", b"1"], b"500"),
            ([b"2.0", b"1", b"triage", b"127.0.0.1", b"", b"CURVE", b"k" * 32], b"500"),
            ([b"1.0", b"1", b"triage", b"127.0.0.1", b"", b"NULL"], b"400"),
            ([b"1.0", b"1", b"triage", b"127.0.0.1", b"", b"PLAIN", b"a", b"b"], b"400"),
            ([b"1.0", b"1", b"triage", b"127.0.0.1", b"", b"CURVE", b"k" * 31], b"400"),
            ([b"1.0", b"1", b"triage", b"127.0.0.1", b"", b"CURVE", b"k" * 32], b"200"),
        ):
            assert keyed._answer(request)[2] == status, request
        for address, mechanism, status in (
            ("127.0.0.1", b"NULL", b"200"),
            ("::ffff:127.0.0.1", b"NULL", b"200"),
            ("192.168.0.1", b"NULL", b"400"),
            ("127.0.0.1", b"CURVE", b"400"),
        ):
            request = [b"1.0", b"1", b"triage", address.encode(), b"", mechanism]
            assert plain._answer(request)[2] == status, address
    finally:
        keyed.close()
        plain.close()


# -- key files -----------------------------------------------------------------------------------


def test_key_files_are_written_for_their_owner_alone_and_never_over_others(
    tmp_path: Path,
) -> None:
    """Mode 600 whatever the umask; pyzmq reads them; a second call changes nothing."""
    before = os.umask(0)
    try:
        told, kept = write_key_pair(tmp_path / "k", "beamline")
    finally:
        os.umask(before)
    assert kept.stat().st_mode & 0o777 == 0o600
    assert "secret-key" not in told.read_text()
    public, secret = zmq.auth.load_certificate(kept)
    assert secret is not None
    assert zmq.auth.load_certificate(told) == (public, None)
    assert zmq.curve_public(secret) == public
    text = kept.read_text()
    with pytest.raises(ConfigError, match="File exists"):
        write_key_pair(tmp_path / "k", "beamline")
    assert kept.read_text() == text


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o660, 0o602, 0o777])
def test_a_secret_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    """The message says what to do; the group may read, for a service's user."""
    _, kept = write_key_pair(tmp_path, "k")
    kept.chmod(0o640)
    key_pair(kept)
    kept.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        key_pair(kept)


def _damage(tmp_path: Path) -> list[tuple[str, Callable[[], object], str]]:
    told, _ = write_key_pair(tmp_path, "k")
    broken = tmp_path / "broken.key_secret"
    broken.write_text('curve\n    public-key = "short"\n    secret-key = "short"\n')
    broken.chmod(0o600)
    listed = tmp_path / "list"
    listed.write_text("# friends\nnot-a-key someone\n")
    return [
        ("public where secret is wanted", lambda: key_pair(told), "no secret key"),
        ("not there", lambda: key_pair(tmp_path / "none"), "triage keygen"),
        ("no key in it", lambda: key_pair(broken), "40 characters"),
        ("no certificate", lambda: public_key(listed), "triage keygen"),
        ("a line that is no key", lambda: authorized_keys(listed), "'not-a-key' is no key"),
        ("no list", lambda: authorized_keys(tmp_path / "none"), "authorized_keys"),
    ]


def test_a_public_key_in_place_of_the_secret_is_called_that(tmp_path: Path) -> None:
    """Whatever its mode, which is right for a public key."""
    told, _ = write_key_pair(tmp_path, "k")
    told.chmod(0o644)
    with pytest.raises(ConfigError, match=r"only a public one; expected the NAME\.key_secret"):
        key_pair(told)


def test_key_files_that_are_not_right_are_configuration_errors(tmp_path: Path) -> None:
    """Each names the file and the next step."""
    for what, action, said in _damage(tmp_path):
        with pytest.raises(ConfigError) as caught:
            action()
        assert said in str(caught.value), what


def test_a_list_of_keys_in_one_file_may_have_remarks(keys: Keys, tmp_path: Path) -> None:
    """The same keys as the folder holds."""
    friend = public_key(keys.authorized / "friend.key").decode()
    listed = tmp_path / "list"
    listed.write_text(f"# who may listen\n\n{friend} the control room\n")
    assert authorized_keys(listed) == authorized_keys(keys.authorized)
    assert len(authorized_keys(listed)) == 1


# -- what may be bound ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("publish.endpoint", "tcp://*:31002"),
        ("publish.endpoint", "tcp://10.1.2.3:31002"),
        ("control.endpoint", "tcp://eth0:31005"),
        ("control.endpoint", "tcp://[::]:31005"),
        ("crystfel.endpoint", "tcp://0.0.0.0:31004"),
        ("metrics.host", "0.0.0.0"),
        ("metrics.host", ""),
    ],
)
def test_an_address_that_others_reach_is_refused_unless_the_network_is_trusted(
    keys: Keys, key: str, value: str
) -> None:
    """Keys make it right where the socket can ask for them, allow_plain everywhere."""
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError, match=rf"\[{section}\] {name} = .*allow_plain"):
        load_settings(None, {key: value})
    load_settings(None, {key: value, "security.allow_plain": True})
    if section in ("publish", "control"):
        keys.settings(**{key: value})
    else:
        with pytest.raises(ConfigError, match="allow_plain"):
            keys.settings(**{key: value})


@pytest.mark.parametrize(
    "address",
    ["tcp://127.0.0.1:1", "tcp://127.8.8.8:*", "tcp://localhost:1", "tcp://[::1]:1", "tcp://lo:1",
     "ipc:///run/triage/decisions"],
)  # fmt: skip
def test_loopback_addresses_need_nothing(address: str) -> None:
    """By number, by name, by interface; and sockets in the file system."""
    load_settings(None, {"publish.endpoint": address, "control.endpoint": address})


def test_sockets_of_detector_and_writer_may_face_the_network() -> None:
    """What stands there knows no keys; allowed_addresses is for them."""
    load_settings(
        None,
        {
            "source.endpoint": "tcp://*:31001",
            "source.bind": True,
            "forward.endpoint": "tcp://*:31003",
            "forward.bind": True,
        },
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"security.server_key_file": "x"}, "both or neither"),
        ({"security.allowed_addresses": ["10.0.0.300"]}, "allowed_addresses"),
    ],
)
def test_half_a_setting_is_refused(values: dict[str, Any], said: str) -> None:
    """A key without a list of those who may connect would let in nobody, or everybody."""
    with pytest.raises(ConfigError, match=said):
        load_settings(None, values)


# -- who is there --------------------------------------------------------------------------------


def test_connections_are_counted_as_they_come_and_go(context: zmq.Context[Any]) -> None:
    """On a socket that connects, before and after its peer binds, and when the peer is gone."""
    connections = Connections()
    pull = context.socket(zmq.PULL)
    connections.watch(pull)
    push = context.socket(zmq.PUSH)
    push.bind("tcp://127.0.0.1:*")
    other = context.socket(zmq.PULL)
    connections.watch(other)
    assert connections.connected() == (0, 2)
    pull.connect(push.getsockopt_string(zmq.LAST_ENDPOINT))
    _until(lambda: connections.connected() == (1, 2))
    push.close(linger=0)
    _until(lambda: connections.connected() == (0, 2))
    connections.close()
    connections.close()


def _until(condition: Callable[[], bool]) -> None:
    import threading

    turn = threading.Event()
    for _ in range(6000):
        if condition():
            return
        turn.wait(0.01)
    raise AssertionError("did not come about in a minute")


def test_a_name_that_is_taken_leaves_no_secret_behind(tmp_path: Path) -> None:
    """Nothing is made where either file is there."""
    (tmp_path / "i04.key").write_text("theirs")
    with pytest.raises(ConfigError, match="exists"):
        write_key_pair(tmp_path, "i04")
    assert [path.name for path in tmp_path.iterdir()] == ["i04.key"]
