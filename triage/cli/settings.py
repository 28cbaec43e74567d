"""``triage config``: what is set, whether a file is right, and a file to start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from triage.errors import ConfigError

__all__ = ["app", "parsed_overrides"]

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
