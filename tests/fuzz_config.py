"""Settings that are almost right: a TOML file, variables and flags."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fuzz_grammar as grammar
from fuzz_base import Target, need

__all__ = ["ConfigTarget"]

_TOML_VALUES = (
    *('"tcp://127.0.0.1:31001"', '"pull"', '"sub"', "true", "false", "0", "1", "-1", "9309", "0.5"),
    *("1e400", "nan", "-inf", '""', "[]", "{}", "[1, [2]]", "2024-01-01", "0x7f", "9" * 5000),
    *('"shadow"', '"enforce"', '"stream2"', '"karabo"', '"slsdetector"', '"cuda"', '"drop"'),
    *('"tcp://*:5555"', '"ipc://x"', '"tcp://[::1]:1,tcp://a:2"', "1_0", '"\\u0000"', "'\x7f'"),
    *('"tcp://a:1,tcp://b:2"', '"round_robin"', '"lane"', '"user_data"', '["10.0.0.0/8"]'),
)
_ENV_VALUES = (
    *("", "1", "true", "no", "-5", "0.25", "1e9", "pull", "enforce", "tcp://0.0.0.0:1", "[1]"),
    *("{}", "\N{BLUE HEART}", "9" * 5000, "nan", " 7 ", "null", "10.0.0.0/8", "a,b"),
)


class ConfigTarget(Target):
    """An input is JSON of a TOML text, variables and flags.

    They give settings, or a ConfigError that says what is wrong; a value comes from the strongest
    layer that has one; settings that are written down read the same; and sound ones are loaded
    afterwards as ever.
    """

    modules = ("triage.config", "triage.cli.settings")

    def __init__(self) -> None:
        from triage.cli.settings import parsed_overrides
        from triage.config import Settings, load_settings, origins
        from triage.errors import ConfigError

        self._load, self._origins = load_settings, origins
        self._parsed, self._refused = parsed_overrides, ConfigError
        home = Path(__file__).resolve().parent.parent
        sound = (home / "triage" / "triage.toml").read_text()
        self._folder = tempfile.TemporaryDirectory()
        self._sound = Path(self._folder.name) / "sound.toml"
        self._sound.write_text(sound)
        self._known = {
            f"{section}.{name}": value
            for section, values in Settings().model_dump().items()
            for name, value in values.items()
        }
        with _environment({}):
            self._settings = load_settings(self._sound)
        short = "\n".join(line for line in sound.splitlines() if line and line[0] != "#")
        seeds: list[Any] = [
            {"toml": short, "env": {}, "flags": []},
            {"toml": "", "env": {"TRIAGE_POLICY__MODE": "enforce"}, "flags": []},
            {"toml": "[policy]\nmode = 'enforce'\n", "env": {}, "flags": ["policy.mode=shadow"]},
            {
                "toml": "[pipeline]\ndeadline_ms = 100\nbatch_wait_ms = 2\n",
                "env": {"TRIAGE_PIPELINE__DEADLINE_MS": "200", "TRIAGE_SOURCE__BIND": "true"},
                "flags": ["pipeline.deadline_ms=300", 'source.channel="threshold_2"'],
            },
        ]
        self.seeds = [json.dumps(seed).encode() for seed in seeds]

    def close(self) -> None:
        self._folder.cleanup()

    def changed(self, data: bytes, rng: random.Random) -> bytes:
        try:
            document = json.loads(data)
        except ValueError:
            return rng.choice(self.seeds)
        if not isinstance(document, dict) or rng.randrange(40) == 0:
            return rng.choice(self.seeds)
        key = rng.choice(sorted(self._known))
        section, _, name = key.partition(".")
        if rng.randrange(12) == 0:
            name = rng.choice([name[:-1], name + "s", "", name.upper(), "a.b", "\x00", '"'])
        toml = str(document.get("toml", ""))
        env, flags = document.get("env"), document.get("flags")
        env = env if isinstance(env, dict) else {}
        flags = flags if isinstance(flags, list) else []
        kind = rng.randrange(9)
        if kind < 4:
            value = rng.choice(_TOML_VALUES)
            if rng.randrange(2):
                value = json.dumps(self._known[key])
            toml = self._changed_toml(toml, kind, section, name, value, rng)
        elif kind < 6:
            variable = f"TRIAGE_{section}__{name}".upper()
            if rng.randrange(8) == 0:
                variable = rng.choice(["TRIAGE_", "TRIAGE___", "TRIAGE_X__Y", variable.lower()])
            env[variable] = str(self._known[key]) if rng.randrange(2) else rng.choice(_ENV_VALUES)
            if kind == 5:
                del env[rng.choice(sorted(env))]
        elif kind < 8:
            value = rng.choice([*_ENV_VALUES, json.dumps(self._known[key])])
            flags.append(rng.choice([f"{section}.{name}={value}", f"{section}{name}", f"{name}=1"]))
            flags = flags[-6:]
        elif flags:
            flags[rng.randrange(len(flags))] = rng.choice(["=", ".=", "a.b=" + '{"a":' * 3000])
        return json.dumps({"toml": toml, "env": env, "flags": flags}).encode()

    @staticmethod
    def _changed_toml(
        toml: str, kind: int, section: str, name: str, value: str, rng: random.Random
    ) -> str:
        if kind == 2:
            return grammar.changed_bytes(toml.encode("utf-8", "surrogateescape"), rng).decode(
                "utf-8", "surrogateescape"
            )
        lines = toml.splitlines()
        if kind == 3:
            lines = lines or [""]
            at = rng.randrange(len(lines))
            nested = f"{name} = " + "[" * rng.choice([1, 3, 3000])
            lines[at : at + 1] = rng.choice([[], [lines[at]] * 2, [nested], ["[[x]]"]])
            return "\n".join(lines)
        at = next((i for i, line in enumerate(lines) if line.strip() == f"[{section}]"), -1)
        if at < 0:
            lines.append(f"[{section}]")
            at = len(lines) - 1
        # A second line of the same key is an error; mostly there shall be one.
        lines = [x for x in lines if kind or x.partition("=")[0].strip() != name]
        lines.insert(min(at + 1, len(lines)), f"{name} = {value}")
        return "\n".join(lines)

    def check(self, data: bytes) -> None:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(document, dict):
            return
        toml, env, flags = (document.get(name) for name in ("toml", "env", "flags"))
        file = Path(self._folder.name) / "changed.toml"
        file.write_bytes(str(toml).encode("utf-8", "surrogateescape"))
        variables = {
            str(name): str(value)
            for name, value in (env if isinstance(env, dict) else {}).items()
            if "=" not in name and "\0" not in f"{name}{value}" and str(name).startswith("TRIAGE")
        }
        texts = [str(flag) for flag in flags] if isinstance(flags, list) else []
        try:
            with _environment(variables):
                overrides = self._parsed(texts)
                settings = self._load(file, overrides)
                where = self._origins(file, overrides)
        except self._refused as err:
            need(str(err), "an error that says nothing")
        else:
            self._check_layers(settings.model_dump(), where, file, variables, overrides)
            try:
                file.write_text(_written(settings.model_dump()))
            except UnicodeEncodeError:
                return  # half a character, as a flag may give it
            with _environment({}):
                need(self._load(file) == settings, "written down, they read otherwise")
        with _environment({}):
            need(self._load(self._sound) == self._settings, "sound settings load otherwise")

    def _check_layers(
        self,
        settings: Mapping[str, Any],
        where: Mapping[str, str],
        file: Path,
        variables: Mapping[str, str],
        overrides: Mapping[str, Any],
    ) -> None:
        """Each value against the strongest layer that names its key."""
        document = tomllib.loads(file.read_text())
        upper = {name.upper(): name for name in variables}
        for key, default in self._known.items():
            section, _, name = key.partition(".")
            variable = upper.get(f"TRIAGE_{section}__{name}".upper())
            if key in overrides:
                told, origin = overrides[key], "flag"
            elif variable is not None:
                told, origin = None, variable
            elif name in document.get(section, {}):
                told, origin = document[section][name], str(file)
            else:
                told, origin = default, "default"
            need(where[key] == origin, f"{key} comes from {where[key]}; expected {origin}")
            value = settings[section][name]
            if isinstance(told, str | bool | int) and type(told) is type(value):
                need(value == told, f"{key} = {value!r}; expected {told!r}")


def _written(settings: Mapping[str, Any]) -> str:
    lines = []
    for section, values in settings.items():
        lines.append(f"[{section}]")
        for name, value in values.items():
            if value is not None:
                lines.append(f"{name} = {_as_toml(value)}")
    return "\n".join(lines)


def _as_toml(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables of the product, and no others of its own."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("TRIAGE_")}
    for name in kept:
        del os.environ[name]
    try:
        os.environ.update(variables)
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(kept)
