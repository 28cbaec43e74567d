"""Settings: flags, then TRIAGE_SECTION__KEY, then one TOML file, then defaults.

A key that is not known is an error that names the nearest one that is.
"""

from __future__ import annotations

import difflib
import ipaddress
import logging
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from triage.errors import ConfigError

__all__ = ["Settings", "addresses", "is_loopback", "load_settings", "origins"]

log = logging.getLogger(__name__)

ENV_PREFIX = "TRIAGE_"

_NO_SETTINGS = frozenset({"TRIAGE_PEER_PYTHON"})
"""Variables that are read elsewhere."""

_LARGEST_FILE_BYTES = 1 << 20


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SourceSettings(_Section):
    """Where frames come from."""

    endpoint: str = "tcp://127.0.0.1:31001"
    socket: Literal["pull", "sub"] = "pull"
    bind: bool = False
    protocol: Literal["auto", "stream2", "stream1", "jungfraujoch", "karabo", "slsdetector"] = (
        "auto"
    )
    channel: str = ""
    karabo_socket: Literal["req", "sub", "pull"] = "req"
    karabo_source: str = ""
    karabo_path: str = ""
    karabo_order: Literal["file", "online"] = "file"
    message_bytes: int = Field(default=16 << 20, ge=1)
    io_threads: int = Field(default=1, ge=1, le=64)
    part_wait_ms: int = Field(default=100, ge=1, le=60_000)
    module_gap_y_px: int = Field(default=0, ge=0, le=4096)
    module_gap_x_px: int = Field(default=0, ge=0, le=4096)
    pedestal_file: str = ""
    gain_file: str = ""


class GeometrySettings(_Section):
    """What a stream does not tell of the experiment; 0 where it is not known."""

    beam_center_x_px: float = 0.0
    beam_center_y_px: float = 0.0
    pixel_size_m: float = Field(default=0.0, ge=0.0, le=0.1)
    detector_distance_m: float = Field(default=0.0, ge=0.0)
    incident_wavelength_angstrom: float = Field(default=0.0, ge=0.0)
    rotation_increment_deg: float | None = None
    sensor_material: str = ""
    sensor_thickness_m: float = Field(default=0.0, ge=0.0, le=0.1)


class PipelineSettings(_Section):
    """How long and how much may wait."""

    deadline_ms: int = Field(default=500, ge=1, le=600_000)
    queue_bytes: int = Field(default=2 << 30, ge=1 << 20)
    batch_size: int = Field(default=8, ge=1, le=1024)
    batch_wait_ms: float = Field(default=5.0, ge=0.0, le=1000.0)


class ComputeSettings(_Section):
    """How many decide at a time."""

    workers: int = Field(default=0, ge=0, le=1024)


class BackendSettings(_Section):
    """What decodes and reduces."""

    kind: Literal["auto", "cpu", "cuda"] = "auto"


class ModelSettings(_Section):
    """What scores."""

    path: str = ""
    runtime: Literal["auto", "openvino", "torch"] = "auto"


class PolicySettings(_Section):
    """What decides."""

    mode: Literal["shadow", "enforce"] = "shadow"
    audit_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    audit_limit: float = Field(default=0.005, ge=0.0, le=1.0)
    p_blank_veto: float | None = Field(default=None, ge=0.0, le=1.0)
    all_heads: bool = False


class ForwardSettings(_Section):
    """Where kept messages go, and in what form."""

    endpoint: str = ""
    bind: bool = False
    distribute: Literal["round_robin", "lane"] = "round_robin"
    writer_timeout_s: float = Field(default=10.0, ge=0.0, le=86_400.0)
    vetoed: Literal["drop", "placeholder"] = "drop"
    verdict: Literal["none", "user_data"] = "none"
    tee: bool = False


class PublishSettings(_Section):
    """Where decisions are told."""

    endpoint: str = ""


class CrystfelSettings(_Section):
    """Where CrystFEL asks for kept frames."""

    endpoint: str = ""
    queue_bytes: int = Field(default=256 << 20, ge=1 << 20)
    threads: int = Field(default=1, ge=1, le=256)
    peaks: bool = True


class ControlSettings(_Section):
    """Where an operator asks and tells."""

    endpoint: str = ""


class SecuritySettings(_Section):
    """Who may connect."""

    server_key_file: str = ""
    authorized_keys: str = ""
    allowed_addresses: list[str] = []
    allow_plain: bool = False

    @field_validator("allowed_addresses", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        # A variable holds a text.
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @field_validator("allowed_addresses")
    @classmethod
    def _are_networks(cls, value: list[str]) -> list[str]:
        for address in value:
            ipaddress.ip_network(address.strip(), strict=False)
        return value


class LogSettings(_Section):
    """What is said."""

    level: Literal["debug", "info", "warning", "error"] = "warning"


class MetricsSettings(_Section):
    """Where Prometheus scrapes."""

    host: str = "127.0.0.1"
    port: int = Field(default=9309, ge=0, le=65535)


class OutputSettings(_Section):
    """What is written down."""

    directory: str = ""
    write_kept: bool = False
    state_directory: str = ""
    fsync: bool = False


class Settings(BaseSettings):
    """Everything that can be set; see deploy/triage.toml for what each key means."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENV_PREFIX, env_nested_delimiter="__"
    )

    source: SourceSettings = SourceSettings()
    geometry: GeometrySettings = GeometrySettings()
    pipeline: PipelineSettings = PipelineSettings()
    compute: ComputeSettings = ComputeSettings()
    backend: BackendSettings = BackendSettings()
    model: ModelSettings = ModelSettings()
    policy: PolicySettings = PolicySettings()
    forward: ForwardSettings = ForwardSettings()
    publish: PublishSettings = PublishSettings()
    crystfel: CrystfelSettings = CrystfelSettings()
    control: ControlSettings = ControlSettings()
    security: SecuritySettings = SecuritySettings()
    log: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()
    output: OutputSettings = OutputSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # load_settings merges the layers itself, because it must know where a value came from.
        return (init_settings,)


def load_settings(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """The settings in force.

    Args:
        path: TOML file, None for none.
        overrides: flags by dotted key, such as ``{"policy.mode": "enforce"}``.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, a file that
            cannot be read, a variable that is nearly one; the message names file or variable and
            key.
    """
    _look_at_other_variables()
    merged: dict[str, dict[str, Any]] = {}
    where: dict[str, str] = {}
    for origin, values in _layers(path, overrides or {}):
        for key, value in values.items():
            section, _, name = key.partition(".")
            _refuse_unknown(section, name, origin)
            merged.setdefault(section, {})[name] = value
            where[key] = origin
    try:
        settings = Settings(**merged)  # type: ignore[arg-type]
    except ValidationError as err:
        first = err.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        section, _, name = key.partition(".")
        origin = where.get(key, "settings")
        raise ConfigError(
            f"{origin}: [{section}] {name} = {first['input']!r}: {first['msg']}"
        ) from err
    _refuse_contradictions(settings)
    _refuse_exposed(settings)
    return settings


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches a host, or a ZeroMQ address to bind."""
    transport, slashes, rest = address.partition("://")
    if slashes and transport in ("ipc", "inproc"):
        return True
    host = rest.rpartition(":")[0] if slashes else address
    host = host.rpartition(";")[2].strip("[]")
    if host in ("localhost", "lo"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse_exposed(settings: Settings) -> None:
    """Whoever reaches these addresses reads decisions or stops the run: not without a key.

    The sockets of detector and writer are left out. They have to face other machines, and what
    stands there knows no keys.
    """
    security = settings.security
    if bool(security.server_key_file) != bool(security.authorized_keys):
        raise ConfigError(
            f"[security] server_key_file = {security.server_key_file!r}, authorized_keys = "
            f"{security.authorized_keys!r}: expected both or neither"
        )
    if security.allow_plain:
        return
    has_keys = bool(security.server_key_file)
    for key, address, may_have_keys in (
        ("[publish] endpoint", settings.publish.endpoint, True),
        ("[control] endpoint", settings.control.endpoint, True),
        ("[crystfel] endpoint", settings.crystfel.endpoint, False),
        # An empty host is every address.
        ("[metrics] host", (settings.metrics.host or "*") * bool(settings.metrics.port), False),
    ):
        if address and not is_loopback(address) and not (may_have_keys and has_keys):
            raise ConfigError(
                f"{key} = {address!r} can be reached by other machines without a key; expected "
                "a loopback address"
                + (", [security] server_key_file ('triage keygen' makes one)" * may_have_keys)
                + ", or [security] allow_plain = true where the network is trusted"
            )


def addresses(endpoint: str) -> list[str]:
    """The addresses that a setting names, separated by commas.

    Raises:
        ConfigError: one of them is empty or named twice.
    """
    found = [address.strip() for address in endpoint.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise ConfigError(
            f"endpoint = {endpoint!r}: expected addresses separated by commas, each once, such "
            "as tcp://127.0.0.1:5500,tcp://127.0.0.1:5501"
        )
    return found


def _refuse_contradictions(settings: Settings) -> None:
    """Settings that are right each by itself and not together."""
    forward = settings.forward
    if settings.source.protocol == "karabo":
        _refuse_for_trains(settings)
    if settings.source.protocol == "slsdetector" and settings.source.bind:
        raise ConfigError(
            "[source] bind = true with protocol = 'slsdetector': receivers bind; expected false"
        )
    if bool(settings.source.pedestal_file) != bool(settings.source.gain_file):
        raise ConfigError(
            f"[source] pedestal_file = {settings.source.pedestal_file!r}, gain_file = "
            f"{settings.source.gain_file!r}: expected both or neither"
        )
    writers = len(addresses(forward.endpoint)) if forward.endpoint else 0
    if forward.distribute == "lane" and writers:
        if settings.source.protocol == "slsdetector":
            raise ConfigError(
                "[forward] distribute = 'lane' with [source] protocol = 'slsdetector': its frames "
                "are put together from all sockets; expected 'round_robin'"
            )
        lanes = len(addresses(settings.source.endpoint))
        if writers != lanes:
            raise ConfigError(
                f"[forward] endpoint names {writers} writers and [source] endpoint {lanes} "
                "sockets; expected as many of one as of the other with distribute = 'lane'"
            )
    if not forward.tee:
        return
    refused = {
        "[policy] mode": (settings.policy.mode, "shadow"),
        "[forward] vetoed": (forward.vetoed, "drop"),
        "[forward] verdict": (forward.verdict, "none"),
    }
    for key, (value, expected) in refused.items():
        if value != expected:
            raise ConfigError(
                f"[forward] tee = true with {key} = {value!r}: expected {expected!r}, because "
                "messages have gone on before anything is decided"
            )
    if not writers:
        raise ConfigError("[forward] tee = true: expected [forward] endpoint with it, the writer")
    if writers > 1 and forward.distribute != "lane":
        raise ConfigError(
            "[forward] tee = true with several writers: expected distribute = 'lane', because a "
            "tee takes the place of a cable; let a run without tee distribute images"
        )


def _refuse_for_trains(settings: Settings) -> None:
    """A Karabo bridge is a tap beside the facility's recorder, and gives out whole trains."""
    wrong = {
        "[policy] mode": (settings.policy.mode, "shadow", "nothing can be dropped at a tap"),
        "[forward] verdict": (settings.forward.verdict, "none", "a train goes on as it came"),
        "[source] bind": (settings.source.bind, False, "a bridge binds"),
    }
    for key, (value, expected, why) in wrong.items():
        if value != expected:
            raise ConfigError(
                f"{key} = {value!r} with [source] protocol = 'karabo': expected {expected!r}, "
                f"because {why}"
            )
    if len(addresses(settings.source.endpoint)) > 1:
        raise ConfigError(
            f"[source] endpoint = {settings.source.endpoint!r}: expected the one address of a "
            "bridge with protocol = 'karabo'"
        )


def origins(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> dict[str, str]:
    """For every key where its value comes from: a flag, a variable, the file or the default."""
    found = dict.fromkeys(_known_keys(), "default")
    for origin, values in _layers(path, overrides or {}):
        found.update(dict.fromkeys(values, origin))
    return found


def _known_keys() -> list[str]:
    return [
        f"{section}.{name}"
        for section, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for name in field.annotation.model_fields
    ]


def _layers(path: Path | None, overrides: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Weakest first: (origin, values by dotted key)."""
    layers = []
    if path is not None:
        layers.append((str(path), _read_toml(path)))
    layers += [(name, {key: value}) for name, key, value in _environment()]
    layers.append(("flag", dict(overrides)))
    return layers


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_FILE_BYTES + 1)
        if len(text) > _LARGEST_FILE_BYTES:
            raise ConfigError(
                f"{path}: more than {_LARGEST_FILE_BYTES} bytes; expected a TOML file of settings"
            )
        document = tomllib.loads(text.decode("utf-8"))
    except OSError as err:
        raise ConfigError(
            f"{path}: {err.strerror}; expected a TOML file; "
            "'triage config init FILE' writes one with every key"
        ) from err
    except (ValueError, RecursionError) as err:
        # Not TOML, not UTF-8, a number of thousands of digits, or arrays nested as deep.
        raise ConfigError(f"{path}: {err}; expected TOML") from err
    values: dict[str, Any] = {}
    for section, content in document.items():
        if not isinstance(content, dict):
            raise ConfigError(
                f"{path}: {section} = {content!r} stands outside a section; expected it under "
                f"one of {', '.join(f'[{name}]' for name in Settings.model_fields)}"
            )
        _refuse_unknown(section, "", str(path))
        values |= {f"{section}.{name}": value for name, value in content.items()}
    return values


def _environment() -> list[tuple[str, str, Any]]:
    """(variable, dotted key, value) of each TRIAGE_SECTION__KEY."""
    found = []
    known = {key: key for key in _known_keys()}
    for variable, text in os.environ.items():
        if not variable.startswith(ENV_PREFIX) or "__" not in variable:
            continue
        key = variable.removeprefix(ENV_PREFIX).lower().replace("__", ".", 1)
        found.append((variable, known.get(key, key), text))
    return sorted(found)


def _look_at_other_variables() -> None:
    """Refuse variables that are nearly settings, and name those that are none: who has set one
    counts on it."""
    known = {_variable(key): key for key in _known_keys()}
    letters = {name.replace("_", ""): name for name in known}
    unread = [
        name
        for name in sorted(os.environ)
        if name.upper().startswith(ENV_PREFIX)
        and not (name.startswith(ENV_PREFIX) and "__" in name)
        and name not in _NO_SETTINGS
        and not _is_service_link(name)
    ]
    for name in unread:
        near = _near(name.upper(), list(known), letters)
        if near:
            raise ConfigError(
                f"{name}: is not read; did you mean {near}, which sets {known[near]}? Expected two "
                "underscores between section and key, in capitals"
            )
        log.warning(
            "%s: is no setting and is not read; expected TRIAGE_SECTION__KEY such as %s",
            name,
            "TRIAGE_POLICY__MODE",
        )


def _near(name: str, known: list[str], letters: dict[str, str]) -> str:
    """The variable that is meant by one with a wrong name; "" for one with none like it."""
    if name.replace("_", "") in letters:
        return letters[name.replace("_", "")]
    section = name.removeprefix(ENV_PREFIX).partition("_")[0]
    if section.lower() in Settings.model_fields:
        of_it = [each for each in known if each.startswith(f"{ENV_PREFIX}{section}__")]
        return difflib.get_close_matches(name, of_it, n=1, cutoff=0.0)[0]
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.85)), "")


def _variable(key: str) -> str:
    """What sets a dotted key."""
    return ENV_PREFIX + key.upper().replace(".", "__")


def _is_service_link(name: str) -> bool:
    """Whether Kubernetes has set a variable to tell of a service whose name begins with triage."""
    for mark in ("_SERVICE_", "_PORT"):
        service, found, _ = name.partition(mark)
        if found and f"{service}_SERVICE_HOST" in os.environ:
            return True
    return False


def _refuse_unknown(section: str, name: str, origin: str) -> None:
    sections = list(Settings.model_fields)
    if section not in sections:
        raise ConfigError(f"{origin}: [{section}] is no section; {_nearest(section, sections)}")
    names = [key.partition(".")[2] for key in _known_keys() if key.startswith(f"{section}.")]
    if name and name not in names:
        raise ConfigError(f"{origin}: [{section}] {name} is no key; {_nearest(name, names)}")


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
