"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil

import pytest

import retina_fast
from retina_fast.kernels import levels

MODULES = [module.name for module in pkgutil.walk_packages(retina_fast.__path__, "retina_fast.")]
KERNELS = [
    f"retina_fast.kernels.{module.name}" for module in pkgutil.iter_modules([levels.__file__.rpartition("/")[0]])
]


@pytest.mark.parametrize("name", MODULES + KERNELS)
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0
