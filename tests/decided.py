"""Decisions as a live run makes them, for tests of what keeps or counts them."""

from __future__ import annotations

from typing import Any

from triage.records import NOT_SCORED, Decision, Frame, Override, Reason, Verdict

__all__ = ["decided"]


def decided(frame: Frame, *, forwarded: bool = True, **other: Any) -> Decision:
    """Keep what is forwarded and veto what is not, without a score; ``other`` fields replace."""
    fields: dict[str, Any] = {
        "series_id": frame.series.series_id,
        "series_unique_id": frame.series.series_unique_id,
        "image_id": frame.image_id,
        "file": "",
        "frame": -1,
        "ordinal": frame.ordinal,
        "verdict": Verdict.KEEP if forwarded else Verdict.VETO,
        "reason": Reason.SCORE,
        "forwarded": forwarded,
        "override": Override.NONE,
        "scores": NOT_SCORED,
        "model_id": "",
        "policy_id": "",
        "latency_us": 0.0,
    }
    return Decision(**{**fields, **other})
