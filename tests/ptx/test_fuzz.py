"""Random calls, as compiled code, against the references."""

import pytest

from tests.ptx.fuzz import fuzz


@pytest.mark.slow
def test_ten_minutes_of_random_calls():
    count, failures = fuzz(seed=1, seconds=600)
    assert count
    assert not failures
