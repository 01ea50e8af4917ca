"""A pytest plugin that ends the process of a test that hangs: `python -m pytest -p benchmarks.gpu.hung_tests`.

A test that waits for a kernel which never ends cannot be interrupted from Python. So its process prints where it hangs
and exits; pytest-xdist counts the test as failed and runs the others in a new process.
"""

import faulthandler
import os
from collections.abc import Iterator

import pytest

SECONDS = 120  # of a test, its compilations included
STDERR = os.dup(2)  # before pytest captures it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Runs one test under the limit, its fixtures included."""
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=STDERR)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
