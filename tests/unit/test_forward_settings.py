"""[forward]: what the keys turn into, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest

from triage.config import load_settings
from triage.errors import ConfigError

ONE = {"forward.endpoint": "tcp://127.0.0.1:31003"}
TWO = {"forward.endpoint": "tcp://127.0.0.1:31003, tcp://127.0.0.1:31013"}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({**ONE, "forward.tee": True, "policy.mode": "enforce"}, "mode"),
        ({**ONE, "forward.tee": True, "forward.vetoed": "placeholder"}, "vetoed"),
        ({**ONE, "forward.tee": True, "forward.verdict": "user_data"}, "verdict"),
        ({"forward.tee": True}, "endpoint"),
        ({**TWO, "forward.tee": True}, "distribute"),
        ({**TWO, "forward.distribute": "lane"}, "2 writers"),
        ({**ONE, "forward.distribute": "fan"}, "distribute"),
        ({**ONE, "forward.vetoed": "blank"}, "vetoed"),
        ({**ONE, "forward.writer_timeout_s": -1}, "writer_timeout_s"),
        (
            {**ONE, "forward.distribute": "lane", "source.protocol": "slsdetector"},
            "slsdetector",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], names: str) -> None:
    """The message says what came and what was expected."""
    with pytest.raises(ConfigError, match=names) as caught:
        load_settings(None, settings)
    assert "expected" in str(caught.value) or "Input should be" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {**ONE, "forward.tee": True},
        {
            **TWO,
            "forward.tee": True,
            "forward.distribute": "lane",
            "source.endpoint": "tcp://127.0.0.1:5500,tcp://127.0.0.1:5501",
        },
        {**TWO, "policy.mode": "enforce", "forward.vetoed": "placeholder"},
        {**ONE, "forward.verdict": "user_data", "policy.mode": "enforce"},
    ],
)
def test_settings_that_go_together_are_taken(settings: dict[str, Any]) -> None:
    """One writer or several, each with what it allows."""
    assert load_settings(None, settings).forward.endpoint == settings["forward.endpoint"]
