"""``triage config``: what is set, whether a file is right, and a file to start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triage.errors import ConfigError

if TYPE_CHECKING:
    from triage.config import Settings

__all__ = ["app", "listening_settings", "parsed_overrides"]

app = typer.Typer(help="Show, check or start the configuration.", no_args_is_help=True)

_SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting as section.key=value.")
]


def parsed_overrides(assignments: list[str]) -> dict[str, Any]:
    """``section.key=value`` texts as settings by dotted key; values as JSON where they are.

    Raises:
        ConfigError: a text without ``=`` or without a dot in the key.
    """
    overrides: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or "." not in key:
            raise ConfigError(f"--set {text}: expected section.key=value")
        try:
            overrides[key.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            overrides[key.strip()] = value
    return overrides


def listening_settings(
    config: Path | None, overrides: dict[str, Any], socket: str | None
) -> Settings:
    """Settings to look at a stream with, by the kind of socket that ``--socket`` names.

    Without one it is ``sub``, whatever is configured, because a PULL socket takes messages away;
    a Karabo bridge says what fits it, so there it is what is configured.

    Raises:
        ConfigError: as :func:`triage.config.load_settings`; a kind that the protocol does not
            have.
    """
    from triage.config import load_settings

    protocol = load_settings(config, overrides).source.protocol
    kinds: tuple[str, ...]
    if protocol == "karabo":
        key, kinds = "source.karabo_socket", ("req", "sub", "pull")
    elif protocol == "slsdetector":
        key, kinds = "source.socket", ("sub",)
    else:
        key, kinds = "source.socket", ("sub", "pull")
    if socket is not None and socket not in kinds:
        raise ConfigError(f"--socket {socket} with {protocol}: expected {' or '.join(kinds)}")
    if socket is not None or protocol != "karabo":
        overrides = {**overrides, key: socket or "sub"}
    return load_settings(config, overrides)


@app.command("show")
def show(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.")] = None,
    set_: _SetOption = None,
) -> None:
    """Every setting in force, with where its value comes from."""
    from triage.config import load_settings, origins

    overrides = parsed_overrides(set_ or [])
    settings = load_settings(config, overrides).model_dump()
    where = origins(config, overrides)
    for section, values in settings.items():
        print(f"[{section}]")
        for name, value in values.items():
            written = f"{name} = {json.dumps(value)}" if value is not None else f"# {name} unset"
            print(f"{written:<48} # {where[f'{section}.{name}']}")
        print()


@app.command("check")
def check(file: Annotated[Path, typer.Argument(help="TOML file.")]) -> None:
    """Exit 2 and name the key when a file is not right."""
    from triage.config import load_settings

    load_settings(file)
    print(f"{file}: right")


@app.command("init")
def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("triage.toml"),
) -> None:
    """Write a file with every key, its default and what it means."""
    from importlib.resources import files

    if file.exists():
        raise ConfigError(f"{file}: exists; expected a name that is free")
    text = files("triage").joinpath("triage.toml").read_text(encoding="utf-8")
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"{file}: {err.strerror}; expected a place that can be written") from err
    print(f"wrote {file}")
