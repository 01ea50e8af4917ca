"""Every example in a docstring runs, and what a user imports has one."""

import doctest
import enum
import importlib
import inspect
import linecache
import pkgutil

import pytest

import retina_fast
from retina_fast import ops
from retina_fast.kernels import levels

MODULES = [module.name for module in pkgutil.walk_packages(retina_fast.__path__, "retina_fast.")]
KERNELS = [
    f"retina_fast.kernels.{module.name}" for module in pkgutil.iter_modules([levels.__file__.rpartition("/")[0]])
]
SLOW = {"retina_fast.deploy.export.write"}  # traces a whole detector, as tests/deploy/export/test_export.py does


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODULES + KERNELS]
)
def test_examples(name):
    linecache.clearcache()  # doctest looks at each file in it, for each example
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize("module", [retina_fast, ops], ids=lambda module: module.__name__)
def test_what_a_user_imports_has_an_example(module):
    """Except results, torchvision's weights, and builders whose docstring refers to another builder's."""
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.ismodule(thing) or (inspect.isclass(thing) and issubclass(thing, (tuple, enum.Enum))):
            continue
        text = inspect.getdoc(thing) or ""
        assert ">>>" in text or "The arguments are those of" in text, name
