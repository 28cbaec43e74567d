"""Settings: where they come from, what is refused, and that the file in deploy/ is right."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from triage.config import Settings, load_settings, origins
from triage.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that say where the tests find other programs begin as settings do."""
    for name in [name for name in os.environ if name.startswith("TRIAGE_")]:
        monkeypatch.delenv(name)


def test_the_safe_defaults() -> None:
    """Shadow, loopback, and the figures of the design."""
    s = load_settings()
    assert s.policy.mode == "shadow"
    assert s.policy.audit_fraction == 0.01
    assert s.pipeline.deadline_ms == 500
    assert s.pipeline.queue_bytes == 2 << 30
    assert "127.0.0.1" in s.source.endpoint
    assert s.metrics.host == "127.0.0.1"


def test_flags_beat_variables_beat_the_file_beat_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer is asked in turn, and `config show` can say which answered."""
    file = tmp_path / "t.toml"
    file.write_text("[pipeline]\ndeadline_ms = 100\nbatch_size = 2\nbatch_wait_ms = 1.0\n")
    monkeypatch.setenv("TRIAGE_PIPELINE__BATCH_SIZE", "3")
    monkeypatch.setenv("TRIAGE_PIPELINE__BATCH_WAIT_MS", "2.5")
    flags = {"pipeline.batch_wait_ms": 4.0}
    s = load_settings(file, flags).pipeline
    assert (s.deadline_ms, s.batch_size, s.batch_wait_ms) == (100, 3, 4.0)
    where = origins(file, flags)
    assert where["pipeline.deadline_ms"] == str(file)
    assert where["pipeline.batch_size"] == "TRIAGE_PIPELINE__BATCH_SIZE"
    assert where["pipeline.batch_wait_ms"] == "flag"
    assert where["policy.mode"] == "default"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[policy]\nmodee = 'shadow'", "did you mean mode"),
        ("[polices]\nmode = 'shadow'", "did you mean policy"),
        ("[policy]\nmode = 'drop'", r"\[policy\] mode = 'drop'"),
        ("[policy]\np_blank_veto = 1.3", r"p_blank_veto = 1.3"),
        ("[pipeline]\ndeadline_ms = 'soon'", "deadline_ms = 'soon'"),
        ("mode = 'shadow'", "outside a section"),
        ("[policy\n", "expected TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    """File, key, value, and what was expected."""
    file = tmp_path / "t.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as raised:
        load_settings(file)
    assert str(file) in str(raised.value)


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that means nothing would be a setting that is not in force."""
    monkeypatch.setenv("TRIAGE_POLICY__MOOD", "enforce")
    with pytest.raises(ConfigError, match="TRIAGE_POLICY__MOOD"):
        load_settings()


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("TRIAGE_POLICY_MODE", "TRIAGE_POLICY__MODE"),
        ("TRIAGE_POLICYMODE", "TRIAGE_POLICY__MODE"),
        ("triage_policy__mode", "TRIAGE_POLICY__MODE"),
        ("TRIAGE_PIPELINE_DEADLINE_MS", "TRIAGE_PIPELINE__DEADLINE_MS"),
        ("TRIAGE_OUTPUT_DIR", "TRIAGE_OUTPUT__DIRECTORY"),
        ("TRIAGE_POLCY_MODE", "TRIAGE_POLICY__MODE"),
        ("TRIAGE_METRICS_PORT", "TRIAGE_METRICS__PORT"),
    ],
)
def test_a_variable_that_is_nearly_a_setting_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, meant: str
) -> None:
    """It would not be read, and whoever set it counts on it."""
    monkeypatch.setenv(variable, "enforce")
    with pytest.raises(ConfigError, match=f"{variable}.*did you mean {meant}"):
        load_settings()


def test_other_variables_are_named_and_harm_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither those of other programs, nor what Kubernetes sets for services called triage and
    triage-metrics, which is not even named."""
    for variable, value in (
        ("TRIAGE_SITE", "i04"),
        ("TRIAGE_PEER_PYTHON", "python"),
        ("TRIAGE_PORT", "tcp://10.0.0.1:9309"),
        ("TRIAGE_SERVICE_HOST", "10.0.0.1"),
        ("TRIAGE_SERVICE_PORT_METRICS", "9309"),
        ("TRIAGE_METRICS_PORT_9309_TCP_ADDR", "10.0.0.1"),
        ("TRIAGE_METRICS_PORT", "tcp://10.0.0.1:9309"),
        ("TRIAGE_METRICS_SERVICE_HOST", "10.0.0.1"),
    ):
        monkeypatch.setenv(variable, value)
    assert load_settings() == Settings()
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["TRIAGE_SITE"]


def test_the_file_in_deploy_has_every_key_at_its_default() -> None:
    """What `config init` writes changes nothing and leaves nothing out."""
    text = (ROOT / "deploy" / "triage.toml").read_text()
    written = tomllib.loads(text)
    defaults = Settings().model_dump()
    # Keys whose default is "unset" stand there as comments.
    for section, key in (("policy", "p_blank_veto"), ("geometry", "rotation_increment_deg")):
        assert f"# {key} = " in text
        assert defaults[section].pop(key) is None
    assert written == defaults
