"""From scores to verdicts, and from verdicts to what is done with a frame.

The policy knows nothing of bytes, sockets or networks. Its invariant: only a score vetoes, and
a frame without one is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field

from triage.errors import ConfigError
from triage.records import Frame, Override, Reason, Scores, Verdict

__all__ = ["Policy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Thresholds and mode of one run.

    Attributes:
        mode: ``shadow`` forwards everything, ``enforce`` drops what is vetoed.
        p_blank_veto: frames with ``p_blank`` at or above it are vetoed; 0..1.
        audit_fraction: share of vetoed frames that ``enforce`` forwards all the same; 0..1.
        all_heads: run the full exit on vetoed frames too.
        policy_id: 8 hex digits over what decides a verdict, so that equal rules have equal names.
    """

    mode: str = "shadow"
    p_blank_veto: float = 1.0
    audit_fraction: float = 0.01
    all_heads: bool = False
    policy_id: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if self.mode not in ("shadow", "enforce"):
            raise ConfigError(f"[policy] mode = {self.mode!r}: expected 'shadow' or 'enforce'")
        for name in ("p_blank_veto", "audit_fraction"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"[policy] {name} = {value!r}: expected 0..1")
        rules = json.dumps({"p_blank_veto": self.p_blank_veto}, sort_keys=True)
        object.__setattr__(self, "policy_id", hashlib.sha256(rules.encode()).hexdigest()[:8])

    def judge(self, frame: Frame, scores: Scores) -> tuple[Verdict, Reason]:
        """The verdict on one frame, the same in every mode.

        A frame unlike anything trained on (``ood``) is kept whatever its score, and so is one whose
        score is provisional: :meth:`wants_full_exit` then sends it on to the full exit.
        """
        if frame.fault is not None:
            return Verdict.KEEP, frame.fault
        if frame.series.is_rotation:
            return Verdict.KEEP, Reason.ROTATION
        if not math.isfinite(scores.p_blank):
            return Verdict.KEEP, Reason.SCORER_ERROR
        if scores.p_blank >= self.p_blank_veto and not (scores.ood or scores.provisional):
            return Verdict.VETO, Reason.SCORE
        return Verdict.KEEP, Reason.SCORE

    def is_audited(self, frame: Frame) -> bool:
        """Whether a veto of this frame would be forwarded as part of the audit sample.

        The draw is a hash of the frame's identity: the same frame is drawn in every replay,
        and neither order nor neighbours matter.
        """
        if self.audit_fraction <= 0.0:
            return False
        identity = f"{frame.series.series_id}/{frame.series.series_unique_id}/{frame.image_id}"
        digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.audit_fraction * 2.0**64

    def wants_full_exit(self, verdict: Verdict, *, audited: bool) -> bool:
        """Whether the heads of the full exit are worth their time on a frame."""
        return self.all_heads or audited or verdict is Verdict.KEEP

    def dispose(self, verdict: Verdict, *, audited: bool) -> tuple[bool, Override]:
        """What is done with a frame: (forwarded, why a veto is forwarded all the same).

        Args:
            audited: the frame is in the audit sample; see :meth:`is_audited`.
        """
        if verdict is Verdict.KEEP:
            return True, Override.NONE
        if self.mode == "shadow":
            return True, Override.SHADOW
        if audited:
            return True, Override.AUDIT
        return False, Override.NONE
