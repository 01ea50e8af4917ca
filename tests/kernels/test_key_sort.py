"""Sorting of keys as compiled code."""

import pytest

from tests.ptx.cases import OTHER_ORDERS, check, names


@pytest.mark.parametrize("name", names("key_sort"))
def test_compiled(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("order", OTHER_ORDERS)
@pytest.mark.parametrize("name", names("key_sort"))
def test_compiled_in_other_orders(name, order):
    check(name, **OTHER_ORDERS[order])
