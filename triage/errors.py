"""Every error this package raises on purpose.

::

    TriageError
    ├── ConfigError            settings: unknown key, wrong type, out of range      exit 2
    ├── EnvironmentLacksError  an extra, a device or a file system is missing       exit 4
    ├── WireError              one message; the next one is unharmed
    │   ├── MalformedMessage     bytes do not follow the protocol
    │   └── UnsupportedEncoding  well formed, but a compression we do not read
    ├── DecodeError            one payload; the next one is unharmed
    ├── FileError              one recorded file
    │   ├── NotAnImage           nothing to triage in it: listed, skipped
    │   └── UnreadableFile       should hold frames and cannot be read
    ├── DeviceError            the accelerator is lost
    └── ModelError             weights and card do not fit each other or this program

A message says where, what came, what was expected and the next step.
"""

from __future__ import annotations


class TriageError(Exception):
    """Root of the errors raised on purpose."""


class ConfigError(TriageError):
    """A setting is unknown, of the wrong type or out of range."""


class EnvironmentLacksError(TriageError):
    """Something this machine should have is missing; the message names the remedy."""


class WireError(TriageError):
    """One received message cannot be used; it is counted and passed on."""


class MalformedMessage(WireError):
    """The bytes do not follow the protocol."""


class UnsupportedEncoding(WireError):
    """The message is well formed, but its compression or pixel type is not one we read."""


class DecodeError(TriageError):
    """A compressed payload does not decode to the frame it claims to hold."""


class FileError(TriageError):
    """One recorded file cannot be used."""


class NotAnImage(FileError):
    """The file holds nothing to triage; it is listed in the report and skipped."""


class UnreadableFile(FileError):
    """The file should hold frames and cannot be read."""


class DeviceError(TriageError):
    """The accelerator failed; frames go on unscored."""


class ModelError(TriageError):
    """Weights, card and input recipe do not belong together."""
