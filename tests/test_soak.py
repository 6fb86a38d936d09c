"""The soak test, in short; ``make soak`` is the long one."""

from __future__ import annotations

import pytest

from tests.soak import soak


@pytest.mark.slow
def test_a_disturbed_run_ends_as_the_quiet_one(tmp_path):
    outcome = soak(tmp_path, iterations=16, kills=1, signals=1, faults=1, early=1)
    print(outcome)
    assert outcome.differences == []
    assert outcome.disturbances.total() == 4
    assert outcome.file_growth <= 0
