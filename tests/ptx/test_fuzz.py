"""A minute of random calls, as compiled code, against the references."""

import pytest

from tests.ptx.fuzz import fuzz


@pytest.mark.slow
def test_random_calls():
    count, failures = fuzz(seed=1, seconds=60)
    assert count
    assert not failures
