"""What all tests share: the folder of recordings beside the repository, and settled chance."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("settled", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("settled")

_SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """``../shared``, with recorded wire messages and real frames."""
    if not (_SHARED / "samples").is_dir():
        pytest.skip("needs the folder ../shared beside the repository")
    return _SHARED
