"""``triage ctl`` and ``triage keygen``: an operator's end of the control socket, and its keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from triage.control import Answer

__all__ = ["ctl", "keygen"]


def ctl(
    endpoint: Annotated[str, typer.Argument(help="[control] endpoint of the running triage.")],
    command: Annotated[
        str, typer.Argument(help="state, reload, shadow, open_gate, resume or drain.")
    ],
    key: Annotated[
        Path | None, typer.Option(help="Your NAME.key_secret, where triage asks for keys.")
    ] = None,
    server_key: Annotated[
        Path | None, typer.Option(help="NAME.key of the running triage, with --key.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The answer as it came.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="Wait so long for an answer.")] = 10.0,
) -> None:
    """Ask a running triage what it does, or tell it.

    'reload' reads its settings anew, 'shadow' and 'open_gate' stop all drops at once and whenever
    it is started anew, until 'resume' takes them back, 'drain' ends it when all that was received
    is released.
    """
    import msgspec

    from triage.control import COMMANDS, Answer, ask
    from triage.errors import ConfigError, TriageError
    from triage.sockets import key_pair, public_key

    if command not in COMMANDS:
        raise ConfigError(f"command {command!r}: expected one of {', '.join(COMMANDS)}")
    if (key is None) != (server_key is None):
        raise ConfigError("expected --key and --server-key together")
    text = ask(
        endpoint,
        command,
        timeout_s=seconds,
        keys=key_pair(key) if key else None,
        server=public_key(server_key) if server_key else None,
    )
    answer = msgspec.json.decode(text, type=Answer)
    if as_json:
        print(text.decode())
    else:
        _show(answer)
    if not answer.ok:
        raise TriageError(f"{command}: {answer.error}")


def _show(answer: Answer) -> None:
    import msgspec

    if answer.changed:
        print(f"changed: {', '.join(answer.changed)}")
    if answer.state is not None:
        for name, value in msgspec.to_builtins(answer.state).items():
            shown = value
            if isinstance(value, dict):
                shown = "; ".join(f"{reason}: {detail}" for reason, detail in value.items())
            elif isinstance(value, list):
                shown = ", ".join(value)
            print(f"{name:<16} {'' if shown is None else shown}".rstrip())


def keygen(
    directory: Annotated[Path, typer.Argument(help="Folder for the two files.")],
    name: Annotated[str, typer.Option(help="What the files are called.")] = "triage",
) -> None:
    """Make a CURVE key pair: NAME.key to tell others, NAME.key_secret to keep (mode 600)."""
    from triage.errors import ConfigError
    from triage.sockets import write_key_pair

    if not name or Path(name).name != name:
        raise ConfigError(f"--name {name!r}: expected a file name without a folder")
    told, kept = write_key_pair(directory, name)
    print(f"wrote {kept}: keep it; [security] server_key_file, or 'triage ctl --key'")
    print(f"wrote {told}: tell it; [security] authorized_keys, or 'triage ctl --server-key'")
