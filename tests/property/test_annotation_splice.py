"""Messages of any content: what is written into them can be taken out, and nothing breaks."""

from __future__ import annotations

from typing import Any

import cbor2
from hypothesis import given, settings
from hypothesis import strategies as st

from triage.annotation import Annotator
from triage.errors import WireError
from triage.records import Decision, Message, MessageKind, Override, Reason, Scores, Verdict

BOTH = Annotator(verdicts=True, placeholders=True)
DECISION = Decision(
    series_id=1,
    series_unique_id="",
    image_id=0,
    file="",
    frame=-1,
    ordinal=0,
    verdict=Verdict.KEEP,
    reason=Reason.SCORE,
    forwarded=True,
    override=Override.NONE,
    scores=Scores(p_blank=0.25),
    model_id="m",
    policy_id="p",
    latency_us=1.0,
)
MAGIC = b"\xd9\xd9\xf7"

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=300)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)
messages = st.dictionaries(
    st.sampled_from(["type", "data", "user_data", "image_id", "x"]) | st.text(max_size=4),
    values,
    min_size=1,
    max_size=30,
)


def image(*parts: bytes) -> Message:
    return Message(kind=MessageKind.IMAGE, parts=parts)


@settings(max_examples=150, deadline=None)
@given(messages, st.booleans(), st.booleans())
def test_what_is_written_can_be_taken_out(
    fields: dict[str, Any], magic: bool, open_ended: bool
) -> None:
    """Every key has its value, in its place; user_data holds the old value beside ours."""
    body = cbor2.dumps(fields)
    if open_ended and len(fields) < 24:
        body = b"\xbf" + body[1:] + b"\xff"
    (went,) = BOTH.kept(image(MAGIC * magic + body), DECISION).parts
    assert (went[:3] == MAGIC) is magic
    now = cbor2.loads(went[3 * magic :])
    told = now.pop("user_data")
    assert told["triage"]["p_blank"] == 0.25
    before = dict(fields)
    assert ("user_data" in told) is ("user_data" in before)
    assert told.get("user_data") == before.pop("user_data", None)
    assert now == before
    assert list(now) == list(before)
    size = len(went) - len(body) - 3 * magic
    assert size < 300


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.binary(max_size=60)
        | st.builds(lambda f, n: cbor2.dumps(f)[:n], messages, st.integers(0, 400))
        | st.sampled_from(
            [b"{", b'{"htype": "dimage-1.0"}', b'{"jsonversion": 5}', b"{}", b"[1]", b'{"a": NaN}']
        ),
        min_size=1,
        max_size=6,
    )
)
def test_no_message_breaks_the_writing(parts: list[bytes]) -> None:
    """A kept image always goes on; of a dropped one there is a placeholder or a refusal."""
    kept = BOTH.kept(image(*parts), DECISION)
    assert len(kept.parts) in (len(parts), 5)
    try:
        small = BOTH.placeholder(image(*parts), DECISION)
    except WireError:
        return
    assert any(b"SKIPPED" in part for part in small.parts)
