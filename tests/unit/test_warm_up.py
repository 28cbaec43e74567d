"""What a run compiles before its first frame."""

from __future__ import annotations

import numpy as np
import pytest

from triage.backends import open_backend
from triage.cli.assembly import _empty_chunk
from triage.records import Frame, Series


@pytest.mark.parametrize("kind", ["u1", "<u2", "<u4"])
def test_the_frames_of_the_warm_up_are_read(kind: str) -> None:
    """Sound chunks of nothing but valid zeros: what fails early compiles little."""
    dtype = np.dtype(kind)
    payload = _empty_chunk(64 * 64 * dtype.itemsize)
    frame = Frame(
        series=Series(), image_id=0, encoding="bslz4", dtype=dtype, shape=(64, 64), payload=payload
    )
    backend = open_backend("cpu")
    assert not backend.decode(frame).any()
    views = backend.prepare([frame])
    assert views.errors == (None,)
    assert int(views.count.sum()) == 64 * 64
