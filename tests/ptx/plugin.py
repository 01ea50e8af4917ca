"""A plugin for pytest: runs the tests of kernels as compiled code, where they would be interpreted.

python -m pytest -p tests.ptx.plugin tests/kernels/test_box_loss.py
"""

from collections.abc import Iterator

import pytest

from tests.ptx.launch import emulated


@pytest.fixture(autouse=True)
def _every_launch_emulated() -> Iterator[None]:
    with emulated():
        yield
