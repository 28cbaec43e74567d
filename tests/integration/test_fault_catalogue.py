"""Each fault of the catalogue over real sockets: all accounted for, the next series whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_list import CATALOGUE, run_fault

NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if fault.slow else name
    for name, fault in CATALOGUE.items()
]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_loses_nothing_that_was_not_decided(tmp_path: Path, name: str) -> None:
    """What the writer saw, the journal and the gaps are together what was sent, and no drop is
    without a scored veto."""
    fault = CATALOGUE[name]
    account = run_fault(fault, tmp_path)
    assert fault.shortcomings(account) == [], account
